"""The kernel for GPUs, against the columns rounded one by one.

With ``TRITON_INTERPRET=1`` and the package triton, the same tests run on a CPU: ``-m gpu``.
"""

import os

import pytest
import torch

from qwen_pipeline.quantization.recipes import ScaleSearch
from qwen_pipeline.quantization.steps import gptq

pytestmark = pytest.mark.gpu
DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") else "cuda"


def rounded_both_ways(
    inputs: int, outputs: int, search: ScaleSearch | None, *, bits: int, group_size: int
) -> tuple[gptq.Rounded, gptq.Rounded]:
    kernel = pytest.importorskip("qwen_pipeline.quantization.steps.rounding_kernel")
    generator = torch.Generator().manual_seed(0)
    x_NI = torch.randn(4 * inputs, inputs, generator=generator).to(DEVICE)
    factor = gptq.factored(x_NI.T @ x_NI, torch.arange(inputs, device=DEVICE), 0.05)
    weight_OI = torch.randn(outputs, inputs, generator=generator).to(DEVICE)
    weight_OI[3] = 0
    found: list[gptq.Rounded] = []
    for rounding in (kernel.round_block, gptq.round_block_by_columns):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(gptq, "rounding_of", lambda _, rounding=rounding: rounding)
            found.append(gptq.round_columns(weight_OI, factor, search, bits=bits, group_size=group_size))
    return found[0], found[1]


@pytest.mark.parametrize(
    ("inputs", "bits", "group_size"),
    [
        (256, 4, 64),
        (256, 4, 128),
        (320, 4, 64),
        (224, 4, 32),
        (224, 8, 32),
    ],  # the last block is smaller, or of odd size
)
def test_on_gptqmodels_grid_all_bytes_are_equal(inputs: int, bits: int, group_size: int) -> None:
    kernel, columns = rounded_both_ways(inputs, 100, None, bits=bits, group_size=group_size)
    for part in ("weight", "target", "scales", "loss"):
        assert torch.equal(getattr(kernel, part), getattr(columns, part)), part


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
def test_searched_scales_are_equal_but_where_costs_are(bits: int, signed: bool) -> None:
    """The costs of scales are sums in another order; where two are equal but for that, the other may be taken."""
    search = ScaleSearch(signed=signed)
    kernel, columns = rounded_both_ways(256, 100, search, bits=bits, group_size=64)
    same_O = (kernel.scales == columns.scales).all(dim=1)
    assert same_O.float().mean() > (0.9 if bits == 4 else 0.6)
    assert torch.equal(kernel.weight[same_O], columns.weight[same_O])
    torch.testing.assert_close(kernel.loss.sum(), columns.loss.sum(), rtol=1e-3, atol=0)
    assert (kernel.scales < 0).any() == signed


def test_a_nan_is_not_hidden() -> None:
    kernel = pytest.importorskip("qwen_pipeline.quantization.steps.rounding_kernel")
    target = torch.ones(64, 40, device=DEVICE)
    target[5, 7] = torch.nan
    _, errors, _ = kernel.round_block(target, torch.eye(64, device=DEVICE), bits=4, group_size=64, search=ScaleSearch())
    assert errors.isnan().any(dim=0).nonzero().flatten().tolist() == [7]
