"""8-bit floats against compressed-tensors' own compressor and config, and Transformers' own quantizer."""

from importlib import import_module
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers.integrations.finegrained_fp8 import Fp8Dequantize, Fp8Quantize

from qwen_pipeline.checkpoint.lazy import Checkpoint, open_checkpoint
from qwen_pipeline.errors import CheckpointRefused
from qwen_pipeline.qwen.linears import ExpertSlice, Linear, decoder_linears
from qwen_pipeline.qwen.methods import FP8_LAYOUTS, Fp8Layout, Method, layout_of
from qwen_pipeline.transforms.codes.dequantize import dequantized
from qwen_pipeline.transforms.codes.fp8 import Fp8Format, fp8_format
from qwen_pipeline.transforms.codes.to_fp8 import as_fp8
from qwen_pipeline_tests.in_memory import blocks_of, checkpoint_of, loaded, random_stack
from qwen_pipeline_tests.tiny import tiny_model

PRESETS: dict[Method, str] = {"fp8-block": "FP8_BLOCK", "fp8-dynamic": "FP8_DYNAMIC"}
OUTPUTS, INPUTS = 300, 200
MODULE = "model.layers.0.mlp.up_proj"


def preset(method: Method) -> Any:
    return import_module("compressed_tensors.quantization.quant_scheme").preset_name_to_scheme(
        PRESETS[method], ["Linear"]
    )


