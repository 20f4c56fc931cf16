"""``qwen-pipeline evidence``: what is known of each module of a quantized checkpoint."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qwen_pipeline.cli.results import CommandResult, command

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from rich.table import Table

    from qwen_pipeline.quantization.evidence import Evidence

app = typer.Typer()
WORST = 20


@command(
    app,
    "evidence",
    examples=["qwen-pipeline evidence quantized/", "qwen-pipeline evidence quantized/ --before earlier/ --json"],
)
def evidence(
    quantized: Path,
    before: Annotated[Path | None, typer.Option(help="An earlier quantized checkpoint to compare losses with.")] = None,
) -> CommandResult:
    """Show each module's loss, damping, odd groups, time and memory, worst losses first.

    The whole table is logs/evidence.csv of the checkpoint, the plot logs/evidence.png.
    """
    from dataclasses import asdict

    from qwen_pipeline.quantization.evidence import compare_evidence, load_evidence, summarize

    rows = load_evidence(quantized)
    summary = summarize(rows)
    data: dict[str, Any] = {"summary": summary, "modules": [asdict(row) for row in rows]}
    view: list[Any] = [_module_table(rows), _summary_line(summary)]
    if before:
        found = compare_evidence(load_evidence(before), rows)
        data["comparison"] = asdict(found)
        view.append(_comparison_table(found.worst))
        view.append(
            f"Losses of {found.modules} modules: {found.mean_ratio or 1:.4f} times those before (geometric mean)."
        )
    return CommandResult(data=data, view=view)


def _module_table(rows: "Sequence[Evidence]") -> "Table":
    from rich.table import Table

    table = Table("module", "loss", "damping", "tokens", "zero groups", "saturated", "seconds", "GPU", "host")
    worst = sorted(rows, key=lambda row: (row.loss is not None, -(row.loss or 0)))[:WORST]
    for row in worst:
        loss = "rounded" if row.rounded else "not finite" if row.loss is None else f"{row.loss:.3g}"
        zero, saturated = (f"{100 * count / row.groups:.2f} %" for count in (row.zero_groups, row.saturated_groups))
        seconds = "" if row.seconds is None else f"{row.seconds:.2f}"
        memory = (
            "" if not nbytes else f"{nbytes / 2**30:.2f} GiB" for nbytes in (row.gpu_peak_bytes, row.host_peak_bytes)
        )
        table.add_row(row.module, loss, f"{row.damp:g}", f"{row.tokens:,}", zero, saturated, seconds, *memory)
    return table


def _summary_line(summary: "Mapping[str, Any]") -> str:
    return (
        f"{summary['modules']} modules, {summary['fallbacks']} rounded, solved in {summary['solver_seconds']:.1f} s."
        f" Of {summary['groups']:,} groups {summary['zero_groups']:,} are zero and {summary['saturated_groups']:,}"
        " saturated."
    )


def _comparison_table(worst: "Mapping[str, float]") -> "Table":
    from rich.table import Table

    table = Table("module", "loss now / before")
    for module, ratio in worst.items():
        table.add_row(module, f"{ratio:.3f}")
    return table
