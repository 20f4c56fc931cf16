"""Which channels are split: those that the slow definition finds, expert by expert, and written down compactly."""

import base64

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qwen_pipeline.checkpoint import digest
from qwen_pipeline.qwen.geometry import dump_plan, plan_padding
from qwen_pipeline.transforms.padding.splitting import choose_splits, split_map
from qwen_pipeline_tests.transforms.padding.test_pad import mlp, stack

DOWN = "model.layers.0.mlp.down_proj.weight"


def gains(down_HI: torch.Tensor, group_size: int) -> list[float]:
    """Halve each channel in turn, and see what that takes off the sum of squared group maxima."""

    def cost(weight: torch.Tensor) -> float:
        return sum(float(group.abs().amax(dim=1).double().square().sum()) for group in weight.split(group_size, dim=1))

    before = cost(down_HI)
    halved = [torch.where(torch.arange(down_HI.shape[1]) == i, down_HI / 2, down_HI) for i in range(down_HI.shape[1])]
    return [before - cost(weight) for weight in halved]


@given(width=st.integers(5, 40), group_size=st.sampled_from([4, 8]), block=st.sampled_from([1, 10_000]))
def test_the_channels_whose_halving_gains_most_are_split(width: int, group_size: int, block: int) -> None:
    live = mlp(width, 7)
    plan = choose_splits(live, plan_padding(live.config, group_size=group_size, tensor_parallel=3, layout="split"))
    (size,) = plan.sizes
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(digest, "BLOCK_BYTES", block)
        copies = split_map(size, "model.layers.0.mlp").bincount(minlength=width) if size.zeros else torch.ones(width)
    gain = torch.tensor(gains(live.load(DOWN).float(), group_size))
    more, fewer = gain[copies > copies.min()], gain[copies == copies.min()]
    assert copies.sum() == size.padded
    assert copies.max() - copies.min() <= 1
    assert not len(more) or more.min() >= fewer.max() - 1e-6


@pytest.mark.parametrize("transposed", [False, True])
def test_each_expert_of_a_stack_splits_channels_of_its_own(transposed: bool) -> None:
    live = stack(12, 257, 3, transposed=transposed)
    plan = choose_splits(live, plan_padding(live.config, group_size=4, tensor_parallel=4, layout="split"))
    (size,) = plan.sizes
    maps = split_map(size, "model.layers.0.mlp.experts")
    assert maps.shape == (3, 16)
    down = live.load("model.layers.0.mlp.experts.down_proj").float()
    for expert, matrix in enumerate(down.transpose(1, 2) if transposed else down):
        best = torch.tensor(gains(matrix, 4)).topk(4).indices.sort().values
        assert torch.equal((maps[expert].bincount() == 2).nonzero().flatten(), best)


def test_a_manifest_holds_one_bit_for_a_channel() -> None:
    live = mlp(100, 3)
    plan = choose_splits(live, plan_padding(live.config, group_size=4, tensor_parallel=8, layout="split"))
    (size,) = dump_plan(plan)["sizes"]
    assert {owner: len(base64.b64decode(bits)) for owner, bits in size["splits"].items()} == {"model.layers.0.mlp": 13}
