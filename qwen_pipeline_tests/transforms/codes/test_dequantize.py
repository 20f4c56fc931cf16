"""Quantized models in full precision: the weights of Transformers, compressed-tensors and a slow implementation."""

import json
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.integrations.finegrained_fp8 import Fp8Dequantize

from qwen_pipeline.checkpoint.lazy import Checkpoint, open_checkpoint
from qwen_pipeline.errors import CheckpointRefused
from qwen_pipeline.qwen.config import require_full_precision
from qwen_pipeline.transforms.codes.dequantize import dequantized
from qwen_pipeline_tests.codes import METHODS, Method, Packing, write_checkpoint_of_codes
from qwen_pipeline_tests.in_memory import checkpoint_of
from qwen_pipeline_tests.tiny import tiny_qwen2
from qwen_pipeline_tests.transforms.codes.nf4_of_bitsandbytes import SHAPES

NAME = "model.layers.0.mlp.up_proj.weight"
GOLDEN = load_file(Path(__file__).with_name("nf4_of_bitsandbytes.safetensors"))
Tensors = dict[str, torch.Tensor]


def fp8(weight: torch.Tensor, rows: int, columns: int) -> Tensors:
    """Return a weight in blocks of 8-bit floats, with the largest value of each block at the end of their range."""
    outputs, inputs = weight.shape[-2:]
    grid = torch.stack(
        [
            torch.stack([block.abs().amax((-2, -1)) for block in part.split(columns, -1)], -1)
            for part in weight.float().split(rows, -2)
        ],
        -2,
    )
    scale = grid / torch.finfo(torch.float8_e4m3fn).max
    spread = scale.repeat_interleave(rows, -2)[..., :outputs, :].repeat_interleave(columns, -1)[..., :inputs]
    return {"": (weight.float() / spread).to(torch.float8_e4m3fn), "_scale_inv": scale}


def read_in_blocks(checkpoint: Checkpoint, name: str) -> torch.Tensor:
    rows = checkpoint[name].rows
    return torch.cat([checkpoint.load(name, slice(start, start + 3)) for start in range(0, rows, 3)])


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 0.1


@pytest.mark.parametrize("shape", [(256, 384), (2, 128, 256)], ids=["matrix", "stack of experts"])
def test_blocks_of_8_bit_floats_are_what_transformers_reads(shape: tuple[int, ...]) -> None:
    stored = fp8(random(*shape), 128, 128)
    settings = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    config = {"model_type": "qwen3", "dtype": "bfloat16", "quantization_config": settings}
    source = checkpoint_of({NAME + ending: tensor for ending, tensor in stored.items()}, config)
    found = dequantized(source)
    oracle: Any = Fp8Dequantize(None)
    expected = oracle._dequantize_one(stored[""], stored["_scale_inv"], torch.bfloat16)
    assert torch.equal(read_in_blocks(found, NAME), expected)
    assert list(found) == [NAME]
    assert "quantization_config" not in found.config


