"""Tokens are those of ``apply_chat_template`` in every template of Qwen; broken tokenizers are refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qwen_pipeline.errors import InputRefused
from qwen_pipeline.text.records import BadRecord
from qwen_pipeline.text.tokenizers import encode_prompt, encode_record, load_tokenizer
from qwen_pipeline_tests.tiny import tiny_tokenizer

TEMPLATES = {file.stem: file.read_text() for file in sorted((Path(__file__).parent / "templates").glob("*.jinja"))}
SYSTEM = {"role": "system", "content": "Be brief."}
ASK = {"role": "user", "content": "Weather in Oslo? Grüße \u2028 <b>"}
ANSWER = {"role": "assistant", "content": "It rains."}
ARGUMENTS = {"city": "Oslo", "days": [1, 2], "unit": None, "exact": True}
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Tells the weather.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


def call(arguments: Any, **message: Any) -> dict[str, Any]:
    function = {"name": "weather", "arguments": arguments}
    return {"role": "assistant", "tool_calls": [{"id": "1", "type": "function", "function": function}], **message}


def talk(*answers: dict[str, Any]) -> list[dict[str, Any]]:
    return [SYSTEM, ASK, *answers, {"role": "tool", "content": '{"rain": true}'}, ANSWER]


CALLED, SILENT = talk(call(ARGUMENTS, content="Wait.")), talk(call(ARGUMENTS))
PARTS = {**ASK, "content": [{"type": "text", "text": "Weather "}, {"type": "text", "text": "now?"}]}
RECORDS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({"messages": [ASK, ANSWER]}, {"conversation": [ASK, ANSWER]}),
    "system": ({"messages": [SYSTEM, ASK, ANSWER, ASK]}, {"conversation": [SYSTEM, ASK, ANSWER, ASK]}),
    "reasoning": (
        {"messages": [ASK, {**ANSWER, "reasoning_content": "Look up."}, ASK, ANSWER]},
        {"conversation": [ASK, {**ANSWER, "reasoning_content": "Look up."}, ASK, ANSWER]},
    ),
    "call": ({"messages": CALLED}, {"conversation": CALLED}),
    "null content": ({"messages": talk(call(ARGUMENTS, content=None))}, {"conversation": SILENT}),
    "no content": ({"messages": SILENT}, {"conversation": SILENT}),
    "arguments as text": ({"messages": talk(call(json.dumps(ARGUMENTS)))}, {"conversation": SILENT}),
    "no arguments": ({"messages": talk(call("{}"))}, {"conversation": talk(call({}))}),
    "tools": ({"messages": SILENT, "tools": [TOOL]}, {"conversation": SILENT, "tools": [TOOL]}),
    "tools as text": (
        {"messages": [ASK, ANSWER], "tools": json.dumps([TOOL])}, {"conversation": [ASK, ANSWER], "tools": [TOOL]},
    ),
    "thinking": (
        {"messages": [ASK], "chat_template_kwargs": {"enable_thinking": True, "add_generation_prompt": True}},
        {"conversation": [ASK], "enable_thinking": True, "add_generation_prompt": True},
    ),
    "not thinking": (
        {"messages": [ASK], "enable_thinking": False, "chat_template_kwargs": {"add_generation_prompt": True}},
        {"conversation": [ASK], "enable_thinking": False, "add_generation_prompt": True},
    ),
    "parts": (
        {"messages": [PARTS, ANSWER]},
        {"conversation": [{**ASK, "content": "Weather now?"}, ANSWER]},
    ),
    "ShareGPT": (
        {
            "conversations": [
                {"from": "human", "value": ASK["content"]},
                {"from": "function_call", "value": json.dumps({"name": "weather", "arguments": ARGUMENTS})},
                {"from": "observation", "value": '{"rain": true}'},
                {"from": "gpt", "value": ANSWER["content"]},
            ],
            "system": SYSTEM["content"],
            "tools": json.dumps([TOOL]),
        },
        {"conversation": SILENT, "tools": [TOOL]},
    ),
    "pair": (
        {"prompt": [SYSTEM, ASK], "chosen": [ANSWER], "rejected": [ASK]},
        {"conversation": [SYSTEM, ASK, ANSWER]},
    ),
}  # fmt: skip


def with_template(template: str | None) -> Any:
    tokenizer: Any = tiny_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def test_all_templates_of_trl_are_here() -> None:
    assert len(TEMPLATES) == 18


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
@pytest.mark.parametrize(("record", "arguments"), RECORDS.values(), ids=RECORDS)
def test_tokens_are_those_of_apply_chat_template(
    record: dict[str, Any], arguments: dict[str, Any], template: str
) -> None:
    tokenizer = with_template(template)
    expected = tokenizer.apply_chat_template(**arguments, tokenize=True, return_dict=False)
    assert encode_record(record, tokenizer, where="here") == expected


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl", "qwen3_5_think"])
def test_joined_parts_equal_the_parts_in_templates_that_take_them(name: str) -> None:
    tokenizer = with_template(TEMPLATES[name])
    messages = [PARTS, ANSWER]
    expected = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
    assert encode_record({"messages": messages}, tokenizer, where="here") == expected


def test_a_template_that_writes_arguments_as_they_are_gets_them_as_they_are() -> None:
    tokenizer = with_template(TEMPLATES["qwen3"])
    messages = talk(call('{"city":"Oslo"}'))
    expected = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
    assert encode_record({"messages": messages}, tokenizer, where="here") == expected


def test_arguments_of_a_record_count_more_than_those_of_the_settings() -> None:
    tokenizer = with_template("{{ enable_thinking }}{{ effort }}{{ messages|length }}")
    settings = {"enable_thinking": True, "effort": "low"}
    record = {"messages": [ASK], "enable_thinking": False}
    assert tokenizer.decode(encode_record(record, tokenizer, where="here", arguments=settings)) == "Falselow1"
    assert tokenizer.decode(encode_prompt("Hi", tokenizer, arguments=settings)) == "Truelow1"


def test_a_prompt_is_that_of_the_generation_prompt_with_arguments() -> None:
    tokenizer = with_template(TEMPLATES["qwen3"])
    for thinking in (True, False):
        expected = tokenizer.apply_chat_template(
            [{"role": "user", "content": "Hi"}], add_generation_prompt=True, enable_thinking=thinking, return_dict=False
        )
        assert encode_prompt("Hi", tokenizer, arguments={"enable_thinking": thinking}) == expected
    assert encode_prompt("Hi", with_template(None)) == tokenizer("Hi")["input_ids"]


REFUSED = {
    "no user": ("{{ raise_exception('no query of a user') }}", r"chat template refuses it: no query of a user"),
    "undefined": ("{{ messages[0].tool.name }}", "chat template refuses it: .* has no attribute 'tool'"),
    "arithmetic": ("{{ 1 / 0 }}", r"chat template refuses it: division by zero \(ZeroDivisionError\)"),
    "sandbox": ("{{ messages.append(1) }}", "chat template refuses it: .*SecurityError"),
    "recursion": ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "chat template refuses it: .*RecursionError"),
}


@pytest.mark.parametrize(("template", "words"), REFUSED.values(), ids=REFUSED)
def test_what_the_template_says_is_quoted(template: str, words: str) -> None:
    with pytest.raises(BadRecord, match=words):
        encode_record({"messages": [ASK]}, with_template(template), where="here")
    with pytest.raises(InputRefused, match=words):
        encode_prompt("Hi", with_template(template))


@pytest.mark.parametrize("record", [{"text": "half \ud83d"}, {"messages": [{**ASK, "content": "half \ud83d"}]}])
def test_half_of_a_surrogate_pair_is_named(record: dict[str, Any]) -> None:
    with pytest.raises(BadRecord, match=r"half of a surrogate pair: '.*half \\ud83d'"):
        encode_record(record, tiny_tokenizer(), where="here")


def test_a_template_that_cannot_be_compiled_is_not_the_records_fault() -> None:
    with pytest.raises(InputRefused, match="cannot be compiled: line 2"):
        encode_record({"messages": [ASK]}, with_template("\n{% for %}"), where="here")


def config(**fields: Any) -> Callable[[Path], object]:
    def edit(root: Path) -> None:
        file = root / "tokenizer_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | fields))

    return edit


def replaced(name: str, content: str) -> Callable[[Path], object]:
    return lambda root: (root / name).write_text(content)


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "no vocabulary": (lambda root: (root / "tokenizer.json").unlink(), "there is none of tokenizer.json"),
    "half a file": (replaced("tokenizer.json", '{"version": '), r"tokenizer\.json is not valid JSON"),
    "a list": (replaced("tokenizer_config.json", "[]"), r"tokenizer_config\.json is not a JSON object"),
    "nothing in it": (replaced("tokenizer.json", "{}"), "no tokenizer that can be loaded"),
    "another model": (replaced("tokenizer.json", '{"model": {"type": "X"}, "added_tokens": []}'), "can be loaded"),
    "added tokens": (config(added_tokens_decoder={"12": "x"}), "can be loaded: TypeError"),
    "deep": (replaced("tokenizer.json", "[" * 100_000), r"tokenizer\.json"),
    "special tokens": (config(extra_special_tokens=5), "can be loaded"),
}  # fmt: skip


@pytest.mark.parametrize(("damage", "words"), BROKEN.values(), ids=BROKEN)
def test_a_broken_tokenizer_is_refused(damage: Callable[[Path], object], words: str, tmp_path: Path) -> None:
    tiny_tokenizer().save_pretrained(tmp_path)
    damage(tmp_path)
    with pytest.raises(InputRefused, match=words) as refused:
        load_tokenizer(tmp_path)
    assert refused.value.remedy


TAKEN: dict[str, Callable[[Path], object]] = {
    "no config": lambda root: (root / "tokenizer_config.json").unlink(),
    "list": config(extra_special_tokens=["<|im_start|>", "<|im_end|>"]),
    "mapping": config(extra_special_tokens={"image_token": "<|im_start|>"}),
    "model specific": config(model_specific_special_tokens={"image_token": "<|im_start|>"}),
    "Qwen2": config(tokenizer_class="Qwen2Tokenizer"),
    "without special tokens": config(eos_token=None, pad_token=None),
}


@pytest.mark.parametrize("change", TAKEN.values(), ids=TAKEN)
def test_unusual_tokenizers_are_loaded(change: Callable[[Path], object], tmp_path: Path) -> None:
    tiny_tokenizer().save_pretrained(tmp_path)
    change(tmp_path)
    assert load_tokenizer(tmp_path)("ab", add_special_tokens=False)["input_ids"]


def test_the_template_of_a_processor_is_used_if_there_is_no_other(tmp_path: Path) -> None:
    with_template(None).save_pretrained(tmp_path)
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "{{ messages[0].content }}!"}))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.decode(encode_prompt("Hi", tokenizer)) == "Hi!"
    with_template("{{ messages[0].content }}?").save_pretrained(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.decode(encode_prompt("Hi", tokenizer)) == "Hi?"
