"""The tensors of a training that make up a model or an adapter: tied ones once, and none of the base's own."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from qwen_pipeline.checkpoint.hashing_reader import are_equal
from qwen_pipeline.checkpoint.lazy import SINGLE_SHARD, LazyTensor
from qwen_pipeline.checkpoint.trainers.weights import TrainedWeights
from qwen_pipeline.errors import InputRefused
from qwen_pipeline.qwen.families import declares_tied
from qwen_pipeline.qwen.names import parse_name
from qwen_pipeline.transforms.lora.lazy_ops import cast

Dtype = Literal["bfloat16", "float16", "float32"]
DTYPES: Mapping[Dtype, str] = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
_FLOATS = ("BF16", "F16", "F32", "F64")
SHARD_BYTES = 5 * 10**9
_ADAPTER_PARTS = ("lora_", "modules_to_save.", "trainable_tokens_", "token_adapter.")
_PEFT_PREFIX = "base_model.model."


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """The tensors to write.

    Attributes:
        written: Name of an output tensor -> name of the trained tensor that it is.
        left_out: Name of a tensor that is not written -> the reason.
        config: The output's config, if it is not the training's.
    """

    written: Mapping[str, str]
    left_out: Mapping[str, str]
    config: Mapping[str, Any] | None = None

    @property
    def spec(self) -> dict[str, Any]:
        """The names that the output has besides the training's, and those that it lacks, for a derivation."""
        return {
            "added": {name: stored for name, stored in self.written.items() if name != stored},
            "left_out": sorted(self.left_out),
        }


def select_model(weights: TrainedWeights, config: Mapping[str, Any]) -> Selection:
    """Return all tensors of a full model, but a tied head once."""
    left_out = {name: f"tied to {embedding}" for name, embedding in _tied(weights, config)}
    written = {name: weights.aliases.get(name, name) for name in weights.tensors if name not in left_out}
    return Selection(written=written, left_out=left_out)


def select_adapter(weights: TrainedWeights, config: Mapping[str, Any]) -> Selection:
    """Return the tensors of an adapter, without the base's, and with those that were trained beside it.

    Args:
        weights: The weights.
        config: The adapter's settings. The modules of tensors beside it are added to ``modules_to_save``.
    """
    own = {name for name in weights.tensors if name not in weights.frozen}
    if any(".base_layer." in name for name in own):
        biases = config.get("bias", "none") != "none"
        own = {name for name in own if is_adapter_tensor(name) or (biases and name.endswith(".bias"))}
    beside = {name for name in weights.beside if name in own}
    written = {
        (_PEFT_PREFIX + name.removeprefix(_PEFT_PREFIX) if name in beside else name): weights.aliases.get(name, name)
        for name in weights.tensors
        if name in own
    }
    modules = {name.removeprefix(_PEFT_PREFIX).rpartition(".")[0] for name in beside}
    saved = [*(config.get("modules_to_save") or []), *sorted(modules)]
    return Selection(
        written=written,
        left_out={name: "not trained: a weight of the base" for name in weights.tensors if name not in own},
        config={**config, "modules_to_save": saved} if modules else None,
    )


def is_adapter_tensor(name: str) -> bool:
    return any(f".{part}" in name for part in _ADAPTER_PARTS)


def part_of(name: str, config: Mapping[str, Any]) -> str | None:
    """Return the part of the model that owns a tensor; None if the family is unknown or has none of this name."""
    try:
        return parse_name(name, config).part
    except InputRefused:
        return None


def _tied(weights: TrainedWeights, config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield (head, embedding) if the config ties them and they have the same values."""
    if not declares_tied(config):
        return
    parts = {name: part_of(name, config) for name in weights.tensors}
    heads = [name for name, part in parts.items() if part == "head"]
    embeddings = [name for name, part in parts.items() if part == "embedding"]
    for head, embedding in zip(heads, embeddings, strict=False):
        same = weights.aliases.get(head, head) == weights.aliases.get(embedding, embedding)
        if same or are_equal(weights.tensors[head], weights.tensors[embedding]):
            yield head, embedding


def rounded(tensor: LazyTensor, dtype: Dtype | None) -> LazyTensor:
    """Return a floating-point tensor rounded to a dtype; any other, or one of this dtype, unchanged."""
    if dtype is None or tensor.spec.dtype not in _FLOATS or tensor.spec.dtype == DTYPES[dtype]:
        return tensor
    return cast(tensor, DTYPES[dtype])


def with_dtype(config: Mapping[str, Any], dtype: Dtype | None) -> tuple[Mapping[str, Any], bool]:
    """Return the config with the requested dtype where it states one, and whether anything changed."""
    fields = [field for field in ("dtype", "torch_dtype") if config.get(field) not in (None, dtype)]
    changed = {**config, **dict.fromkeys(fields, dtype)} if dtype and fields else dict(config)
    return changed, changed != config


def plan_shards(tensors: Mapping[str, LazyTensor], *, most: int = SHARD_BYTES) -> dict[str, str]:
    """Return tensor name -> file name, in files of at most ``most`` bytes unless a single tensor is larger."""
    numbers: dict[str, int] = {}
    number, size = 1, 0
    for name, tensor in tensors.items():
        if size and size + tensor.spec.nbytes > most:
            number, size = number + 1, 0
        numbers[name] = number
        size += tensor.spec.nbytes
    if number == 1:
        return dict.fromkeys(tensors, SINGLE_SHARD)
    return {name: f"model-{place:05}-of-{number:05}.safetensors" for name, place in numbers.items()}
