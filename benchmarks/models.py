"""Random checkpoints with the widths of a real Qwen model and as many layers as fit, streamed to disk."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from itertools import count, islice, product
from pathlib import Path
from string import ascii_lowercase

import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel

from qwen_pipeline.checkpoint.lazy import Checkpoint, LazyTensor
from qwen_pipeline.checkpoint.safetensors_file import TensorSpec
from qwen_pipeline.checkpoint.writer import write_checkpoint

SHARD_BYTES = 4 * 10**9
"""About the size of a file of the published 72B checkpoint."""
NOISE = 2**22 - 3
"""Number of random values, a prime, so that no row of a weight equals another.

Each tensor repeats them from its own offset, which only a compressor could exploit.
"""

SPECIAL_TOKENS = 16
"""Tokens left to loaders, which add Qwen's own."""
SPACE = "\u0120"
"""The space before a word, in byte-level BPE."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Widths:
    """The sizes of a dense Qwen2 model that decide the work of a layer."""

    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int
    tie_word_embeddings: bool = False


QWEN2_72B = Widths(
    hidden_size=8192, intermediate_size=29568, num_attention_heads=64, num_key_value_heads=8, vocab_size=152064
)
QWEN2_7B = Widths(
    hidden_size=3584, intermediate_size=18944, num_attention_heads=28, num_key_value_heads=4, vocab_size=152064
)
QWEN2_3B = Widths(
    hidden_size=2048, intermediate_size=11008, num_attention_heads=16, num_key_value_heads=2, vocab_size=151936
)
QWEN2_1_5B = Widths(
    hidden_size=1536, intermediate_size=8960, num_attention_heads=12, num_key_value_heads=2, vocab_size=151936
)
QWEN2_HALF_B = Widths(
    hidden_size=896, intermediate_size=4864, num_attention_heads=14, num_key_value_heads=2, vocab_size=151936
)
EMBEDDING_OF_8_GIB = replace(QWEN2_72B, vocab_size=2**19, tie_word_embeddings=True)
WIDTHS: Mapping[str, Widths] = {
    "72b": QWEN2_72B,
    "7b": QWEN2_7B,
    "3b": QWEN2_3B,
    "1.5b": QWEN2_1_5B,
    "0.5b": QWEN2_HALF_B,
    "8gib-embedding": EMBEDDING_OF_8_GIB,
}


def widths_of(name: str) -> Widths:
    """Return the widths of a known size, or those in a ``config.json``."""
    if name in WIDTHS:
        return WIDTHS[name]
    config = json.loads(Path(name).read_bytes())
    return Widths(**{field: config[field] for field in Widths.__dataclass_fields__ if field in config})


def linears(widths: Widths) -> dict[str, tuple[int, int]]:
    """Return the linear layers of one decoder layer: name -> [O, I]."""
    hidden, mlp = widths.hidden_size, widths.intermediate_size
    kv = hidden // widths.num_attention_heads * widths.num_key_value_heads
    return {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (kv, hidden),
        "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (mlp, hidden),
        "mlp.up_proj": (mlp, hidden),
        "mlp.down_proj": (hidden, mlp),
    }


def write_base(widths: Widths, layers: int, root: Path) -> Path:
    """Write a Qwen2 checkpoint of random bfloat16 weights; at most a few blocks are in memory."""
    shapes = dict(_shapes(widths, layers))
    noise = torch.randn(NOISE, generator=torch.Generator().manual_seed(0)).mul_(0.02).bfloat16()
    tensors = {name: _noisy(shape, noise, offset) for offset, (name, shape) in enumerate(shapes.items())}
    root.mkdir(parents=True)
    checkpoint = Checkpoint(config=_config(widths, layers), tensors=tensors, shards=_shards(tensors))
    write_checkpoint(checkpoint, root, task="generate")
    (root / ".journal.jsonl").unlink()
    return root


def write_adapter(widths: Widths, layers: int, root: Path, *, rank: int, base: Path) -> Path:
    """Write a PEFT LoRA on all linear layers, A and B random, in float32 as PEFT saves it.

    If embedding and head are one tensor, the embedding has a LoRA too, so that the largest tensor is computed.
    """
    random = torch.Generator().manual_seed(1)
    tensors: dict[str, torch.Tensor] = {}
    for layer in range(layers):
        for name, (o, i) in linears(widths).items():
            at = f"base_model.model.model.layers.{layer}.{name}"
            tensors[f"{at}.lora_A.weight"] = torch.randn(rank, i, generator=random) / i**0.5
            tensors[f"{at}.lora_B.weight"] = torch.randn(o, rank, generator=random) * 0.01
    modules = sorted(name.rpartition(".")[2] for name in linears(widths))
    if widths.tie_word_embeddings:
        modules.append("embed_tokens")
        at = "base_model.model.model.embed_tokens"
        tensors[f"{at}.lora_embedding_A"] = torch.randn(rank, widths.vocab_size, generator=random) * 0.01
        tensors[f"{at}.lora_embedding_B"] = torch.randn(widths.hidden_size, rank, generator=random)
    root.mkdir(parents=True)
    save_file(tensors, root / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base),
        "r": rank,
        "lora_alpha": 2 * rank,
        "target_modules": modules,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    (root / "adapter_config.json").write_text(json.dumps(config))
    return root


def write_tokenizer(widths: Widths, root: Path) -> None:
    """Write a byte-level BPE tokenizer that fills the vocabulary: one token for each byte and for each short word."""
    alphabet, words = sorted(ByteLevel.alphabet()), _words(widths)
    vocabulary = {token: number for number, token in enumerate([*alphabet, *(f"{SPACE}{word}" for word in words)])}
    merges = [(f"{SPACE}{word[:-1]}", word[-1]) for word in words]
    tokenizer = Tokenizer(BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer, tokenizer.decoder = ByteLevel(add_prefix_space=False), ByteLevelDecoder()
    tokenizer.save(str(root / "tokenizer.json"))
    (root / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))


def write_text(widths: Widths, path: Path, *, words: int, seed: int) -> None:
    """Write about as many words, a token each, in records of 500, with frequencies like those of natural language."""
    known = list(_words(widths))
    ranks = np.random.default_rng(seed).zipf(1.2, size=(-(-words // 500), 500)) % len(known)
    texts = ("".join(f" {known[rank]}" for rank in record) for record in ranks)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def _words(widths: Widths) -> Iterator[str]:
    """Return the words a, b, ..., aa, ab, ... that fill a vocabulary, beside bytes and special tokens."""
    words = (letters for length in count(1) for letters in product(ascii_lowercase, repeat=length))
    return map("".join, islice(words, widths.vocab_size - 256 - SPECIAL_TOKENS))


def _shapes(widths: Widths, layers: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden = widths.hidden_size
    yield "model.embed_tokens.weight", (widths.vocab_size, hidden)
    for layer in range(layers):
        at = f"model.layers.{layer}"
        for name, shape in linears(widths).items():
            yield f"{at}.{name}.weight", shape
            if name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"):
                yield f"{at}.{name}.bias", shape[:1]
        yield f"{at}.input_layernorm.weight", (hidden,)
        yield f"{at}.post_attention_layernorm.weight", (hidden,)
    yield "model.norm.weight", (hidden,)
    if not widths.tie_word_embeddings:
        yield "lm_head.weight", (widths.vocab_size, hidden)


def _noisy(shape: tuple[int, ...], noise: torch.Tensor, offset: int) -> LazyTensor:
    spec = TensorSpec(dtype="BF16", shape=shape)
    width = spec.row_bytes // 2

    def read(start: int, stop: int) -> torch.Tensor:
        count, begin = (stop - start) * width, (start * width + offset * 8191) % NOISE
        repeats = -(-(begin + count) // NOISE)
        return noise.repeat(repeats)[begin : begin + count].reshape(stop - start, *shape[1:])

    return LazyTensor(spec=spec, read=read)


def _shards(tensors: Mapping[str, LazyTensor]) -> dict[str, str]:
    numbers: dict[str, int] = {}
    number, held = 1, 0
    for name, tensor in tensors.items():
        if held and held + tensor.spec.nbytes > SHARD_BYTES:
            number, held = number + 1, 0
        numbers[name], held = number, held + tensor.spec.nbytes
    return {name: f"model-{at:05}-of-{number:05}.safetensors" for name, at in numbers.items()}


def _config(widths: Widths, layers: int) -> dict[str, object]:
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "num_hidden_layers": layers,
        "hidden_act": "silu",
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "torch_dtype": "bfloat16",
        "use_sliding_window": False,
        **asdict(widths),
    }
