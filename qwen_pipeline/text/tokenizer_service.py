"""A tokenizer of Transformers behind the interface of :class:`~qwen_pipeline.text.tokenizers.Tokenizer`.

The module is imported once by the server of the processes that hold tokenizers; so it imports Transformers.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer as AutoTokenizer

from qwen_pipeline.text.records import BadRecord, Conversation, PlainText
from qwen_pipeline.text.tokenizers import encode, encode_prompt, load_tokenizer

_NOTHING: Mapping[str, Any] = {}


class LoadedTokenizer:
    """A tokenizer in this process.

    Args:
        tokenizer: A tokenizer of Transformers.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    @property
    def pad_token(self) -> int:
        numbers = (self._tokenizer.pad_token_id, self._tokenizer.eos_token_id)
        return next((number for number in numbers if number is not None), 0)

    def encode(
        self, record: PlainText | Conversation, *, where: str, arguments: Mapping[str, Any] = _NOTHING
    ) -> list[int]:
        return encode(record, self._tokenizer, where=where, arguments=arguments)

    def encode_prompt(self, prompt: str, *, arguments: Mapping[str, Any] = _NOTHING) -> list[int]:
        return encode_prompt(prompt, self._tokenizer, arguments=arguments)

    def encode_text(self, text: str, *, add_special_tokens: bool) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"])

    def decode(self, tokens: Sequence[int]) -> str:
        return self._tokenizer.decode(list(tokens), skip_special_tokens=True)


def open_tokenizer(spec: Mapping[str, Any]) -> Callable[[Mapping[str, Any]], Any]:
    """Load the tokenizer of a checkpoint; return the function that answers requests: a method and its arguments."""
    loaded = LoadedTokenizer(load_tokenizer(Path(spec["checkpoint"])))

    def answer(request: Mapping[str, Any]) -> Any:
        method, arguments = request["method"], request["arguments"]
        if method == "pad_token":
            return loaded.pad_token
        if method != "encode":
            return getattr(loaded, method)(**arguments)
        fields = arguments["record"]
        record = PlainText(**fields) if "text" in fields else Conversation(**fields)
        try:
            tokens = loaded.encode(record, where=arguments["where"], arguments=arguments["arguments"])
        except BadRecord as bad:
            return {"bad": {"reason": bad.reason, "detail": bad.detail, "remedy": bad.remedy}}
        return {"tokens": tokens}

    return answer
