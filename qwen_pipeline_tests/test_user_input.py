"""No input of users ends a command with an internal error: it is taken, or refused with a remedy.

``FUZZ_EXAMPLES=10000 make test-slow`` tries as many of each kind; ``docs/security.md`` has the last figures.
"""

import copy
import functools
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st

from qwen_pipeline import config as config_package
from qwen_pipeline.checkpoint import thread_pool
from qwen_pipeline.checkpoint.lazy import open_checkpoint
from qwen_pipeline.config import Settings, load_settings
from qwen_pipeline.config.file import PREFIX
from qwen_pipeline.errors import PipelineError
from qwen_pipeline.evaluation.loading import place_tensors
from qwen_pipeline.evaluation.structure.check import check_structure
from qwen_pipeline.quantization.calibration import plot
from qwen_pipeline.text import bounded_tokenizer
from qwen_pipeline_tests.fuzzing.kept import KeptObject
from qwen_pipeline_tests.fuzzing.mutate import (
    VALUES,
    Edits,
    damaged,
    edited_copy,
    file_edits,
    lines_of,
    mutated_document,
)
from qwen_pipeline_tests.tiny import CHAT_TEMPLATE
from qwen_pipeline_tests.user_inputs import CODE_COMMANDS, MODEL_COMMANDS, Site, calibrate, make_site, run, run_on_model

pytestmark = pytest.mark.lengthy

FAST, THOROUGH = 20, int(os.environ.get("FUZZ_EXAMPLES", "30"))
"""Examples of a kind in ``make test``, and in ``make test-slow`` if the variable does not say otherwise."""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plot, "draw_calibration_plot", lambda *_: None)
        patch.setattr(bounded_tokenizer, "BoundedObject", KeptObject)
        patch.setattr(thread_pool, "pool_size", lambda: 1)
        patch.setattr(config_package, "load_settings", _remembered_settings())
        patch.chdir(tmp_path_factory.mktemp("elsewhere"))
        yield make_site(tmp_path_factory.mktemp("site"))


def _remembered_settings() -> Callable[[], Settings]:
    """Return a function that loads the settings again if a variable has changed."""
    load = functools.cache(lambda _: load_settings())
    return lambda: load(tuple(item for item in sorted(os.environ.items()) if item[0].startswith(PREFIX)))


Damage = Callable[[Random, Site], Any]
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


def records(random: Random, site: Site) -> bytes:
    del site
    return lines_of(SEEDS, random)


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


def template(random: Random, site: Site) -> bytes:
    del site
    pieces = random.choices((*PIECES, CHAT_TEMPLATE), k=random.randint(0, 7))
    content = "".join(pieces).encode("utf-8", random.choice(("surrogatepass", "replace")))
    return damaged(content, random) if random.random() < 0.2 else content


def use_template(content: bytes, site: Site, root: Path) -> None:
    model = edited_copy(site.base, root / "model", [("chat_template.jinja", content)])
    text = root / "text.jsonl"
    text.write_text("\n".join(json.dumps(record) for record in SEEDS[1:]))
    calibrate(model, text, root, "--max-skipped", "1", "--template-argument", "x=1")


