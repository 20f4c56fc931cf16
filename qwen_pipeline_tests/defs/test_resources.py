"""The configurable resources: their values, their config schema, and overrides in a run."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import dagster as dg
import pytest

from qwen_pipeline.config import Settings
from qwen_pipeline.definitions import code_location
from qwen_pipeline.defs.resources import PipelineSettings, WorkspaceResource, configured_resources
from qwen_pipeline.errors import InputRefused
from qwen_pipeline_tests.site import Site


def resolve(settings: Settings, config: dict[str, Any] | None = None) -> Settings:
    """Return the settings as an asset sees them, in a run with this config of the resource ``settings``."""
    resolved: list[Settings] = []

    @dg.asset
    def asset(workspace: WorkspaceResource, settings: PipelineSettings) -> None:
        resolved.append(settings.resolve(workspace))

    run_config = {"resources": {"settings": {"config": config}}} if config else None
    resources = configured_resources(settings)
    with dg.DagsterInstance.ephemeral() as instance:
        dg.materialize([asset], resources=resources, run_config=run_config, instance=instance)
    return resolved[0]


@pytest.mark.parametrize(
    "more",
    [
        "",
        "unpadded = true\ntargets = { vllm = [2, 4] }\n[validation.overrides.poet]\nmax_mean_kl = 0.5\n",
        "[validation.lm_eval]\ntasks = ['arc_easy']\nminimum = { 'arc_easy/acc' = 0.5 }\nlimit = 3\n",
        "[engines.gptqmodel]\npython = 'bin/python'\n[store]\nhard_links = true\n",
        "[quantization.dynamic.'mlp']\nmse = 2.4\n",
    ],
)
def test_an_asset_sees_the_settings_of_the_file(site: Site, more: str) -> None:
    site.configure(more)
    expected = site.settings.model_dump(exclude={"owners"})
    assert resolve(site.settings).model_dump(exclude={"owners"}) == expected


def test_targets_replace_the_number_of_ranks(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    file = site.root / "qwen_pipeline.toml"
    file.write_text(file.read_text().replace("tensor_parallel = 2", "targets = { vllm = [2, 8] }"))
    assert resolve(site.settings).padding_spec == site.settings.padding_spec


def test_a_run_can_override_settings_with_values_and_environment_variables(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BASE_OF_THIS_RUN", "Qwen/Qwen2.5-0.5B")
    config = {"base_model": {"env": "BASE_OF_THIS_RUN"}, "quantization": {"bits": 8}}
    settings = resolve(site.settings, config)
    assert settings.base_model == "Qwen/Qwen2.5-0.5B"
    assert settings.quantization == replace(site.settings.quantization, bits=8)
    assert settings.padding == site.settings.padding


def test_an_invalid_override_is_refused_by_dagster_or_by_the_settings(site: Site) -> None:
    with pytest.raises(dg.DagsterInvalidConfigError, match="bitz"):
        resolve(site.settings, {"quantization": {"bitz": 4}})
    with pytest.raises(InputRefused, match="bits is 5"):
        resolve(site.settings, {"quantization": {"bits": 5}})


@pytest.mark.parametrize(
    ("section", "setting", "value"),
    [("store", "merged", False), ("validation", "unpadded", True), ("validation", "other_merge", True)],
)
def test_a_run_cannot_override_a_setting_that_decides_which_assets_exist(
    site: Site, section: str, setting: str, value: bool
) -> None:
    job = code_location(site.settings).resolve_job_def("process_fine_tune")
    config = {"resources": {"settings": {"config": {section: {setting: value}}}}}
    with pytest.raises(
        dg.DagsterInvalidConfigError, match=rf'unexpected config entry "{setting}" at path .*:{section}'
    ):
        dg.validate_run_config(job, config)


def test_the_config_schema_describes_every_setting(site: Site) -> None:
    schemas = {
        name: resource.config_schema.as_field()
        for name, resource in code_location(site.settings).get_repository_def().get_top_level_resources().items()
    }
    described = {".".join(path): field.description for path, field in fields_below(schemas["settings"], ())}
    assert {path for path in described if "." not in path} == Settings.model_fields.keys() - {
        *("workspace", "inbox", "imports", "owners", "notify", "openlineage", "execution", "assets"),
        *("bases", "recipes", "default_recipes", "uploads_choose_recipes", "release", "queue"),
    }
    assert described["base_revision"] == "Commit, tag or branch of a base model on the hub."
    assert described["padding.towers"].startswith("Whether the MLPs of vision and audio towers")
    assert [path for path, text in described.items() if not text or ":class:" in text or ":data:" in text] == []


def fields_below(field: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yield (path, field) of each field of a config type, and of those below it."""
    for name, inner in getattr(field.config_type, "fields", {}).items():
        yield (*path, name), inner
        yield from fields_below(inner, (*path, name))
