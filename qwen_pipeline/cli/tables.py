"""Tables of artifacts, checks, statuses and sizes, and their JSON values."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Group
from rich.table import Column, Table
from rich.text import Text

from qwen_pipeline.checkpoint.store.destinations import Artifact
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
_STATE_STYLES = {"done": "green", "failed": "bold red", "damaged": "bold red", "stale": "yellow", "missing": "dim"}


def size(nbytes: int) -> str:
    """Return a number of bytes in GB or MB."""
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:.1f} MB"


def artifact_data(artifact: Artifact) -> dict[str, Any]:
    """Return an artifact as JSON values."""
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
    """Return a table with a row for each fine-tune (or import) and the state of every stage."""
    stages = list(statuses[0].stages)
    table = Table(title, *stages, "remark")
    for status in statuses:
        states = [status.stages[stage].state for stage in stages]
        table.add_row(status.name, *(Text(state, style=_STATE_STYLES[state]) for state in states), Text(status.remark))
    return table


def status_data(statuses: Sequence["FineTuneStatus"]) -> list[dict[str, Any]]:
    """Return the status of each fine-tune (or import) as JSON values."""
    return [
        {
            "name": status.name,
            "remark": status.remark or None,
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
        for number, size in enumerate(row.sizes):
            before, after = (f"{groups:g}" for groups in size.groups_per_rank)
            table.add_row(
                str(row.degree) if not number else "",
                size.field.removesuffix("intermediate_size").rstrip("_") or "mlp",
                f"{size.live:,}",
                f"{size.target:,}",
                f"{size.extra_percent:.2f} %",
                f"{before} -> {after}" if size.live != size.target else before,
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


def repair_table(plan: "PadPlan") -> Table:
    """Return a table with a row for each size and the groups that a repair adds."""
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
