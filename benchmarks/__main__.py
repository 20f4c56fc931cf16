"""``make bench``: measure memory and, on a small checkpoint, speed; write what came out to ``benchmarks/results/``.

It takes some minutes on two cores. ``python -m benchmarks.speed`` measures a large model's widths.
"""

import json
from datetime import UTC, datetime
from pathlib import Path

import pandas as pd

from benchmarks import memory, speed
from benchmarks.machine import describe_machine

RESULTS = Path(__file__).parent / "results"
SMALL = ("--widths", "0.5b", "--layers", "24", "--rounds", "5", "--peer-rounds", "3", "--skip", "mergekit")
"""What two cores measure in minutes."""


def main() -> None:
    measure_memory()
    speed.main([*SMALL, "--out", str(RESULTS / "small")])


def measure_memory() -> None:
    day, machine, rows = datetime.now(UTC).date().isoformat(), describe_machine(), memory.measure()
    frame = pd.DataFrame(rows)
    megabytes = pd.DataFrame(
        {
            "base, MB": (frame["base_bytes"] / 1e6).round().astype(int),
            "run": frame["run"],
            "peak": (frame["peak_bytes_above"] / 1e6).round().astype(int),
        }
    )
    table = megabytes.pivot_table(index="base, MB", columns="run", values="peak", aggfunc="first", sort=False)
    text = f"""# Peak memory above a bare interpreter with torch, MB

{day}, {machine["cpu"]}, {machine["cores"]} cores. bfloat16 checkpoints, LoRA of rank 16 on all linear layers.

{markdown(table.reset_index())}
"""
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "memory.json").write_text(json.dumps({"date": day, "machine": machine, "rows": rows}, indent=2) + "\n")
    (RESULTS / "memory.md").write_text(text)
    print(text)


def markdown(frame: pd.DataFrame) -> str:
    rows = [list(map(str, frame.columns)), ["---"] * frame.shape[1], *(list(map(str, row)) for row in frame.to_numpy())]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


if __name__ == "__main__":
    main()
