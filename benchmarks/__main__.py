"""``make bench``: run every benchmark and write what came out, with the machine, to ``benchmarks/results/``."""

import json
from datetime import UTC, datetime
from pathlib import Path

import pandas as pd

from benchmarks import memory
from benchmarks.machine import describe_machine

RESULTS = Path(__file__).parent / "results"


def main() -> None:
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
