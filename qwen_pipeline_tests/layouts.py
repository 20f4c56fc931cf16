"""Layouts of one family's checkpoints on disk, all of which Transformers loads as the same model.

Sources: Transformers' ``conversion_mapping.py`` and ``_keys_to_ignore_on_load_unexpected``.
"""

import json
import re
import shutil
from pathlib import Path
from typing import Literal, get_args

import torch
from safetensors.torch import load_file, save_file

Layout = Literal["saved", "fused", "transposed", "nested", "mtp", "bare"]
"""``saved`` is that of ``save_pretrained``, ``nested`` has the names in memory, ``mtp`` adds a draft head, and ``bare``
lacks the prefix ``model.``, like published embedding models, which were saved without their head.
"""

Tensors = dict[str, torch.Tensor]
_SEPARATE = re.compile(r"(.*\.mlp\.experts)\.\d+\.gate_proj\.weight")
_SEPARATED = (
    "qwen2_moe", "qwen3_moe", "qwen3_next", "qwen3_omni_moe", "qwen3_omni_moe_thinker", "qwen3_5_moe",
    "qwen3_5_moe_text", "qwen4_exp", "qwen4_exp_text",
)  # fmt: skip
_TRANSPOSED = ("qwen3_vl_moe",)
_NESTED = ("qwen2_vl", "qwen2_5_vl", "qwen2_5_omni_thinker", "qwen3_omni_moe_thinker", "qwen2_audio")
_WHOLE = ("qwen2_5_omni", "qwen3_omni_moe")
"""Models whose thinker has a prefix of its own."""
_DRAFTED = ("qwen3_next", "qwen3_5", "qwen3_5_text", "qwen3_5_moe", "qwen3_5_moe_text")


def layouts_of(family: str) -> list[Layout]:
    """Return the layouts that checkpoints of a family may have."""
    fits: dict[Layout, bool] = {
        "saved": True,
        "fused": family in _SEPARATED,
        "transposed": family in _TRANSPOSED,
        "nested": family in _NESTED,
        "mtp": family in _DRAFTED,
        "bare": family not in _WHOLE,
    }
    return [layout for layout in get_args(Layout) if fits[layout]]


def relay(root: Path, layout: Layout) -> None:
    """Rewrite the weights that ``save_pretrained`` saved in ``root`` in another layout."""
    if layout == "saved":
        return
    family = json.loads((root / "config.json").read_bytes())["model_type"]
    assert layout in layouts_of(family), f"{family} is not published {layout}"
    tensors = load_file(root / "model.safetensors")
    if layout == "bare" and family in _NESTED:
        tensors = nested(tensors)
    rewritten = {"fused": fused, "transposed": transposed, "nested": nested, "mtp": drafted, "bare": bare}
    save_file({n: t.contiguous() for n, t in rewritten[layout](tensors).items()}, root / "model.safetensors")


def fused(tensors: Tensors) -> Tensors:
    """Stack separate experts into ``gate_up_proj`` [E, 2I, H] and ``down_proj`` [E, H, I]."""
    kept = dict(tensors)
    for experts in sorted({match[1] for name in tensors if (match := _SEPARATE.fullmatch(name))}):
        count = sum(name.startswith(experts) and name.endswith(".gate_proj.weight") for name in tensors)
        parts = {
            part: torch.stack([kept.pop(f"{experts}.{e}.{part}_proj.weight") for e in range(count)])
            for part in ("gate", "up", "down")
        }
        kept[f"{experts}.gate_up_proj"] = torch.cat([parts["gate"], parts["up"]], dim=1)
        kept[f"{experts}.down_proj"] = parts["down"]
    return kept


def transposed(tensors: Tensors) -> Tensors:
    """Transpose fused experts: ``gate_up_proj`` [E, H, 2I], ``down_proj`` [E, I, H]."""
    stacked = fused(tensors)
    return {name: t.transpose(1, 2) if ".mlp.experts." in name else t for name, t in stacked.items()}


