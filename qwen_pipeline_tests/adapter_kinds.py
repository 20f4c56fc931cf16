"""Every kind of adapter that PEFT can save, for any Qwen family, and PEFT's own merge of it."""

from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from qwen_pipeline.qwen.families import FAMILIES
from qwen_pipeline_tests.tiny import VOCABULARY, load_tiny

LARGER = VOCABULARY + 10
_EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]

Values = Callable[[torch.Tensor], torch.Tensor]
"""Fills a trainable parameter in place, and returns it."""


def noise(parameter: torch.Tensor) -> torch.Tensor:
    return parameter.normal_(std=0.1)


def grid(parameter: torch.Tensor) -> torch.Tensor:
    """Fill with -1/8, 0 and 1/8: with a base of multiples of 1/32, every product and sum is exact in bfloat16."""
    return parameter.random_(-1, 2).div_(8)


def biased_linears(model: torch.nn.Module) -> list[str]:
    linears = [(name, part) for name, part in _modules(model) if isinstance(part, torch.nn.Linear)]
    return [name for name, part in linears if "bias" in part.state_dict()]


def convolutions(model: torch.nn.Module) -> list[str]:
    kinds = (torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d)
    return [name for name, part in _modules(model) if isinstance(part, kinds) and part.groups == 1]


