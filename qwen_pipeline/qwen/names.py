"""Tensor names: parsing of stored names, and the possible stored names of a tensor.

A tensor may have several spellings: Transformers has a vision-language model's decoder at ``model.language_model`` in
memory, but Qwen2-VL is published (and saved) with it at ``model``. All spellings of a tensor have the same
:class:`ParsedName`. Experts are stored one by one or in stacks.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Literal

from qwen_pipeline.checkpoint.lazy import Checkpoint
from qwen_pipeline.errors import CheckpointRefused
from qwen_pipeline.qwen.families import Config, Family, Mixer, ModelPart, require_family

GATE_UP = "mlp.experts.gate_up_proj"
DOWN = "mlp.experts.down_proj"
DRAFTS = "mtp."
"""Beginning of the names of a draft head's tensors."""
SCORE = "score"
"""The linear layer that stands in place of the output head where tokens or texts are classified or rated."""
_OTHER_HEADS: Mapping[str, tuple[str, str]] = {
    "v_head.": (
        "a value head of TRL, which no class of Transformers loads beside an output head",
        "If the model is a policy, remove v_head from its files. If it is a reward model, rename v_head.summary to"
        " score, remove lm_head, and set architectures to the family's class, such as Qwen3ForTokenClassification: it"
        " computes the same value for each token.",
    ),
    "qa_outputs.": (
        "a head that answers questions by the place in a text, which is not supported",
        "Quantize the model without this pipeline, or use a classifier.",
    ),
    "score.": (
        "a head that is no single linear layer named score, or of a family whose classifiers are not supported",
        "Use a head of Transformers' own classes; others need code that the model's repository brings along.",
    ),
}
"""Beginning of the names of heads that are refused -> a description, and what to do."""
_OF_ADAPTERS = (".lora_A.", ".lora_B.", ".base_layer.", ".lora_magnitude_vector.", ".modules_to_save.")
"""Parts of the names in the state dict of a model that PEFT wraps."""
FUSED = (GATE_UP, DOWN)
"""Stacks of experts: parameters without ``.weight``."""
_CODES = (
    "qweight", "qzeros", "scales", "g_idx", "weight_packed", "weight_scale", "weight_scale_inv", "weight_zero_point",
    "weight_shape", "weight_g_idx",
)  # fmt: skip
NUMBER = r"(?:0|[1-9][0-9]{0,5})"
"""The number of a layer, an expert or a shard in a name, as every framework writes it."""
_LAYER = re.compile(rf"layers\.({NUMBER})\.(.+)")
_EXPERT = re.compile(rf"((?:.+\.)?)mlp\.experts\.{NUMBER}\.(gate|up|down)_proj")