def nested(tensors: Tensors) -> Tensors:
    """Rename tensors as in the model in memory: towers and decoder under ``model.``."""

    def named(name: str) -> str:
        if name.startswith(("visual.", "audio_tower.", "multi_modal_projector.")):
            return f"model.{name}"
        if name.startswith("language_model."):
            return re.sub(r"^language_model\.(?:model\.)?", "model.language_model.", name).replace(
                "model.language_model.lm_head", "lm_head"
            )
        return re.sub(r"^model\.", "model.language_model.", name)

    return {named(name): tensor for name, tensor in tensors.items()}


def bare(tensors: Tensors) -> Tensors:
    """Rename tensors as a model without an output head saves them, as Qwen3-Embedding is published."""
    return {name.removeprefix("model."): tensor for name, tensor in tensors.items()}


def drafted(tensors: Tensors) -> Tensors:
    """Add a multi-token prediction head: a copy of the last layer, under the names of published checkpoints."""
    layer = re.compile(r"model\.(?:language_model\.)?layers\.1\.(.+)")
    draft = {f"mtp.layers.0.{match[1]}": t.clone() for name, t in tensors.items() if (match := layer.fullmatch(name))}
    hidden = draft["mtp.layers.0.input_layernorm.weight"]
    norms = {f"mtp.{name}.weight": hidden.clone() for name in ("norm", "pre_fc_norm_embedding", "pre_fc_norm_hidden")}
    return tensors | draft | norms | {"mtp.fc.weight": torch.zeros(len(hidden), 2 * len(hidden), dtype=hidden.dtype)}


_PARTS = {
    "self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "linear_attn.in_proj_qkvz": ("linear_attn.in_proj_qkv", "linear_attn.in_proj_z"),
    "linear_attn.in_proj_ba": ("linear_attn.in_proj_b", "linear_attn.in_proj_a"),
    "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.shared_expert.gate_up_proj": ("mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj"),
    **{f"mlp.experts.{e}.gate_up_proj": (f"mlp.experts.{e}.gate_proj", f"mlp.experts.{e}.up_proj") for e in range(4)},
}
"""Matrices that vLLM builds as one, and as some tools export them; no class of Transformers loads them for Qwen."""


def fused_projections(tensors: Tensors, *, groups: int = 1, is_swapped: bool = False) -> Tensors:
    """Fuse projections by rows: q, k and v of one group of heads after the other; the second part first if swapped."""
    kept: Tensors = {}
    for name, tensor in tensors.items():
        owner, _, inner = name.rpartition("layers.")
        number, _, leaf = inner.partition(".")
        module, _, parameter = leaf.rpartition(".")
        whole = next((whole for whole, parts in _PARTS.items() if owner and module in parts), None)
        if whole is None or owner.endswith("tower.") or owner.startswith(("talker.", "code2wav.")):
            kept[name] = tensor
            continue
        stored = [tensors[f"{owner}layers.{number}.{part}.{parameter}"] for part in _PARTS[whole]]
        by_group = groups if "qkv_proj" in whole else 1
        turned = stored[::-1] if is_swapped and len(stored) == 2 else stored
        grouped = torch.cat([part.reshape(by_group, -1, *part.shape[1:]) for part in turned], dim=1)
        kept[f"{owner}layers.{number}.{whole}.{parameter}"] = grouped.reshape(-1, *tensor.shape[1:])
    return kept


def fused_copy(source: Path, root: Path, *, groups: int = 1, is_swapped: bool = False) -> Path:
    """Copy a model with its projections fused, as :func:`fused_projections` does it."""
    shutil.copytree(source, root)
    tensors = fused_projections(load_file(source / "model.safetensors"), groups=groups, is_swapped=is_swapped)
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(contiguous, root / "model.safetensors", metadata={"format": "pt"})
    return root
