"""Sizes of published models, with the source of each. No network is needed."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Published:
    """A model's sizes; ``source`` is empty if they are from memory and unchecked."""

    name: str
    family: str
    hidden: int
    mlp: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int = 128
    experts: int = 0
    chosen: int = 0
    expert: int = 0
    shared: int = 0
    vocab: int = 151936
    source: str = ""


DEFAULTS = "the defaults of the configuration class in Transformers 5.23"
_TORCHTUNE = "pytorch/torchtune, torchtune/models/qwen{}/_model_builders.py, commit {}"
_PATCH = "alibaba/Pai-Megatron-Patch, examples/qwen{}, commit {}"
_QWEN1_5 = _PATCH.format("1_5/run_pretrain_mcore_qwen.sh", "0ab8902")
_QWEN2_5 = _TORCHTUNE.format("2_5", "47a9e19")
_QWEN3 = _TORCHTUNE.format("3", "010412e")
_QWEN3_MOE = _PATCH.format("3/run_mcore_qwen3.sh", "0f5c122")
_QWEN2_57B = "NVIDIA/TensorRT-LLM, tests/unittest/_torch/modeling/test_modeling_qwen_moe.py, commit cb4c622"
_QWEN3_CODER = "zyzshishui/miles, scripts/models/qwen3-coder-480B-A35B.sh, commit b269970"

PUBLISHED = (
    Published("Qwen1.5-0.5B", "qwen2", 1024, 2816, 24, 16, 16, 64, source=_QWEN1_5),
    Published("Qwen1.5-1.8B", "qwen2", 2048, 5504, 24, 16, 16, source=_QWEN1_5),
    Published("Qwen1.5-4B", "qwen2", 2560, 6912, 40, 20, 20, source=_QWEN1_5),
    Published("Qwen1.5-7B", "qwen2", 4096, 11008, 32, 32, 32, source=_QWEN1_5),
    Published("Qwen1.5-14B", "qwen2", 5120, 13696, 40, 40, 40, source=_QWEN1_5),
    Published("Qwen1.5-32B", "qwen2", 5120, 27392, 64, 40, 8, vocab=152064, source=_QWEN1_5),
    Published("Qwen1.5-72B", "qwen2", 8192, 24576, 80, 64, 64, vocab=152064, source=_QWEN1_5),
    Published("Qwen1.5-110B", "qwen2", 8192, 49152, 80, 64, 8),
    Published(
        "Qwen1.5-MoE-A2.7B", "qwen2_moe", 2048, 5632, 24, 16, 16, experts=60, chosen=4, expert=1408, shared=5632,
        source=DEFAULTS,
    ),
    Published(
        "Qwen2-57B-A14B", "qwen2_moe", 3584, 18944, 28, 28, 4, experts=64, chosen=8, expert=2560, shared=20480,
        source=_QWEN2_57B,
    ),
    Published("Qwen2-72B, Qwen2.5-72B, Qwen2-VL-72B", "qwen2", 8192, 29568, 80, 64, 8, vocab=152064, source=_QWEN2_5),
    Published("Qwen2.5-0.5B", "qwen2", 896, 4864, 24, 14, 2, 64, source=_QWEN2_5),
    Published("Qwen2.5-1.5B", "qwen2", 1536, 8960, 28, 12, 2, source=_QWEN2_5),
    Published("Qwen2.5-3B", "qwen2", 2048, 11008, 36, 16, 2, source=_QWEN2_5),
    Published("Qwen2.5-7B", "qwen2", 3584, 18944, 28, 28, 4, vocab=152064, source=_QWEN2_5),
    Published("Qwen2.5-14B", "qwen2", 5120, 13824, 48, 40, 8, vocab=152064, source=_QWEN2_5),
    Published("Qwen2.5-32B", "qwen2", 5120, 27648, 64, 40, 8, vocab=152064, source=_QWEN2_5),
    Published("Qwen3-0.6B", "qwen3", 1024, 3072, 28, 16, 8, source=_QWEN3),
    Published("Qwen3-1.7B", "qwen3", 2048, 6144, 28, 16, 8, source=_QWEN3),
    Published("Qwen3-4B", "qwen3", 2560, 9728, 36, 32, 8, source=_QWEN3),
    Published("Qwen3-8B", "qwen3", 4096, 12288, 36, 32, 8, source=_QWEN3),
    Published("Qwen3-14B", "qwen3", 5120, 17408, 40, 40, 8, source=_QWEN3),
    Published("Qwen3-32B", "qwen3", 5120, 25600, 64, 64, 8, source=_QWEN3),
    Published(
        "Qwen3-30B-A3B", "qwen3_moe", 2048, 6144, 48, 32, 4, experts=128, chosen=8, expert=768,
        source=_QWEN3_MOE,
    ),
    Published(
        "Qwen3-235B-A22B", "qwen3_moe", 4096, 12288, 94, 64, 4, experts=128, chosen=8, expert=1536,
        source=_QWEN3_MOE,
    ),
    Published(
        "Qwen3-Coder-480B-A35B", "qwen3_moe", 6144, 8192, 62, 96, 8, experts=160, chosen=8, expert=2560,
        source=_QWEN3_CODER,
    ),
    Published(
        "Qwen3-Next-80B-A3B", "qwen3_next", 2048, 5632, 48, 16, 2, 256, experts=512, chosen=10, expert=512, shared=512,
        source=DEFAULTS,
    ),
    Published(
        "Qwen3.5-35B-A3B", "qwen3_5_moe_text", 2048, 0, 40, 16, 2, 256, experts=256, chosen=8, expert=512, shared=512,
        vocab=248320, source=DEFAULTS,
    ),
    Published("Qwen3.5-9B", "qwen3_5_text", 4096, 12288, 32, 16, 4, 256, vocab=248320, source=DEFAULTS),
    Published(
        "Qwen4-Exp", "qwen4_exp_text", 2048, 0, 40, 16, 2, 256, experts=512, chosen=10, expert=512, shared=512,
        vocab=248320, source=DEFAULTS,
    ),
)  # fmt: skip
QWEN2_72B: dict[str, Any] = {
    "model_type": "qwen2",
    "hidden_size": 8192,
    "intermediate_size": 29568,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
}
QWEN2_5_VL_3B: dict[str, Any] = {
    "model_type": "qwen2_5_vl", "hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36,
    "num_attention_heads": 16, "num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True,
    "vision_config": {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16},
}  # fmt: skip
"""The decoder is that of Qwen2.5-3B, the tower's width the default of the configuration class."""


