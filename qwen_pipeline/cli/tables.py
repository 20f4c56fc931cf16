"""Tables: what was made, what was checked, where everything stands."""

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Group
from rich.table import Column, Table
from rich.text import Text

from qwen_pipeline.checkpoint.store.destinations import Artifact
from qwen_pipeline.errors import CheckFailed
from qwen_pipeline.reports import CheckReport, load_reports, shown

if TYPE_CHECKING:  # no command waits for what only another shows
    from qwen_pipeline.evaluation.regression import Change
    from qwen_pipeline.qwen.geometry import PadPlan
    from qwen_pipeline.qwen.tensor_parallel.feasibility import DegreeFeasibility
    from qwen_pipeline.status import FineTuneStatus


def artifact_data(artifact: Artifact) -> dict[str, Any]:
    """An artifact for machines."""
    manifest = artifact.manifest
    return {
        "stage": manifest.derivation.stage,
        "path": str(artifact.path),
        "content_digest": manifest.content_digest,
        "bytes": manifest.contents.nbytes,
        "seconds": manifest.run.seconds,
        "peak_memory_bytes": manifest.run.peak_memory_bytes,
        "added_memory_bytes": manifest.run.added_memory_bytes,
        "reused": artifact.reused,
        "inputs": dict(manifest.derivation.inputs),
        "checks": list(manifest.result.get("checks", ())),
    }


def artifact_table(artifacts: Iterable[Artifact], perplexity: Mapping[str, float] | None = None) -> Table:
    """What was made, with the perplexity of each stage's model where it is known."""
    table = Table("stage", "size", "digest", "seconds", "peak memory", "added by it", "perplexity", "")
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
            "was there" if artifact.reused else "new",
        )
    return table


def check_table(artifacts: Sequence[Artifact]) -> Group:
    """The verdicts, and below them in words whatever did not pass."""
    table = Table("stage", Column("check", no_wrap=True), "verdict", "measured", "limit")
    remarks: list[Text] = []
    for artifact in artifacts:
        stage = artifact.manifest.derivation.stage
        for report in load_reports(artifact.manifest.result):
            table.add_row(stage, report.name, verdict(report), *report.figures)
            if not report.passed:
                remarks.append(Text.assemble(verdict(report), f" {stage} {report.name}: {report.detail}"))
    return Group(table, *remarks)


def verdict(report: CheckReport) -> Text:
    if report.skipped:
        return Text("skipped", style="dim")
    if report.passed:
        return Text("passed", style="green")
    return Text("FAILED", style="bold red") if report.blocks else Text("warning", style="yellow")


def size(nbytes: int) -> str:
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:.1f} MB"


def blocking_failure(artifacts: Iterable[Artifact]) -> CheckFailed | None:
    """The first check that stops the pipeline, as a fault."""
    for artifact in artifacts:
        for report in load_reports(artifact.manifest.result):
            if report.blocks:
                return CheckFailed(f"The check {report.name} failed: {report.detail}", remedy=f"Read {artifact.path}.")
    return None


_COLORS = {"done": "green", "failed": "bold red", "damaged": "bold red", "stale": "yellow", "missing": "dim"}


def status_table(found: Sequence["FineTuneStatus"], what: str = "fine-tune") -> Table:
    """How far each fine-tune, or each of whatever has the same stages, is."""
    stages = list(found[0].stages)
    table = Table(what, *stages, "remark")
    for fine_tune in found:
        states = [fine_tune.stages[stage].state for stage in stages]
        table.add_row(fine_tune.name, *(Text(state, style=_COLORS[state]) for state in states), Text(fine_tune.remark))
    return table


def status_data(found: Sequence["FineTuneStatus"]) -> list[dict[str, Any]]:
    return [
        {
            "name": fine_tune.name,
            "remark": fine_tune.remark or None,
            "stages": {
                stage: {"state": stands.state, **(artifact_data(stands.artifact) if stands.artifact else {})}
                for stage, stands in fine_tune.stages.items()
            },
        }
        for fine_tune in found
    ]


def feasibility_table(rows: Sequence["DegreeFeasibility"], group_size: int) -> Table:
    """What each degree means for each size; a row of the table is a size at a degree."""
    table = Table("TP", "size", "width", "padded", "extra", f"groups of {group_size} per rank", "what happens")
    for row in rows:
        for number, at in enumerate(row.sizes):
            before, after = (f"{groups:g}" for groups in at.groups_per_rank)
            table.add_row(
                str(row.degree) if not number else "",
                at.field.removesuffix("intermediate_size").rstrip("_") or "mlp",
                f"{at.live:,}",
                f"{at.target:,}",
                f"{at.extra_percent:.2f} %",
                f"{before} -> {after}" if at.live != at.target else before,
                Text(row.sentence, style="" if row.legal else "red") if not number else "",
            )
    return table


def change_table(changes: Sequence["Change"]) -> Table:
    table = Table("quantized model", "before", "now", "change")
    for change in changes:
        relative = f"{change.now / change.before - 1:+.2%}" if change.before else ""
        table.add_row(change.figure, shown(change.before), shown(change.now), relative)
    return table


def repair_table(plan: "PadPlan") -> Table:
    """What a repair adds to each size, in groups."""
    ranks = plan.tensor_parallel
    table = Table("size", "width", "repaired", "extra", f"groups of {plan.group_size}", f"on each of {ranks} ranks")
    for size in plan.sizes:
        before, after = (width / size.group_size for width in (size.live, size.padded))
        table.add_row(
            size.field,
            f"{size.live:,}",
            f"{size.padded:,}",
            f"{100 * size.zeros / size.live:.2f} %",
            "" if size.of_tower else f"{before:g} -> {after:g}",
            f"{before / ranks:g} -> {after / ranks:g}" + " channels" * size.of_tower,
        )
    return table