_MIXERS: Mapping[str, str] = {
    "attention": "",
    "next": r"|linear_attn\.(?:in_proj_qkvz|in_proj_ba|out_proj|conv1d|norm)",
    "3.5": r"|linear_attn\.(?:in_proj_(?:qkv|z|a|b)|out_proj|conv1d|norm)",
}
_QWEN4_MODULES = (
    r"|self_attn\.indexer\.(?:index_qk_proj|[qk]_layernorm)"
    r"|(?:attn|mlp)_hyper_connection\.(?:hc_norm|input_mix_weight_down|input_mix_weight_up|block_inject_weight)"
    r"|ple\.(?:conv1d|key_proj|value_proj|norm_(?:conv|key|query)"
    rf"|ple_embedding\.ngram_embedding(?:\.shard_{NUMBER})?)"
)
_PARAMETERS = re.compile(
    r"linear_attn\.(?:A_log|dt_bias)"
    r"|ple\.ple_embedding\.(?:layer_multipliers|ngram_heads_offsets|ngram_heads_vocab_sizes)"
)
"""Tensors that are direct parameters of a layer's module, without ``.weight``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ParsedName:
    """The meaning of a tensor name, independent of its spelling.

    Attributes:
        part: The part of the model that owns the tensor.
        layer: Number of the decoder (or draft) layer; None outside of layers.
        module: Path inside the layer, such as ``self_attn.q_proj``, ``mlp.experts.7.gate_proj``,
            ``mlp.experts.gate_up_proj`` or ``linear_attn.in_proj_qkvz``. Outside of layers the path inside the part,
            which for towers begins with the tower, as in ``visual.merger.mlp.0``.
        parameter: ``weight``, ``bias`` or a code such as ``qweight``. A stack of experts is a ``weight``.
    """

    part: ModelPart
    layer: int | None = None
    module: str
    parameter: str


def parse_name(name: str, config: Config) -> ParsedName:
    """Parse the stored (or in-memory) name of a tensor in a model of this config.

    Raises:
        InputRefused: The family is unknown.
        CheckpointRefused: The family has no such tensor.
    """
    if parsed := _parse(name, require_family(config)):
        return parsed
    if any(part in name for part in _OF_ADAPTERS):
        raise CheckpointRefused(
            f"{name} belongs to an adapter that was not merged into the model that is stored here.",
            remedy="Save the adapter alone with PEFT's save_pretrained, or the model that merge_and_unload returns.",
        )
    for prefix, (reason, remedy) in _OTHER_HEADS.items():
        if name.startswith(prefix):
            raise CheckpointRefused(f"{name} belongs to {reason}.", remedy=remedy)
    raise CheckpointRefused(
        f"Models of type {config['model_type']} have no tensor {name}.",
        remedy="If training added it, such as a value or reward head, save the model without it. Otherwise fetch the"
        " checkpoint again, or correct model_type in its config: weights and config must belong to one model.",
    )


def is_tensor_name(name: str, config: Config) -> bool:
    """Return whether models of this config have a tensor of this name.

    Raises:
        InputRefused: The family is unknown.
    """
    return _parse(name, require_family(config)) is not None


def parse_names(checkpoint: Checkpoint) -> dict[ParsedName, str]:
    """Return parsed name -> stored name for all tensors of a checkpoint.

    Raises:
        InputRefused: The family is unknown.
        CheckpointRefused: The family has no such tensor, or two tensors are spellings of one; the message names them.
    """
    names: dict[ParsedName, str] = {}
    for name in checkpoint:
        parsed = parse_name(name, checkpoint.config)
        if parsed in names:
            raise CheckpointRefused(
                f"{names[parsed]} and {name} are two spellings of one tensor.",
                remedy="Remove the stale one: files of two saves are mixed.",
            )
        names[parsed] = name
    return names


def decoder_prefix(checkpoint: Checkpoint) -> str:
    """Return the prefix before ``layers.`` in the names of the decoder's tensors, such as ``model.language_model.``.

    Raises:
        CheckpointRefused: The decoder has no layer.
    """
    for name in checkpoint:
        if parse_name(name, checkpoint.config).part == "decoder" and "layers." in name:
            return name[: name.index("layers.")]
    raise CheckpointRefused(
        "The checkpoint has no tensor of a decoder layer.", remedy="Pass a complete Hugging Face model directory."
    )


def spellings(parsed: ParsedName, family: Family) -> list[str]:
    """Return all names that a tensor may have on disk or in memory, the published ones first."""
    leaf = parsed.module if parsed.module in FUSED else f"{parsed.module}.{parsed.parameter}"
    inner = leaf if parsed.layer is None else f"layers.{parsed.layer}.{leaf}"
    if parsed.part == "head" and parsed.module == SCORE:
        return [f"{SCORE}.{parsed.parameter}"]
    if parsed.part == "head":
        return [f"{head}.{parsed.parameter}" for head in family.heads]
    if parsed.part == "mtp":
        return [f"{DRAFTS}{inner}"]
    if parsed.part in ("decoder", "embedding", "norm"):
        return [f"{prefix}{inner}" for prefix in family.decoder]
    tower = parsed.module.partition(".")[0]
    return [prefix.removesuffix(f"{tower}.") + leaf for prefix in family.towers if _tower_name(prefix) == tower]


def _parse(name: str, family: Family) -> ParsedName | None:
    for prefix, part in family.towers.items():
        if name.startswith(prefix):
            leaf = name.removeprefix(prefix)
            module, parameter = (leaf, "weight") if leaf.endswith(FUSED) else leaf.rpartition(".")[::2]
            return ParsedName(part=part, module=f"{_tower_name(prefix)}.{module}".rstrip("."), parameter=parameter)
    if name.startswith(DRAFTS) and family.drafts:
        return _parse_draft(name.removeprefix(DRAFTS), family)
    module, _, parameter = name.rpartition(".")
    if module in family.heads and parameter in ("weight", *_CODES):
        return ParsedName(part="head", module="lm_head", parameter=parameter)
    if module == SCORE and family.scored and parameter in ("weight", "bias"):
        return ParsedName(part="head", module=SCORE, parameter=parameter)
    for prefix in family.decoder:
        if name.startswith(prefix) and (parsed := _parse_decoder(name.removeprefix(prefix), family)):
            return parsed
    return None


def _tower_name(prefix: str) -> str:
    return prefix.removesuffix(".").rpartition(".")[2]


def _parse_decoder(name: str, family: Family) -> ParsedName | None:
    if match := _LAYER.fullmatch(name):
        return _parse_layer("decoder", int(match[1]), match[2], family)
    module, _, parameter = name.rpartition(".")
    if name == "embed_tokens.weight":
        return ParsedName(part="embedding", module=module, parameter=parameter)
    mixer = family.mixer == "4" and module.startswith("hyper_connection_mixer.")
    return ParsedName(part="norm", module=module, parameter=parameter) if name == "norm.weight" or mixer else None


def _parse_draft(name: str, family: Family) -> ParsedName | None:
    if match := _LAYER.fullmatch(name):
        return _parse_layer("mtp", int(match[1]), match[2], family)
    module, _, parameter = name.rpartition(".")
    return ParsedName(part="mtp", module=module, parameter=parameter)


def _parse_layer(part: Literal["decoder", "mtp"], layer: int, name: str, family: Family) -> ParsedName | None:
    module, _, parameter = name.rpartition(".")
    if name in FUSED and family.experts:
        return ParsedName(part=part, layer=layer, module=name, parameter="weight")
    if _PARAMETERS.fullmatch(name) and family.mixer != "attention":
        return ParsedName(part=part, layer=layer, module=module, parameter=parameter)
    if parameter in ("weight", "bias", *_CODES) and _modules(family.mixer, family.experts, family.shared)(module):
        return ParsedName(part=part, layer=layer, module=module, parameter=parameter)
    return None


@cache
def _modules(mixer: Mixer, experts: bool, shared: bool) -> "Callable[[str], re.Match[str] | None]":
    pattern = (
        r"input_layernorm|post_attention_layernorm|self_attn\.(?:[qkvo]_proj|[qk]_norm)|mlp\.(?:gate|up|down)_proj"
    )
    pattern += _MIXERS.get(mixer, _MIXERS["3.5"] + _QWEN4_MODULES)
    pattern += rf"|mlp\.gate|mlp\.experts\.{NUMBER}\.(?:gate|up|down)_proj" if experts else ""
    pattern += r"|mlp\.shared_expert\.(?:gate|up|down)_proj|mlp\.shared_expert_gate" if shared else ""
    return re.compile(pattern).fullmatch


def stack_of(module: str) -> str | None:
    """Return the stack that would contain an expert's projection; None if the module is not one of an expert."""
    match = _EXPERT.fullmatch(module)
    return match[1] + (DOWN if match[2] == "down" else GATE_UP) if match else None