@dataclass(frozen=True, slots=True)
class PublishedTower:
    """A tower's sizes that matter to ranks; ``sizes`` are fields of its section in the config."""

    name: str
    family: str
    part: str
    sizes: dict[str, int]
    source: str = DEFAULTS

    @property
    def config(self) -> dict[str, Any]:
        return {"model_type": self.family, f"{self.part}_config": self.sizes}


_QWEN2_5_VL = "alibaba/Pai-Megatron-Patch, megatron_patch/model/qwen2_5_vl/transformer_config.py, commit 2b8784d"
_WHISPER = {"encoder_ffn_dim": 5120, "encoder_attention_heads": 20}
TOWERS = (
    PublishedTower("Qwen2-VL", "qwen2_vl", "vision", {"embed_dim": 1280, "mlp_ratio": 4, "num_heads": 16}),
    PublishedTower(
        "Qwen2.5-VL-3B, Qwen2.5-VL-7B", "qwen2_5_vl", "vision", {"intermediate_size": 3420, "num_heads": 16},
        _QWEN2_5_VL,
    ),
    PublishedTower(
        "Qwen2.5-VL-32B, Qwen2.5-VL-72B", "qwen2_5_vl", "vision", {"intermediate_size": 3456, "num_heads": 16},
        _QWEN2_5_VL,
    ),
    PublishedTower("Qwen2.5-Omni", "qwen2_5_omni_thinker", "vision", {"intermediate_size": 3420, "num_heads": 16}),
    PublishedTower("Qwen2.5-Omni", "qwen2_5_omni_thinker", "audio", _WHISPER),
    PublishedTower("Qwen2-Audio", "qwen2_audio", "audio", _WHISPER),
    PublishedTower("Qwen3-VL", "qwen3_vl", "vision", {"intermediate_size": 4304, "num_heads": 16}),
    PublishedTower("Qwen3-VL (mixtures)", "qwen3_vl_moe", "vision", {"intermediate_size": 4304, "num_heads": 16}),
    PublishedTower("Qwen3-Omni", "qwen3_omni_moe_thinker", "vision", {"intermediate_size": 4304, "num_heads": 16}),
    PublishedTower("Qwen3-Omni", "qwen3_omni_moe_thinker", "audio", _WHISPER),
    PublishedTower("Qwen3.5", "qwen3_5", "vision", {"intermediate_size": 4304, "num_heads": 16}),
    PublishedTower("Qwen3-ASR", "qwen3_asr", "audio", {"encoder_ffn_dim": 4096, "encoder_attention_heads": 16}),
)  # fmt: skip
_DELTA = {
    "linear_num_key_heads": 16, "linear_num_value_heads": 32, "linear_key_head_dim": 128, "linear_value_head_dim": 128,
}  # fmt: skip


def config_of(name: str) -> dict[str, Any]:
    """Return the config of a model of :data:`PUBLISHED`."""
    return as_config(next(model for model in PUBLISHED if model.name == name))


def as_config(model: Published) -> dict[str, Any]:
    """Return the config fields that determine the geometry."""
    sizes = {
        "model_type": model.family, "hidden_size": model.hidden, "num_hidden_layers": model.layers,
        "num_attention_heads": model.heads, "num_key_value_heads": model.kv_heads, "head_dim": model.head_dim,
        "vocab_size": model.vocab,
    }  # fmt: skip
    sizes |= {"intermediate_size": model.mlp} if model.mlp else {}
    if model.experts:
        sizes |= {"num_experts": model.experts, "num_experts_per_tok": model.chosen}
        sizes |= {"moe_intermediate_size": model.expert}
    sizes |= {"shared_expert_intermediate_size": model.shared} if model.shared else {}
    sizes |= {"hc_count": 4, "hc_lowrank": 320} if "qwen4" in model.family else {}
    return sizes | (_DELTA if "next" in model.family or "3_5" in model.family or "qwen4" in model.family else {})
