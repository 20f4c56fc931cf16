"""``make bench``: measure memory and, on a small checkpoint, speed; write what came out to ``benchmarks/results/``.

It takes about a quarter of an hour on two cores and 32 GB of disk. ``python -m benchmarks.speed`` measures a large
model's widths.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks import memory, speed

if TYPE_CHECKING:
    import pandas as pd

RESULTS = Path(__file__).parent / "results"
QUICK = ("--skip", "mergekit")
"""It would install another torch first."""
SMALL = ("--widths", "0.5b", "--layers", "24", "--rounds", "5", "--peer-rounds", "3", *QUICK)
"""What two cores measure in minutes."""


def main() -> None:
    memory.main(QUICK)
    speed.main([*SMALL, "--out", str(RESULTS / "small")])


def markdown(frame: "pd.DataFrame") -> str:
    rows = [list(map(str, frame.columns)), ["---"] * frame.shape[1], *(list(map(str, row)) for row in frame.to_numpy())]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


if __name__ == "__main__":
    main()
