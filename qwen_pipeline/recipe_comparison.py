"""The recipes of one fine-tune beside each other: size, divergence, scores, and what serves each."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from qwen_pipeline.checkpoint.manifest import Manifest
from qwen_pipeline.checkpoint.store.destinations import CheckpointStore
from qwen_pipeline.checkpoint.store.products import Product, product
from qwen_pipeline.errors import InputRefused
from qwen_pipeline.evaluation.figures import ModelFigures
from qwen_pipeline.evaluation.findings import MERGED, QUANTIZED
from qwen_pipeline.evaluation.report.load import ValidationReport, load_validation
from qwen_pipeline.evaluation.report.rejudge import ReportedFindings
from qwen_pipeline.evaluation.tensor_parallel.findings import Target, TargetFindings
from qwen_pipeline.reports import shown
from qwen_pipeline.stages import quantize, validate

COLUMNS: Mapping[str, str] = {
    "recipe": "The recipe's name in the settings.",
    "format": "What the recipe makes of the linear layers.",
    "MB": "Size of all tensors, and its share of the merged model's.",
    "perplexity": "On the held-out text.",
    "KL mean": "KL(merged || quantized) in nats per token, of language models.",
    "KL 99.9 %": "Its 99.9th percentile.",
    "agreement": "Share of tokens, or of labels, that the merged model predicts too; the cosine of embeddings.",
    "tasks": "Scores in benchmark tasks.",
    "serves on": "Engines and ranks by their rules and simulated ranks, and engines that answered.",
    "outcome": "The checks that prevent a release.",
    "text": "Digest of the held-out text: figures are comparable if it is the same.",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class RecipeRow:
    """The last validation of one product, and the manifest of what it measured, if that is still known."""

    product: Product
    report: ValidationReport
    quantized: Manifest | None

    @property
    def cells(self) -> dict[str, str]:
        """The row under :data:`COLUMNS`."""
        findings = self.report.findings
        model, sizes = findings.models[QUANTIZED], findings.nbytes
        share = f" ({sizes[QUANTIZED] / sizes[MERGED]:.0%})" if sizes.get(MERGED) else ""
        divergence, blocking = model.divergence, self.report.blocking
        values = (
            self.product.mark.removeprefix("@"),
            _format(self.quantized),
            f"{sizes[QUANTIZED] / 1e6:,.1f}{share}",
            shown(model.perplexity),
            shown(divergence.mean if divergence else None),
            shown(divergence.p99_9 if divergence else None),
            _agreement(model),
            ", ".join(f"{score.name} {shown(score.quantized)}" for score in findings.tasks),
            _serves_on(findings),
            f"fails {', '.join(check.name for check in blocking)}" if blocking else "may be released",
            self.report.text.removeprefix("sha256:")[:12],
        )
        return dict(zip(COLUMNS, values, strict=True))


def recipe_rows(store: CheckpointStore, fine_tune: str) -> list[RecipeRow]:
    """Return the last validation of each product of a fine-tune, the default recipe first.

    Raises:
        InputRefused: None of its products has been validated.
        CheckpointRefused: A validation is damaged.
    """
    keys = sorted(each.key for each in store.products((validate.STAGE,), fine_tune))
    rows = [row for key in keys if (row := _row(store, key))]
    if not rows:
        raise InputRefused(
            f"Nothing of {fine_tune!r} is validated below {store.root}.",
            remedy=f"Run it first: qwen-pipeline run {fine_tune}; or pass two validations or releases to compare.",
        )
    return rows


def comparable(rows: Sequence[RecipeRow]) -> bool:
    """Return whether all rows were measured on the same text."""
    return len({row.report.text for row in rows}) == 1


def _row(store: CheckpointStore, key: str) -> RecipeRow | None:
    validated = store.latest(validate.STAGE, key)
    if validated is None or validated.manifest.derivation.code_version != validate.CODE_VERSION:
        return None
    report = load_validation(validated.path, validated.manifest)
    made = [*store.finished(quantize.STAGE, key), *filter(None, [store.last_dropped(quantize.STAGE, key)])]
    manifests = (each.manifest for each in made if each.manifest.content_digest == report.candidate)
    return RecipeRow(product=product(key), report=report, quantized=next(manifests, None))


def _format(manifest: Manifest | None) -> str:
    """Return the format of a quantized checkpoint, from the spec that made it."""
    if manifest is None:
        return ""
    spec = manifest.derivation.spec
    if (method := str(spec.get("method", "gptq"))) != "gptq":
        return method
    others = " mixed" if spec.get("modules") or spec.get("precision", "uniform") != "uniform" else ""
    return f"int{spec['bits']} g{spec['group_size']}{others}"


def _agreement(model: ModelFigures) -> str:
    if model.divergence:
        return f"{model.divergence.top1_agreement:.2%}"
    head = model.head
    values = (head.agreement, head.order, head.cosine) if head else ()
    return shown(next((value for value in values if value is not None), None))


def _serves_on(findings: ReportedFindings) -> str:
    kernels: dict[Target, list[TargetFindings]] = {}
    for row in findings.targets:
        kernels.setdefault(row.target, []).append(row)
    by_engine: dict[str, list[str]] = {}
    for target, rows in kernels.items():
        if not any(row.answers_wrongly for row in rows) and not all(row.refuses for row in rows):
            by_engine.setdefault(target.engine, []).append(str(target.degree))
    simulated = [f"{engine}: {', '.join(degrees)}" for engine, degrees in by_engine.items()]
    answered = [
        f"{served.engine}: {served.degree} (answered)"
        for served in findings.served
        if served.role == QUANTIZED and served.ready and not served.fault
    ]
    return "; ".join([*simulated, *answered]) or "none"
