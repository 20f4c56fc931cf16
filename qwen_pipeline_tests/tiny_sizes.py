"""Config values that shrink every Qwen family of the installed Transformers to two layers and some 100 kB."""

from collections.abc import Mapping
from copy import deepcopy
from typing import Any, cast

from transformers import PreTrainedConfig
from transformers.models.auto import modeling_auto

HIDDEN = 64
INTERMEDIATE = 96
"""Three groups of 32, which do not divide among 2 ranks, as the groups of the 72B do not divide among 8."""
VOCABULARY = 320

AUTO_MAPPINGS = cast(
    "tuple[Mapping[str, str], ...]",
    (
        modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
        modeling_auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
        modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    ),
)
"""Model type -> class whose output is logits over a vocabulary; the mapping of the most complete classes first."""

LANGUAGE_FAMILIES = tuple(sorted({family for names in AUTO_MAPPINGS for family in names if "qwen" in family}))

_TEXT: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": HIDDEN, "intermediate_size": INTERMEDIATE, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": HIDDEN // 4, "max_position_embeddings": 512,
    "tie_word_embeddings": False, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}, "eos_token_id": 2,
    # mixtures of experts
    "moe_intermediate_size": INTERMEDIATE, "shared_expert_intermediate_size": 160, "num_experts": 4,
    "num_local_experts": 4, "num_experts_per_tok": 2,
    # gated delta nets
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
    # hyper-connections, n-gram embeddings and indexed attention
    "hc_count": 2, "hc_lowrank": 8, "ple_layer_ids": [1], "ngram_vocab_size_base": 50, "heads_per_ngram": 2,
    "split_ngram_parts": 2, "make_ngram_vocab_size_divisible_by": 4, "indexer_n_heads": 2, "indexer_kv_heads": 1,
    "indexer_head_dim": 16, "indexer_budget": 8, "indexer_compress_ratio": 4,
    # talkers
    "embedding_size": HIDDEN, "thinker_hidden_size": HIDDEN, "num_code_groups": 2, "codec_eos_token_id": 1,
}  # fmt: skip
_UNDECLARED = {
    "talker_config": {"spatial_merge_size": 2},
    "qwen2_5_omni_thinker": {"vision_start_token_id": 301},
    "qwen3_omni_moe_thinker": {"vision_start_token_id": 301},
    "qwen3_omni_moe_talker_text": {"shared_expert_intermediate_size": 160},
}
"""Fields that published configs have and models read, but that configuration classes do not declare."""
_MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
_VISION: dict[str, Any] = {
    "depth": 1, "embed_dim": 32, "hidden_size": 32, "num_heads": 2, "intermediate_size": INTERMEDIATE, "mlp_ratio": 3,
    "out_hidden_size": HIDDEN, "deepstack_visual_indexes": [0], "fullatt_block_indexes": [0],
    "num_position_embeddings": 16,
}  # fmt: skip
_AUDIO: dict[str, Any] = {
    "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": INTERMEDIATE, "d_model": 32,
    "num_mel_bins": 16, "output_dim": HIDDEN, "downsample_hidden_size": 16, "max_source_positions": 16,
}  # fmt: skip
_OTHERS: dict[str, dict[str, Any]] = {
    "vision_config": _VISION,
    "audio_config": _AUDIO,
    "code2wav_config": {
        "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2,
        "intermediate_size": INTERMEDIATE, "decoder_dim": 32, "codebook_size": 8, "num_quantizers": 2,
        "upsample_rates": [2, 2], "upsampling_ratios": [2], "sliding_window": 8, "max_position_embeddings": 64,
    },
    "dit_config": {
        "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "head_dim": 16, "emb_dim": 16,
        "num_embeds": 9, "mel_dim": 8, "enc_emb_dim": 8, "enc_dim": 8, "enc_channels": [8, 8, 8, 8, 24],
        "enc_attention_channels": 8, "look_ahead_layers": [0], "look_backward_layers": [0],
    },
    "bigvgan_config": {
        "mel_dim": 8, "upsample_initial_channel": 8, "upsample_rates": [2], "upsample_kernel_sizes": [4],
        "resblock_kernel_sizes": [3], "resblock_dilation_sizes": [[1, 3, 5]],
    },
}  # fmt: skip


def tiny_sizes(config: PreTrainedConfig, text: dict[str, Any], role: str = "text_config") -> dict[str, Any]:
    """Return arguments for a tiny config of ``config``'s class; ``text`` overrides fields of the language model."""
    parts = {
        name: tiny_sizes(part if (part := getattr(config, name)) is not None else kind(), text, name)
        for name, kind in config.sub_configs.items()
    }
    known = config.to_dict()
    sizes = _OTHERS.get(role, _TEXT | _special(config)) | (text if role == "text_config" else {})
    if parts and role != "talker_config":
        sizes = {"tie_word_embeddings": text.get("tie_word_embeddings", False)}
    if config.model_type == "qwen2_vl_vision":
        sizes["hidden_size"] = HIDDEN
    undeclared = _UNDECLARED.get(config.model_type or role, {})
    overrides = text if role == "text_config" and not parts else {}
    chosen = {name: value for name, value in sizes.items() if name in known or name in overrides} | undeclared
    return deepcopy(chosen) | parts  # configuration classes modify their arguments


def _special(config: PreTrainedConfig) -> dict[str, Any]:
    special: dict[str, Any] = {}
    if hasattr(config, "linear_num_key_heads"):
        special["layer_types"] = ["linear_attention", "full_attention"]
    if any(kind in config.model_type for kind in ("_vl_", "omni", "talker", "qwen3_5", "qwen4")):
        special["rope_parameters"] = _MROPE
    return special
