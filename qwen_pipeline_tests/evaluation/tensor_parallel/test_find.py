"""Findings for engines, rank by rank: cases with observed wrong answers, and cases that work."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from qwen_pipeline.checkpoint.lazy import Checkpoint, open_checkpoint
from qwen_pipeline.errors import InputRefused
from qwen_pipeline.evaluation.tensor_parallel.find import shardings_with_effect
from qwen_pipeline.evaluation.tensor_parallel.findings import ANY_ENGINE, Target, TargetFindings
from qwen_pipeline.evaluation.tensor_parallel.ranks import effective_g_idx, rank_part, weight_over_ranks
from qwen_pipeline.evaluation.tensor_parallel.simulate import diverge
from qwen_pipeline.layerwise.model import ComputeContext
from qwen_pipeline.qwen.linears import decoder_linears
from qwen_pipeline.transforms.codes.gptq import PackedLinear, gptq_format
from qwen_pipeline_tests.evaluation.simulated import find_targets
from qwen_pipeline_tests.rounding import round_to_codes, rounded
from qwen_pipeline_tests.tiny import VOCABULARY, tiny_model

CPU = ComputeContext(device=torch.device("cpu"), dtype=torch.float32)
SMALL: dict[str, Any] = {
    "num_hidden_layers": 1, "hidden_size": 128, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 128,
}  # fmt: skip
"""Attention that 8 ranks share in whole groups of 128, with 4 replicated key-value heads."""


def quantized(root: Path, group_size: int = 128, family: str = "qwen2", **text: Any) -> tuple[Checkpoint, Checkpoint]:
    source = tiny_model(family, root / "source", **(SMALL | text))
    candidate = round_to_codes(source, root / "candidate", group_size=group_size)
    return open_checkpoint(source), open_checkpoint(candidate)


def findings(models: tuple[Checkpoint, Checkpoint], engine: str, degree: int) -> TargetFindings:
    (found,) = find_targets(*models, [Target(engine=engine, degree=degree)])
    return found


@pytest.fixture(scope="module")
def nine_groups(tmp_path_factory: pytest.TempPathFactory) -> tuple[Checkpoint, Checkpoint]:
    return quantized(tmp_path_factory.mktemp("nine"), intermediate_size=9 * 128)


@pytest.mark.parametrize(
    "engine", ["vllm-cpu", "vllm-machete", "vllm-exllama", "sglang-gptq-marlin", "tensorrt-llm", ANY_ENGINE]
)
def test_nine_groups_are_wrong_on_two_ranks(nine_groups: tuple[Checkpoint, Checkpoint], engine: str) -> None:
    found = findings(nine_groups, engine, 2)
    assert found.answers_wrongly
    assert found.found
    assert found.found.errors.keys() == {"model.layers.0.mlp.down_proj"}
    assert found.found.compared == 7
    assert 0.1 < found.found.worst[1] < 1
    assert "gives wrong answers without an error: 1 of 7 weights differ" in found.sentence


@pytest.mark.parametrize("engine", ["vllm-marlin", "vllm-compressed-tensors", "sglang-gptq"])
def test_nine_groups_are_refused_by_engines_that_check(nine_groups: tuple[Checkpoint, Checkpoint], engine: str) -> None:
    found = findings(nine_groups, engine, 2)
    assert found.refuses
    assert found.found is None
    assert "576 inputs per rank are 4.5 groups of 128" in found.sentence


def test_nine_groups_are_correct_if_padded_at_load_or_not_sharded(
    nine_groups: tuple[Checkpoint, Checkpoint],
) -> None:
    padded, alone = findings(nine_groups, "lmdeploy-turbomind", 2), findings(nine_groups, "vllm-cpu", 1)
    for found in (padded, alone):
        assert not found.refuses
        assert not found.answers_wrongly
        assert found.found
        assert found.found.errors == {}


def test_half_a_group_is_wrong_on_one_rank(tmp_path: Path) -> None:
    models = quantized(tmp_path, intermediate_size=8 * 128 + 64)
    assert findings(models, "vllm-cpu", 1).found
    assert findings(models, "vllm-cpu", 1).answers_wrongly
    assert findings(models, "vllm-exllama", 1).refuses
    assert not findings(models, "transformers-gptqmodel", 1).answers_wrongly


@pytest.mark.slow
def test_the_width_of_72b_is_wrong_on_two_and_eight_ranks_until_it_is_padded(tmp_path: Path) -> None:
    live = quantized(tmp_path / "live", intermediate_size=29568, vocab_size=VOCABULARY)
    for engine in ("vllm-machete", "vllm-exllama"):
        found = findings(live, engine, 2)
        assert found.answers_wrongly, engine
        assert found.found
    eighth = findings(live, "vllm-exllama", 8)
    assert eighth.answers_wrongly
    assert eighth.found
    assert eighth.found.worst[1] > 0.1
    assert not findings(live, "vllm-machete", 1).answers_wrongly
    padded = quantized(tmp_path / "padded", intermediate_size=29696)
    for degree in (1, 2, 4, 8):
        for found in find_targets(*padded, [Target(engine="vllm", degree=degree)]):
            assert not found.answers_wrongly, found.sentence
            assert not found.refuses, found.sentence


def test_the_groups_of_experts_are_halved_by_the_engine_that_does_that(tmp_path: Path) -> None:
    models = quantized(tmp_path, family="qwen3_moe", moe_intermediate_size=384)
    assert findings(models, "vllm-cpu", 2).answers_wrongly
    halved = findings(models, "vllm-moe-wna16", 2)
    assert not halved.answers_wrongly
    assert halved.found
    assert halved.found.compared == 4 + 3 * 4


def test_a_rank_without_a_scale_is_wrong_and_not_measured(tmp_path: Path) -> None:
    models = quantized(tmp_path, intermediate_size=128, head_dim=16)
    found = findings(models, ANY_ENGINE, 2)
    assert found.found
    assert found.found.errors.keys() == {"model.layers.0.self_attn.o_proj", "model.layers.0.mlp.down_proj"}
    assert shardings_with_effect(models[1], [found.found]) == {}


def test_slices_give_the_same_verdict_as_whole_weights(nine_groups: tuple[Checkpoint, Checkpoint]) -> None:
    """Compare the layers again in full, by the weight that all ranks compute with."""
    source, candidate = nine_groups
    for degree in (2, 4, 8):
        found = findings(nine_groups, ANY_ENGINE, degree).found
        assert found
        for linear in decoder_linears(source):
            packed = gptq_format(candidate.config).load(candidate, linear.module)
            dimension = "in" if linear.kind.endswith(("o_proj", "down_proj")) else "out"
            ranks = min(degree, 4) if linear.kind.endswith(("k_proj", "v_proj")) else degree
            held = weight_over_ranks(packed, dimension, ranks).read(0, linear.out_features)
            same = torch.equal(held, packed.weight_rows(0, linear.out_features))
            assert same == (linear.module not in found.errors), linear.module


@pytest.mark.parametrize(("inputs", "ranks"), [(9 * 16, 2), (9 * 16, 3), (8 * 16, 4), (17 * 8, 1)])
def test_a_layer_with_the_effective_g_idx_equals_the_weights_on_ranks(inputs: int, ranks: int) -> None:
    form = gptq_format({"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 16}})
    packed = PackedLinear(
        format=form, **rounded(torch.randn(24, inputs, generator=torch.Generator().manual_seed(3)), 16)
    )
    sharded = PackedLinear(
        format=form,
        qweight=packed.qweight,
        qzeros=packed.qzeros,
        scales=packed.scales,
        g_idx=effective_g_idx(packed, ranks),
    )
    assert torch.equal(sharded.weight_rows(0, 24), weight_over_ranks(packed, "in", ranks).read(0, 24))


class RankSum(nn.Module):
    """A row-parallel layer as ranks compute it: the sum over ranks of their inputs times their codes."""

    def __init__(self, packed: PackedLinear, ranks: int) -> None:
        super().__init__()
        outputs = packed.qweight.shape[1]
        self.parts = [rank_part(packed, "in", rank, ranks).weight_rows(0, outputs).double() for rank in range(ranks)]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.stack([r @ w.T for r, w in zip(x.chunk(len(self.parts), -1), self.parts, strict=True)]).sum(0)


def test_divergence_equals_that_of_a_forward_pass_rank_by_rank(
    nine_groups: tuple[Checkpoint, Checkpoint], tmp_path: Path
) -> None:
    source, candidate = nine_groups
    windows = list(torch.randint(0, VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(1)))
    simulated = findings(nine_groups, ANY_ENGINE, 2).found
    assert simulated
    cuts = shardings_with_effect(candidate, [simulated])
    (found,) = diverge(candidate, list(cuts.values()), windows, CPU)

    root = tiny_model("qwen2", tmp_path / "again", intermediate_size=9 * 128, **SMALL)
    model: Any = AutoModelForCausalLM.from_pretrained(root, dtype=torch.float64)
    packed = {at.module: gptq_format(candidate.config).load(candidate, at.module) for at in decoder_linears(source)}
    for module, codes in packed.items():
        model.get_submodule(module).weight.data = codes.weight_rows(0, codes.qweight.shape[1]).double()
    with torch.no_grad():
        whole = model(torch.stack(windows)).logits[:, :-1].log_softmax(-1)
        for module, codes in packed.items():
            if module.endswith(("o_proj", "down_proj")):
                model.set_submodule(module, RankSum(codes, 2))
        ranks = model(torch.stack(windows)).logits[:, :-1].log_softmax(-1)
    kl = (whole.exp() * (whole - ranks)).sum(-1)
    assert found.divergence
    assert found.divergence.mean == pytest.approx(kl.mean().item(), rel=1e-3)
    assert found.divergence.mean > 1e-3
    assert found.divergence.top1_agreement == (whole.argmax(-1) == ranks.argmax(-1)).double().mean().item()


def test_a_target_is_an_engine_and_a_number() -> None:
    assert Target.parse("vllm:8") == Target(engine="vllm", degree=8)
    for text in ("vllm", "vllm:", "vllm:0", "vllm:two", "vlm:2"):
        with pytest.raises(InputRefused):
            Target.parse(text)
