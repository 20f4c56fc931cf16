"""The cheapest choice of one option per unit: a multiple-choice knapsack, solved for all budgets at once.

Sizes are counted in a common divisor, so that the solution is exact, unless that would take more than :data:`STATES`
steps; then extra sizes are rounded up to a coarser step, so that a solution never exceeds its budget.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from math import ceil, gcd

import numpy as np
from numpy.typing import NDArray

STATES = 2**16
"""Highest number of steps of size between the smallest and the largest choice."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """One choice for a unit: its size in bytes, and its cost."""

    nbytes: int
    cost: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """A choice for all units that no smaller one beats.

    Attributes:
        picks: For each unit the index of its option.
    """

    nbytes: int
    cost: float
    picks: tuple[int, ...]


def frontier(units: Sequence[Sequence[Option]]) -> list[Point]:
    """Return the choices that have the least cost for their size, by ascending size and descending cost."""
    smallest = [min(option.nbytes for option in options) for options in units]
    extras = [[option.nbytes - low for option in options] for options, low in zip(units, smallest, strict=True)]
    capacity = sum(map(max, extras))
    step = max(reduce(gcd, (extra for options in extras for extra in options), 0), ceil(capacity / STATES), 1)
    steps = [[ceil(extra / step) for extra in options] for options in extras]
    states = sum(map(max, steps)) + 1
    best: NDArray[np.float64] = np.zeros(states)
    picked = np.zeros((len(units), states), dtype=np.uint8)
    for number, options in enumerate(units):
        costs = np.full((len(options), states), np.inf)
        for index, (option, taken) in enumerate(zip(options, steps[number], strict=True)):
            costs[index, taken:] = best[: states - taken] + option.cost
        picked[number] = costs.argmin(axis=0)
        best = costs.min(axis=0)
    improves = np.flatnonzero(np.diff(best, prepend=np.inf) < 0)
    return [_point(units, steps, picked, int(state)) for state in improves]


def _point(
    units: Sequence[Sequence[Option]], steps: Sequence[Sequence[int]], picked: NDArray[np.uint8], state: int
) -> Point:
    picks: list[int] = []
    for number in range(len(units) - 1, -1, -1):
        picks.append(int(picked[number, state]))
        state -= steps[number][picks[-1]]
    chosen = [options[pick] for options, pick in zip(units, reversed(picks), strict=True)]
    return Point(
        nbytes=sum(option.nbytes for option in chosen),
        cost=sum(option.cost for option in chosen),
        picks=tuple(reversed(picks)),
    )
