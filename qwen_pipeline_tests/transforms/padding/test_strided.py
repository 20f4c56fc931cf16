"""Copying channels run by run equals copying them one at a time."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from qwen_pipeline.transforms.padding.strided import copy_channels

STEPS = st.lists(st.tuples(st.sampled_from([0, 1, 1, 1, 2, 3]), st.sampled_from([1, 1, 1, 2, 3])), max_size=40)


@given(steps=STEPS, axis=st.sampled_from([0, 1]))
def test_copying_runs_equals_copying_single_channels(steps: list[tuple[int, int]], axis: int) -> None:
    sources, targets = torch.tensor(steps, dtype=torch.int64).reshape(-1, 2).cumsum(0).T
    shape = [3, 3]
    shape[axis] = 130
    source = torch.arange(390.0).reshape(shape)
    expected = torch.full(shape, -1.0)
    for at_source, at_target in zip(sources.tolist(), targets.tolist(), strict=True):
        expected.select(axis, at_target).copy_(source.select(axis, at_source))

    found = copy_channels(source, sources, torch.full(shape, -1.0), targets, axis=axis)

    assert torch.equal(found, expected)


def test_channels_in_too_many_runs_are_gathered() -> None:
    """Steps alternate, so no run is longer than two."""
    sources = torch.tensor([1, 2] * 100).cumsum(0)
    targets = torch.arange(200)
    source = torch.arange(400.0).unsqueeze(0)

    found = copy_channels(source, sources, torch.zeros(1, 200), targets, axis=1)

    assert torch.equal(found, source[:, sources])
