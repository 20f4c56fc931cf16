"""Tiny random models of the dense Qwen families, with a real byte-level tokenizer, and real PEFT adapters for them.

Every directory is what ``save_pretrained`` of the reference libraries writes. The default MLP has the 72B's problem in
small: 96 channels are 3 groups of 32, which 2 ranks cannot share.
"""

from math import ceil
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

HIDDEN = 64
INTERMEDIATE = 96
VOCABULARY = 320
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
VISION: dict[str, dict[str, Any]] = {
    "qwen2_vl": {"depth": 1, "embed_dim": 32, "num_heads": 2, "hidden_size": HIDDEN, "mlp_ratio": 3},
    "qwen2_5_vl": {"depth": 1, "hidden_size": 32, "num_heads": 2, "intermediate_size": 96, "out_hidden_size": HIDDEN},
    "qwen3_vl": {"depth": 1, "hidden_size": 32, "num_heads": 2, "intermediate_size": 96, "out_hidden_size": HIDDEN,
                 "deepstack_visual_indexes": [0]},
}  # fmt: skip
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def tiny_qwen2(
    root: Path,
    *,
    intermediate_size: int = INTERMEDIATE,
    tie: bool = False,
    shards: int = 1,
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
    **config: Any,
) -> Path:
    """Save a two-layer Qwen2 (with attention biases) and its tokenizer into ``root``; return ``root``.

    ``shards`` is about how many files hold the weights; ``config`` overrides fields of ``Qwen2Config``.
    """
    sizes = _sizes(intermediate_size=intermediate_size, tie=tie) | config
    return _save(Qwen2ForCausalLM, Qwen2Config(**sizes), root, shards=shards, dtype=dtype, seed=seed)


def tiny_qwen3(
    root: Path,
    *,
    intermediate_size: int = INTERMEDIATE,
    tie: bool = False,
    shards: int = 1,
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
    **config: Any,
) -> Path:
    """Save a two-layer Qwen3 (with query and key norms) and its tokenizer into ``root``; see :func:`tiny_qwen2`."""
    sizes = _sizes(intermediate_size=intermediate_size, tie=tie) | config
    return _save(Qwen3ForCausalLM, Qwen3Config(**sizes), root, shards=shards, dtype=dtype, seed=seed)


def tiny_vl(family: str, root: Path, *, dtype: torch.dtype = torch.float32, seed: int = 0) -> Path:
    """Save a vision-language model of a :data:`VISION` family, whose vision MLP is as wide as the text's."""
    text = _sizes(intermediate_size=INTERMEDIATE, tie=False)
    text["rope_parameters"] = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
    torch.manual_seed(seed)
    config = AutoConfig.for_model(family, text_config=text, vision_config=VISION[family])
    AutoModelForImageTextToText.from_config(config).to(dtype).save_pretrained(root)
    return root


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
    """Have PEFT save a LoRA for ``base`` whose A *and* B are random; ``lora`` goes to ``LoraConfig``."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    defaults: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": list(LINEARS), "task_type": "CAUSAL_LM"}
    peft = get_peft_model(model, LoraConfig(**(defaults | lora)))
    with torch.no_grad():
        for parameter in (p for p in peft.parameters() if p.requires_grad):
            parameter.normal_(std=0.1)
            parameter.data = parameter.data.to(dtype)
    peft.save_pretrained(str(root))
    return root


def _sizes(*, intermediate_size: int, tie: bool) -> dict[str, Any]:
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN,
        "intermediate_size": intermediate_size,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": HIDDEN // 4,
        "max_position_embeddings": 512,
        "tie_word_embeddings": tie,
    }


def _save(
    family: type[PreTrainedModel], config: Any, root: Path, *, shards: int, dtype: torch.dtype, seed: int
) -> Path:
    tokenizer = tiny_tokenizer()
    config.eos_token_id, config.pad_token_id, config.bos_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id, None
    torch.manual_seed(seed)
    model = family(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 or name.endswith("bias"):
                parameter.normal_(std=0.1)
    model.to(dtype=dtype)  # pyright: ignore[reportArgumentType, reportCallIssue]
    model.generation_config.do_sample = False
    nbytes = sum(p.numel() * p.element_size() for p in model.parameters())
    model.save_pretrained(root, max_shard_size=ceil(nbytes / shards) + 1 if shards > 1 else "50GB")
    tokenizer.save_pretrained(root)
    return root
