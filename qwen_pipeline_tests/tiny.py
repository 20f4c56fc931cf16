"""Tiny random models of every Qwen family, with a real byte-level tokenizer, and real PEFT adapters for them.

``save_pretrained`` of the reference libraries writes every directory; other layouts are made of its files.
"""

from functools import partial
from math import ceil
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerFast

from qwen_pipeline_tests.layouts import Layout, relay
from qwen_pipeline_tests.tiny_sizes import (
    AUTO_MAPPINGS,
    HIDDEN,
    INTERMEDIATE,
    LANGUAGE_FAMILIES,
    VOCABULARY,
    tiny_sizes,
)

__all__ = ["HIDDEN", "INTERMEDIATE", "LANGUAGE_FAMILIES", "VOCABULARY"]

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
DENSE_LINEARS = (*(f"self_attn.{name}" for name in LINEARS[:4]), *(f"mlp.{name}" for name in LINEARS[4:]))
"""The linear layers of a dense layer with full attention, in the order of the forward pass."""
VISION = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")


def tiny_model(
    family: str,
    root: Path,
    *,
    tie: bool = False,
    shards: int = 1,
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
    layout: Layout = "saved",
    **text: Any,
) -> Path:
    """Save a two-layer model of a family of :data:`LANGUAGE_FAMILIES` and its tokenizer into ``root``; return ``root``.

    Args:
        family: ``model_type`` of the config.
        root: Directory to write.
        tie: Whether the output head shares its weights with the embedding.
        shards: The approximate number of files of weights.
        dtype: The dtype of every floating-point weight.
        seed: The seed of the weights.
        layout: The names and fusion of tensors on disk, one of :func:`qwen_pipeline_tests.layouts.layouts_of`.
        text: Config fields of the language model to override.
    """
    tokenizer = tiny_tokenizer()
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}
    default = AutoConfig.for_model(family)
    config = type(default)(**tiny_sizes(default, {"tie_word_embeddings": tie} | ids | text))
    torch.manual_seed(seed)
    model = model_class(family)(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 or name.endswith("bias"):
                parameter.normal_(std=0.1)
    model.to(dtype=dtype)  # pyright: ignore[reportArgumentType, reportCallIssue]
    model.generation_config.do_sample = False
    nbytes = sum(p.numel() * p.element_size() for p in model.parameters())
    model.save_pretrained(root, max_shard_size=ceil(nbytes / shards) + 1 if shards > 1 else "50GB")
    tokenizer.save_pretrained(root)
    relay(root, layout)
    return root


tiny_qwen2 = partial(tiny_model, "qwen2")
tiny_qwen3 = partial(tiny_model, "qwen3")


def tiny_vl(family: str, root: Path, *, dtype: torch.dtype = torch.float32) -> Path:
    """Save a vision-language model; the MLPs of vision and text have the same width."""
    return tiny_model(family, root, dtype=dtype)


def with_codes(root: Path) -> Path:
    """Store codes of one layer among the weights in ``root``, which are then those of a quantized model."""
    tensors = load_file(root / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.qweight"] = torch.zeros(8, 96, dtype=torch.int32)
    save_file(tensors, root / "model.safetensors")
    return root


def model_class(family: str) -> type[PreTrainedModel]:
    """Return the class of a family's most complete model."""
    return getattr(transformers, next(names[family] for names in AUTO_MAPPINGS if family in names))


def load_tiny(root: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Load a directory of :func:`tiny_model` as a model that maps ``input_ids`` to logits."""
    config = AutoConfig.from_pretrained(root)
    kind = model_class(config.model_type)
    if "thinker_config" in config.sub_configs:
        kind, config = model_class(config.thinker_config.model_type), config.thinker_config
    loaded: Any = kind.from_pretrained(root, config=config, dtype=dtype, output_loading_info=True)
    model, report = loaded
    assert not report["missing_keys"], report["missing_keys"]
    assert not report["mismatched_keys"], report["mismatched_keys"]
    return model.eval()


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer that maps each byte to a token, with Qwen's special tokens and chat format."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={byte: i for i, byte in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>", model_max_length=512
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def tiny_adapter(base: Path, root: Path, *, dtype: torch.dtype = torch.float32, seed: int = 1, **lora: Any) -> Path:
    """Have PEFT save a LoRA for ``base`` whose A *and* B are random; ``lora`` are arguments of ``LoraConfig``."""
    torch.manual_seed(seed)
    model: Any = load_tiny(base)
    defaults: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": list(LINEARS), "task_type": "CAUSAL_LM"}
    peft = get_peft_model(model, LoraConfig(**(defaults | lora)))
    with torch.no_grad():
        for parameter in (p for p in peft.parameters() if p.requires_grad):
            parameter.normal_(std=0.1)
            parameter.data = parameter.data.to(dtype)
    peft.save_pretrained(str(root))
    return root
