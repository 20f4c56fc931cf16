"""Maps of channels are undone bit for bit, however channels are placed and divided."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qwen_pipeline.transforms.padding.channel_maps import (
    NEW,
    divided,
    first_positions,
    gathered,
    placed,
    selected,
    summed,
)

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


@st.composite
def maps(draw: st.DrawFn) -> torch.Tensor:
    """Draw any map: the parts of a channel are adjacent, zeros anywhere but between them."""
    entries: list[int] = []
    for channel in range(draw(st.integers(1, 12))):
        entries += [channel] * draw(st.integers(1, 5)) + [NEW] * draw(st.integers(0, 2))
    return torch.tensor(entries)


def numbers(live: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Return random bits without NaN and infinity: from the largest numbers to subnormal ones, with signed zeros."""
    whole = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    bits = torch.iinfo(whole)
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(bits.min, bits.max, (3, live, 3), dtype=whole, generator=generator).view(dtype)
    subnormal = torch.randint(-5, 6, (3, live, 3), generator=generator).to(dtype) * torch.finfo(dtype).smallest_normal
    return torch.where(drawn.isfinite(), drawn, subnormal / 128)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a.flatten().view(torch.uint8), b.flatten().view(torch.uint8))


@given(source=maps(), dtype=st.sampled_from(DTYPES), axis=st.integers(0, 2), seed=st.integers(0, 999))
def test_a_map_applied_and_undone_is_the_identity(
    source: torch.Tensor, dtype: torch.dtype, axis: int, seed: int
) -> None:
    live = numbers(int(source.max()) + 1, dtype, seed).transpose(1, axis).contiguous()
    assert same_bits(gathered(placed(live, axis, source), axis, source), live)
    assert same_bits(selected(live, axis, source), placed(live, axis, source))
    assert same_bits(summed(divided(live, axis, source), axis, source), live)


@given(source=maps(), dtype=st.sampled_from(DTYPES[:3]), seed=st.integers(0, 999))
def test_parts_sum_without_rounding_and_new_channels_are_zero(
    source: torch.Tensor, dtype: torch.dtype, seed: int
) -> None:
    live = numbers(int(source.max()) + 1, dtype, seed)
    parts, copies = divided(live, 1, source), placed(live, 1, source)
    for position, channel in enumerate(source.tolist()):
        if channel == NEW:
            assert not parts[:, position].any()
            assert not copies[:, position].any()
        else:
            assert same_bits(copies[:, position], live[:, channel])
    exact = torch.zeros(live.shape, dtype=torch.float64)
    exact.index_add_(1, source[source != NEW], parts[:, source != NEW].double())
    assert torch.equal(exact, live.double())


def test_a_map_worked_out_by_hand() -> None:
    source = torch.tensor([0, NEW, 1, 1, 2, 2, 2])
    live = torch.tensor([[1.0, 2.0, 4.0]])
    assert placed(live, 1, source).tolist() == [[1, 0, 2, 2, 4, 4, 4]]
    assert divided(live, 1, source).tolist() == [[1, 0, 1, 1, 2, 1, 1]]
    assert first_positions(source).tolist() == [0, 2, 4]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_smallest_subnormal_is_divided_without_loss(dtype: torch.dtype) -> None:
    smallest = torch.tensor([[3]], dtype=torch.int16).view(dtype)  # three times the smallest: its half is not exact
    parts = divided(smallest, 1, torch.tensor([0, 0]))
    assert same_bits(parts.sum(dim=1, keepdim=True, dtype=torch.float64).to(dtype), smallest)
    assert same_bits(summed(parts, 1, torch.tensor([0, 0])), smallest)
