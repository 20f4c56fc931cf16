"""Settings: where they are read from, their defaults, and error messages that name the setting at fault."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from qwen_pipeline.config import FILE_VARIABLE, load_settings, require_setting, settings_from_values, settings_of
from qwen_pipeline.errors import EnvironmentFault, InputRefused
from qwen_pipeline.evaluation.limits import Limits


@pytest.fixture
def settings_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return an empty settings file that this process reads."""
    file = tmp_path / "qwen_pipeline.toml"
    file.touch()
    monkeypatch.setenv(FILE_VARIABLE, str(file))
    return file


def test_defaults_need_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    settings = load_settings()
    assert settings.workspace == tmp_path / "workspace"
    assert settings.inbox == tmp_path / "workspace" / "inbox"
    assert settings.store_root.parent == settings.dagster_home.parent == settings.workspace
    assert settings.quantization.bits == 4


@pytest.mark.parametrize(
    ("written", "source"),
    [
        ('"owner/name@main#train"', "owner/name@main#train"),
        ('{ source = "owner/name", min_expert_tokens = 7 }', "owner/name"),
        ('"/abs/text"', "/abs/text"),
    ],
)
def test_calibration_is_a_path_or_the_name_of_a_dataset(settings_file: Path, written: str, source: str) -> None:
    settings_file.write_text(f"calibration = {written}\n")
    assert load_settings().calibration.source == source


def test_the_name_of_an_existing_directory_is_a_path(settings_file: Path) -> None:
    (settings_file.parent / "chats").mkdir()
    settings_file.write_text('calibration = "chats"\n')
    assert load_settings().calibration.source == str(settings_file.parent / "chats")


def test_paths_are_relative_to_the_settings_file(settings_file: Path) -> None:
    settings_file.write_text('workspace = "w"\ncalibration = "chats.jsonl"\n[validation]\ntext = "/abs/held-out.txt"\n')
    settings = load_settings()
    assert settings.inbox == settings_file.parent / "w" / "inbox"
    assert settings.calibration.source == str(settings_file.parent / "chats.jsonl")
    assert settings.validation.text == Path("/abs/held-out.txt")


