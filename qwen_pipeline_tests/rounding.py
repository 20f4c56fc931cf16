"""Whole checkpoints quantized in milliseconds by rounding to the nearest code: no solver, no calibration."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file

from qwen_pipeline.checkpoint.lazy import Checkpoint, open_checkpoint
from qwen_pipeline.qwen.linears import Linear, decoder_linears, load_weight
from qwen_pipeline.transforms.codes.gptq import gptq_format, pack_rows

MIDDLE = 8


def round_to_codes(source: Path, out: Path, *, group_size: int) -> Path:
    """Quantize every decoder linear of ``source`` to symmetric 4-bit codes of format ``gptq``; return ``out``.

    The last group may be incomplete, as quantizers write it.
    """
    shutil.copytree(source, out, ignore=shutil.ignore_patterns("*.safetensors*", "manifest.json"))
    checkpoint = open_checkpoint(source)
    linears = decoder_linears(checkpoint)
    weights = {linear.tensor for linear in linears}
    tensors = {name: checkpoint.load(name) for name in checkpoint if name not in weights}
    for linear in linears:
        codes = rounded(load_weight(checkpoint, linear).float(), group_size)
        tensors |= {f"{linear.module}.{code}": tensor for code, tensor in codes.items()}
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((out / "config.json").read_text())
    settings = {"quant_method": "gptq", "bits": 4, "group_size": group_size, "sym": True, "desc_act": False}
    (out / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
    return out


def rounded(w_OI: torch.Tensor, group_size: int) -> dict[str, torch.Tensor]:
    """Return the four tensors of the codes of a weight."""
    outputs, inputs = w_OI.shape
    g_idx = torch.arange(inputs, dtype=torch.int32) // group_size
    scales_GO = torch.stack([group.abs().amax(dim=1) for group in w_OI.split(group_size, dim=1)]) / 7.5
    scales_GO = torch.where(scales_GO > 0, scales_GO, 2 / 15).half()
    codes_IO = (w_OI.T / scales_GO.float()[g_idx.long()]).round().clamp(-MIDDLE, MIDDLE - 1) + MIDDLE
    zeros = torch.full((len(scales_GO), outputs), MIDDLE - 1)
    return {
        "qweight": pack_rows(codes_IO, 4).contiguous(),
        "qzeros": pack_rows(zeros.T, 4).T.contiguous(),
        "scales": scales_GO.contiguous(),
        "g_idx": g_idx,
    }


def dequantized(source: Checkpoint, codes: Checkpoint, linears: Sequence[Linear]) -> dict[str, torch.Tensor]:
    """Return the source's tensors with those of linear layers computed from codes, in the same stacks."""
    tensors, form = {name: source.load(name) for name in source}, gptq_format(codes.config)
    tensors |= {linear.tensor: tensors[linear.tensor].float() for linear in linears}
    for linear in linears:
        weight_OI = form.load(codes, linear.module).weight_rows(0, linear.out_features)
        if part := linear.expert_slice:
            expert = tensors[linear.tensor][part.expert]
            (expert.T if part.transposed else expert)[part.start : part.start + linear.out_features] = weight_OI
        else:
            tensors[linear.tensor] = weight_OI.contiguous()
    return tensors


def save_dequantized(source: Path, codes: Path, out: Path) -> Path:
    """Save the weights computed from codes of ``source`` as a checkpoint in full precision; return ``out``."""
    shutil.copytree(source, out, ignore=shutil.ignore_patterns("*.safetensors*"))
    checkpoint = open_checkpoint(source)
    tensors = dequantized(checkpoint, open_checkpoint(codes), decoder_linears(checkpoint))
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return out
