"""Taking over a fine-tune: its whole weights, if it is a complete model, and the files that say how it is used."""

from collections.abc import Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path

from qwen_pipeline.checkpoint.lazy import Checkpoint
from qwen_pipeline.errors import CheckpointRefused, listed
from qwen_pipeline.qwen.config import require_full_precision
from qwen_pipeline.qwen.families import config_values, is_tied
from qwen_pipeline.transforms.lora.vocabulary import vocabulary_of

_TOKENIZER = (
    "tokenizer*", "vocab.json", "merges.txt", "*.tiktoken", "special_tokens_map.json", "added_tokens.json",
    "chat_template.*", "additional_chat_templates/*",
)  # fmt: skip
_VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json")
_LEGAL = ("LICENSE*", "NOTICE*")


def adopt(base: Checkpoint, fine_tune: Checkpoint) -> Checkpoint:
    """Return a full fine-tune of ``base`` with its own tensors, dtypes, config and shards.

    A tied output head may be stored in one of them and not in the other. The vocabulary may be another, if embedding,
    head and config agree about it.

    Raises:
        QuantizedInputRefused: The fine-tune is quantized.
        CheckpointRefused: A tensor is missing, is not in the base or has another shape; the message names them.
    """
    require_full_precision(
        fine_tune,
        because="A fine-tune is padded and quantized later, from its full-precision weights.",
        remedy="Hand in the model as it was saved before quantization.",
    )
    tied = {"lm_head.weight"} if is_tied(base) and is_tied(fine_tune) else set[str]()
    kinds = [str(checkpoint.config.get("model_type")) for checkpoint in (base, fine_tune)]
    wrong = [f"model_type {kinds[1]} where the base is {kinds[0]}"] if kinds[0] != kinds[1] else []
    wrong += [f"{name} is missing" for name in base if name not in fine_tune and name not in tied]
    wrong += [f"{name} is not in the base" for name in fine_tune if name not in base and name not in tied]
    if not wrong:
        reshaped = [name for name, spec in base.items() if name in fine_tune and fine_tune[name].shape != spec.shape]
        resized = _resized_vocabulary(base, fine_tune) if reshaped else ()
        wrong = [
            f"{name} is {list(fine_tune[name].shape)} where the base has {list(base[name].shape)}"
            for name in reshaped
            if name not in resized
        ]
    if wrong:
        raise CheckpointRefused(
            f"The full fine-tune is not one of this base: {listed(wrong)}.",
            remedy="Name the base that the model was trained from, and hand in all of its shards. If its vocabulary was"
            " resized, embedding, head and vocab_size must have as many rows.",
        )
    return fine_tune


def _resized_vocabulary(base: Checkpoint, fine_tune: Checkpoint) -> Sequence[str]:
    """Return the embedding and the head, if only their rows differ from the base's and the config counts as many."""
    names = [name for name in vocabulary_of(fine_tune).names if name in fine_tune]
    shapes = [fine_tune[name].shape for name in names]
    counted = {rows for rows, *_ in shapes} == config_values(fine_tune.config, "vocab_size")
    wide = {shape[1:] for shape in shapes} == {base[name].shape[1:] for name in names if name in base}
    return names if counted and wide else ()


def usage_files(base: Mapping[str, Path], fine_tune: Mapping[str, Path]) -> dict[str, Path]:
    """Return the sidecars of a merged model: the base's, each overridden by the fine-tune's of the same name.

    A fine-tune with a vocabulary brings its whole tokenizer: nothing of the base's is mixed into it, such as a chat
    template that would hide its own. The base's licence stays.
    """
    replaced = _TOKENIZER if any(_matches(path, _VOCABULARIES) for path in fine_tune) else ()
    kept = {path: file for path, file in base.items() if not _matches(path, replaced)}
    brought = {path: file for path, file in fine_tune.items() if not (_matches(path, _LEGAL) and path in base)}
    return kept | brought


def _matches(path: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch(path, pattern) for pattern in patterns)
