"""The matrices of each decoder layer, derived from a config: shapes, tensor-parallel split, quantized or not.

Sources: ``base_model_tp_plan`` of Transformers' configurations and its models' ``__init__``. Matrices that GPTQModel's
model definitions leave out stay in full precision: routers, gates, and small projections of gated delta nets.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from qwen_pipeline.errors import InputRefused
from qwen_pipeline.qwen.families import (
    Config,
    DecoderField,
    config_paths,
    config_values,
    number_of_experts,
    require_family,
    text_config,
)

Split = Literal["columns", "rows", "whole"]
"""Tensor-parallel split of a matrix: by outputs (column-parallel), by inputs (row-parallel), or replicated."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Matrix:
    """A kind of linear layer in one decoder layer.

    Attributes:
        kind: Path inside the layer; ``mlp.experts.*.gate_proj`` stands for ``count`` of them.
        split: Its tensor-parallel split.
        quantized: Whether quantization turns it into codes.
        size: The size field that counts its outputs (columns) or inputs (rows), if padding may change it.
        fused: Projections that engines load as one matrix with it, itself included.
        count: Number of such layers in the decoder layer.
    """

    kind: str
    out_features: int
    in_features: int
    split: Split
    quantized: bool = True
    size: DecoderField | None = None
    fused: tuple[str, ...] = ()
    count: int = 1

    def kinds(self) -> list[str]:
        """Return one kind for each of ``count``, such as ``mlp.experts.7.gate_proj``."""
        return [self.kind.replace("*", str(number)) for number in range(self.count)]


def layer_matrices(config: Config, layer: int) -> list[Matrix]:
    """Return the matrices of one decoder layer in the order of the forward pass, attention first.

    Raises:
        InputRefused: The family is unknown, or the config lacks a size.
    """
    linear = is_linear_attention(config, layer)
    mixer = _delta_net(config) if linear else _attention(config)
    return [*mixer, *_qwen4_matrices(config, layer, linear), *mlp_matrices(config, layer)]


def number_of_layers(config: Config) -> int:
    """Return the number of decoder layers, without draft layers."""
    return required(config, "num_hidden_layers")


def head_geometry(config: Config) -> tuple[int, int, int]:
    """Return the number of attention heads, of key-value heads, and of channels per head."""
    text = text_config(config)
    heads = required(config, "num_attention_heads")
    kv_heads = int(text.get("num_key_value_heads") or heads)
    default = require_family(config).head_dim or required(config, "hidden_size") // heads
    return heads, kv_heads, int(text.get("head_dim") or default)


def is_linear_attention(config: Config, layer: int) -> bool:
    """Return whether the layer's token mixer is a gated delta net."""
    if require_family(config).mixer == "attention":
        return False
    text = text_config(config)
    if types := text.get("layer_types"):
        return types[layer] == "linear_attention"
    return (layer + 1) % int(text.get("full_attention_interval") or 4) != 0


def has_experts(config: Config, layer: int) -> bool:
    """Return whether the layer's MLP is a mixture of experts."""
    text = text_config(config)
    return (
        require_family(config).experts
        and number_of_experts(config) > 0
        and layer not in (text.get("mlp_only_layers") or ())
        and (layer + 1) % int(text.get("decoder_sparse_step") or 1) == 0
    )


def size_fields(config: Config) -> tuple[DecoderField, ...]:
    """Return the size fields that decoder layers are built from, that of the dense MLP first."""
    layers = range(number_of_layers(config))
    sparse = [has_experts(config, layer) for layer in layers]
    built_from: dict[DecoderField, bool] = {
        "intermediate_size": not all(sparse),
        "moe_intermediate_size": any(sparse),
        "shared_expert_intermediate_size": any(sparse) and require_family(config).shared,
    }
    return tuple(field for field, used in built_from.items() if used)


def required(config: Config, field: str) -> int:
    """Return a size field of the config.

    Raises:
        InputRefused: The field is missing, is not a positive integer, or has different values in nested configs.
    """
    found = config_values(config, field)
    if len(found) == 1 and isinstance(size := next(iter(found)), int) and size > 0:
        return size
    paths = ", ".join(config_paths(config, field))
    values = f"got {', '.join(sorted(map(str, found)))} at {paths}" if paths else "but the config lacks it"
    raise InputRefused(
        f"{field} must be one positive number, {values}.",
        remedy="Correct config.json so that it matches the shapes of the weights.",
    )


