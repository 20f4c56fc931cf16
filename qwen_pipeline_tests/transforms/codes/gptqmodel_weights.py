"""Weights that GPTQModel computes from codes; run with ``python -m`` in the environment of the engine gptqmodel.

Arguments: safetensors file of symmetric codes of format ``gptq``, output file, JSON list of modules, bits, group size.
"""

import json
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file


def write_weights(source: Path, destination: Path, modules: Sequence[str], *, bits: int, group_size: int) -> None:
    """Write the float32 weight [O, I] of each module."""
    linear_class: Any = import_module("gptqmodel.nn_modules.qlinear.torch").TorchLinear
    tensors, weights = load_file(source), {}
    for module in modules:
        codes = {code: tensors[f"{module}.{code}"] for code in ("qweight", "qzeros", "scales", "g_idx")}
        linear = linear_class(
            bits=bits,
            group_size=group_size,
            sym=True,
            desc_act=False,
            bias=False,
            in_features=codes["g_idx"].numel(),
            out_features=codes["scales"].shape[1],
            register_buffers=True,
        )
        linear.load_state_dict(codes)
        linear.qzeros += 0x11111111  # GPTQModel computes with the format gptq_v2
        linear.scales = linear.scales.float()
        weights[module] = linear.dequantize_weight().T.contiguous().float()
    save_file(weights, destination)


if __name__ == "__main__":
    source, destination, modules, bits, group_size = sys.argv[1:]
    write_weights(Path(source), Path(destination), json.loads(modules), bits=int(bits), group_size=int(group_size))
