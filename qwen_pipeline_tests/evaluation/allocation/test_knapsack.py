"""The curve of best choices against all choices, enumerated."""

from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_pipeline.evaluation.allocation import knapsack
from qwen_pipeline.evaluation.allocation.knapsack import Option, frontier

OPTIONS = st.lists(
    st.builds(Option, nbytes=st.integers(1, 40).map(lambda n: 8 * n), cost=st.integers(0, 50).map(float)),
    min_size=1,
    max_size=3,
)


@given(st.lists(OPTIONS, min_size=1, max_size=5))
@settings(max_examples=100)
def test_the_curve_is_that_of_all_choices(units: list[list[Option]]) -> None:
    every = [
        (sum(option.nbytes for option in chosen), sum(option.cost for option in chosen)) for chosen in product(*units)
    ]
    best = [each for each in set(every) if not any(other != each and other[0] <= each[0] and other[1] <= each[1]
                                                   for other in every)]  # fmt: skip
    points = frontier(units)
    assert [(point.nbytes, point.cost) for point in points] == sorted(best)
    for point in points:
        chosen = [options[pick] for options, pick in zip(units, point.picks, strict=True)]
        assert point.nbytes == sum(option.nbytes for option in chosen)


def test_sizes_that_are_rounded_never_exceed_a_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(knapsack, "STATES", 16)
    units = [[Option(nbytes=101 + n, cost=float(n)), Option(nbytes=997 + 3 * n, cost=0.0)] for n in range(12)]
    points = frontier(units)
    assert points[-1].cost == 0
    for point in points:
        chosen = [options[pick] for options, pick in zip(units, point.picks, strict=True)]
        assert (point.nbytes, point.cost) == (sum(o.nbytes for o in chosen), sum(o.cost for o in chosen))
