"""The tokenizer of a merged model means what the fine-tune's own does, by Transformers' ``AutoTokenizer``."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from qwen_pipeline.errors import CheckpointRefused
from qwen_pipeline.transforms.sidecars import merged_sidecars
from qwen_pipeline_tests.tiny import tiny_tokenizer

TALK = [{"role": "user", "content": "x"}]
MINE = "{% for m in messages %}MINE {{ m.content }}{% endfor %}"
FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


def files(root: Path) -> dict[str, Path]:
    return {path.relative_to(root).as_posix(): path for path in root.rglob("*") if path.is_file()}


def loaded(root: Path) -> Any:
    return AutoTokenizer.from_pretrained(root)


def write(root: Path, sidecars: dict[str, Path]) -> Path:
    for name, file in sidecars.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, root / name)
    return root


def template_in_config(root: Path) -> None:
    (root / "chat_template.jinja").unlink(missing_ok=True)
    file = root / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"chat_template": MINE}))


def without(*names: str) -> Callable[[Path], object]:
    return lambda root: [(root / name).unlink(missing_ok=True) for name in names]


def several(root: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = {"default": MINE, "tool_use": MINE + "!"}  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.save_pretrained(root)


BASES: dict[str, Callable[[Path], object]] = {
    "template in a file": lambda _: None,
    "template in the config": template_in_config,
    "a second template": several,
    "a template of the processor": lambda root: (root / "chat_template.json").write_text('{"chat_template": "OLD"}'),
}


@pytest.fixture(params=BASES.values(), ids=list(BASES))
def base(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    request.param(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def tuned(tmp_path: Path) -> Path:
    """A fine-tune's tokenizer, with a token, a template and an end token of its own."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<|mine|>"])
    tokenizer.chat_template = MINE
    tokenizer.eos_token = "<|im_start|>"
    tokenizer.save_pretrained(tmp_path / "tuned")
    return tmp_path / "tuned"


@pytest.mark.parametrize("change", [lambda _: None, template_in_config], ids=["in a file", "in the config"])
def test_a_whole_tokenizer_replaces_the_base(
    base: Path, tuned: Path, change: Callable[[Path], object], tmp_path: Path
) -> None:
    change(tuned)
    merged, own = loaded(write(tmp_path / "out", merged_sidecars(files(base), files(tuned)))), loaded(tuned)
    assert merged.chat_template == own.chat_template == MINE
    assert merged.get_vocab() == own.get_vocab()
    assert merged.special_tokens_map == own.special_tokens_map
    assert set(files(tmp_path / "out")) == set(files(tuned)), "nothing of the base's tokenizer is left"


@pytest.mark.parametrize("kept", ["chat_template.jinja", "tokenizer_config.json"])
def test_a_template_wins_wherever_it_stands(base: Path, tuned: Path, kept: str, tmp_path: Path) -> None:
    if kept == "tokenizer_config.json":
        template_in_config(tuned)
    without(*(name for name in FILES if name != kept))(tuned)
    merged = loaded(write(tmp_path / "out", merged_sidecars(files(base), files(tuned))))
    assert merged.apply_chat_template(TALK, tokenize=False) == "MINE x"
    assert merged.chat_template == MINE
    assert merged.eos_token == ("<|im_start|>" if kept == "tokenizer_config.json" else "<|im_end|>")


def test_a_vocabulary_alone_keeps_the_settings_and_the_template(base: Path, tuned: Path, tmp_path: Path) -> None:
    (base / "added_tokens.json").write_text('{"<|old|>": 400}')
    (base / "vocab.json").write_text('{"old": 1}')
    without("tokenizer_config.json", "chat_template.jinja")(tuned)
    own = loaded(tuned).get_vocab()
    merged = loaded(write(tmp_path / "out", merged_sidecars(files(base), files(tuned))))
    assert merged.get_vocab() == own
    assert merged.eos_token == "<|im_end|>"
    assert merged.chat_template == loaded(base).chat_template
    assert not files(tmp_path / "out").keys() & {"added_tokens.json", "vocab.json"}


def test_other_sidecars_are_replaced_by_name_and_the_licence_stays() -> None:
    def named(root: str, *names: str) -> dict[str, Path]:
        return {name: Path(root) / name for name in names}

    base = named("base", "tokenizer.json", "vocab.json", "chat_template.jinja", "generation_config.json", "LICENSE")
    assert merged_sidecars(base, {}) == base
    assert merged_sidecars(base, named("ours", "tokenizer.json", "tokenizer_config.json", "LICENSE")) == {
        **named("base", "generation_config.json", "LICENSE"),
        **named("ours", "tokenizer.json", "tokenizer_config.json"),
    }
    template = named("ours", "chat_template.jinja", "generation_config.json", "NOTICE")
    assert merged_sidecars(base, template) == base | template


@pytest.mark.parametrize("content", ["", "{", "[]", "null", "[" * 100_000])
def test_a_config_that_is_no_object_is_refused(content: str, tmp_path: Path) -> None:
    config = tmp_path / "tokenizer_config.json"
    config.write_text(content)
    with pytest.raises(CheckpointRefused, match="is not"):
        merged_sidecars({}, {"tokenizer_config.json": config})