def _attention(config: Config) -> Iterator[Matrix]:
    heads, kv_heads, head_dim = head_geometry(config)
    hidden, gated = required(config, "hidden_size"), require_family(config).mixer != "attention"
    fused = tuple(f"self_attn.{name}_proj" for name in "qkv")
    widths = (heads * head_dim * (2 if gated else 1), kv_heads * head_dim, kv_heads * head_dim)
    for kind, out_features in zip(fused, widths, strict=True):
        yield Matrix(kind=kind, out_features=out_features, in_features=hidden, split="columns", fused=fused)
    yield Matrix(kind="self_attn.o_proj", out_features=hidden, in_features=heads * head_dim, split="rows")


def _delta_net(config: Config) -> Iterator[Matrix]:
    hidden = required(config, "hidden_size")
    key, value, value_heads = delta_geometry(config)
    names: dict[str, int] = (
        {"in_proj_qkvz": 2 * key + 2 * value, "in_proj_ba": 2 * value_heads}
        if require_family(config).mixer == "next"
        else {"in_proj_qkv": 2 * key + value, "in_proj_z": value, "in_proj_b": value_heads, "in_proj_a": value_heads}
    )
    for name, out_features in names.items():
        yield Matrix(
            kind=f"linear_attn.{name}",
            out_features=out_features,
            in_features=hidden,
            split="columns",
            quantized=name not in ("in_proj_ba", "in_proj_b", "in_proj_a"),
        )
    yield Matrix(kind="linear_attn.out_proj", out_features=hidden, in_features=value, split="rows")


def delta_geometry(config: Config) -> tuple[int, int, int]:
    """Return the number of key channels, value channels and value heads of a gated delta net."""
    heads = required(config, "linear_num_value_heads")
    keys = required(config, "linear_num_key_heads") * required(config, "linear_key_head_dim")
    return keys, heads * required(config, "linear_value_head_dim"), heads


def _qwen4_matrices(config: Config, layer: int, linear: bool) -> Iterator[Matrix]:
    """Yield the matrices that only Qwen4 has; they are small and stay in full precision."""
    if require_family(config).mixer != "4":
        return
    text, hidden = text_config(config), required(config, "hidden_size")
    streams = required(config, "hc_count")
    if not linear and text.get("indexer_n_heads"):
        heads = required(config, "indexer_n_heads") + required(config, "indexer_kv_heads")
        yield _whole("self_attn.indexer.index_qk_proj", heads * required(config, "indexer_head_dim"), hidden)
    for block in ("attn", "mlp"):
        owner, rank = f"{block}_hyper_connection", required(config, "hc_lowrank")
        yield _whole(f"{owner}.input_mix_weight_down", rank, streams * hidden)
        yield _whole(f"{owner}.input_mix_weight_up", streams * hidden, rank)
        yield _whole(f"{owner}.block_inject_weight", streams, streams * hidden)
    if layer + 1 in (text.get("ple_layer_ids") or ()):
        embedded = int(text.get("ple_embed_dim") or hidden)
        yield _whole("ple.key_proj", streams * hidden, embedded)
        yield _whole("ple.value_proj", hidden, embedded)


def mlp_matrices(config: Config, layer: int) -> Iterator[Matrix]:
    """Yield the matrices of one layer's MLP or mixture of experts."""
    hidden = required(config, "hidden_size")
    if not has_experts(config, layer):
        yield from _gated("mlp", hidden, required(config, "intermediate_size"), "intermediate_size")
        return
    experts = number_of_experts(config)
    yield _whole("mlp.gate", experts, hidden)
    width = required(config, "moe_intermediate_size")
    yield from _gated("mlp.experts.*", hidden, width, "moe_intermediate_size", count=experts)
    if require_family(config).shared:
        width = required(config, "shared_expert_intermediate_size")
        yield from _gated("mlp.shared_expert", hidden, width, "shared_expert_intermediate_size")
        yield _whole("mlp.shared_expert_gate", 1, hidden)


def _gated(owner: str, hidden: int, width: int, size: DecoderField, *, count: int = 1) -> Iterator[Matrix]:
    fused = (f"{owner}.gate_proj", f"{owner}.up_proj")
    for kind in fused:
        yield Matrix(
            kind=kind, out_features=width, in_features=hidden, split="columns", size=size, fused=fused, count=count
        )
    kind = f"{owner}.down_proj"
    yield Matrix(kind=kind, out_features=hidden, in_features=width, split="rows", size=size, count=count)


def _whole(kind: str, out_features: int, in_features: int) -> Matrix:
    return Matrix(kind=kind, out_features=out_features, in_features=in_features, split="whole", quantized=False)
