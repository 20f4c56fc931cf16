"""Input groups: the tokens that each Hessian is computed from, with masks and with routing."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from qwen_pipeline.checkpoint.lazy import Checkpoint, open_checkpoint
from qwen_pipeline.errors import InputRefused
from qwen_pipeline.layerwise.forward import LayerStream
from qwen_pipeline.layerwise.model import ComputeContext
from qwen_pipeline.quantization.input_groups import LayerPass, input_groups, require_known
from qwen_pipeline.qwen.linears import Linear, decoder_linears
from qwen_pipeline_tests.tiny import load_tiny, tiny_model

CPU = ComputeContext(device=torch.device("cpu"), dtype=torch.float32)
WINDOWS = torch.randint(3, 250, (4, 16), generator=torch.Generator().manual_seed(0))
MASK = torch.arange(16) < torch.tensor([[16], [5], [9], [1]])
EXPERTS = "mlp.experts"


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model("qwen2_moe", tmp_path_factory.mktemp("groups") / "mixture")


@torch.inference_mode()
def first_layer(
    checkpoint: Checkpoint, mask: Tensor, *, all_experts: bool, within: str = ""
) -> dict[str, tuple[int, Tensor]]:
    """Return kind -> tokens and Hessian, for the linear layers of the first layer whose kind begins with ``within``."""
    stream = LayerStream(checkpoint, WINDOWS.split(2), CPU)
    module = next(stream.iter_layers())
    linears = [each for each in decoder_linears(checkpoint) if each.layer == 0 and each.kind.startswith(within)]
    masks = [part.flatten() for part in mask.split(2)]
    found: dict[str, tuple[int, Tensor]] = {}
    passes = [LayerPass(stream=stream, layer=0, module=module)]
    for group in input_groups(passes, masks, linears, all_experts=all_experts):
        tokens, hessian = group.hessian.tokens, group.hessian.pop_mean()
        found |= {linear.kind: (tokens, hessian) for linear in group.linears}
        for linear, weight in zip(group.linears, group.weights, strict=True):
            assert weight.shape == (linear.out_features, linear.in_features)
    assert found.keys() == {linear.kind for linear in linears}
    return found


def expert_inputs(root: Path) -> tuple[Tensor, Tensor]:
    """Return the oracle: inputs and chosen experts of the first layer, in Transformers' own model."""
    model: Any = load_tiny(root)
    seen: list[tuple[Tensor, Tensor]] = []
    experts = model.get_submodule(f"model.layers.0.{EXPERTS}")
    experts.register_forward_pre_hook(lambda _, given: seen.append((given[0], given[1])))
    with torch.no_grad():
        model(input_ids=WINDOWS)
    return seen[0]


@pytest.mark.parametrize("mask", [MASK, torch.ones_like(MASK)])
def test_an_expert_gets_the_unmasked_tokens_that_are_routed_to_it(mixture: Path, mask: Tensor) -> None:
    x_NH, chosen_NK = expert_inputs(mixture)
    found = first_layer(open_checkpoint(mixture), mask, all_experts=False)
    assert found["self_attn.q_proj"][0] == mask.sum()
    for expert in range(4):
        own = x_NH[mask.flatten() & (chosen_NK == expert).any(dim=-1)]
        for kind in ("gate_proj", "up_proj"):
            tokens, hessian = found[f"{EXPERTS}.{expert}.{kind}"]
            assert tokens == len(own)
            torch.testing.assert_close(hessian, 2 / max(len(own), 1) * own.T @ own if len(own) else torch.eye(64))


@pytest.mark.parametrize(
    ("family", "first"), [("qwen3", "self_attn.q_proj"), ("qwen3_5_text", "linear_attn.in_proj_qkv")]
)
@torch.inference_mode()
def test_attention_is_computed_once_and_cached(tmp_path: Path, family: str, first: str) -> None:
    """Once for each batch, and once more for the type of its return value; the layer's outputs are the same."""
    checkpoint = open_checkpoint(tiny_model(family, tmp_path / "model"))
    linears = [linear for linear in decoder_linears(checkpoint) if linear.layer == 0]
    streams = [LayerStream(checkpoint, WINDOWS.split(2), CPU) for _ in ("kept", "computed")]
    kept, computed = (next(stream.iter_layers()) for stream in streams)
    calls = list[str]()
    kept.get_submodule(first).register_forward_hook(lambda *_: calls.append(first))
    passes = [LayerPass(stream=streams[0], layer=0, module=kept)]
    for _ in input_groups(passes, [torch.ones(32, dtype=torch.bool)] * 2, linears, all_experts=False):
        pass
    assert len(calls) == 2 + 1
    for stream, module in zip(streams, (kept, computed), strict=True):
        stream.run(0, module)
    assert all(torch.equal(one, other) for one, other in zip(*(stream.hidden for stream in streams), strict=True))


def test_all_experts_get_every_token(mixture: Path) -> None:
    found = first_layer(open_checkpoint(mixture), MASK, all_experts=True)
    tokens, hessian = found["mlp.shared_expert.gate_proj"]
    for expert in range(4):
        own = found[f"{EXPERTS}.{expert}.up_proj"]
        assert own[0] == tokens == MASK.sum()
        torch.testing.assert_close(own[1], hessian)
        assert found[f"{EXPERTS}.{expert}.down_proj"][0] == tokens


def test_an_unknown_linear_layer_is_refused() -> None:
    odd = Linear(
        module="model.layers.0.mlp.odd_proj", layer=0, kind="mlp.odd_proj", out_features=32, in_features=32, tensor="t"
    )
    with pytest.raises(InputRefused, match="odd_proj"):
        require_known([odd])


def test_attention_that_keeps_its_weights_is_computed_once(mixture: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint, cached = open_checkpoint(mixture), list[str]()
    cache = LayerStream.cache_outputs

    def counted(self: LayerStream, layer: int, module: Any, last: str, inputs: list[Tensor]) -> None:
        cached.append(last)
        cache(self, layer, module, last, inputs)

    whole = first_layer(checkpoint, MASK, all_experts=False)
    monkeypatch.setattr(LayerStream, "cache_outputs", counted)
    found = first_layer(checkpoint, MASK, all_experts=False, within="mlp")
    assert cached == ["self_attn.o_proj"]
    assert found.keys() == {kind for kind in whole if kind.startswith("mlp")}
    for kind, (tokens, hessian) in found.items():
        assert tokens == whole[kind][0]
        assert torch.equal(hessian, whole[kind][1])
