"""Commands, options and settings that errors recommend exist, in every module: remedies are read from the sources."""

import ast
import dataclasses
import inspect
import re
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from peft import PeftModel
from typer.main import get_command

from qwen_pipeline.cli import app
from qwen_pipeline.config import Settings
from qwen_pipeline_tests import REPOSITORY

MODULES = sorted((REPOSITORY / "qwen_pipeline").rglob("*.py"))
_OPTION = re.compile(r"(?<![\w-])--[a-z][\w-]*")
_SNAKE = re.compile(r"(?<![\w./-])[a-z]+(?:_[a-z0-9]+)+(?![\w/(]|\.\w)")
OF_OTHERS = {
    "mlx_lm.fuse": {"--model", "--adapter-path", "--save-path", "--dequantize"},
    "ms-swift": {"--to_hf"},
    "vLLM": {"--tensor-parallel-size", "--mm-encoder-tp-mode"},
}
"""Options of other programs."""
NAMES_OF_OTHERS = {
    "config.json": {
        "auto_map", "max_position_embeddings", "model_type", "num_hidden_layers", "quantization_config",
    },
    "modules and files": {
        "down_proj", "gate_proj", "up_proj", "self_attn", "global_step", "pytorch_model", "pytorch_model_fsdp_0",
    },
    "adapter_config.json": {
        "lora_alpha", "modules_to_save", "peft_version", "target_modules", "grouped_by_expert", "rank_major",
    },
    "adapters.toml": {"combination_type"},
    "chat templates": {"enable_thinking"},
    "libraries": {
        "merge_and_unload", "save_pretrained", "path_initial_model_for_weight_conversion", "selected_adapters",
        "save_to_disk", "unsloth_zoo", "weights_only",
    },
}  # fmt: skip
"""Words with an underscore that are no settings."""


def commands() -> Iterator[tuple[str, Any]]:
    """Yield the words of each command, and the command; a group may be a command too."""
    waiting: list[tuple[str, Any]] = [("", get_command(app))]
    for prefix, group in waiting:
        for name, command in getattr(group, "commands", {}).items():
            yield f"{prefix} {name}".strip(), command
            waiting.append((f"{prefix} {name}".strip(), command))


COMMANDS = dict(commands())


def options(name: str) -> set[str]:
    """Return the options of a command, of a group those of the command that it runs without a name."""
    command = COMMANDS[name]
    default = COMMANDS.get(f"{name} show")
    found = [*command.params, *(default.params if default else ())]
    return {option for each in found for option in (*each.opts, *each.secondary_opts)} | {"--help"}


def text_of(node: ast.AST) -> str:
    if isinstance(node, ast.JoinedStr):
        return "".join(map(text_of, node.values))
    if isinstance(node, ast.FormattedValue):
        return "X"
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""


def texts(tree: ast.AST) -> Iterator[str]:
    """Yield the texts of a tree, without docstrings; values that are filled in are an X."""
    parts = {id(each) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for each in ast.walk(node)}
    parts -= {id(node) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr)}
    parts |= {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    yield from (text for node in ast.walk(tree) if id(node) not in parts and (text := text_of(node)))


def remedies(tree: ast.AST) -> Iterator[str]:
    """Yield the texts of all remedies of a module, with those of the constants that they name."""
    values = [node.value for node in ast.walk(tree) if isinstance(node, ast.keyword) and node.arg == "remedy"]
    named = {name.id for value in values for name in ast.walk(value) if isinstance(name, ast.Name)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant | ast.JoinedStr):
            values += [node.value for target in node.targets if isinstance(target, ast.Name) and target.id in named]
    for value in values:
        yield from texts(value)


def setting_names(kind: Any, seen: set[Any]) -> Iterator[str]:
    """Yield the names of all settings below a section."""
    if kind in seen:
        return
    if hasattr(kind, "model_fields"):
        seen.add(kind)
        inner = {name: field.annotation for name, field in kind.model_fields.items()}
    elif dataclasses.is_dataclass(kind) and str(kind.__module__).startswith("qwen_pipeline"):
        seen.add(kind)
        inner = typing.get_type_hints(kind)
    else:
        for each in typing.get_args(kind):
            yield from setting_names(each, seen)
        return
    for name, annotation in inner.items():
        yield name
        yield from setting_names(annotation, seen)


SETTINGS = set(setting_names(Settings, set()))


def name_of(path: Path) -> str:
    return path.relative_to(REPOSITORY / "qwen_pipeline").as_posix()


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_commands_and_their_options_exist(path: Path) -> None:
    for text in texts(ast.parse(path.read_text())):
        for match in re.finditer(r"qwen-pipeline ([a-z][\w-]*)(?: ([a-z][\w-]*))?([^,;.]*)", text):
            both = f"{match[1]} {match[2]}"
            name = both if both in COMMANDS else match[1]
            assert name in COMMANDS, text
            assert set(_OPTION.findall(match[3])) <= options(name), text


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_options_in_sentences_exist(path: Path) -> None:
    known = {option for name in COMMANDS for option in options(name)}.union(*OF_OTHERS.values())
    known |= {option for each in get_command(app).params for option in each.opts}
    for text in texts(ast.parse(path.read_text())):
        if " " in text:
            assert set(_OPTION.findall(text)) <= known, text


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_settings_that_remedies_name_exist(path: Path) -> None:
    known = SETTINGS.union(*NAMES_OF_OTHERS.values())
    for text in remedies(ast.parse(path.read_text())):
        assert set(_SNAKE.findall(text)) <= known, text


def test_remedies_are_found_where_they_are_written() -> None:
    """The three tests above would pass if they saw nothing."""
    found = [text for path in MODULES for text in remedies(ast.parse(path.read_text()))]
    assert len(found) > 400
    assert {"max_skipped", "base_names", "leave_behind", "tokenizer_seconds"} <= SETTINGS
    assert any("qwen-pipeline convert --from X" in text for text in found)


def test_arguments_of_peft_that_remedies_name_exist() -> None:
    arguments = inspect.signature(PeftModel.save_pretrained).parameters
    assert {"selected_adapters", "path_initial_model_for_weight_conversion"} <= set(arguments)
