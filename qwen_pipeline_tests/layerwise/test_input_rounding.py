"""8-bit floats in the streamed forward pass, against Transformers with compressed-tensors and a slow computation."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from qwen_pipeline.checkpoint.lazy import open_checkpoint
from qwen_pipeline.layerwise.forward import LayerStream, advance, logit_blocks
from qwen_pipeline.layerwise.input_rounding import InputRounding
from qwen_pipeline.layerwise.model import ComputeContext
from qwen_pipeline.quantization.spec import QuantSpec
from qwen_pipeline.qwen.methods import Method
from qwen_pipeline.stages.quantize import quantize
from qwen_pipeline_tests.tiny import load_tiny, tiny_model

TOKENS = torch.randint(0, 256, (2, 24), generator=torch.Generator().manual_seed(0))
CPU = ComputeContext(device=torch.device("cpu"), dtype=torch.float32)
ROUNDING = InputRounding(128)
SIZES: dict[str, Any] = {
    "hidden_size": 128, "intermediate_size": 256, "head_dim": 64, "num_attention_heads": 4, "num_key_value_heads": 2,
    "moe_intermediate_size": 128, "shared_expert_intermediate_size": 128, "linear_key_head_dim": 64,
    "linear_value_head_dim": 64, "linear_num_key_heads": 2, "linear_num_value_heads": 2,
}  # fmt: skip


def streamed(root: Path) -> Tensor:
    """Return the logits [B, T - 1, V] of the streamed forward pass."""
    stream = LayerStream(open_checkpoint(root), [TOKENS], CPU)
    for _ in advance([stream]):
        pass
    return torch.cat([block.values[0] for block in logit_blocks([stream], CPU)], dim=1).unflatten(0, (len(TOKENS), -1))


def nearest(values: Tensor) -> Tensor:
    """Round to E4M3 in float64: 3 bits after the leading one, and steps of 2**-9 below 2**-6."""
    exponent = torch.floor(torch.log2(values.abs().clamp(min=2.0**-6)))
    step = 2.0 ** (exponent - 3)
    return torch.round(values / step) * step  # ties to even


def slowly_rounded(inputs: Tensor, per_scale: int | None) -> Tensor:
    blocks = inputs.double().unflatten(-1, (-1, per_scale or inputs.shape[-1]))
    scales = blocks.abs().amax(-1, keepdim=True) / 448
    return (nearest(blocks / scales) * scales).flatten(-2)


def quantized(root: Path, method: Method) -> Path:
    return quantize(source=root, destination=root.with_name(method), spec=QuantSpec(method=method)).path


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model("qwen3", tmp_path_factory.mktemp("dense") / "source", dtype=torch.bfloat16, **SIZES)


@pytest.mark.parametrize("per_scale", [None, 128])
def test_inputs_are_rounded_to_the_nearest_float(per_scale: int | None) -> None:
    inputs = torch.randn(3, 5, 256, generator=torch.Generator().manual_seed(1)) * torch.logspace(-4, 1, 256)
    inputs[0, 0, 0] = 0
    found = InputRounding(per_scale).round(inputs)
    torch.testing.assert_close(found.double(), slowly_rounded(inputs, per_scale), rtol=1e-6, atol=1e-12)
    assert not InputRounding(per_scale).round(torch.zeros(2, 256)).any()


@pytest.mark.parametrize("method", ["fp8-dynamic", "fp8-block"])
def test_logits_are_those_of_transformers_with_compressed_tensors(dense: Path, method: Method) -> None:
    root = quantized(dense, method)
    model: Any = AutoModelForCausalLM.from_pretrained(root, dtype=torch.float32).eval()
    with torch.inference_mode():
        expected = model(TOKENS).logits[:, :-1]
    found = streamed(root)
    assert (found - expected).abs().max() < 1e-3 * expected.abs().max()
    unrounded = streamed(dense)
    assert (found - unrounded).abs().max() > 1e-2 * expected.abs().max()


@pytest.mark.parametrize("family", ["qwen3", "qwen3_5_moe"])
def test_every_layer_computes_with_rounded_inputs(family: str, dense: Path, tmp_path: Path) -> None:
    """Experts too, which Transformers keeps in one parameter and multiplies with other functions."""
    source = dense if family == "qwen3" else tiny_model(family, tmp_path / "source", dtype=torch.bfloat16, **SIZES)
    root = quantized(source, "fp8")
    reference: Any = load_tiny(source)
    with_slow_floats(reference, root)
    with torch.inference_mode():
        expected = reference(input_ids=TOKENS).logits[:, :-1]
    found = streamed(root)
    assert (found - expected).abs().max() < 2e-3 * expected.abs().max()


def with_slow_floats(model: Any, root: Path) -> None:
    """Give a full-precision model the weights of 8-bit floats, and let it round inputs, experts one by one."""
    tensors: dict[str, Tensor] = {}
    for file in root.glob("*.safetensors"):
        tensors |= load_file(file)
    weights = {
        name.removesuffix("_scale_inv"): tensors[name.removesuffix("_scale_inv")].double()
        * scale.double().repeat_interleave(128, 0).repeat_interleave(128, 1)
        for name, scale in tensors.items()
        if name.endswith("_scale_inv")
    }
    own = {name.replace("model.language_model.", "model."): weight.float() for name, weight in weights.items()}
    for name, module in model.named_modules():
        at = name.replace("model.language_model.", "model.")
        if isinstance(module, nn.Linear) and f"{at}.weight" in own:
            module.weight.data = own.pop(f"{at}.weight")
            module.register_forward_pre_hook(lambda _, inputs: (ROUNDING.round(inputs[0]),))
        if name.endswith(".experts"):
            module.forward = slow_experts(
                {int(key.split(".")[-3]): None for key in own if key.startswith(f"{at}.")},
                {key.removeprefix(f"{at}."): own.pop(key) for key in list(own) if key.startswith(f"{at}.")},
            )
    assert not own, list(own)


def slow_experts(numbers: dict[int, None], weights: dict[str, Tensor]) -> Any:
    def forward(hidden: Tensor, chosen: Tensor, shares: Tensor) -> Tensor:
        out = torch.zeros_like(hidden)
        for number in numbers:
            gate, up, down = (weights[f"{number}.{name}_proj.weight"] for name in ("gate", "up", "down"))
            for token in range(len(hidden)):
                for place in (chosen[token] == number).nonzero().flatten().tolist():
                    x = ROUNDING.round(hidden[token])
                    inner = ROUNDING.round(nn.functional.silu(gate @ x) * (up @ x))
                    out[token] += shares[token, place] * (down @ inner)
        return out

    return forward
