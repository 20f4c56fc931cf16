"""The layout of factors of stacked experts, which depends on the PEFT that saved them, and on Unsloth.

PEFT trains a stack ``[E, O, I]`` by ``lora_A [E x R, I]`` and ``lora_B [O, R x E]``. Up to 0.19.0 it took the stack for
``[E, I, O]``: A then has the outputs and B the inputs, so the factors are those of the transposed matrices
(vllm#41384, unsloth-zoo#647). Qwen3-VL-MoE's stacks were ``[E, I, O]`` in Transformers 4: there it is the other way
round. One side of each matrix is the hidden size, so its shapes decide, unless it is square, which ``gate_up_proj`` and
``down_proj`` cannot both be. Unsloth read the columns of B grouped by expert until September 2026 (unsloth-zoo#1269,
#1232), and now states their order in ``adapter_config.json``.
"""

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, cast

from qwen_pipeline.checkpoint.lazy import Checkpoint
from qwen_pipeline.errors import AdapterRefused, CheckpointRefused
from qwen_pipeline.qwen.layers import required
from qwen_pipeline.qwen.names import DOWN, FUSED, parse_name
from qwen_pipeline.transforms.lora.adapter import Adapter
from qwen_pipeline.transforms.lora.adapter_tensors import Factors

COLUMN_ORDERS: Mapping[str, bool] = {"rank_major": False, "grouped_by_expert": True}
"""Values of Unsloth's ``lora_B_layout`` -> whether the columns of B are grouped by expert; PEFT's are not."""
_FIRST_STRAIGHT = (0, 19, 1)
"""The first PEFT that saves the factors of ``[E, O, I]`` as such."""
_UNCLEAR_DEV = ((0, 19, 1), (0, 20, 0))
"""Versions whose development builds may be older or newer than the change."""
_STORED_BOTH_WAYS = ("qwen3_vl_moe",)
"""Model types whose stacks in memory were transposed in Transformers 4: the version alone does not decide."""
_VERSION = re.compile(r"(\d+)\.(\d+)\.(\d+)(.*)")


def with_expert_layout(adapter: Adapter, base: Checkpoint) -> Adapter:
    """Return an adapter whose factors of stacked experts are read as they were trained; others are returned unchanged.

    Raises:
        AdapterRefused: The layout is stated neither by the shapes nor by the settings.
    """
    stacks = {path: factors for path, factors in adapter.tensors.factors.items() if factors.layout == "experts"}
    if not stacks:
        return adapter
    are_swapped = _are_swapped(adapter, base, stacks)
    changed = {
        path: _laid_out(factors, swapped=are_swapped, grouped=_is_grouped(adapter, factors))
        for path, factors in stacks.items()
    }
    if all(changed[path] is factors for path, factors in stacks.items()):
        return adapter
    return replace(adapter, tensors=replace(adapter.tensors, factors=adapter.tensors.factors | changed))


def _laid_out(factors: Factors, *, swapped: bool, grouped: bool) -> Factors:
    if swapped:
        factors = replace(factors, layout="swapped experts", up=factors.down, down=factors.up)
    return replace(factors, grouped_by_expert=True) if grouped else factors


def _are_swapped(adapter: Adapter, base: Checkpoint, stacks: Mapping[str, Factors]) -> bool:
    votes = _votes(adapter, base, stacks)
    decided = {vote for vote in votes.values() if vote is not None}
    if len(decided) == 1:
        return decided.pop()
    if decided:
        raise AdapterRefused(
            f"The shapes of {adapter.root} contradict each other: some factors of its experts are those of the"
            " transposed matrices, others are not.",
            remedy="Save the adapter again; its files seem to come from two trainings.",
        )
    return bool(votes) and _are_square_swapped(adapter, base, next(iter(votes)))


def _votes(adapter: Adapter, base: Checkpoint, stacks: Mapping[str, Factors]) -> dict[str, bool | None]:
    """Return, for each stack of this base, whether its factors are those of the transposed matrices; None if square.

    A stack without the hidden size is left out: it does not fit this base.
    """
    hidden, votes = required(base.config, "hidden_size"), dict[str, bool | None]()
    for path, factors in stacks.items():
        try:
            module = parse_name(path, base.config).module
        except CheckpointRefused:
            continue
        of_a, of_b = adapter.shape(factors.down)[1] == hidden, adapter.shape(factors.up)[0] == hidden
        if module.endswith(FUSED) and (of_a or of_b):
            votes[path] = None if of_a and of_b else of_a == module.endswith(DOWN)
    return votes


def _are_square_swapped(adapter: Adapter, base: Checkpoint, path: str) -> bool:
    """Return whether factors of square matrices are those of the transposed ones, which only the version tells."""
    version = adapter.config.get("peft_version")
    straight = _saves_straight(version)
    refused = (
        f"{adapter.root} trained square matrices of experts ({path}), whose shapes do not tell their factors from those"
        " of the transposed matrices"
    )
    if base.config.get("model_type") in _STORED_BOTH_WAYS:
        raise AdapterRefused(
            f"{refused}, and Transformers 4 and 5 hold this model's experts in different layouts.",
            remedy="Merge it with the PEFT and Transformers that trained it, and use the result as a full fine-tune.",
        )
    if straight is None:
        raise AdapterRefused(
            f"{refused}, and neither does its peft_version {version!r}.",
            remedy="Write the version of PEFT that saved it into adapter_config.json, such as"
            ' "peft_version": "0.18.0". PEFT itself does since 0.18; before, any older version is right.',
        )
    return not straight


def _saves_straight(version: object) -> bool | None:
    """Return whether a PEFT saves the factors of ``[E, O, I]`` as such; None if its version does not tell."""
    match = _VERSION.match(str(version))
    if not match:
        return None
    release = (int(match[1]), int(match[2]), int(match[3]))
    return None if "dev" in match[4] and release in _UNCLEAR_DEV else release >= _FIRST_STRAIGHT


def _is_grouped(adapter: Adapter, factors: Factors) -> bool:
    """Return whether the columns of B are grouped by expert.

    Raises:
        AdapterRefused: Unsloth saved the adapter without their order, or stated an unknown one.
    """
    name = factors.parameter.rpartition(".")[2]
    if min(adapter.rank(factors), adapter.experts(factors)) == 1:
        return False
    order = _section(adapter.config, "unsloth_fused_expert_lora", "parameters", name).get("lora_B_layout")
    order = order or adapter.config.get("lora_B_layout")
    if str(order) in COLUMN_ORDERS:
        return COLUMN_ORDERS[str(order)]
    is_unsloth = bool(_section(adapter.config, "auto_mapping").get("unsloth_fixed"))
    if order is None and not is_unsloth:
        return False
    raise AdapterRefused(
        f"{adapter.root} was saved by Unsloth with factors of stacked experts ({factors.parameter}), and"
        f" lora_B_layout={order!r} does not tell the order of their columns; expected one of"
        f" {', '.join(COLUMN_ORDERS)}.",
        remedy='Write "lora_B_layout" into adapter_config.json: "grouped_by_expert" if it was trained with unsloth_zoo'
        ' before 2026.9.6, "rank_major" if with a later one.',
    )


def _section(config: Mapping[str, Any], *path: str) -> Mapping[str, Any]:
    """Return a nested object of a config; an empty one if it is not there."""
    for name in path:
        section = config.get(name)
        config = cast("Mapping[str, Any]", section) if isinstance(section, Mapping) else {}
    return config
