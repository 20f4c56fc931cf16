"""Time of merging and padding, compared with a plain copy and with other tools in the same run.

``python -m benchmarks.speed`` makes a checkpoint with a real model's widths once, then runs every contender once a
round, in turn, each in its own process and followed by a sync, and computes the median. Results go to ``--out`` as JSON
and Markdown after each run, so that an interruption loses no figure. Contenders that are not installed are listed as
skipped.
"""

import argparse
import json
import shutil
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.contenders import (
    COPY,
    START,
    Contender,
    Run,
    baselines,
    make_models,
    own_commands,
    peak_of_start,
    peers,
    run,
)
from benchmarks.machine import describe_machine
from benchmarks.report import RESULTS, keep

_BARE = Contender(name="torch", command=(), start=(sys.executable, "-c", "import torch, pydantic"))


def main(arguments: Sequence[str] | None = None) -> None:
    options = _arguments(arguments)
    options.scratch.mkdir(parents=True)
    try:
        print(markdown(measure(options)))
    finally:
        shutil.rmtree(options.scratch)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Make the models, run every contender ``rounds`` times in turn, and return all figures, written after each run."""
    began, scratch = time.monotonic(), options.scratch.resolve()
    base = make_models(scratch, widths=options.widths, layers=options.layers, rank=options.rank)
    others, skipped = peers(options.degree, scratch, skip=options.skip)
    contenders = [*baselines(), *own_commands(options.degree), *others]
    report: dict[str, Any] = {
        "date": datetime.now(UTC).date().isoformat(),
        "machine": describe_machine(),
        "model": json.loads((base / "config.json").read_bytes()),
        "layers": options.layers,
        "rank": options.rank,
        "base_bytes": sum(file.stat().st_size for file in base.iterdir()),
        "bare_peak_bytes": peak_of_start(_BARE, scratch),
        "skipped": skipped,
    }
    runs: list[Run] = []
    for number in range(options.rounds):
        round_began = time.monotonic()
        for contender in contenders:
            if contender.is_peer and number >= options.peer_rounds:
                continue
            runs.append(run(contender, scratch))
            print(f"round {number + 1}: {runs[-1]}", file=sys.stderr, flush=True)
            report |= {"medians": _medians(runs), "runs": [asdict(each) for each in runs]}
            keep(options.out / "speed", markdown(report), report)
        now = time.monotonic()
        if (
            options.minutes
            and (now - began) + (now - round_began) > 60 * options.minutes
            and number + 1 < options.rounds
        ):
            skipped[f"rounds {number + 2} to {options.rounds}"] = f"no time left of {options.minutes} minutes"
            break
    keep(options.out / "speed", markdown(report), report)
    return report


def markdown(report: Mapping[str, Any]) -> str:
    """Return the table of medians, with the machine."""
    machine, medians = report["machine"], report["medians"]
    start = medians[START]["seconds"] if START in medians else 0.0
    rows = [
        "| what | s with sync | against cp | s without start | GB/s written | CPU s | peak above torch, MB | rounds |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, row in medians.items():
        ratio = row["synced_seconds"] / medians[COPY]["synced_seconds"]
        working = row["synced_seconds"] - (0.0 if name == COPY else start)
        above = max(0, row["peak_bytes"] - report["bare_peak_bytes"]) / 1e6
        rows.append(
            f"| {name} | {row['synced_seconds']:.1f} | {ratio:.2f} | {working:.1f} "
            f"| {row['written_bytes'] / 1e9 / row['synced_seconds']:.2f} | {row['cpu_seconds']:.1f} | {above:.0f} "
            f"| {row['rounds']} |"
        )
    skipped = "".join(f"\n\nSkipped: {name}: {why}." for name, why in report["skipped"].items())
    return (
        f"# Speed\n\n{report['date']}. {machine['cpu']}, {machine['cores']} cores, Python {machine['python']}. "
        f"Layers of {report['model']['hidden_size']} x {report['model']['intermediate_size']}, "
        f"{report['layers']} of them, vocabulary {report['model']['vocab_size']}: "
        f"{report['base_bytes'] / 1e9:.2f} GB of bfloat16. LoRA of rank {report['rank']} on all linear layers. "
        "Medians of rounds in turn; this package hashes the base, not seen before, and its output. "
        f"Starting Python and importing torch and this package takes {start:.1f} s of each of its commands.\n\n"
        + "\n".join(rows)
        + skipped
        + "\n"
    )


def _medians(runs: Sequence[Run]) -> dict[str, Mapping[str, float]]:
    fields = ("seconds", "synced_seconds", "cpu_seconds", "peak_bytes", "written_bytes")
    medians: dict[str, Mapping[str, float]] = {}
    for name in dict.fromkeys(each.name for each in runs):
        own = [asdict(each) for each in runs if each.name == name]
        medians[name] = {field: statistics.median(row[field] for row in own) for field in fields} | {"rounds": len(own)}
    return medians


def _arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", default="72b", help="72b, 7b, 0.5b or a config.json")
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--degree", type=int, default=8, help="tensor-parallel ranks to pad for")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--peer-rounds", type=int, default=5, help="rounds in which other tools run")
    parser.add_argument("--minutes", type=float, default=0, help="begin no round that would end later; 0: no limit")
    parser.add_argument("--skip", action="append", default=[], help="a contender to leave out")
    parser.add_argument("--scratch", type=Path, default=Path("build/speed"), help="a directory on the disk to measure")
    parser.add_argument("--out", type=Path, default=RESULTS)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
