"""The tokenizer of a checkpoint in a process of its own, since it and the chat template are whatever was uploaded."""

from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from qwen_pipeline.errors import InputRefused
from qwen_pipeline.text.records import BadRecord, Conversation, PlainText
from qwen_pipeline.workers.bounded import BoundedObject, LimitExceeded, Limits, start_server

_MODULE = "qwen_pipeline.text.tokenizer_service"
_NOTHING: Mapping[str, Any] = {}
LIMITS = Limits(seconds=20, memory_bytes=4_000_000_000, seconds_per_mb=5, memory_per_byte=500)
"""Limits of loading a tokenizer, which takes about a second, and of each text."""


def prepare_tokenizers() -> None:
    """Begin to import what tokenizers need, in another process."""
    start_server(_MODULE)


class BoundedTokenizer:
    """The tokenizer and the chat template of a checkpoint.

    Args:
        checkpoint: The directory.
        limits: Limits of loading it, and of each text.

    Raises:
        InputRefused: There is no tokenizer, it cannot be loaded, or it exceeds a limit.
    """

    def __init__(self, checkpoint: Path, limits: Limits = LIMITS) -> None:
        self._checkpoint, self._limits = checkpoint, limits
        spec = {"checkpoint": str(checkpoint.absolute())}
        try:
            self._object = BoundedObject(f"{_MODULE}:open_tokenizer", spec, limits)
        except LimitExceeded as exceeded:
            raise InputRefused(
                f"The tokenizer of {checkpoint} needs more than {exceeded} to be loaded.", remedy=_REMEDY
            ) from exceeded
        self.pad_token: int = self._call("Its pad token", "pad_token")

    def encode(
        self, record: PlainText | Conversation, *, where: str, arguments: Mapping[str, Any] = _NOTHING
    ) -> list[int]:
        content = {each.name: getattr(record, each.name) for each in fields(record)}
        try:
            answer = self._call(where, "encode", record=content, where=where, arguments=arguments)
        except RecursionError as error:
            raise BadRecord("is nested too deeply") from error
        if bad := answer.get("bad"):
            raise BadRecord(bad["reason"], bad["detail"], remedy=bad["remedy"])
        return answer["tokens"]

    def encode_prompt(self, prompt: str, *, arguments: Mapping[str, Any] = _NOTHING) -> list[int]:
        return self._call(f"The prompt {ascii(prompt)[:80]}", "encode_prompt", prompt=prompt, arguments=arguments)

    def encode_text(self, text: str, *, add_special_tokens: bool) -> list[int]:
        return self._call(ascii(text)[:80], "encode_text", text=text, add_special_tokens=add_special_tokens)

    def decode(self, tokens: Sequence[int]) -> str:
        return self._call("An answer", "decode", tokens=list(tokens))

    def _call(self, what: str, method: str, **arguments: Any) -> Any:
        try:
            return self._object.call({"method": method, "arguments": arguments}, self._limits)
        except LimitExceeded as exceeded:
            raise InputRefused(
                f"{what} needs more than {exceeded} in the chat template and the tokenizer of {self._checkpoint}.",
                remedy=_REMEDY,
            ) from exceeded


_REMEDY = (
    "Copy tokenizer and chat template from the model that was fine-tuned, shorten the text, or raise tokenizer_seconds"
    " or tokenizer_memory_gb in the settings."
)
