"""``make bench``: measure memory and, on a small checkpoint, speed; write both to ``benchmarks/results/small/``.

It takes seven minutes on two cores and 32 GB of disk. ``python -m benchmarks.speed`` measures a large
model's widths.
"""

from benchmarks import memory, speed
from benchmarks.report import RESULTS

QUICK = ("--skip", "mergekit")
"""Mergekit would first install another torch."""
SMALL = ("--widths", "0.5b", "--layers", "24", "--rounds", "5", "--peer-rounds", "3", *QUICK)
"""A measurement that takes minutes on two cores."""


def main() -> None:
    out = ("--out", str(RESULTS / "small"))
    memory.main([*QUICK, *out])
    speed.main([*SMALL, *out])


if __name__ == "__main__":
    main()
