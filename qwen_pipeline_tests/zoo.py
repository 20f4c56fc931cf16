"""Broken checkpoints: the damage, its cause, and the check that must catch it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from qwen_pipeline.transforms.codes.gptq import CODES
from qwen_pipeline_tests.chain import GROUP_SIZE
from qwen_pipeline_tests.damages import (
    DOWN,
    EXPERT,
    KEY,
    L0,
    UP,
    Make,
    drop,
    edited,
    file,
    flush,
    fourfold_scale,
    halve_a_shard,
    halved_scale,
    leave_in_full_precision,
    load_and_save,
    lose_a_shard,
    misplace,
    pad_rows_of_codes,
    poisoned,
    retie,
    retie_by_value,
    saturate,
    scale,
    set_to,
    settings,
    shorten,
    stale,
    swap_experts,
    swap_shards,
    swapped,
    transpose_an_expert,
    unzero,
    widen_only_the_config,
    without,
)
from qwen_pipeline_tests.rounding import round_to_codes

BY_HAND, COPY, BITS = "edited tensors", "files of another model", "a flipped bit"
SCRIPT, CONFIGS = "a padding script run after quantization", "a config of another checkpoint"


@dataclass(frozen=True, slots=True, kw_only=True)
class Specimen:
    """One broken checkpoint.

    Attributes:
        damage: The fault.
        by: Its cause.
        caught_by: The name of the check, or ``opening`` if the checkpoint cannot be opened.
        says: Text that the finding must contain.
        make: Writes the checkpoint.
        source: The field of :class:`Healthy` with which it is compared.
        ranks: Number of ranks that are to serve it.
    """

    damage: str
    by: str
    caught_by: str
    says: str
    make: Make
    source: str = "padded"
    ranks: int = 2


def specimen(damage: str, by: str, says: str, make: Make, *, caught_by: str = "structure", **more: Any) -> Specimen:
    return Specimen(damage=damage, by=by, caught_by=caught_by, says=says, make=make, **more)


# fmt: off
SPECIMENS: Mapping[str, Specimen] = {
    "config-padded": specimen("only the config was padded", SCRIPT, "expected I32 [8, 128]", widen_only_the_config),
    "codes-padded": specimen("words of codes padded as if they were weights", SCRIPT, "values that are zero",
        pad_rows_of_codes),
    "straddling": specimen("3 groups for 2 ranks", "quantizing without padding", "2 of 14 weights differ",
        lambda healthy, out: round_to_codes(healthy.merged, out, group_size=GROUP_SIZE), caught_by="ranks_agree",
        source="merged"),
    "swapped-shards": specimen("two shards under each other's names", "renamed files", "", swap_shards,
        caught_by="opening"),
    "wrong-index": specimen("the index looks for a tensor in another shard", "an edited index", "", misplace,
        caught_by="opening"),
    "half-shard": specimen("half of a shard", "a copy that was cut short", "", halve_a_shard, caught_by="opening"),
    "lost-shard": specimen("a shard is missing", "a copy that was cut short", "", lose_a_shard, caught_by="opening"),
    "made-up-experts": specimen("experts are random", "Transformers: load and save_pretrained",
        "experts.0.gate_proj.qweight is missing", load_and_save, source="mixture", ranks=1),
    "transposed-expert": specimen("an expert's weight transposed", BY_HAND,
        f"{EXPERT}.down_proj decodes to another weight", edited(transpose_an_expert, "packed_mixture"),
        source="mixture", ranks=1),
    "swapped-experts": specimen("two experts exchanged", BY_HAND, f"{EXPERT}.down_proj decodes to another weight",
        edited(swap_experts, "packed_mixture"), source="mixture", ranks=1),
    "fourfold-scale": specimen("one scale four times itself", BITS, "as if its scale were", edited(fourfold_scale)),
    "halved-scale": specimen("one scale halved", BITS, "as if its scale were", edited(halved_scale)),
    "nan-scale": specimen("a scale is NaN", BY_HAND, "1 values that are not finite",
        edited(scale(UP, lambda _: torch.nan))),
    "inf-scale": specimen("a scale is infinite", BY_HAND, "1 values that are not finite",
        edited(scale(UP, lambda _: torch.inf))),
    "negative-scale": specimen("a scale of the wrong sign", BITS, "as if its scale were -",
        edited(scale(UP, lambda s: -s))),
    "zero-scale": specimen("a scale is zero", "float16 rounding", "1 values that are zero",
        edited(scale(UP, lambda s: s * 0))),
    "nan-norm": specimen("a norm holds NaN", BY_HAND, "model.norm.weight differs from its value before",
        edited(set_to("model.norm.weight", poisoned(torch.nan)))),
    "inf-embedding": specimen("an embedding holds infinity", BY_HAND,
        "model.embed_tokens.weight differs from its value before",
        edited(set_to("model.embed_tokens.weight", poisoned(torch.inf)))),
    "flushed": specimen("a layer's weights flushed to zero", "a detour through float16", f"{UP} is all zeros",
        flush),
    "saturated": specimen("every code at an end of its range", BY_HAND, "at an end of their range", edited(saturate)),
    "truncated": specimen("the last 8 inputs of a layer dropped",
        "a packer that rounds down, as AutoGPTQ's does at 1000", f"{DOWN}.qweight is I32 [15, 64]", edited(shorten)),
    "loud-padding": specimen("a padded channel is not zero", BY_HAND, "1 of 32 padded channels are not zero",
        edited(unzero), caught_by="padding_is_silent"),
    "wrong-g_idx": specimen("g_idx in another order", BY_HAND, "g_idx is not in order",
        edited(set_to(f"{DOWN}.g_idx", lambda g: g.flip(0)))),
    "g_idx-beyond": specimen("g_idx names a group too many", BY_HAND, "g_idx has indices of groups that do not exist",
        edited(set_to(f"{DOWN}.g_idx", lambda g: g + 1))),
    "v1-as-v2": specimen("zero points of gptq read as gptq_v2", CONFIGS, "zero points that are not the middle code",
        settings(checkpoint_format="gptq_v2")),
    "zero-qzeros": specimen("zero points are zero", BY_HAND, "zero points that are not the middle code",
        edited(set_to(f"{UP}.qzeros", torch.zeros_like))),
    "swapped-kv": specimen("keys and values exchanged", BY_HAND, f"{KEY} decodes to another weight",
        edited(swapped(KEY, KEY.replace("k_", "v_"), *CODES))),
    "swapped-gate-up": specimen("gate and up exchanged", BY_HAND, f"{UP} decodes to another weight",
        edited(swapped(UP, UP.replace("up", "gate"), *CODES))),
    "swapped-layers": specimen("a layer's codes in another layer", BY_HAND, f"{UP} decodes to another weight",
        edited(swapped(UP, UP.replace("layers.0", "layers.1"), *CODES))),
    "swapped-groups": specimen("scales of two groups exchanged", BY_HAND, f"{DOWN}: ",
        edited(set_to(f"{DOWN}.scales", lambda s: s.flip(0)))),
    "missing": specimen("a tensor is missing", BY_HAND, f"{UP}.scales is missing", edited(drop(f"{UP}.scales"))),
    "extra": specimen("a tensor too many", BY_HAND, "extra.weight is unexpected",
        edited(lambda tensors, _: tensors.update({f"{L0}.extra.weight": torch.zeros(4)}))),
    "unquantized": specimen("a layer left in full precision", BY_HAND, f"{UP}.qweight is missing",
        edited(leave_in_full_precision)),
    "lost-bias": specimen("a bias is missing", "a loader that drops biases", f"{KEY}.bias is missing",
        edited(drop(f"{KEY}.bias"))),
    "zero-bias": specimen("a bias is zero", "a packer that writes zero biases",
        f"{KEY}.bias differs from its value before",
        edited(set_to(f"{KEY}.bias", torch.zeros_like))),
    "retied": specimen("lm_head dropped and tied to the embedding", BY_HAND, "lm_head.weight is missing",
        edited(retie)),
    "retied-by-value": specimen("lm_head overwritten with the embedding", BY_HAND,
        "lm_head.weight differs from its value before", edited(retie_by_value)),
    "stale-width": specimen("intermediate_size of before padding", CONFIGS, "intermediate_size 96, expected 128",
        stale(intermediate_size=96)),
    "stale-vocabulary": specimen("vocab_size of another model", CONFIGS, "vocab_size 7, expected 320",
        stale(vocab_size=7)),
    "stale-rope": specimen("rope_theta of another model", CONFIGS, "config.json has rope_parameters",
        stale(rope_parameters={"rope_type": "default", "rope_theta": 1e6})),
    "stale-tie": specimen("tie_word_embeddings of another model", CONFIGS, "tie_word_embeddings True, expected False",
        stale(tie_word_embeddings=True)),
    "stale-eos": specimen("eos_token_id of another model", CONFIGS, "config.json has eos_token_id",
        stale(eos_token_id=0)),
    "wrong-group_size": specimen("group_size of another quantization", CONFIGS,
        "scales is F16 [2, 128], expected F16 [1, 128]", settings(group_size=64)),
    "wrong-bits": specimen("bits of another quantization", CONFIGS, "qweight is I32 [8, 128], expected I32 [16, 128]",
        settings(bits=8)),
    "wrong-method": specimen("quant_method of another quantizer", CONFIGS, "quant_method 'awq', expected 'gptq'",
        settings(quant_method="awq")),
    "asymmetric": specimen("sym is false, the codes are symmetric", CONFIGS,
        "sym is false, but every zero point is the middle code", settings(sym=False)),
    "no-settings": specimen("no quantization_config", CONFIGS, "quant_method None",
        edited(lambda _, config: config.pop("quantization_config"))),
    "chat-template": specimen("another chat template", COPY, "chat_template.jinja differs from the fine-tune's",
        file("chat_template.jinja", lambda _: "{{ messages }}")),
    "no-chat-template": specimen("no chat template", "a tool that does not copy it", "chat_template.jinja is missing",
        file("chat_template.jinja", None)),
    "tokenizer": specimen("a tokenizer of another model", COPY, "tokenizer.json differs from the fine-tune's",
        file("tokenizer.json", lambda t: t | {"added_tokens": []})),
    "special-tokens": specimen("another end-of-text token", COPY, "tokenizer_config.json differs from the fine-tune's",
        file("tokenizer_config.json", lambda t: t | {"eos_token": "<|endoftext|>"})),
    "stop-tokens": specimen("a generation config without stop tokens", COPY,
        "generation_config.json differs from the fine-tune's", file("generation_config.json", without("eos_token_id"))),
}
# fmt: on


def table() -> str:
    """Return the zoo as Markdown."""
    rows = [("damage", "made by", "caught by"), ("---",) * 3]
    rows += [(each.damage, each.by, f"`{each.caught_by}`") for each in SPECIMENS.values()]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
