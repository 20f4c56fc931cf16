"""Peak memory of merging and padding against the model's size, for this package and other tools in the same run.

``python -m benchmarks.memory`` makes checkpoints with a real model's widths, one after the other, and runs every
contender on each, in its own process, which is observed from outside. A peak is resident memory beyond that of a
process that only imports the same libraries. Results go to ``--out`` after each run, the plot at the end.
"""

import argparse
import json
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.contenders import WHOLE_MODEL_PAD, Contender, make_models, own_commands, peak_of_start, peers, run
from benchmarks.machine import describe_machine
from benchmarks.report import RESULTS, keep
from qwen_pipeline.checkpoint.memory_budget import available_memory

GIB = 2**30
LABEL_STEP = 1.35
"""Ratio between two labels one above the other, on the logarithmic axis."""
PEER_FACTOR = 1.5
"""Multiple of the base's bytes that must be free in memory for tools that load the whole model."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """One checkpoint.

    Attributes:
        widths: As :func:`benchmarks.models.widths_of` takes them.
        no_peers: Why other tools are left out; empty if they are not.
    """

    widths: str
    layers: int
    no_peers: str = ""

    @property
    def name(self) -> str:
        return f"{self.widths}, {self.layers} layer{'s' if self.layers > 1 else ''}"


SIZES = (
    Size(widths="7b", layers=3),
    Size(widths="7b", layers=12),
    Size(
        widths="8gib-embedding",
        layers=1,
        no_peers="the update of that one tensor is 17 GB in PEFT's float32",
    ),
)


def main(arguments: Sequence[str] | None = None) -> None:
    options = _arguments(arguments)
    options.scratch.mkdir(parents=True)
    try:
        report = measure(options)
    finally:
        shutil.rmtree(options.scratch)
    draw(report, options.out / "memory.png")
    print(markdown(report))


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Run every contender on every size and return all peaks, written after each run."""
    scratch = options.scratch.resolve()
    others, skipped = peers(options.degree, scratch, skip=[*options.skip, WHOLE_MODEL_PAD])
    skipped.pop(WHOLE_MODEL_PAD)
    report: dict[str, Any] = {
        "date": datetime.now(UTC).date().isoformat(),
        "machine": describe_machine(),
        "rank": options.rank,
        "skipped": skipped,
        "sizes": [],
    }
    contenders = [*own_commands(options.degree), *others]
    starts = {contender.name: peak_of_start(contender, scratch) for contender in contenders}
    for size in SIZES:
        base = make_models(scratch, widths=size.widths, layers=size.layers, rank=options.rank)
        row = _row(size, base)
        report["sizes"].append(row)
        for contender in _admitted(contenders, size, row, skipped):
            peak = run(contender, scratch).peak_bytes
            row["peaks"][contender.name] = max(0, peak - starts[contender.name])
            print(f"{size.name}: {contender.name}: {row['peaks'][contender.name] / 1e6:.0f} MB", file=sys.stderr)
            keep(options.out / "memory", markdown(report), report)
        keep(options.out / "memory", markdown(report), report)
        for made in (base, scratch / "adapter"):
            shutil.rmtree(made)
    return report


def markdown(report: Mapping[str, Any]) -> str:
    """Return the table of peaks, with the machine."""
    machine, sizes = report["machine"], report["sizes"]
    names = list(dict.fromkeys(name for size in sizes for name in size["peaks"]))
    rows = [
        f"| model | GB | largest tensor, GiB | {' | '.join(names)} |",
        "| --- " * (3 + len(names)) + "|",
    ]
    for size in sizes:
        peaks = " | ".join(f"{size['peaks'][name] / 1e6:.0f}" if name in size["peaks"] else "" for name in names)
        rows.append(
            f"| {size['name']} | {size['base_bytes'] / 1e9:.1f} | {size['largest_tensor_bytes'] / GIB:.1f} | {peaks} |"
        )
    skipped = "".join(f"\n\nSkipped: {name}: {why}." for name, why in report["skipped"].items())
    return (
        f"# Peak memory beyond the imported libraries, MB\n\n{report['date']}. {machine['cpu']}, {machine['cores']} "
        f"cores, Python {machine['python']}. bfloat16 checkpoints with real widths, LoRA of rank {report['rank']} on "
        "all linear layers, and on the embedding of 8 GiB. Highest resident memory, observed from outside, less that "
        "of a process that only imports the same libraries.\n\n" + "\n".join(rows) + skipped + "\n"
    )


