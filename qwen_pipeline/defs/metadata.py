"""Metadata of materializations: path, digest, size, performance, plots and tables."""

from base64 import b64encode
from collections.abc import Mapping, Sequence
from math import inf, isfinite
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import dagster as dg

from qwen_pipeline.checkpoint.manifest import Manifest
from qwen_pipeline.checkpoint.store.destinations import Artifact, CheckpointStore
from qwen_pipeline.checkpoint.store.products import product
from qwen_pipeline.config import Settings
from qwen_pipeline.config.assets import Costs
from qwen_pipeline.costs import cost, gpu_seconds
from qwen_pipeline.errors import CheckpointRefused, InputRefused
from qwen_pipeline.evaluation.report import markup
from qwen_pipeline.lineage.verification.model_signature import signer_hint
from qwen_pipeline.recipe_comparison import COLUMNS, recipe_rows
from qwen_pipeline.reports import CheckReport, shown

Figure = TypeVar("Figure")


def significant(value: Figure) -> Figure | float:
    """Return a float rounded to four significant digits, and any other value unchanged."""
    return float(f"{value:.4g}") if isinstance(value, float) else value


def directory_metadata(path: Path, digest: str, nbytes: int) -> dict[str, Any]:
    return {
        "path": dg.MetadataValue.path(path),
        "content_digest": digest,
        "size_mb": significant(nbytes / 1e6),
    }


def base_table(settings: Settings, digests: Mapping[str, str]) -> dg.TableMetadataValue:
    """Return a table with a row for each base; ``digests`` has the content digest of each."""
    columns = {
        "base": "Its name in the settings.",
        "model": "Its directory or hub id.",
        "revision": "Its commit, tag or branch.",
        "content_digest": "Part of the identity of everything that is made from it.",
    }
    rows = [
        dg.TableRecord(
            {"base": name, "model": base.model, "revision": base.revision or "", "content_digest": digests[name]}
        )
        for name, base in settings.bases.items()
    ]
    schema = [dg.TableColumn(name, "string", description=text) for name, text in columns.items()]
    return dg.MetadataValue.table(rows, schema=dg.TableSchema(schema))


def artifact_metadata(artifact: Artifact, prices: Costs) -> dict[str, Any]:
    """Describe a finished directory from its manifest: the digests of its inputs, and the signer that it names.

    Dagster draws every number over time and over partitions. Those of a reused directory are from when it was made.
    """
    manifest, run, signer = artifact.manifest, artifact.manifest.run, signer_hint(artifact.path)
    return {
        **directory_metadata(artifact.path, manifest.content_digest, manifest.contents.nbytes),
        "seconds": significant(run.seconds),
        **spent(manifest, prices=prices),
        "gigabytes_per_second": significant(manifest.contents.nbytes / 1e9 / max(run.seconds, 1e-3)),
        "gigabytes_read": significant(run.read_bytes / 1e9),
        "gigabytes_written": significant(run.written_bytes / 1e9),
        "peak_memory_mb": significant(run.peak_memory_bytes / 1e6),
        "added_memory_mb": significant(run.added_memory_bytes / 1e6),
        "reused": artifact.reused,
        "derivation": manifest.derivation.key,
        "inputs": dict(manifest.derivation.inputs),
        "spec": dict(manifest.derivation.spec),
        "environment": dict(run.environment),
        **({"signer": signer} if signer else {}),
    }


def spent(*manifests: Manifest, prices: Costs, of: str = "") -> dict[str, float]:
    """Return the GPU time of making outputs, and the cost if there are prices, under names that begin with ``of``."""
    price = cost(manifests, prices)
    seconds = {f"{of}gpu_seconds": significant(float(sum(map(gpu_seconds, manifests))))}
    return seconds | ({} if price is None else {f"{of}cost": significant(price)})


def measured_metadata(reports: Sequence[CheckReport]) -> dict[str, float]:
    """Return the checks' measurements by their names: Dagster draws metadata of an asset, and none of its checks."""
    numbers = {report.name: report.measured for report in reports if not report.skipped}
    return {
        name: float(significant(number))
        for name, number in numbers.items()
        if isinstance(number, (int, float)) and isfinite(number)
    }


def inline_plot(path: Path) -> str:
    """Return Markdown with the plot embedded, for a browser on another machine."""
    return f"![{path.stem}](data:image/png;base64,{b64encode(path.read_bytes()).decode()})"


def card_markdown(release: Path) -> str:
    """Return the model card of a release without its front matter, which a page would show as a heading."""
    text = (release / "README.md").read_text()
    return text.removeprefix("---\n").partition("\n---\n")[2].strip() or text


def evidence_markdown(quantized: Artifact, previous: Artifact | None) -> str:
    """Return Markdown with the quantization evidence of each layer, compared with any previous version."""
    from qwen_pipeline.quantization.evidence import PLOT, compare_evidence, load_evidence
    from qwen_pipeline.quantization.plot import draw_evidence

    if not (quantized.path / PLOT).is_file():
        return "8-bit floats are rounded to nearest: there are no losses."
    if previous is None:
        return f"There is no earlier version to compare with.\n\n{inline_plot(quantized.path / PLOT)}"
    old, new = load_evidence(previous.path), load_evidence(quantized.path)
    comparison = compare_evidence(old, new)
    with TemporaryDirectory() as scratch:
        draw_evidence(new, Path(scratch) / "evidence.png", before=old)
        plot = inline_plot(Path(scratch) / "evidence.png")
    rows = [(markup.code(module), f"{ratio:.3f}") for module, ratio in comparison.worst.items()]
    table = markup.table(("module", "loss / previous loss"), rows)
    return f"{markup.text(comparison.sentence(previous.path.name))}\n\n{plot}\n\n{table}"


def loss_table(losses: Sequence[Mapping[str, Any]], *, rows: int = 20) -> dg.TableMetadataValue:
    """Return a table of the modules with the highest loss, in descending order. Non-finite losses come first."""
    worst = sorted(losses, key=lambda entry: -inf if entry["loss"] is None else -entry["loss"])[:rows]
    return dg.MetadataValue.table(
        [dg.TableRecord({"module": entry["module"], "loss": shown(entry["loss"]) or "not finite"}) for entry in worst],
        schema=dg.TableSchema(
            [
                dg.TableColumn("module", "string", description="Name of the linear layer."),
                dg.TableColumn("loss", "string", description="Mean squared error that the quantizer reported."),
            ]
        ),
    )


def text_table(rows: Sequence[Mapping[str, str]], columns: Mapping[str, str]) -> dg.TableMetadataValue:
    """Return a table of texts, given its rows and the description of each column."""
    schema = [dg.TableColumn(name, "string", description=text) for name, text in columns.items()]
    return dg.MetadataValue.table([dg.TableRecord(row) for row in rows], schema=dg.TableSchema(schema))


def recipe_metadata(store: CheckpointStore, key: str) -> dict[str, Any]:
    """Return a table of a fine-tune's recipes beside each other, as metadata, if several of them are validated.

    A damaged validation of another recipe is not a fault of this one; ``qwen-pipeline status`` names it.
    """
    try:
        rows = recipe_rows(store, product(key).fine_tune)
    except (InputRefused, CheckpointRefused):
        return {}
    return {"recipes": text_table([row.cells for row in rows], COLUMNS)} if len(rows) > 1 else {}