def tokenizer(random: Random, site: Site) -> Edits:
    return file_edits(site.base, ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"), random)


def use_tokenizer(edits: Edits, site: Site, root: Path) -> None:
    model = edited_copy(site.base, root / "model", edits)
    calibrate(model, site.text, root)


def config(random: Random, site: Site) -> tuple[Path, Edits, str]:
    sound = random.choice((site.base, site.mixture, site.coded, site.fused))
    edits = file_edits(sound, ("config.json", "generation_config.json"), random)
    return sound, edits, random.choice(MODEL_COMMANDS)


def use_model(drawn: Any, site: Site, root: Path) -> None:
    sound, edits, command = drawn
    run_on_model(command, edited_copy(sound, root / "model", edits), sound, site, root)


def adapter(random: Random, site: Site) -> tuple[Path, Path, Edits]:
    base, sound = random.choice([(site.base, site.adapter), *site.other_adapters])
    return base, sound, file_edits(sound, sorted(path.name for path in sound.iterdir()), random)


def use_adapter(drawn: Any, site: Site, root: Path) -> None:
    del site
    base, sound, edits = drawn
    copy = edited_copy(sound, root / "adapter", edits)
    run("merge", "--base", base, "--adapter", copy, "--out", root / "merged")
    run("inspect", copy, "--base", base)


def base_in_codes(random: Random, site: Site) -> tuple[Path, Edits, str]:
    sound = random.choice(site.bases_in_codes)
    edits = file_edits(sound, ("config.json", "model.safetensors"), random)
    return sound, edits, random.choice(CODE_COMMANDS)


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


def directory(random: Random, site: Site) -> tuple[Path, Edits, str]:
    sound = random.choice((site.base, site.padded, site.coded, site.fused))
    names = sorted(path.name for path in sound.iterdir() if path.is_file())
    strays = [(name, random.choice(CONTENTS)) for name in random.sample(STRAYS, random.randint(0, 2))]
    return sound, [*file_edits(sound, names, random), *strays], random.choice(MODEL_COMMANDS)


def codes(random: Random, site: Site) -> Edits:
    return file_edits(site.coded, ("config.json", "model.safetensors", "generation_config.json"), random)


def use_codes(edits: Any, site: Site, root: Path) -> None:
    """Compare with the source as the worker of a validation does."""
    copy = edited_copy(site.coded, root / "coded", edits)
    with suppress(PipelineError):
        check_structure(open_checkpoint(site.base), open_checkpoint(copy))
    assert place_tensors(copy)


def trained(random: Random, site: Site) -> tuple[Path, Edits]:
    sound = random.choice(site.trained)
    names = sorted(str(path.relative_to(sound)) for path in sound.rglob("*") if path.is_file())
    return sound, file_edits(sound, names, random)


def use_trained(drawn: Any, site: Site, root: Path) -> None:
    sound, edits = drawn
    copy = edited_copy(sound, root / "trained", edits)
    run("convert", "--from", copy, "--out", root / "out", "--base", site.base)
    run("inspect", copy, "--base", site.base)


SETTINGS: dict[str, Any] = {
    "base_model": "base", "calibration": {"source": "a.jsonl", "max_skipped": 0.1, "template_arguments": {"a": 1}},
    "padding": {"tensor_parallel": 2}, "quantization": {"bits": 4, "group_size": 32, "dynamic": {"x": {"mse": 2}}},
    "validation": {"text": "b.txt", "limits": {"max_mean_kl": 0.1}, "template_arguments": {}, "prompts": ["a"]},
}  # fmt: skip


SETTINGS_FILE = """
base_model = "base"
inbox = "inbox"

[calibration]
source = "text.jsonl"
samples = 128

[quantization]
method = "gptq"
dynamic = { 'mlp\\.down_proj' = { damp_percent = 0.1 } }

[validation.limits]
max_mean_kl = 0.05

[store]
merged = false
"""


def configured(random: Random, site: Site) -> Any:
    del site
    return mutated_document(SETTINGS, random)


def use_configured(values: Any, site: Site, root: Path) -> None:
    """Set the sections as variables of the environment, which are JSON."""
    if not isinstance(values, dict):
        return
    with pytest.MonkeyPatch.context() as patch:
        for name, value in values.items():
            text = json.dumps(value)
            if name and name.isprintable() and "=" not in name:  # what a variable may be called
                patch.setitem(os.environ, f"QWEN_PIPELINE_{name.upper()}", text)
        calibrate(site.base, site.text, root)


def settings_file(random: Random, site: Site) -> bytes:
    del site
    return damaged(SETTINGS_FILE.encode(), random)


def use_settings_file(content: bytes, site: Site, root: Path) -> None:
    (root / "inbox/x").mkdir(parents=True)
    (root / "qwen_pipeline.toml").write_bytes(content)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(os.environ, "QWEN_PIPELINE_CONFIG", str(root / "qwen_pipeline.toml"))
        run("status")


KINDS: dict[str, tuple[Damage, Use]] = {
    "records": (records, use_records),
    "template": (template, use_template),
    "tokenizer": (tokenizer, use_tokenizer),
    "config": (config, use_model),
    "adapter": (adapter, use_adapter),
    "base in codes": (base_in_codes, use_model),
    "directory": (directory, use_model),
    "codes": (codes, use_codes),
    "trained": (trained, use_trained),
    "settings": (configured, use_configured),
    "settings file": (settings_file, use_settings_file),
}


def test_sound_input_is_taken(site: Site, tmp_path: Path) -> None:
    text = tmp_path / "text.jsonl"
    text.write_text("\n".join(map(json.dumps, SEEDS)))
    assert "error" not in calibrate(site.base, text, tmp_path)
    assert "error" not in run("merge", "--base", site.base, "--adapter", site.adapter, "--out", tmp_path / "merged")
    assert "error" not in run("convert", "--from", site.trained[2], "--base", site.base, "--out", tmp_path / "whole")
    taken = {"unpad": site.padded, "plan": site.base, "export": site.coded, "audit show": site.padded}
    for verb, model in taken.items():
        (command,) = (command for command in MODEL_COMMANDS if command.startswith(verb))
        assert "error" not in run_on_model(command, model, site.base, site, tmp_path / verb)


def places(node: Any, above: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path of every value of a document."""
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in items:
        yield (*above, key)
        yield from places(value, (*above, key))


@pytest.mark.timeout(1200)
@pytest.mark.slow
@pytest.mark.parametrize("number", range(5), ids=("gptq", "gptq_v2", "awq", "compressed-tensors", "fp8"))
def test_every_odd_value_of_the_settings_of_codes_is_taken_or_refused(number: int, site: Site, tmp_path: Path) -> None:
    """At random each field of a quantization_config is hit too rarely."""
    sound, random = site.bases_in_codes[number], Random(number)
    config = json.loads((sound / "config.json").read_bytes())
    for path in places(config["quantization_config"], ("quantization_config",)):
        for value in VALUES:
            changed: Any = copy.deepcopy(config)
            node = functools.reduce(lambda inner, key: inner[key], path[:-1], changed)
            node[path[-1]] = value
            edits = [("config.json", json.dumps(changed).encode())]
            with tempfile.TemporaryDirectory(dir=tmp_path) as root:
                use_model((sound, edits, random.choice(CODE_COMMANDS)), site, Path(root))


@pytest.mark.timeout(7200)
@pytest.mark.parametrize("examples", [FAST, pytest.param(THOROUGH, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", KINDS)
def test_every_damage_is_taken_or_refused_with_a_remedy(kind: str, examples: int, site: Site) -> None:
    damage, use = KINDS[kind]

    scratch = "/dev/shm" if Path("/dev/shm").is_dir() else None

    @settings(max_examples=examples, derandomize=examples == FAST, suppress_health_check=(HealthCheck.too_slow,))
    @given(random=st.randoms(use_true_random=True))
    def check(random: Random) -> None:
        drawn = damage(random, site)
        note(ascii(drawn)[:3000])
        with tempfile.TemporaryDirectory(dir=scratch) as root:
            use(drawn, site, Path(root))

    check()