def difficult_weight(dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """Return a weight with outliers, a row and a block of zeros, and magnitudes from subnormal to large."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(OUTPUTS, INPUTS, generator=generator) * 0.02
    weight *= torch.logspace(-6, 3, OUTPUTS)[:, None]
    weight[7], weight[:128, 128:], weight[40, 3] = 0, 0, 100
    weight[9] = torch.tensor(2.0) ** -120
    return weight.to(dtype)


def layer_of(weight: torch.Tensor) -> tuple[Checkpoint, Linear]:
    """Return a checkpoint of one weight, and its layer."""
    outputs, inputs = weight.shape
    config = {"model_type": "qwen2", "intermediate_size": outputs, "hidden_size": inputs}
    name = f"{MODULE}.weight"
    linear = Linear(module=MODULE, layer=0, kind="mlp.up_proj", out_features=outputs, in_features=inputs, tensor=name)
    return checkpoint_of({name: weight}, config), linear


def rounded(weight: torch.Tensor, layout: Fp8Layout, *, block_bytes: int = 20_000) -> Checkpoint:
    """Return one layer as 8-bit floats, read in blocks of rows that do not end where those of scales do."""
    source, linear = layer_of(weight)
    with blocks_of(block_bytes):
        return loaded(as_fp8(source, [linear], layout))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("method", PRESETS)
def test_codes_and_scales_are_those_of_compressed_tensors(method: Method, dtype: torch.dtype) -> None:
    weight, scheme = difficult_weight(dtype), preset(method)
    found = rounded(weight, layout_of(method))
    scale = found.load(f"{MODULE}.weight_scale")
    rows, columns = scheme.weights.block_structure or (1, INPUTS)
    helpers: Any = import_module("compressed_tensors.quantization.utils.helpers")
    blocks = [
        [helpers.calculate_qparams(block.min(), block.max(), scheme.weights)[0] for block in part.split(columns, 1)]
        for part in weight.float().split(rows)
    ]
    expected = torch.tensor(blocks)
    assert torch.equal(scale, expected)
    compressor: Any = import_module("compressed_tensors.compressors.naive_quantized.base").FloatQuantizationCompressor
    compressed = compressor.compress({"weight": weight, "weight_scale": expected}, scheme)
    codes = found.load(f"{MODULE}.weight")
    assert codes.dtype == compressed["weight"].dtype
    assert torch.equal(codes.view(torch.uint8), compressed["weight"].view(torch.uint8))
    exact = (
        codes.double() * scale.double().repeat_interleave(rows, 0)[:OUTPUTS].repeat_interleave(columns, 1)[:, :INPUTS]
    )
    form = fp8_format(found.config["quantization_config"])
    assert torch.equal(form.load(found, MODULE).weight_rows(5, 250).double(), exact[5:250].float().double())


@pytest.mark.parametrize("method", PRESETS)
def test_the_config_is_that_of_the_scheme(method: Method) -> None:
    form = Fp8Format(layout=layout_of(method))
    config: Any = import_module("compressed_tensors.quantization").QuantizationConfig
    read = config.model_validate(form.settings(["lm_head"]))
    (group,) = read.config_groups.values()
    for part in ("weights", "input_activations"):
        assert getattr(group, part) == getattr(preset(method), part)
    assert read.ignore == ["lm_head"]
    assert fp8_format(read.model_dump(mode="json")) == form


def test_transformers_reads_blocks_and_makes_the_same_ones() -> None:
    generator = torch.Generator().manual_seed(1)
    weight = (torch.randn(256, 384, generator=generator) * 0.02).bfloat16()
    found = rounded(weight, FP8_LAYOUTS["fp8"])
    codes, scale = (found.load(f"{MODULE}.{name}") for name in ("weight", "weight_scale_inv"))
    dequantize: Any = Fp8Dequantize(None)
    read = dequantize._dequantize_one(codes, scale, torch.float32)
    form = fp8_format(found.config["quantization_config"])
    assert torch.equal(read, form.load(found, MODULE).weight_rows(0, 256))
    settings = SimpleNamespace(weight_block_size=[128, 128], scale_fmt=None)
    quantizer: Any = Fp8Quantize(SimpleNamespace(quantization_config=settings))
    own = quantizer._quantize_one(f"{MODULE}.weight", weight)
    torch.testing.assert_close(scale, own[f"{MODULE}.weight_scale_inv"], rtol=2**-22, atol=0)
    steps = (codes.view(torch.int8).int() - own[f"{MODULE}.weight"].view(torch.int8).int()).abs()
    assert steps.max() <= 1  # ties, since Transformers multiplies by the reciprocal
    assert (steps > 0).float().mean() < 1e-3


def test_scales_without_codes_are_the_same_after_an_interruption() -> None:
    """An attempt that resumes has the codes on disk already, and computes only the scales."""
    weight = difficult_weight()
    source, linear = layer_of(weight)
    for layout in FP8_LAYOUTS.values():
        alone = as_fp8(source, [linear], layout).load(f"{MODULE}.{layout.scale}")
        assert torch.equal(alone, rounded(weight, layout).load(f"{MODULE}.{layout.scale}"))


@pytest.mark.parametrize("transposed", [False, True])
def test_experts_in_a_stack_become_layers(transposed: bool) -> None:
    stack = random_stack(256, 128, 3, transposed=transposed)
    down, up = (stack.load(f"model.layers.0.mlp.experts.{name}") for name in ("down_proj", "gate_up_proj"))
    down, up = (down.mT, up.mT) if transposed else (down, up)
    expected = {f"{n}.down_proj": down[n] for n in range(3)}
    expected |= {f"{n}.gate_proj": up[n, :256] for n in range(3)} | {f"{n}.up_proj": up[n, 256:] for n in range(3)}
    found = as_fp8(stack, expert_linears(stack, transposed=transposed), FP8_LAYOUTS["fp8"])
    weights = dequantized(loaded(found))
    for name, weight in expected.items():
        alone = dequantized(rounded(weight.contiguous(), FP8_LAYOUTS["fp8"]))
        assert torch.equal(weights.load(f"model.layers.0.mlp.experts.{name}.weight"), alone.load(f"{MODULE}.weight"))
    assert len(found) == 18


def expert_linears(stack: Checkpoint, *, transposed: bool) -> list[Linear]:
    """Return the linear layers of three experts that are stored in stacks, of 256 channels and 128 hidden ones."""
    found: list[Linear] = []
    for name, outputs, inputs in (("gate", 256, 128), ("up", 256, 128), ("down", 128, 256)):
        tensor = f"model.layers.0.mlp.experts.{'down_proj' if name == 'down' else 'gate_up_proj'}"
        for expert in range(3):
            part = ExpertSlice(
                expert=expert, start=256 if name == "up" else 0, transposed=transposed, stack=stack[tensor].shape
            )
            kind = f"mlp.experts.{expert}.{name}_proj"
            found.append(
                Linear(
                    module=f"model.layers.0.{kind}",
                    layer=0,
                    kind=kind,
                    out_features=outputs,
                    in_features=inputs,
                    tensor=tensor,
                    expert_slice=part,
                )
            )
    return found


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"quant_method": "fp8", "activation_scheme": "static", "weight_block_size": [128, 128]}, "static"),
        ({"quant_method": "fp8", "weight_block_size": [64, 64]}, "64"),
        ({"quant_method": "fp8"}, r"\[\]"),
        ({"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": {}}, "float-quantized"),
    ],
)
def test_other_layouts_are_refused_by_name(settings: dict[str, Any], named: str) -> None:
    with pytest.raises(CheckpointRefused, match=named):
        fp8_format(settings)


def test_layers_in_full_precision_are_named_as_engines_look_for_them(tmp_path_factory: pytest.TempPathFactory) -> None:
    root = tiny_model("qwen3_5_moe", tmp_path_factory.mktemp("model"), layout="mtp")
    source = open_checkpoint(root)
    linears = decoder_linears(source)
    for layout in FP8_LAYOUTS.values():
        found = as_fp8(source, linears, layout)
        settings = found.config["quantization_config"]
        form = fp8_format(settings)
        coded = [linear.module for linear in linears]
        assert not [module for module in coded if form.excluded(settings, module)]
        assert {f"{module}.weight" for module in coded} <= found.keys()
        left = [name for name, spec in found.items() if len(spec.shape) == 2 and spec.dtype == "BF16"]
        named = [name for name in left if form.excluded(settings, name.removesuffix(".weight"))]
        assert [name for name in left if name not in named and "embed" not in name] == []
        assert any(name.startswith("mtp.") for name in named)
        assert any("visual" in name for name in named)
        assert any(name.endswith("mlp.gate.weight") for name in named)
        entries = settings[form.exclusions]
        assert ("re:.*mtp.*" in entries) == (layout.container == "compressed-tensors")
        assert "lm_head" in entries
