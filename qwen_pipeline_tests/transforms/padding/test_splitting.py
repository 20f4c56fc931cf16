"""The split channels are those of a slow reference implementation, expert by expert, and are stored compactly."""

import base64

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qwen_pipeline.qwen.geometry import dump_plan, plan_padding
from qwen_pipeline.transforms.padding.splitting import choose_splits, split_map
from qwen_pipeline_tests.in_memory import blocks_of, random_mlp, random_stack

DOWN = "model.layers.0.mlp.down_proj.weight"


def gains(down_HI: torch.Tensor, group_size: int) -> list[float]:
    """Return the decrease of the sum of squared group maxima when each channel in turn is halved."""

    def cost(weight: torch.Tensor) -> float:
        return sum(float(group.abs().amax(dim=1).double().square().sum()) for group in weight.split(group_size, dim=1))

    before = cost(down_HI)
    halved = [torch.where(torch.arange(down_HI.shape[1]) == i, down_HI / 2, down_HI) for i in range(down_HI.shape[1])]
    return [before - cost(weight) for weight in halved]


@given(width=st.integers(5, 40), group_size=st.sampled_from([4, 8]), block=st.sampled_from([1, 10_000]))
def test_the_channels_whose_halving_gains_most_are_split(width: int, group_size: int, block: int) -> None:
    live = random_mlp(width, 7)
    plan = choose_splits(live, plan_padding(live.config, group_size=group_size, tensor_parallel=3, layout="split"))
    (size,) = plan.sizes
    with blocks_of(block):
        copies = split_map(size, "model.layers.0.mlp").bincount(minlength=width) if size.zeros else torch.ones(width)
    gain = torch.tensor(gains(live.load(DOWN).float(), group_size))
    more, fewer = gain[copies > copies.min()], gain[copies == copies.min()]
    assert copies.sum() == size.padded
    assert copies.max() - copies.min() <= 1
    assert not len(more) or more.min() >= fewer.max() - 1e-6


@pytest.mark.parametrize("transposed", [False, True])
def test_each_expert_of_a_stack_has_its_own_split_channels(transposed: bool) -> None:
    live = random_stack(12, 257, 3, transposed=transposed)
    plan = choose_splits(live, plan_padding(live.config, group_size=4, tensor_parallel=4, layout="split"))
    (size,) = plan.sizes
    maps = split_map(size, "model.layers.0.mlp.experts")
    assert maps.shape == (3, 16)
    down = live.load("model.layers.0.mlp.experts.down_proj").float()
    for expert, matrix in enumerate(down.transpose(1, 2) if transposed else down):
        best = torch.tensor(gains(matrix, 4)).topk(4).indices.sort().values
        assert torch.equal((maps[expert].bincount() == 2).nonzero().flatten(), best)


def test_a_manifest_has_one_bit_for_each_channel() -> None:
    live = random_mlp(100, 3)
    plan = choose_splits(live, plan_padding(live.config, group_size=4, tensor_parallel=8, layout="split"))
    (size,) = dump_plan(plan)["sizes"]
    nbytes = {module: len(base64.b64decode(bits)) for module, bits in size["splits"].items()}
    assert nbytes == {"model.layers.0.mlp": 13}
