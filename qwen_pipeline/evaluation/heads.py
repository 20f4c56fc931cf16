"""The texts on which models with other heads are compared, and the figures of that comparison."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from pydantic import TypeAdapter

from qwen_pipeline.checkpoint.lazy import Checkpoint
from qwen_pipeline.qwen.families import text_config
from qwen_pipeline.qwen.heads import SCORE_WEIGHT, HeadKind, Pooling, head_kind, pooling_of
from qwen_pipeline.text.tokenizers import Tokenizer

TEXT_TOKENS = 64
"""Tokens in a text that is classified or embedded as a whole: windows are cut into several texts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadTask:
    """The outputs that the models of a validation compute.

    Attributes:
        kind: Their head.
        labels: Number of labels of a classifier, 1 for a reward model, 0 for others.
        pooling: The ways in which an embedding model combines hidden states.
        pad_token: The token after which a classifier's texts end, since Transformers takes the last other token.
    """

    kind: HeadKind = "language"
    labels: int = 0
    pooling: tuple[Pooling, ...] = ()
    pad_token: int | None = None

    @property
    def is_reward(self) -> bool:
        return self.labels == 1

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "HeadTask":
        return _TASK.validate_python(value)


_TASK = TypeAdapter(HeadTask)


def task_of(checkpoint: Checkpoint) -> HeadTask:
    """Return the task of a model, from its weights and files.

    Raises:
        CheckpointRefused: Its pooling is not known.
    """
    kind = head_kind(checkpoint)
    return HeadTask(
        kind=kind,
        labels=checkpoint[SCORE_WEIGHT].rows if kind in ("sequence", "token") else 0,
        pooling=pooling_of(checkpoint) if kind == "embedding" else (),
        pad_token=text_config(checkpoint.config).get("pad_token_id") if kind == "sequence" else None,
    )


def texts_of(windows: Sequence[Sequence[int]], tokenizer: Tokenizer, task: HeadTask) -> list[list[int]]:
    """Return the texts that a model is measured on, all of one length.

    A text that is classified or embedded as a whole ends with the tokens that the tokenizer adds to a text, as the
    end-of-text token by which Qwen's embedding models represent it.
    """
    if task.kind in ("language", "token"):
        return [list(window) for window in windows]
    bare = tokenizer.encode_text("a", add_special_tokens=False)
    whole = tokenizer.encode_text("a", add_special_tokens=True)
    start = next((n for n in range(len(whole)) if whole[n : n + len(bare)] == bare), 0)
    before, after = whole[:start], whole[start + len(bare) :]
    length = min(TEXT_TOKENS, *map(len, windows))
    parts = [window[first : first + length] for window in windows for first in range(0, len(window), length)]
    return [[*before, *part, *after] for part in parts if len(part) == length]
