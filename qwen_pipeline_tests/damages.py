"""Functions that break a checkpoint, by the tools that cause the damage if there are any, else by hand."""

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from qwen_pipeline.transforms.codes.gptq import CODES, pack_rows, unpack_rows
from qwen_pipeline_tests.chain import GROUP_SIZE
from qwen_pipeline_tests.rounding import round_to_codes, rounded

Tensors = dict[str, torch.Tensor]
Config = dict[str, Any]
L0, L1 = "model.layers.0", "model.layers.1"
UP, DOWN, KEY = f"{L0}.mlp.up_proj", f"{L1}.mlp.down_proj", f"{L0}.self_attn.k_proj"
EXPERT = "model.layers.0.mlp.experts.1"
SHARD = "model.safetensors"
EXPONENT = 1 << 10
"""The lowest exponent bit of a float16: clearing it halves a scale; setting the next one quadruples it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Healthy:
    """Valid checkpoints to damage, each with its source.

    Attributes:
        merged: Full precision, 96 MLP channels.
        padded: The same with 128.
        quantized: ``padded``, quantized by GPTQModel.
        mixture: A mixture of experts in full precision, and ``packed_mixture`` its codes.
    """

    merged: Path
    padded: Path
    quantized: Path
    mixture: Path
    packed_mixture: Path


Make = Callable[[Healthy, Path], object]
"""Writes the broken checkpoint to a path that does not exist."""


def edited(edit: Callable[[Tensors, Config], None], of: str = "quantized") -> Make:
    """Change the tensors or the config of a copy."""

    def make(healthy: Healthy, out: Path) -> None:
        copied(getattr(healthy, of), out)
        tensors, config = load_file(out / SHARD), json.loads((out / "config.json").read_text())
        edit(tensors, config)
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, out / SHARD, {"format": "pt"})
        (out / "config.json").write_text(json.dumps(config))

    return make


def stale(**fields: Any) -> Make:
    """Change values in the config of a copy."""
    return edited(lambda _, config: config.update(fields))


def settings(**fields: Any) -> Make:
    """Change values in the ``quantization_config`` of a copy."""
    return edited(lambda _, config: config["quantization_config"].update(fields))


def file(name: str, change: Callable[[Any], Any] | None) -> Make:
    """Change a JSON or text file of a copy, or remove it."""

    def make(healthy: Healthy, out: Path) -> None:
        path = copied(healthy.quantized, out) / name
        if change is None:
            path.unlink()
        elif path.suffix == ".json":
            path.write_text(json.dumps(change(json.loads(path.read_text()))))
        else:
            path.write_text(change(path.read_text()))

    return make


def without(*fields: str) -> Callable[[Mapping[str, Any]], dict[str, Any]]:
    return lambda content: {name: value for name, value in content.items() if name not in fields}


def copied(root: Path, out: Path) -> Path:
    return Path(shutil.copytree(root, out, ignore=shutil.ignore_patterns("manifest.json")))


def swapped(first: str, second: str, *endings: str) -> Callable[[Tensors, Config], None]:
    """Exchange the tensors of two modules."""

    def edit(tensors: Tensors, _: Config) -> None:
        for ending in endings:
            a, b = f"{first}.{ending}", f"{second}.{ending}"
            tensors[a], tensors[b] = tensors[b], tensors[a]

    return edit


def scale(module: str, change: Callable[[torch.Tensor], torch.Tensor | float]) -> Callable[[Tensors, Config], None]:
    """Change one scale of a layer: group 1, output 4."""

    def edit(tensors: Tensors, _: Config) -> None:
        scales = tensors[f"{module}.scales"]
        scales[1, 4] = change(scales[1, 4])

    return edit


def halved_scale(tensors: Tensors, _: Config) -> None:
    """Clear the exponent's lowest bit of the first scale in which it is set."""
    _flip(tensors[f"{DOWN}.scales"].view(torch.int16), EXPONENT, was=True)


def fourfold_scale(tensors: Tensors, _: Config) -> None:
    """Set the exponent's second bit of the first scale in which it is clear."""
    _flip(tensors[f"{DOWN}.scales"].view(torch.int16), EXPONENT << 1, was=False)


def _flip(words: torch.Tensor, bit: int, *, was: bool) -> None:
    group, output = ((words & bit != 0) == was).nonzero()[0].tolist()
    words[group, output] ^= bit


