"""No input of users ends a command with an internal error: it is taken, or refused with a remedy."""

import json
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from qwen_pipeline.cli import app
from qwen_pipeline.quantization.calibration import plot
from qwen_pipeline_tests.mutations import edited_copy, file_edits, lines_of, mutated
from qwen_pipeline_tests.tiny import CHAT_TEMPLATE, tiny_adapter, tiny_model, tiny_qwen3

SLOW = (HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much, HealthCheck.large_base_example)
FAST, THOROUGH = 20, int(os.environ.get("FUZZ_EXAMPLES", "100"))
"""Examples of a kind in ``make test``, and in ``make test-slow`` if the variable does not say otherwise."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """Sound inputs to damage."""

    base: Path
    mixture: Path
    adapter: Path
    text: Path


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    root = tmp_path_factory.mktemp("site")
    base = tiny_qwen3(root / "base", intermediate_size=96)
    text = root / "text.jsonl"
    text.write_text("\n".join(json.dumps({"text": f"Some words, number {n}."}) for n in range(9)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plot, "draw_calibration_plot", lambda *_: None)
        patch.chdir(tmp_path_factory.mktemp("elsewhere"))
        yield Site(
            base=base,
            mixture=tiny_model("qwen3_moe", root / "mixture"),
            adapter=tiny_adapter(base, root / "adapter"),
            text=text,
        )


def run(*arguments: object) -> dict[str, Any]:
    """Run a command in this process; return its JSON, after checking that an error has a remedy."""
    ended = CliRunner().invoke(app, [*map(str, arguments), "--json"])
    data: dict[str, Any] = json.loads(ended.stdout)
    if ended.exit_code:
        assert ended.exit_code in (1, 2, 3), (ended.exit_code, data, ended.stderr)
        assert data["error"]["remedy"], data
    return data


def calibrate(model: Path, text: Path, root: Path, *more: str) -> dict[str, Any]:
    return run(
        "calibrate", "--in", model, "--text", text, "--out", root / "tokens", "--samples", 1, "--seq-len", 4, *more
    )


Damage = Callable[[st.DrawFn, Site], Any]
Use = Callable[[Any, Site, Path], object]
TURNS = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]
CALL = {"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}
SEEDS: list[Any] = [
    {"text": "Some words."},
    {"messages": TURNS},
    {"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}], "tools": [CALL]},
    {"messages": [*TURNS, {"role": "assistant", "tool_calls": [CALL]}], "chat_template_kwargs": {"a": True}},
    {"conversations": [{"from": "human", "value": "Hi"}, {"from": "function_call", "value": '{"name": "f"}'}]},
    {"instruction": "Add.", "input": "1 2", "output": "3", "history": [["a", "b"]], "system": "Be brief."},
    {"prompt": TURNS[:1], "chosen": TURNS[1:], "rejected": TURNS[1:]},
]  # fmt: skip


def records(draw: st.DrawFn, site: Site) -> bytes:
    del site
    return draw(lines_of(st.sampled_from(SEEDS).flatmap(mutated)))


def use_records(content: bytes, site: Site, root: Path) -> None:
    text = root / "text.jsonl"
    text.write_bytes(content)
    calibrate(site.base, text, root, "--max-skipped", "1")


PIECES = (
    "{% for m in messages %}", "{% endfor %}", "{{ m.content }}", "{{ m['role'] }}", "{{ messages[0].content }}",
    "{{ tools | tojson }}", "{{ m.tool_calls[0].function.arguments | items }}", "{% if ", "{% if tools %}",
    "{% endif %}", "{{ raise_exception('no') }}", "{{ messages.append(1) }}", "{{ 'a' * 9 }}", "{{ x.y }}",
    "{{ 1 / 0 }}", "{%", "}}", "{#", "{% set ns = namespace(a=1) %}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "{{ ''.__class__ }}", "\ud83d",
    "{{ messages | map('x') | list }}", "{{ messages | sort }}", "{{ strftime_now('%') }}", "<|im_start|>", "\u2028",
    "a", "{% generation %}", "{% endgeneration %}", "{% include 'a' %}", "{% break %}", "{{ range(10**9) | length }}",
)  # fmt: skip


def template(draw: st.DrawFn, site: Site) -> bytes:
    del site
    pieces = draw(st.lists(st.sampled_from((*PIECES, CHAT_TEMPLATE)), max_size=7))
    return "".join(pieces).encode("utf-8", draw(st.sampled_from(("surrogatepass", "replace"))))


def use_template(content: bytes, site: Site, root: Path) -> None:
    model = edited_copy(site.base, root / "model", [("chat_template.jinja", content)])
    text = root / "text.jsonl"
    text.write_text("\n".join(json.dumps(record) for record in SEEDS[1:]))
    calibrate(model, text, root, "--max-skipped", "1", "--template-argument", "x=1")


def tokenizer(draw: st.DrawFn, site: Site) -> Any:
    return draw(file_edits(site.base, ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")))


def use_tokenizer(edits: Any, site: Site, root: Path) -> None:
    model = edited_copy(site.base, root / "model", edits)
    calibrate(model, site.text, root)


def config(draw: st.DrawFn, site: Site) -> Any:
    name = draw(st.sampled_from(("base", "mixture")))
    edits = draw(file_edits(getattr(site, name), ("config.json", "generation_config.json")))
    return name, edits, draw(st.integers(0, 5))


def use_config(drawn: Any, site: Site, root: Path) -> None:
    name, edits, command = drawn
    sound: Path = getattr(site, name)
    use_model(edited_copy(sound, root / "model", edits), sound, command, site, root)


def use_model(model: Path, sound: Path, command: int, site: Site, root: Path) -> None:
    """Run one of the commands that read a model."""
    out: tuple[object, ...] = ("--out", root / "out")
    commands: Sequence[tuple[object, ...]] = (
        ("pad", "--in", model, *out, "--tp", 2, "--group-size", 32),
        ("merge", "--base", model, "--adapter", sound, *out),
        ("merge", "--base", sound, "--adapter", model, *out),
        ("inspect", model, "--base", sound),
        ("plan", model, "--tp", 2),
        ("calibrate", "--in", model, *out, "--text", site.text, "--samples", 1, "--seq-len", 4, "--all-experts"),
    )
    run(*commands[command])


def adapter(draw: st.DrawFn, site: Site) -> Any:
    names = [path.name for path in site.adapter.iterdir()]
    return draw(
        file_edits(site.adapter, ["adapter_config.json", *(name for name in names if name != "adapter_config.json")])
    )


def use_adapter(edits: Any, site: Site, root: Path) -> None:
    copy = edited_copy(site.adapter, root / "adapter", edits)
    run("merge", "--base", site.base, "--adapter", copy, "--out", root / "merged")
    run("inspect", copy, "--base", site.base)


STRAYS = (
    "model.safetensors.index.json", "model-00001-of-00002.safetensors", "adapter_config.json", "adapters.toml",
    "manifest.json", "chat_template.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "pytorch_model.bin", "additional_chat_templates/x.jinja", "adapter_model.safetensors", "trainer_state.json",
    "optimizer.pt", "x",
)  # fmt: skip
CONTENTS = (
    b"",
    b"{}",
    b"[]",
    b"null",
    b'{"weight_map": {}}',
    b'{"weight_map": {"a": "../x"}}',
    b'{"a": 1}',
    b"\x08" * 9,
)


def directory(draw: st.DrawFn, site: Site) -> Any:
    strays = draw(st.dictionaries(st.sampled_from(STRAYS), st.sampled_from(CONTENTS), max_size=2))
    names = sorted(path.name for path in site.base.iterdir())
    return [*draw(file_edits(site.base, names)), *strays.items()], draw(st.integers(0, 5))


def use_directory(drawn: Any, site: Site, root: Path) -> None:
    edits, command = drawn
    use_model(edited_copy(site.base, root / "model", edits), site.base, command, site, root)


SETTINGS: dict[str, Any] = {
    "base_model": "base", "calibration": {"source": "a.jsonl", "max_skipped": 0.1, "template_arguments": {"a": 1}},
    "padding": {"tensor_parallel": 2}, "quantization": {"bits": 4, "group_size": 32, "dynamic": {"x": {"mse": 2}}},
    "validation": {"text": "b.txt", "limits": {"max_mean_kl": 0.1}, "template_arguments": {}, "prompts": ["a"]},
}  # fmt: skip


def configured(draw: st.DrawFn, site: Site) -> Any:
    del site
    return draw(mutated(SETTINGS))


def use_configured(values: Any, site: Site, root: Path) -> None:
    """Set the sections as variables of the environment, which are JSON."""
    if not isinstance(values, dict):
        return
    with pytest.MonkeyPatch.context() as patch:
        for name, value in values.items():
            text = json.dumps(value)
            if name and "\ud83d" not in name:
                patch.setitem(os.environ, f"QWEN_PIPELINE_{name.upper()}", text)
        calibrate(site.base, site.text, root)


KINDS: dict[str, tuple[Damage, Use]] = {
    "records": (records, use_records),
    "template": (template, use_template),
    "tokenizer": (tokenizer, use_tokenizer),
    "config": (config, use_config),
    "adapter": (adapter, use_adapter),
    "directory": (directory, use_directory),
    "settings": (configured, use_configured),
}


def test_sound_input_is_taken(site: Site, tmp_path: Path) -> None:
    text = tmp_path / "text.jsonl"
    text.write_text("\n".join(map(json.dumps, SEEDS)))
    assert "error" not in calibrate(site.base, text, tmp_path)
    assert "error" not in run("merge", "--base", site.base, "--adapter", site.adapter, "--out", tmp_path / "merged")


@pytest.mark.timeout(7200)
@pytest.mark.parametrize("examples", [FAST, pytest.param(THOROUGH, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", KINDS)
def test_every_damage_is_taken_or_refused_with_a_remedy(kind: str, examples: int, site: Site) -> None:
    damage, use = KINDS[kind]

    @settings(max_examples=examples, derandomize=examples == FAST, suppress_health_check=SLOW)
    @given(drawn=st.composite(damage)(site))
    def check(drawn: Any) -> None:
        with tempfile.TemporaryDirectory() as root:
            use(drawn, site, Path(root))

    check()