def test_the_home_of_a_user_who_does_not_exist_is_a_directory_of_that_name(
    settings_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/homes/me")
    settings_file.write_text('workspace = "~/w"\ninbox = "~no-such-user/inbox"\n')
    settings = load_settings()
    assert settings.workspace == Path("/homes/me/w")
    assert settings.inbox == settings_file.parent / "~no-such-user/inbox"


def test_the_environment_takes_precedence_over_the_file(settings_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings_file.write_text("[quantization]\nbits = 8\ngroup_size = 64\n")
    monkeypatch.setenv("QWEN_PIPELINE_QUANTIZATION__BITS", "4")
    monkeypatch.setenv("QWEN_PIPELINE_BASE_NAMES", '["a/b"]')
    settings = load_settings()
    assert (settings.quantization.bits, settings.quantization.group_size) == (4, 64)
    assert settings.base_names == ("a/b",)


def test_targets_determine_the_number_of_ranks(settings_file: Path) -> None:
    settings_file.write_text("[padding.targets]\nvllm = [2, 8]\nlmdeploy-turbomind = [3]\n")
    padding = load_settings().padding_spec
    assert padding.targets == {"vllm": (2, 8), "lmdeploy-turbomind": (3,)}
    assert padding.ranks == 24
    assert not padding.towers
    settings_file.write_text("[padding]\ntowers = true\n")
    assert load_settings().padding.towers


@pytest.mark.parametrize(
    ("text", "named", "hint"),
    [
        ("bse_model = 'x'", "bse_model", "base_model"),
        ("[quantization]\nbitz = 4", "quantization.bitz", "bits"),
        ("[padding]\ntp = 4", "padding.tp", "tensor_parallel"),
        ("[validation.limits]\nnonsense = 1", "validation.limits.nonsense", "Known are"),
        ("[engines.gptqmodel]\npyton = 'x'", "engines.gptqmodel.pyton", "python"),
        ("[quantization]\nbits = 'four'", "quantization.bits is 'four'", "valid integer"),
        ("[padding]\ntensor_parallel = 0", "padding.tensor_parallel is 0", "greater than or equal to 1"),
        ("[padding.targets]\nvlm = [2]", "padding.targets.vlm is 'vlm'", "There is no serving engine 'vlm'"),
        ("[padding.targets]\nvllm = []", "padding.targets.vllm", "at least 1 item"),
        ("[padding.targets]\nvllm = [0]", "padding.targets.vllm.0 is 0", "greater than 0"),
        ("[padding]\ntensor_parallel = 8\ntargets = { vllm = [2] }", "padding", "Remove tensor_parallel, or targets"),
        ("[quantization]\nbits = 5", "bits is 5", "4, 8"),
        ("[store]\npadded = false", "store", "store.merged = false too"),
        (
            "[quantization]\nengine = 'gptqmodel'\n[store]\nmerged = false\npadded = false",
            "gptqmodel reads padded weights",
            "setting",
        ),
        ("base_model = ", "not valid TOML", "Invalid value"),
        ("[validation.serve]\nengine = 'llama'", "validation.serve.engine is 'llama'", "'vllm'"),
        (
            "[padding.targets]\nvllm = [1000000000]",
            "padding.targets.vllm.0 is 1000000000",
            "less than or equal to 1024",
        ),
        ("[padding]\ntensor_parallel = 1000000000", "padding.tensor_parallel is 1000000000", "or equal to 1024"),
        ("[validation]\nprompts = []", "validation.prompts is []", "at least 1 item"),
        ("[validation]\nprompts = [' ']", "validation.prompts.0 is ' '", "match pattern"),
        ("[validation.limits]\nmax_mean_kl = nan", "max_mean_kl", "is not a number"),
        ("[validation.overrides.poet]\nmax_mean_kl = nan", "max_mean_kl of poet", "is not a number"),
        ("[validation.lm_eval]\nmax_drop = nan", "validation.lm_eval.max_drop is nan", "greater than or equal to 0"),
        ("[validation.lm_eval.minimum]\n'a/b' = nan", "validation.lm_eval.minimum.a/b is nan", "finite number"),
        ("owners = ['me']", "owners.0 is 'me'", "expected team:name or an e-mail address"),
        (f"workspace = '{'w' * 300}'", "workspace is", "names of up to 255 bytes"),
        (f"workspace = '{'w/' * 600}'", "workspace is", "up to 1024 printable characters"),
        ('workspace = "a\\u0000b"', "workspace is", "printable characters"),
        ("[calibration]\ntokenizer_seconds = 0", "calibration.tokenizer_seconds is 0", "greater than 0"),
        ("a = " + "[" * 5000, "not valid TOML", "recursion"),
        ("[validation.overrides.poet]\nmax_kl = 1", "no limit 'max_kl' for poet", "Did you mean max_mean_kl"),
    ],
)
def test_an_error_names_the_setting_and_gives_a_hint(settings_file: Path, text: str, named: str, hint: str) -> None:
    settings_file.write_text(text)
    with pytest.raises(InputRefused) as refusal:
        load_settings()
    assert named in refusal.value.what
    assert hint in refusal.value.what
    assert refusal.value.remedy


def test_a_settings_file_that_is_no_text_is_refused(settings_file: Path) -> None:
    settings_file.write_bytes("base_model = 'Grüße'".encode("latin-1"))
    with pytest.raises(InputRefused, match=r"not valid TOML in UTF-8: 'utf-8' codec"):
        load_settings()
    os.truncate(settings_file, 40_000_000_000)
    with pytest.raises(InputRefused, match=r"has 40,000,000,000 bytes"):
        load_settings()
    settings_file.unlink()
    settings_file.mkdir()
    with pytest.raises(InputRefused, match=r"is not a regular file|does not exist"):
        load_settings()


@pytest.mark.parametrize(
    ("variable", "value", "named"),
    [
        ("QWEN_PIPELINE_WORKSPCE", "x", "QWEN_PIPELINE_WORKSPACE"),
        ("QWEN_PIPELINE_PADDING__TENSOR_PARALEL", "2", "tensor_parallel"),
        ("QWEN_PIPELINE_OWNERS", "team:x", "owners"),
    ],
)
def test_an_error_names_an_invalid_environment_variable(
    settings_file: Path, monkeypatch: pytest.MonkeyPatch, variable: str, value: str, named: str
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(InputRefused, match=named):
        load_settings()


def test_a_settings_file_named_in_the_environment_must_exist(settings_file: Path) -> None:
    settings_file.unlink()
    with pytest.raises(InputRefused, match="does not exist"):
        load_settings()


def test_overrides_apply_to_one_fine_tune_alone(settings_file: Path) -> None:
    settings_file.write_text(
        "[validation.limits]\nmax_mean_kl = 0.05\n[validation.overrides.poet]\nmin_top1_agreement = 0.5"
    )
    validation = load_settings().validation
    assert validation.limits_of("poet") == replace(validation.limits, min_top1_agreement=0.5)
    assert validation.limits_of("other") == validation.limits_of(None) == Limits(max_mean_kl=0.05)


def test_a_serving_engine_that_is_not_installed_is_reported(settings_file: Path) -> None:
    assert load_settings().serving_plan() is None
    settings_file.write_text("[validation.serve]\nengine = 'vllm'\n[engines.vllm]\npython = '/nowhere/python'")
    with pytest.raises(EnvironmentFault, match="/nowhere/python does not exist"):
        load_settings().serving_plan()


def test_the_error_about_a_missing_setting_shows_how_to_add_it(settings_file: Path) -> None:
    with pytest.raises(InputRefused) as refusal:
        require_setting(load_settings().base_model, "base_model", '"Qwen/Qwen2.5-7B"')
    assert f'{settings_file}: base_model = "Qwen/Qwen2.5-7B"' in refusal.value.remedy


def test_settings_are_loaded_without_importing_torch() -> None:
    code = "import sys, qwen_pipeline.config; sys.exit(any(m in sys.modules for m in ('torch', 'transformers')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_given_settings_ignore_the_file_and_the_environment(
    settings_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings_file.write_text("base_revision = 'main'\n[validation.overrides.poet]\nmax_mean_kl = 0.5\n")
    monkeypatch.setenv("QWEN_PIPELINE_QUANTIZATION__BITS", "8")
    assert settings_from_values({"base_model": "a/b"}) == settings_from_values({}).model_copy(
        update={"base_model": "a/b"}
    )
    assert settings_from_values({}).base_revision is None
    assert settings_from_values({}).quantization.bits == 4
    with pytest.raises(InputRefused, match="bits is 5") as refusal:
        settings_from_values({"quantization": {"bits": 5}})
    assert refusal.value.remedy


RECIPES = """
[bases.small]
model = "Qwen/A"
[bases.large]
model = "Qwen/B"
revision = "abc1234"
text_only = true
[padding]
tensor_parallel = 8
[quantization]
group_size = 64
modules = { self_attn = 8 }
[calibration]
source = "chats.jsonl"
max_skipped = 0.5
[recipes.fast]
match = ["chat-*"]
calibration = "code.jsonl"
leave_behind = ["*.bin"]
quantization = { bits = 8, modules = { mlp = "keep" } }
[recipes.floats]
base = "large"
quantization = { method = "fp8" }
padding = { targets = { vllm = [2] } }
[recipes.floats.validation.limits]
max_mean_kl = 0.5
"""


def test_a_recipe_replaces_what_it_names_and_a_base_is_the_only_one_of_its_product(
    settings_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings_file.write_text(RECIPES)
    settings = load_settings()
    assert settings_of(settings, None) is settings
    fast = settings_of(settings, "fast", base="small")
    assert (fast.base_model, fast.text_only, fast.leave_behind) == ("Qwen/A", False, ("*.bin",))
    assert fast.calibration.source == str(settings_file.parent / "code.jsonl")
    assert (fast.calibration.max_skipped, fast.padding) == (0.5, settings.padding)
    assert fast.quantization == replace(settings.quantization, bits=8, modules={"mlp": "keep"})
    assert not fast.bases
    assert not fast.recipes
    floats = settings_of(settings, "floats", base="large", overrides={"validation": {"windows": 3}})
    assert (floats.base_revision, floats.text_only, floats.quantization.method) == ("abc1234", True, "fp8")
    assert floats.padding_spec.targets == {"vllm": (2,)}
    assert floats.validation == settings.validation.model_copy(update={"limits": Limits(max_mean_kl=0.5), "windows": 3})
    assert settings_of(settings, None, base="large").quantization == settings.quantization
    monkeypatch.setenv("QWEN_PIPELINE_RECIPES__FAST__QUANTIZATION", '{"bits": 8, "samples": 4}')
    monkeypatch.setenv("QWEN_PIPELINE_RECIPES__FLOATS__VALIDATION__WINDOWS", "5")
    monkeypatch.setenv("QWEN_PIPELINE_BASES__LARGE__NAMES", '["lab/*"]')
    settings = load_settings()
    assert settings_of(settings, "fast").quantization == replace(settings.quantization, bits=8, samples=4)
    assert settings_of(settings, "floats", base="large").validation.windows == 5
    assert settings.bases["large"].names == ("lab/*",)


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        ("bits = 8", "bits = 5", "recipes.fast.quantization.bits is 5, expected one of 4, 8"),
        ("bits = 8", "bitz = 8", "recipes.fast.quantization.bitz does not exist. Did you mean bits?"),
        ("bits = 8", "bits = 'x'", "recipes.fast.quantization.bits is 'x'"),
        ("[2]", "[0]", "recipes.floats.padding.targets.vllm.0 is 0"),
        ("max_mean_kl", "max_kl", "recipes.floats.validation.limits.max_kl does not exist. Did you mean max_mean_kl?"),
        ("[recipes.floats.validation.limits]", "[recipes.floats.validation]\nunpadded = true", "for all recipes"),
        ("match =", "mtch =", "recipes.fast.mtch does not exist. Did you mean match?"),
        ('base = "large"', "base = 'huge'", "recipes.floats.base is 'huge', which does not exist. Known are small"),
        ("[recipes.fast]", "[recipes.default]", "recipes.default is 'default'"),
        ("[recipes.fast]", "[recipes.'a@b']", "recipes.a@b"),
        ("[bases.small]", "default_recipes = ['quick']\n[bases.small]", "default_recipes is 'quick'"),
        ("[bases.small]", "base_names = ['x']\n[bases.small]", "base_names is ('x',), but there are sections"),
    ],
)
def test_a_wrong_recipe_is_refused_when_settings_load(settings_file: Path, old: str, new: str, named: str) -> None:
    settings_file.write_text(RECIPES.replace(old, new, 1))
    with pytest.raises(InputRefused) as refusal:
        load_settings()
    assert named in refusal.value.what
