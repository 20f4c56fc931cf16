"""Every kind of adapter that PEFT can save, and PEFT's own answer to what merging one gives, for any Qwen family."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel

from qwen_pipeline.qwen.families import FAMILIES
from qwen_pipeline_tests.tiny import VOCABULARY, load_tiny

LARGER = VOCABULARY + 10
_EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """What is asked of PEFT.

    Attributes:
        lora: Fields of ``LoraConfig``.
        tied: Whether the base's head is its embedding.
        vocabulary: Rows of the embedding during training.
        needs_experts: Whether only mixtures of experts can have it.
    """

    lora: Mapping[str, Any] = field(default_factory=dict[str, Any])
    tied: bool = False
    vocabulary: int = VOCABULARY
    needs_experts: bool = False


_LINEARS = r".*\.(?:[qkvo]_proj|in_proj_\w+|out_proj|gate_proj|up_proj|down_proj|shared_expert_gate|qkv|fc1|linear_fc2)"
_ATTENTION = r".*\.(?:[qkvo]_proj|in_proj_\w+|out_proj|qkv)"

KINDS: Mapping[str, Kind] = {
    "linear": Kind(lora={"target_modules": _LINEARS}),
    "rslora": Kind(lora={"use_rslora": True}),
    "patterns": Kind(lora={"rank_pattern": {"q_proj": 2, r"layers\.1\..*o_proj": 6}, "alpha_pattern": {"v_proj": 3}}),
    "dora": Kind(lora={"use_dora": True, "target_modules": _ATTENTION}),
    "dora embedding": Kind(lora={"use_dora": True, "target_modules": ["embed_tokens", "lm_head"]}),
    "bias all": Kind(lora={"bias": "all"}),
    "bias lora_only": Kind(lora={"bias": "lora_only"}),
    "embeddings": Kind(lora={"target_modules": ["q_proj", "embed_tokens", "lm_head"]}),
    "tied embedding": Kind(lora={"target_modules": ["q_proj", "embed_tokens"]}, tied=True),
    "tied head": Kind(lora={"target_modules": ["q_proj", "lm_head"]}, tied=True),
    "modules_to_save": Kind(lora={"modules_to_save": ["lm_head", "embed_tokens", "norm"]}),
    "saved mlp": Kind(lora={"modules_to_save": ["layers.0.mlp"], "bias": "all"}),
    "tied saved head": Kind(lora={"modules_to_save": ["lm_head"]}, tied=True),
    "larger vocabulary": Kind(vocabulary=LARGER),
    "larger, saved": Kind(lora={"modules_to_save": ["lm_head", "embed_tokens"]}, vocabulary=LARGER),
    "tied larger": Kind(vocabulary=LARGER, tied=True),
    "tokens": Kind(lora={"trainable_token_indices": [1, 5, 300]}),
    "tied tokens": Kind(lora={"trainable_token_indices": {"embed_tokens": [1, 5], "lm_head": [2]}}, tied=True),
    "parameters": Kind(lora={"target_modules": [], "target_parameters": ["q_proj.weight"]}),
    "experts": Kind(lora={"target_modules": ["q_proj"], "target_parameters": _EXPERTS}, needs_experts=True),
    "router, down": Kind(
        lora={"target_modules": [], "target_parameters": ["gate.weight", "experts.down_proj"]}, needs_experts=True
    ),
}


_NEVER_TIED = ("qwen2_audio",)
"""Families whose head Transformers makes a tensor of its own, whatever the config says."""


def applies(kind: Kind, family: str) -> bool:
    if kind.tied and family in _NEVER_TIED:
        return False
    return FAMILIES[family].experts or not kind.needs_experts


def train(kind: Kind, base: Path, root: Path, *, seed: int = 1) -> PeftModel:
    """Have PEFT save an adapter whose every trainable tensor is random; return the model it was saved from."""
    model = _resized(load_tiny(base, torch.float32), kind.vocabulary)
    torch.manual_seed(seed)
    defaults: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "o_proj"]}
    peft = get_peft_model(model, LoraConfig(**(defaults | dict(kind.lora))))
    with torch.no_grad():
        for parameter in (p for p in peft.parameters() if p.requires_grad):
            parameter.normal_(std=0.1)
    peft.save_pretrained(str(root), save_embedding_layers=True if kind.vocabulary != VOCABULARY else "auto")
    return peft


def peft_answer(kind: Kind, base: Path, adapter: Path, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Return the tensors after PEFT's own merge, with embedding and head as tensors of their own.

    PEFT would otherwise add an update of either to both, which is not what the adapter computed in training.
    """
    model = _resized(load_tiny(base, dtype), kind.vocabulary)
    if kind.tied:
        separate(model)
    return dict(PeftModel.from_pretrained(model, str(adapter)).merge_and_unload().state_dict())


def separate(model: PreTrainedModel) -> None:
    """Make the head a tensor of its own."""
    head: Any = model.get_output_embeddings()
    head.weight = torch.nn.Parameter(head.weight.detach().clone())
    for config in (model.config, model.config.get_text_config()):
        config.tie_word_embeddings = False


def _resized(model: PreTrainedModel, vocabulary: int) -> PreTrainedModel:
    embedding: Any = model.get_input_embeddings()
    if vocabulary != embedding.weight.shape[0]:
        torch.manual_seed(0)
        model.resize_token_embeddings(vocabulary, mean_resizing=False)
    return model
