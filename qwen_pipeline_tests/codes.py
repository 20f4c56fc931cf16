"""An independent, slow implementation of packed layers: random codes, written and read bit by bit in each format.

It shares no code with the package. A word is a Python integer; a weight is ``scale * (code - zero)`` in float64.
"""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file

Method = Literal["gptq", "gptq_v2", "awq", "compressed-tensors"]
METHODS: tuple[Method, ...] = ("gptq", "gptq_v2", "awq", "compressed-tensors")
AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]
HIDDEN = 32
Tensors = dict[str, torch.Tensor]
_MLP_WEIGHT = re.compile(
    r"(?!.*(?:visual|audio_tower|talker|token2wav|code2wav|mtp)\.).*mlp\..*(?:gate|up|down)_proj\.weight"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Packing:
    """A format of packed codes and its settings."""

    method: Method
    bits: int = 4
    group_size: int = 16
    sym: bool = True
    desc_act: bool = False

    @property
    def per_word(self) -> int:
        return 32 // self.bits

    @property
    def settings(self) -> dict[str, Any]:
        """The ``quantization_config`` as the format's own tool writes it."""
        if self.method == "compressed-tensors":
            weights = {"num_bits": self.bits, "type": "int", "strategy": "group", "group_size": self.group_size}
            weights |= {"symmetric": self.sym, "actorder": "group" if self.desc_act else None}
            scheme = {"targets": ["Linear"], "weights": weights, "input_activations": None}
            return {
                "quant_method": self.method,
                "format": "pack-quantized",
                "config_groups": {"group_0": scheme},
                "ignore": ["lm_head"],
            }
        if self.method == "awq":
            return {"quant_method": "awq", "bits": 4, "group_size": self.group_size, "zero_point": not self.sym,
                    "version": "gemm"}  # fmt: skip
        return {"quant_method": "gptq", "bits": self.bits, "group_size": self.group_size, "sym": self.sym,
                "desc_act": self.desc_act, "checkpoint_format": self.method}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Codes:
    """A layer in integers: codes [I][O], zero points [G][O], the group of each input [I].

    Scales are float16 [G, O], with values that are exact in bfloat16 as well.
    """

    codes: list[list[int]]
    zeros: list[list[int]]
    groups: list[int]
    scales: torch.Tensor

    @property
    def weight(self) -> torch.Tensor:
        """The weight, float64 [O, I]."""
        outputs, inputs = self.scales.shape[1], len(self.codes)
        weight = torch.empty(outputs, inputs, dtype=torch.float64)
        for i in range(inputs):
            for o in range(outputs):
                weight[o, i] = float(self.scales[self.groups[i], o]) * (
                    self.codes[i][o] - self.zeros[self.groups[i]][o]
                )
        return weight


def random_codes(packing: Packing, inputs: int, outputs: int, generator: torch.Generator) -> Codes:
    """Return a random layer of whole groups; its scales have both signs, as some recipes write them."""
    count, top = inputs // packing.group_size, 2**packing.bits
    groups = torch.arange(inputs) // packing.group_size
    if packing.desc_act:
        groups = groups[torch.randperm(inputs, generator=generator)]
    zeros = torch.full((count, outputs), top // 2)
    if not packing.sym:
        zeros = torch.randint(1, top, (count, outputs), generator=generator)
    signs = torch.randint(0, 2, (count, outputs), generator=generator) * 2 - 1
    return Codes(
        codes=torch.randint(0, top, (inputs, outputs), generator=generator).tolist(),
        zeros=zeros.tolist(),
        groups=groups.tolist(),
        scales=(signs * (torch.rand(count, outputs, generator=generator) + 0.5)).bfloat16().half(),
    )


def write_codes(packing: Packing, layer: Codes) -> Tensors:
    """Return the tensors of a layer in the packing's format, by suffix."""
    bits, inputs, outputs = packing.bits, len(layer.codes), layer.scales.shape[1]
    in_words = [[layer.codes[i + p][o] for p in range(packing.per_word)] for i in range(0, inputs, packing.per_word)
                for o in range(outputs)]  # fmt: skip
    if packing.method == "awq":
        order = [8 * w + p for w in range(outputs // 8) for p in AWQ_ORDER]
        rows = [[row[o] for o in order] for row in layer.codes], [[row[o] for o in order] for row in layer.zeros]
        qweight, qzeros = (_words([c[o : o + 8] for c in table for o in range(0, outputs, 8)], 4) for table in rows)
        return {
            "qweight": qweight.reshape(inputs, -1),
            "qzeros": qzeros.reshape(len(layer.zeros), -1),
            "scales": layer.scales,
        }
    packed = _words(in_words, bits).reshape(-1, outputs)
    stored = packing.method == "gptq"
    zero_words = [[z - stored for z in row[o : o + packing.per_word]] for row in layer.zeros
                  for o in range(0, outputs, packing.per_word)]  # fmt: skip
    zeros = _words(zero_words, bits).reshape(len(layer.zeros), -1)
    g_idx = torch.tensor(layer.groups, dtype=torch.int32)
    if packing.method != "compressed-tensors":
        return {"qweight": packed, "qzeros": zeros, "scales": layer.scales, "g_idx": g_idx}
    tensors = {
        "weight_packed": packed.T.contiguous(),
        "weight_scale": layer.scales.bfloat16().T.contiguous(),
        "weight_shape": torch.tensor([outputs, inputs]),
    }
    tensors |= {} if packing.sym else {"weight_zero_point": zeros.T.contiguous()}
    return tensors | ({"weight_g_idx": g_idx} if packing.desc_act else {})


def read_codes(packing: Packing, tensors: Mapping[str, torch.Tensor]) -> Codes:
    """Read a layer back, one code of one word at a time."""
    bits, per_word = packing.bits, packing.per_word
    if packing.method == "awq":
        codes, zeros = (_unpacked_awq(tensors[name]) for name in ("qweight", "qzeros"))
        groups = [i // packing.group_size for i in range(len(codes))]
        return Codes(codes=codes, zeros=zeros, groups=groups, scales=tensors["scales"])
    if packing.method == "compressed-tensors":
        packed, scales = tensors["weight_packed"].T, tensors["weight_scale"].T
        zero_words = tensors["weight_zero_point"].T if "weight_zero_point" in tensors else None
        inputs, outputs = len(packed) * per_word, packed.shape[1]
        assert tensors["weight_shape"].tolist() == [outputs, inputs]
    else:
        packed, scales, zero_words = tensors["qweight"], tensors["scales"], tensors["qzeros"]
        inputs, outputs = len(packed) * per_word, packed.shape[1]
    offset = int(packing.method == "gptq")
    codes = [[_code(packed[i // per_word, o], i % per_word, bits) for o in range(outputs)] for i in range(inputs)]
    zeros = [
        [2 ** (bits - 1) if zero_words is None else _code(zero_words[g, o // per_word], o % per_word, bits) + offset
         for o in range(outputs)]
        for g in range(len(scales))
    ]  # fmt: skip
    in_order = torch.arange(inputs) // packing.group_size
    groups = tensors.get("g_idx", tensors.get("weight_g_idx", in_order)).tolist()
    return Codes(codes=codes, zeros=zeros, groups=groups, scales=scales)


def write_checkpoint_of_codes(
    root: Path, packing: Packing, *, width: int, seed: int = 0, config: Mapping[str, Any] | None = None
) -> dict[str, Codes]:
    """Save a one-layer Qwen2 whose MLP is random codes of ``width`` channels; return its layers by module."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"gate_proj": (HIDDEN, width), "up_proj": (HIDDEN, width), "down_proj": (width, HIDDEN)}
    layers = {f"model.layers.0.mlp.{name}": random_codes(packing, *shape, generator) for name, shape in shapes.items()}
    tensors = {f"{m}.{ending}": t for m, layer in layers.items() for ending, t in write_codes(packing, layer).items()}
    tensors["model.layers.0.mlp.gate_proj.bias"] = torch.rand(width, generator=generator).half()
    tensors["model.norm.weight"] = torch.rand(HIDDEN, generator=generator).half()
    root.mkdir(parents=True)
    save_file(tensors, root / "model.safetensors")
    sizes = {"model_type": "qwen2", "hidden_size": HIDDEN, "intermediate_size": width, "num_hidden_layers": 1,
             "num_attention_heads": 64, "num_key_value_heads": 64, "head_dim": 64}  # fmt: skip
    described = sizes | {"quantization_config": packing.settings} | dict(config or {})
    (root / "config.json").write_text(json.dumps(described))
    return layers


def replace_mlps_by_codes(root: Path, packing: Packing) -> Path:
    """Replace every MLP weight of a full-precision model, experts included, by random codes; return ``root``."""
    tensors, generator = load_file(root / "model.safetensors"), torch.Generator().manual_seed(0)
    for name in [name for name in tensors if _MLP_WEIGHT.fullmatch(name)]:
        outputs, inputs = tensors.pop(name).shape
        codes = write_codes(packing, random_codes(packing, inputs, outputs, generator))
        tensors |= {name.removesuffix("weight") + ending: tensor for ending, tensor in codes.items()}
    save_file(tensors, root / "model.safetensors")
    config = json.loads((root / "config.json").read_bytes())
    (root / "config.json").write_text(json.dumps(config | {"quantization_config": packing.settings}))
    return root


def _words(rows: Iterable[list[int]], bits: int) -> torch.Tensor:
    words = [sum(code << (bits * position) for position, code in enumerate(row)) for row in rows]
    return torch.tensor(words, dtype=torch.int64).to(torch.int32)


def _code(word: torch.Tensor, position: int, bits: int) -> int:
    return (int(word) >> (bits * position)) % 2**bits


def _unpacked_awq(words: torch.Tensor) -> list[list[int]]:
    table = [[0] * (8 * words.shape[1]) for _ in range(len(words))]
    for r in range(len(words)):
        for w in range(words.shape[1]):
            for position, output in enumerate(AWQ_ORDER):
                table[r][8 * w + output] = _code(words[r, w], position, 4)
    return table
