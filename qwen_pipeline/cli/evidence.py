"""``qwen-pipeline evidence``: the figures of each module of a quantized checkpoint."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qwen_pipeline.cli.results import CommandResult, command

if TYPE_CHECKING:
    from collections.abc import Mapping

    import pandas as pd
    from rich.table import Table

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
    """Show each module's loss, damping, zero and saturated groups, time and memory, highest losses first.

    The complete table is logs/evidence.csv in the checkpoint, and the plot is logs/evidence.png.
    """
    from dataclasses import asdict

    from qwen_pipeline.quantization.evidence import compare_evidence, load_evidence, summarize, to_frame

    rows = load_evidence(quantized)
    summary = summarize(rows)
    data: dict[str, Any] = {"summary": summary, "modules": [asdict(row) for row in rows]}
    view: list[Any] = [_module_table(to_frame(rows)), _summary_line(summary)]
    if before:
        comparison = compare_evidence(load_evidence(before), rows)
        data["comparison"] = asdict(comparison)
        view.append(_comparison_table(comparison.worst))
        view.append(
            f"Losses of {comparison.modules} modules: {comparison.mean_ratio or 1:.4f} times those before"
            " (geometric mean)."
        )
    return CommandResult(data=data, view=view)


def _module_table(frame: "pd.DataFrame") -> "Table":
    from rich.table import Table

    table = Table("module", "loss", "damping", "tokens", "zero groups", "saturated", "seconds", "GPU", "host")
    worst = frame.sort_values("loss", ascending=False, na_position="first", kind="stable").head(WORST)
    for module, row in worst.astype(object).where(worst.notna(), None).iterrows():
        loss = "rounded" if row["rounded"] else "not finite" if row["loss"] is None else f"{row['loss']:.3g}"
        shares = (f"{100 * row[name] / row['groups']:.2f} %" for name in ("zero_groups", "saturated_groups"))
        seconds = "" if row["seconds"] is None else f"{row['seconds']:.2f}"
        peaks = (row[name] for name in ("gpu_peak_bytes", "host_peak_bytes"))
        memory = (f"{nbytes / 2**30:.2f} GiB" if nbytes else "" for nbytes in peaks)
        table.add_row(str(module), loss, f"{row['damp']:g}", f"{row['tokens']:,}", *shares, seconds, *memory)
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