def sharded(healthy: Healthy, out: Path) -> dict[str, str]:
    """Write the model in two shards with an index; return the index's map."""
    copied(healthy.quantized, out)
    tensors = load_file(out / SHARD)
    (out / SHARD).unlink()
    names = sorted(tensors)
    files = [f"model-{number}-of-2.safetensors" for number in (1, 2)]
    placed = {name: files[name > names[len(names) // 2]] for name in names}
    for each in files:
        save_file({name: tensors[name] for name in names if placed[name] == each}, out / each, {"format": "pt"})
    write_index(out, placed)
    return placed


def write_index(out: Path, placed: Mapping[str, str]) -> None:
    (out / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": placed}))


def swap_shards(healthy: Healthy, out: Path) -> None:
    first, second = (out / name for name in sorted(set(sharded(healthy, out).values())))
    first.rename(out / "aside")
    second.rename(first)
    (out / "aside").rename(second)


def misplace(healthy: Healthy, out: Path) -> None:
    placed = sharded(healthy, out)
    other = next(file for file in placed.values() if file != placed[f"{UP}.scales"])
    write_index(out, placed | {f"{UP}.scales": other})


def halve_a_shard(healthy: Healthy, out: Path) -> None:
    shard = copied(healthy.quantized, out) / SHARD
    shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 2])


def lose_a_shard(healthy: Healthy, out: Path) -> None:
    (out / max(sharded(healthy, out).values())).unlink()


def widen_only_the_config(healthy: Healthy, out: Path) -> None:
    round_to_codes(healthy.merged, out, group_size=GROUP_SIZE)
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | {"intermediate_size": 128}))


def pad_rows_of_codes(healthy: Healthy, out: Path) -> None:
    """Run the published padding script on a quantized checkpoint: it interleaves rows of zeros, here of words."""
    widen_only_the_config(healthy, out)
    tensors = load_file(out / SHARD)
    for name in [name for name in tensors if ".mlp." in name]:
        axis = 1 if "down_proj" not in name else 0
        if name.endswith(("qweight", "scales", "qzeros")):
            more = tensors[name].shape[axis] // 3
            padding = torch.zeros_like(tensors[name].narrow(axis, 0, more))
            tensors[name] = torch.cat([tensors[name], padding], dim=axis)
        elif "down_proj" in name:
            tensors[name] = torch.cat([tensors[name], torch.zeros(32, dtype=torch.int32)])
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, out / SHARD, {"format": "pt"})


def load_and_save(healthy: Healthy, out: Path) -> None:
    """Load codes with Transformers into a model that does not support them, and save its random weights."""
    scratch = copied(healthy.packed_mixture, out.with_name(f"{out.name}-scratch"))
    config = json.loads((scratch / "config.json").read_text())
    (scratch / "config.json").write_text(json.dumps(without("quantization_config")(config)))
    model: Any = AutoModelForCausalLM.from_pretrained(scratch)
    copied(healthy.packed_mixture, out)
    model.save_pretrained(out)
    (out / "config.json").write_text(json.dumps(config))


def flush(healthy: Healthy, out: Path) -> None:
    """Quantize a layer after a conversion to float16 in which its weights underflow."""
    copied(healthy.quantized, out)
    tensors = load_file(out / SHARD)
    tiny = load_file(healthy.padded / SHARD)[f"{UP}.weight"].float() * 1e-8
    tensors |= {f"{UP}.{code}": tensor for code, tensor in rounded(tiny.half().float(), GROUP_SIZE).items()}
    save_file(tensors, out / SHARD, {"format": "pt"})


def shorten(tensors: Tensors, _: Config) -> None:
    tensors[f"{DOWN}.qweight"] = tensors[f"{DOWN}.qweight"][:-1]


def unzero(tensors: Tensors, _: Config) -> None:
    codes = unpack_rows(tensors[f"{UP}.qweight"], 4)
    codes[7, 1] += 1
    tensors[f"{UP}.qweight"] = pack_rows(codes, 4)


def saturate(tensors: Tensors, _: Config) -> None:
    tensors[f"{UP}.qweight"] = pack_rows(15 * (unpack_rows(tensors[f"{UP}.qweight"], 4) > 7), 4)


def retie(tensors: Tensors, config: Config) -> None:
    del tensors["lm_head.weight"]
    config["tie_word_embeddings"] = True


def retie_by_value(tensors: Tensors, _: Config) -> None:
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()


def drop(*names: str) -> Callable[[Tensors, Config], None]:
    def edit(tensors: Tensors, _: Config) -> None:
        for name in names:
            del tensors[name]

    return edit


def transpose_an_expert(tensors: Tensors, _: Config) -> None:
    """Pack the transpose of an expert's weight in the expected shape."""
    name = f"{EXPERT}.down_proj.qweight"
    codes = unpack_rows(tensors[name], 4)
    tensors[name] = pack_rows(codes.reshape(codes.shape[1], codes.shape[0]).T.reshape(codes.shape), 4)


def set_to(name: str, make: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Tensors, Config], None]:
    return lambda tensors, _: tensors.update({name: make(tensors[name])})


def poisoned(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda tensor: tensor.index_fill(0, torch.tensor([3]), value)


def leave_in_full_precision(tensors: Tensors, config: Config) -> None:
    drop(*(f"{UP}.{code}" for code in CODES))(tensors, config)
    tensors[f"{UP}.weight"] = torch.zeros(128, 64)


def swap_experts(tensors: Tensors, config: Config) -> None:
    swapped(f"{EXPERT}.down_proj", "model.layers.0.mlp.experts.2.down_proj", "qweight", "scales")(tensors, config)
