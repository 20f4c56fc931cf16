"""Contract tests of GPTQModel's solver; Hessians, packing, and counts of zero and saturated groups."""

from pathlib import Path

import pytest
import torch

from qwen_pipeline.quantization import solver
from qwen_pipeline.quantization.losses import NOT_SOLVED
from qwen_pipeline.quantization.solver import Hessian, pack
from qwen_pipeline.transforms.codes.gptq import GptqFormat
from qwen_pipeline.workers.parent import run_worker
from qwen_pipeline_tests.chain import Chain


@pytest.mark.parametrize("block", [2, 5, 12])
def test_a_hessian_does_not_depend_on_the_division_of_its_inputs(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(solver.BLOCK_INPUTS, "cpu", block)
    x = torch.randn(4, 7, 12, dtype=torch.float32)
    whole, parts = Hessian(12), Hessian(12)
    whole.add(x)
    for part in x.split(1):
        parts.add(part)
    exact = 2 / 28 * x.double().flatten(0, 1).T @ x.double().flatten(0, 1)
    torch.testing.assert_close(whole.pop_mean(), exact.float())
    torch.testing.assert_close(parts.pop_mean(), exact.float())


def test_without_tokens_a_hessian_is_the_identity() -> None:
    assert torch.equal(Hessian(3).pop_mean(), torch.eye(3))


def test_groups_of_zeros_and_groups_at_the_ends_of_the_grid_are_counted() -> None:
    form = GptqFormat(bits=4, group_size=32, desc_act=True, sym=True, checkpoint_format="gptq")
    codes_OI = torch.full((32, 64), 5)
    codes_OI[0, :32] = 8
    codes_OI[1, 32:40] = 15
    codes_OI[2, 32:39] = 0
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    g_idx = (torch.arange(64) // 32)[order]
    ones_OG = torch.ones(32, 2)
    packed = pack((codes_OI - 8.0)[:, order], ones_OG, 8 * ones_OG, g_idx, form)
    assert solver.zero_and_saturated_groups(packed) == (1, 1)


@pytest.mark.parametrize(("bits", "group_size"), [(4, 32), (4, 128), (8, 64)])
def test_counts_of_zero_and_saturated_groups_equal_those_from_single_codes(bits: int, group_size: int) -> None:
    form = GptqFormat(bits=bits, group_size=group_size, desc_act=False, sym=False, checkpoint_format="gptq")
    codes_OGS = torch.randint(0, 2**bits, (1056, 3, group_size))
    codes_OGS[::2, 0, :: 4 if bits == 4 else 2] = 2**bits - 1
    codes_OGS[::3, 0, 1 : group_size // 8] = 0
    zeros_OG = torch.randint(1, 2**bits, (1056, 3))
    codes_OGS[::5, 1] = zeros_OG[::5, 1, None]
    ends_OG = ((codes_OGS == 0) | (codes_OGS == 2**bits - 1)).sum(dim=2)
    expected = ((codes_OGS == zeros_OG[..., None]).all(dim=2).sum(), (4 * ends_OG >= group_size).sum())
    weight_OI = (codes_OGS - zeros_OG[..., None]).flatten(1).float()
    packed = pack(weight_OI, torch.ones(1056, 3), zeros_OG.float(), torch.arange(3 * group_size) // group_size, form)
    assert solver.zero_and_saturated_groups(packed) == expected


def test_packing_preserves_a_weight_on_its_grid() -> None:
    form = GptqFormat(bits=4, group_size=32, desc_act=False, sym=False, checkpoint_format="gptq")
    codes_OI = torch.randint(0, 16, (2080, 64))
    scales_OG, zeros_OG = torch.rand(2080, 2).half().float() + 0.125, torch.randint(1, 16, (2080, 2)).float()
    g_idx = torch.arange(64) // 32
    scales_OG = scales_OG.half().float()
    weight_OI = scales_OG[:, g_idx] * (codes_OI - zeros_OG[:, g_idx])
    packed = pack(weight_OI, scales_OG, zeros_OG, g_idx, form)
    assert {name: (t.dtype, t.shape) for name, t in (("qweight", packed.qweight), ("qzeros", packed.qzeros))} == {
        "qweight": (torch.int32, (8, 2080)),
        "qzeros": (torch.int32, (2, 260)),
    }
    assert torch.equal(packed.weight_rows(0, 2080), weight_OI)


@pytest.mark.slow
def test_the_solver_accepts_a_hessian_and_weights(chain: Chain, tmp_path: Path) -> None:
    """The codes equal those with a Hessian accumulated by GPTQModel; weights of dead channels become zero.

    All weights with the same inputs share one inverse. Without tokens the loss says that the weight was only rounded.
    """
    target = "qwen_pipeline_tests.quantization.targets:contract"
    found = run_worker(chain.engine.python, target, {}, log=tmp_path / "log").value
    assert found == {
        "same_codes": [True, True], "factored": [96], "dead_are_zero": [True, True], "inputs_untouched": True,
        "damp": 0.05, "without_tokens": NOT_SOLVED,
    }  # fmt: skip