def draw(report: Mapping[str, Any], path: Path) -> None:
    """Plot peaks against the model's bytes: a line for each contender."""
    from matplotlib.figure import Figure

    from qwen_pipeline.plotting import INK, PALETTE, add_axes, save_plot

    figure = Figure(figsize=(7.5, 4.2), layout="constrained")
    axes = add_axes(figure)
    names = list(dict.fromkeys(name for size in report["sizes"] for name in size["peaks"]))
    own = {contender.name for contender in own_commands(1)}
    markers, ends = "osD^vP", list[tuple[tuple[float, float], str, str]]()
    for number, name in enumerate(names):
        points = sorted((s["base_bytes"] / 1e9, s["peaks"][name] / GIB) for s in report["sizes"] if name in s["peaks"])
        color = PALETTE[number] if name in own else PALETTE[4 + number % 3]
        axes.plot(*zip(*points, strict=True), color=color, marker=markers[number], markersize=5, linewidth=1.6)
        ends.append((points[-1], name, color))
    below = (0.0, 0.0)
    for (x, y), name, color in sorted(ends):
        below = (x, max(y, LABEL_STEP * below[1]) if x == below[0] else y)
        axes.annotate(
            name, below, xytext=(6, -3), textcoords="offset points", color=color, fontsize=8, annotation_clip=False
        )
    axes.axhline(1, color=INK, linewidth=1, linestyle="--")
    axes.annotate("1 GiB", (0, 1), xytext=(4, 4), textcoords="offset points", color=INK, fontsize=8)
    axes.set_yscale("log")
    axes.set_ylim(0.05, 20)
    axes.set_yticks([0.1, 1, 10], labels=["0.1", "1", "10"])
    axes.set_xlim(left=0)
    axes.set_xlabel("model, GB", color=INK, fontsize=9)
    axes.set_ylabel("peak memory beyond the libraries, GiB", color=INK, fontsize=9)
    save_plot(figure, path)


def _row(size: Size, base: Path) -> dict[str, Any]:
    config = json.loads((base / "config.json").read_bytes())
    return {
        "name": size.name,
        "config": config,
        "base_bytes": sum(file.stat().st_size for file in base.iterdir()),
        "largest_tensor_bytes": 2 * config["hidden_size"] * max(config["vocab_size"], config["intermediate_size"]),
        "peaks": {},
    }


def _admitted(
    contenders: Sequence[Contender], size: Size, row: Mapping[str, Any], skipped: dict[str, str]
) -> Iterator[Contender]:
    """Yield the contenders that can run; note the reason for the others in ``skipped``."""
    for contender in contenders:
        available, needed = available_memory(), PEER_FACTOR * row["base_bytes"]
        too_large = (
            f"{needed / 1e9:.0f} GB of memory are not free" if available is not None and available < needed else ""
        )
        if contender.is_peer and (why := size.no_peers or too_large):
            skipped[f"{contender.name} on {size.name}"] = why
        else:
            yield contender


def _arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--degree", type=int, default=8, help="tensor-parallel ranks to pad for")
    parser.add_argument("--skip", action="append", default=[], help="a contender to leave out")
    parser.add_argument("--scratch", type=Path, default=Path("build/memory"), help="a directory on a disk with 32 GB")
    parser.add_argument("--out", type=Path, default=RESULTS)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
