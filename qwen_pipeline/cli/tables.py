"""Tables of artifacts, checks, statuses and sizes, and their JSON values."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType
from rich.table import Column, Table
from rich.text import Text

from qwen_pipeline.checkpoint.store.destinations import Artifact
from qwen_pipeline.checkpoint.store.products import product
from qwen_pipeline.cli.console import size
from qwen_pipeline.config.assets import Costs
from qwen_pipeline.costs import cost, gpu_seconds
from qwen_pipeline.errors import CheckFailed
from qwen_pipeline.reports import Outcome, dump_reports, load_reports, shown

if TYPE_CHECKING:  # imported only by the commands that show them
    from qwen_pipeline.evaluation.regression import Change
    from qwen_pipeline.qwen.geometry import PadPlan
    from qwen_pipeline.qwen.tensor_parallel.feasibility import DegreeFeasibility
    from qwen_pipeline.status import FineTuneStatus

_OUTCOMES: Mapping[Outcome, Text] = {
    "passed": Text("passed", style="green"),
    "failed": Text("FAILED", style="bold red"),
    "warning": Text("warning", style="yellow"),
    "skipped": Text("skipped", style="dim"),
}
_STATE_STYLES: Mapping[str, str] = {
    **dict.fromkeys(("quarantined", "failed", "damaged"), "bold red"),
    "done": "green",
    "dropped": "dim green",
    "stale": "yellow",
    "missing": "dim",
}


def artifact_data(artifact: Artifact) -> dict[str, Any]:
    """Return an artifact as JSON values."""
    manifest = artifact.manifest
    return {
        "stage": manifest.derivation.stage,
        "path": str(artifact.path),
        "content_digest": manifest.content_digest,
        "bytes": manifest.contents.nbytes,
        "seconds": manifest.run.seconds,
        "gpu_seconds": gpu_seconds(manifest),
        "peak_memory_bytes": manifest.run.peak_memory_bytes,
        "added_memory_bytes": manifest.run.added_memory_bytes,
        "reused": artifact.reused,
        "inputs": dict(manifest.derivation.inputs),
        "checks": dump_reports(load_reports(manifest.result)),
    }


def artifact_table(artifacts: Iterable[Artifact], perplexity: Mapping[str, float] | None = None) -> Table:
    """Return a table with a row for each artifact, and the perplexity of its model if known."""
    table = Table("stage", "size", "digest", "seconds", "peak memory", "added memory", "perplexity", "")
    for artifact in artifacts:
        manifest = artifact.manifest
        table.add_row(
            manifest.derivation.stage,
            size(manifest.contents.nbytes),
            manifest.content_digest.removeprefix("sha256:")[:12],
            f"{manifest.run.seconds:.1f}",
            size(manifest.run.peak_memory_bytes),
            size(manifest.run.added_memory_bytes),
            shown((perplexity or {}).get(manifest.derivation.stage)),
            "reused" if artifact.reused else "new",
        )
    return table


def check_table(artifacts: Sequence[Artifact]) -> Group:
    """Return a table of the checks, the counts of outcomes, and the details of all checks that did not pass."""
    table = Table("stage", Column("check", no_wrap=True), "outcome", "measured", "limit")
    details: list[Text] = []
    counts: Counter[Outcome] = Counter()
    for artifact in artifacts:
        stage = artifact.manifest.derivation.stage
        for report in load_reports(artifact.manifest.result):
            table.add_row(stage, report.name, _OUTCOMES[report.outcome], *report.figures)
            counts[report.outcome] += 1
            if not report.passed:
                details.append(Text.assemble(_OUTCOMES[report.outcome], f" {stage} {report.name}: {report.detail}"))
    summary = ", ".join(f"{counts[outcome]} {outcome}" for outcome in _OUTCOMES if counts[outcome])
    return Group(table, Text(f"{counts.total()} checks: {summary or 'none'}."), *details)


def blocking_failure(artifacts: Iterable[Artifact]) -> CheckFailed | None:
    """Return the first check that stops the pipeline, as an error; None if there is none."""
    for artifact in artifacts:
        for report in load_reports(artifact.manifest.result):
            if report.blocks:
                return CheckFailed(
                    f"The check {report.name} failed: {report.detail}",
                    remedy=f"Correct the cause and run again. The results are in {artifact.path}.",
                )
    return None


def status_table(statuses: Sequence["FineTuneStatus"], title: str = "fine-tune") -> Table:
    """Return a table with a row for each product (or import): the first stage that is not done, and what it needs."""
    has_bases = any(status.base for status in statuses)
    fixed = [Column(name, no_wrap=True) for name in ("stage", "state")]
    table = Table(
        Column(title, overflow="fold"), *(["base"] if has_bases else []), *fixed, Column("remark", overflow="fold")
    )
    for status in statuses:
        stage, state = status.first_open
        found = status.stages[stage]
        remark = status.remark or found.fault or ", ".join(found.failed_checks)
        shown_state = "quarantined" if status.is_quarantined else state
        table.add_row(
            status.name,
            *([status.base] if has_bases else []),
            "" if status.is_quarantined else stage,
            Text(shown_state, style=_STATE_STYLES[shown_state]),
            Text(" ".join(remark.split())),
        )
    return table


def status_data(statuses: Sequence["FineTuneStatus"], prices: Costs) -> list[dict[str, Any]]:
    """Return the status of each product (or import) as JSON values, with what its outputs cost at these prices."""
    return [
        {
            "name": status.name,
            "fine_tune": product(status.name).fine_tune,
            "recipe": product(status.name).recipe,
            "base": status.base or None,
            "quarantined": status.is_quarantined,
            "remark": status.remark or None,
            "cost": cost((each.artifact.manifest for each in status.stages.values() if each.artifact), prices),
            "stages": {
                name: {"state": stage.state, **(artifact_data(stage.artifact) if stage.artifact else {})}
                for name, stage in status.stages.items()
            },
        }
        for status in statuses
    ]


def feasibility_table(rows: Sequence["DegreeFeasibility"], group_size: int) -> Table:
    """Return a table with a row for each size at each tensor-parallel degree."""
    table = Table("TP", "size", "width", "padded", "extra", f"groups of {group_size} per rank", "result")
    for row in rows:
        for number, each in enumerate(row.sizes):
            before, after = (f"{groups:g}" for groups in each.groups_per_rank)
            table.add_row(
                str(row.degree) if not number else "",
                each.field.removesuffix("intermediate_size").rstrip("_") or "mlp",
                f"{each.live:,}",
                f"{each.target:,}",
                f"{each.extra_percent:.2f} %",
                f"{before} -> {after}" if each.live != each.target else before,
                Text(row.sentence, style="" if row.legal else "red") if not number else "",
            )
    return table


def change_table(changes: Sequence["Change"]) -> Table:
    """Return a table with a row for each figure of the quantized model, before and now."""
    table = Table("quantized model", "before", "now", "change")
    for change in changes:
        relative = f"{change.now / change.before - 1:+.2%}" if change.before else ""
        table.add_row(change.figure, shown(change.before), shown(change.now), relative)
    return table


def recipe_table(rows: Sequence[Mapping[str, str]]) -> Table:
    """Return a table with a column for each recipe and a row for each figure."""
    first, *others = rows[0]
    table = Table(first, *(row[first] for row in rows))
    for figure in others:
        table.add_row(figure, *(row[figure] for row in rows))
    return table


def repair_table(plan: "PadPlan") -> Table:
    """Return a table with a row for each size and the groups that a repair adds."""
    ranks = plan.tensor_parallel
    table = Table("size", "width", "repaired", "extra", f"groups of {plan.group_size}", f"on each of {ranks} ranks")
    for each in plan.sizes:
        before, after = (width / each.group_size for width in (each.live, each.padded))
        table.add_row(
            each.field,
            f"{each.live:,}",
            f"{each.padded:,}",
            f"{100 * each.zeros / each.live:.2f} %",
            "" if each.of_tower else f"{before:g} -> {after:g}",
            f"{before / ranks:g} -> {after / ranks:g}" + " channels" * each.of_tower,
        )
    return table


def allocation_view(data: Mapping[str, Any], out: Path) -> list[RenderableType]:
    """Return the uniform candidates beside the choice, the curve, and the modules that differ from the usual."""
    sizes = Table("precision", "GB", "KL, measured", "KL, predicted from parts")
    for each in data["uniform"]:
        sizes.add_row(
            each["precision"], f"{each['bytes'] / 1e9:.3f}", f"{each['kl']:.4g}", f"{each['sum_of_parts']:.4g}"
        )
    sizes.add_row("chosen", f"{data['bytes'] / 1e9:.3f}", f"{data['measured_kl']:.4g}", f"{data['predicted_kl']:.4g}")
    curve = Table("GB", "bits", "KL, predicted")
    for point in data["curve"][:: max(len(data["curve"]) // 10, 1)]:
        curve.add_row(f"{point['bytes'] / 1e9:.3f}", f"{point['bits']:.2f}", f"{point['kl']:.4g}")
    modules = Table("modules", "precision")
    for pattern, word in data["modules"].items():
        modules.add_row(pattern, word)
    return [sizes, curve, modules, f"Usual precision: {data['usual']}. Settings, table and curve: {out}"]