def test_a_last_block_may_be_smaller() -> None:
    weight = random(200, 300)
    stored = fp8(weight, 128, 128)
    settings = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    source = checkpoint_of(
        {NAME + ending: tensor for ending, tensor in stored.items()},
        {"model_type": "qwen3", "dtype": "float32", "quantization_config": settings},
    )
    found = read_in_blocks(dequantized(source), NAME)
    for row, column in ((0, 0), (127, 128), (128, 127), (199, 299)):
        scale = stored["_scale_inv"][row // 128, column // 128].double()
        assert found[row, column].double() == (stored[""][row, column].double() * scale).float().double()
    assert (found - weight).abs().max() < 0.07 * weight.abs().max()


@pytest.mark.parametrize("strategy", ["tensor", "channel", "block"])
def test_8_bit_floats_of_compressed_tensors_are_what_the_package_reads(strategy: str) -> None:
    forward: Any = import_module("compressed_tensors.quantization.lifecycle.forward")
    args: Any = import_module("compressed_tensors.quantization").QuantizationArgs
    weight = random(64, 96)
    sizes = {"tensor": (64, 96), "channel": (1, 96), "block": (32, 32)}[strategy]
    stored = fp8(weight, *sizes)
    scale = stored["_scale_inv"].bfloat16()
    scale = scale.reshape(1) if strategy == "tensor" else scale
    scheme = args(
        num_bits=8, type="float", strategy=strategy, block_structure=[32, 32] if strategy == "block" else None
    )
    expected = forward.dequantize(x_q=stored[""], scale=scale, args=scheme, dtype=torch.float32).bfloat16()
    source = checkpoint_of(
        {NAME: stored[""], f"{NAME}_scale": scale, NAME.replace("weight", "input_scale"): torch.ones(1)},
        {
            "model_type": "qwen3",
            "torch_dtype": "bfloat16",
            "quantization_config": {"quant_method": "compressed-tensors"},
        },
    )
    assert list(dequantized(source)) == [NAME]
    found = read_in_blocks(dequantized(source), NAME)
    exact = (stored[""].double() * spread(scale.double(), weight.shape)).bfloat16()
    assert torch.equal(found, exact)
    assert (found.float() - expected.float()).abs().max() <= 2**-8 * weight.abs().max()


def spread(scale: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    grid = scale.reshape(scale.shape if scale.dim() == 2 else (1, 1))
    return grid.repeat_interleave(shape[0] // grid.shape[0], 0).repeat_interleave(shape[1] // grid.shape[1], 1)


@pytest.mark.parametrize("sym", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("method", METHODS)
def test_packed_codes_are_the_float64_weights_rounded_once(method: Method, sym: bool, tmp_path: Path) -> None:
    packing = Packing(method=method, sym=sym, desc_act=method != "awq")
    layers = write_checkpoint_of_codes(tmp_path / "codes", packing, width=48, config={"dtype": "bfloat16"})
    source = open_checkpoint(tmp_path / "codes")
    found = dequantized(source)
    require_full_precision(found, because="", remedy="")
    for module, layer in layers.items():
        assert torch.equal(read_in_blocks(found, f"{module}.weight"), layer.weight.bfloat16())
    kept = {"model.layers.0.mlp.gate_proj.bias", "model.norm.weight"}
    assert found.keys() == {f"{module}.weight" for module in layers} | kept
    assert all(torch.equal(found.load(name), source.load(name)) for name in kept)


@pytest.mark.parametrize("statistics", ["single", "double"])
@pytest.mark.parametrize("case", SHAPES)
def test_4_bit_codes_of_bitsandbytes_are_restored_as_it_restores_them(case: str, statistics: str) -> None:
    stored, expected = f"{case}/{statistics}/stored", GOLDEN[f"{case}/{statistics}"]
    tensors = {NAME + name.removeprefix(stored): each for name, each in GOLDEN.items() if name.startswith(stored)}
    settings = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    found = dequantized(checkpoint_of(tensors, {"model_type": "qwen2", "quantization_config": settings}))
    assert list(found) == [NAME]
    assert torch.equal(read_in_blocks(found, NAME), expected)
    assert expected.dtype == found[NAME].torch_dtype
    del tensors[f"{NAME}.absmax"]
    with pytest.raises(CheckpointRefused, match=rf"{NAME} is in 4-bit codes.*absmax"):
        dequantized(checkpoint_of(tensors, {"model_type": "qwen2", "quantization_config": settings}))


def test_full_precision_is_returned_as_it_is(tmp_path: Path) -> None:
    base = open_checkpoint(tiny_qwen2(tmp_path / "base"))
    assert dequantized(base) is base


def test_a_format_that_is_not_read_is_refused() -> None:
    config = {"model_type": "qwen2", "quantization_config": {"quant_method": "bitsandbytes"}}
    tensors = {NAME: torch.zeros(8, 1, dtype=torch.uint8), f"{NAME}.absmax": torch.ones(1)}
    with pytest.raises(CheckpointRefused, match=r"bitsandbytes.*up_proj\.weight, U8"):
        dequantized(checkpoint_of(tensors, config))


@pytest.mark.parametrize("damage", ["no scale", "two scales", "shape"])
def test_a_scale_that_does_not_fit_is_refused(damage: str) -> None:
    stored = fp8(random(256, 256), 128, 128)
    tensors = {NAME + ending: tensor for ending, tensor in stored.items()}
    if damage == "no scale":
        del tensors[f"{NAME}_scale_inv"]
    if damage == "two scales":
        tensors[f"{NAME}_scale"] = torch.ones(1)
    if damage == "shape":
        tensors[f"{NAME}_scale_inv"] = torch.ones(3, 2)
    config = {"model_type": "qwen2", "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}
    with pytest.raises(CheckpointRefused, match=NAME):
        dequantized(checkpoint_of(tensors, config))


def to_fp8(root: Path) -> Path:
    """Store the decoder's linear layers of a model in blocks of 8-bit floats, as published FP8 models do."""
    tensors = load_file(root / "model.safetensors")
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        tensors |= {name + ending: tensor for ending, tensor in fp8(tensors.pop(name), 32, 32).items()}
    save_file(tensors, root / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((root / "config.json").read_bytes())
    settings = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [32, 32]}
    (root / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
    return root