def _modules(model: torch.nn.Module) -> list[tuple[str, torch.nn.Module]]:
    return [(name, part) for name, part in model.named_modules() if name != "lm_head"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """A kind of adapter.

    Attributes:
        lora: Fields of ``LoraConfig``.
        targets: Returns the modules of a model to train; the kind does not apply to a model without any.
        tied: Whether the base's head and embedding are tied.
        vocabulary: Rows of the embedding during training.
        needs_experts: Whether the kind applies to mixtures of experts only.
    """

    lora: Mapping[str, Any] = field(default_factory=dict[str, Any])
    targets: Callable[[torch.nn.Module], list[str]] | None = None
    tied: bool = False
    vocabulary: int = VOCABULARY
    needs_experts: bool = False

    @property
    def is_computed_exactly(self) -> bool:
        """True if every intermediate result is exact in bfloat16; those of DoRA, which takes roots, are not."""
        return not self.lora.get("use_dora")


_LINEARS = r".*\.(?:[qkvo]_proj|in_proj_\w+|out_proj|gate_proj|up_proj|down_proj|shared_expert_gate|qkv|fc1|linear_fc2)"
_ATTENTION = r".*\.(?:[qkvo]_proj|in_proj_\w+|out_proj|qkv)"
_TIED: dict[str, Any] = {"ensure_weight_tying": True}

KINDS: Mapping[str, Kind] = {
    "linear": Kind(lora={"target_modules": _LINEARS}),
    "rslora": Kind(lora={"use_rslora": True}),
    "patterns": Kind(lora={"rank_pattern": {"q_proj": 2, r"layers\.1\..*o_proj": 8}, "alpha_pattern": {"v_proj": 3}}),
    "fan_in_fan_out": Kind(lora={"fan_in_fan_out": True}),
    "dora": Kind(lora={"use_dora": True, "target_modules": _ATTENTION}),
    "dora embedding": Kind(lora={"use_dora": True, "target_modules": ["embed_tokens", "lm_head"]}),
    "convolution": Kind(targets=convolutions),
    "dora convolution": Kind(lora={"use_dora": True}, targets=convolutions),
    "bias all": Kind(lora={"bias": "all"}),
    "bias lora_only": Kind(lora={"bias": "lora_only"}),
    "lora_bias": Kind(lora={"lora_bias": True}, targets=biased_linears),
    "embeddings": Kind(lora={"target_modules": ["q_proj", "embed_tokens", "lm_head"]}),
    "tied embedding": Kind(lora={"target_modules": ["q_proj", "embed_tokens"]}, tied=True),
    "tied head": Kind(lora={"target_modules": ["q_proj", "lm_head"]}, tied=True),
    "kept tied": Kind(lora={"target_modules": ["q_proj", "embed_tokens"], **_TIED}, tied=True),
    "modules_to_save": Kind(lora={"modules_to_save": ["lm_head", "embed_tokens", "norm"]}),
    "saved mlp": Kind(lora={"modules_to_save": ["layers.0.mlp"], "bias": "all"}),
    "tied saved head": Kind(lora={"modules_to_save": ["lm_head"]}, tied=True),
    "saved, kept tied": Kind(lora={"modules_to_save": ["embed_tokens"], **_TIED}, tied=True),
    "larger vocabulary": Kind(vocabulary=LARGER),
    "larger, saved": Kind(lora={"modules_to_save": ["lm_head", "embed_tokens"]}, vocabulary=LARGER),
    "tied larger": Kind(vocabulary=LARGER, tied=True),
    "tokens": Kind(lora={"trainable_token_indices": [1, 5, 300]}),
    "tied tokens": Kind(lora={"trainable_token_indices": {"embed_tokens": [1, 5], "lm_head": [2]}}, tied=True),
    "tokens, kept tied": Kind(lora={"trainable_token_indices": [1, 5], **_TIED}, tied=True),
    "parameters": Kind(lora={"target_modules": [], "target_parameters": ["q_proj.weight"]}),
    "experts": Kind(lora={"target_modules": ["q_proj"], "target_parameters": _EXPERTS}, needs_experts=True),
    "router, down": Kind(
        lora={"target_modules": [], "target_parameters": ["gate.weight", "experts.down_proj"]}, needs_experts=True
    ),
}


def applies(kind: Kind, family: str, base: Path) -> bool:
    """Return whether a model of a family has the modules that a kind trains."""
    if kind.needs_experts and not FAMILIES[family].experts:
        return False
    return kind.targets is None or bool(kind.targets(_loaded(base, torch.float32)))


def train(kind: Kind, base: Path, root: Path, *, seed: int = 1, values: Values = noise) -> PeftModel:
    """Save an adapter whose trainable tensors are all random with PEFT; return the model that was saved."""
    model = _resized(_loaded(base, torch.float32), kind.vocabulary)
    torch.manual_seed(seed)
    targets = kind.targets(model) if kind.targets else ["q_proj", "v_proj", "o_proj"]
    defaults: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": targets}
    peft = get_peft_model(model, LoraConfig(**(defaults | dict(kind.lora))))
    with torch.no_grad():
        for parameter in (p for p in peft.parameters() if p.requires_grad):
            values(parameter)
    peft.save_pretrained(str(root), save_embedding_layers=True if kind.vocabulary != VOCABULARY else "auto")
    return peft


def merged_by_peft(kind: Kind, base: Path, adapter: Path, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Return the tensors after PEFT's own merge, with embedding and head untied.

    PEFT would otherwise add an update of either to both, and with ``ensure_weight_tying`` to both twice, which is not
    what the adapter computed in training. Only token rows are written to both as they were trained.
    """
    model = _resized(_loaded(base, dtype), kind.vocabulary)
    config: Any = LoraConfig.from_pretrained(str(adapter))
    if kind.tied and not (config.ensure_weight_tying and config.trainable_token_indices):
        untie(model)
        if config.ensure_weight_tying and "embed_tokens" in config.target_modules:
            config.target_modules = {*config.target_modules, "lm_head"}
        config.ensure_weight_tying = False
    return dict(PeftModel.from_pretrained(model, str(adapter), config=config).merge_and_unload().state_dict())


def put_on_grid(root: Path) -> Path:
    """Round the weights of a stored model to multiples of 1/32; return ``root``."""
    file = root / "model.safetensors"
    save_file({name: (t.float() * 32).round().div(32).to(t.dtype) for name, t in load_file(file).items()}, file)
    return root


def untie(model: PreTrainedModel) -> None:
    """Make the head a separate tensor."""
    head: Any = model.get_output_embeddings()
    head.weight = torch.nn.Parameter(head.weight.detach().clone())
    for config in (model.config, model.config.get_text_config()):
        config.tie_word_embeddings = False


def _loaded(base: Path, dtype: torch.dtype) -> PreTrainedModel:
    return deepcopy(_loaded_once(base, dtype))


@lru_cache(maxsize=8)
def _loaded_once(base: Path, dtype: torch.dtype) -> PreTrainedModel:
    return load_tiny(base, dtype)


def _resized(model: PreTrainedModel, vocabulary: int) -> PreTrainedModel:
    """Resize the embedding, and the head if it is untied; the values of new rows are multiples of 1/32."""
    embedding: Any = model.get_input_embeddings()
    rows = embedding.weight.shape[0]
    if vocabulary != rows:
        model.resize_token_embeddings(vocabulary, mean_resizing=False)
        generator = torch.Generator().manual_seed(0)
        new = torch.randint(-8, 9, (vocabulary - rows, embedding.weight.shape[1]), generator=generator) / 32
        parts: list[Any] = [model.get_input_embeddings(), model.get_output_embeddings()]
        with torch.no_grad():
            for part in parts:
                part.weight[rows:] = new
    return model
