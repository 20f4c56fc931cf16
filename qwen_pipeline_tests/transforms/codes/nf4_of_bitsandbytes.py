"""Rounds random weights to NF4 with bitsandbytes, stores them and restores them.

The file ``nf4_of_bitsandbytes.safetensors`` is of version 0.50.2.

To make it again, in an environment with bitsandbytes::

    python -m qwen_pipeline_tests.transforms.codes.nf4_of_bitsandbytes OUT
"""

import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

SHAPES = {"whole rows": (48, 64), "blocks across rows": (40, 96), "last block not full": (33, 50)}


def main(out: str) -> None:
    functional: Any = import_module("bitsandbytes.functional")
    generator = torch.Generator().manual_seed(1)
    tensors: dict[str, torch.Tensor] = {}
    for name, shape in SHAPES.items():
        weight = (torch.randn(shape, generator=generator) * 0.05).bfloat16()
        tensors[f"{name}/weight"] = weight
        for statistics in ("single", "double"):
            codes, state = functional.quantize_4bit(
                weight, blocksize=64, quant_type="nf4", compress_statistics=statistics == "double"
            )
            tensors[f"{name}/{statistics}"] = functional.dequantize_4bit(codes, state).reshape(shape).clone()
            tensors[f"{name}/{statistics}/stored"] = codes
            parts = state.as_dict(packed=True).items()
            tensors |= {f"{name}/{statistics}/stored.{part}": tensor.clone() for part, tensor in parts}
    save_file(tensors, Path(out))


if __name__ == "__main__":
    main(*sys.argv[1:])
