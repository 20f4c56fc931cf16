"""The code location: the exact set of definitions in each mode, and a light-weight import."""

import subprocess
import sys
from types import ModuleType

import dagster as dg
import pytest

from qwen_pipeline.definitions import code_location
from qwen_pipeline.defs.stage_assets import COMPLETE
from qwen_pipeline.errors import InputRefused
from qwen_pipeline.evaluation.regression import NOT_WORSE
from qwen_pipeline.stages import calibrate, merge, pad, publish, quantize, repair, validate
from qwen_pipeline_tests.site import Site

STAGES = (merge, pad, calibrate, quantize, validate, publish, repair)


@pytest.fixture
def definitions(site: Site) -> dg.Definitions:
    return code_location(site.settings)


PARENTS = {
    "base_model": set[str](),
    "fine_tune": set[str](),
    "merged_checkpoint": {"base_model", "fine_tune"},
    "padded_checkpoint": {"merged_checkpoint"},
    "calibration_tokens": {"padded_checkpoint"},
    "quantized_checkpoint": {"calibration_tokens", "padded_checkpoint"},
    "validated_checkpoint": {"merged_checkpoint", "quantized_checkpoint"},
    "published_checkpoint": {"quantized_checkpoint", "validated_checkpoint"},
    "imported_checkpoint": set[str](),
    "repaired_checkpoint": {"imported_checkpoint"},
}
WITH_UNPADDED = {
    **PARENTS,
    "unpadded_quantized_checkpoint": {"merged_checkpoint", "calibration_tokens"},
    "validated_checkpoint": {"merged_checkpoint", "quantized_checkpoint", "unpadded_quantized_checkpoint"},
}
IN_ONE_PASS = "\n[store]\nmerged = false\n"


@pytest.mark.parametrize(
    ("more", "parents"), [("", PARENTS), (IN_ONE_PASS, PARENTS), ("unpadded = true\n", WITH_UNPADDED)]
)
def test_the_asset_graph_is_exactly_this_one(site: Site, more: str, parents: dict[str, set[str]]) -> None:
    site.configure(more)
    definitions = code_location(site.settings)
    dg.Definitions.validate_loadable(definitions)
    graph = definitions.resolve_asset_graph()
    assert parents == {
        key.to_user_string(): {parent.to_user_string() for parent in graph.get(key).parent_keys}
        for key in graph.get_all_asset_keys()
    }


def test_merging_and_padding_are_one_step_if_merged_weights_are_not_stored(site: Site) -> None:
    separate = specs_and_checks(code_location(site.settings))
    site.configure(IN_ONE_PASS)
    definitions = code_location(site.settings)
    assert specs_and_checks(definitions) == separate
    steps = {
        asset.op.name: {key.to_user_string() for key in asset.keys}
        for asset in definitions.assets or ()
        if isinstance(asset, dg.AssetsDefinition) and len(asset.keys) > 1
    }
    assert steps == {"merged_and_padded_checkpoints": {"merged_checkpoint", "padded_checkpoint"}}


def specs_and_checks(definitions: dg.Definitions) -> dict[str, tuple[dg.AssetSpec, set[str]]]:
    """Return asset -> its spec and its checks."""
    graph = definitions.resolve_asset_graph()
    checks = {key: {check.name for check in graph.get(key).check_keys} for key in graph.get_all_asset_keys()}
    return {spec.key.to_user_string(): (spec, checks[spec.key]) for spec in definitions.resolve_all_asset_specs()}


def test_quantizing_without_padding_needs_stored_merged_weights(site: Site) -> None:
    site.configure("unpadded = true\n" + IN_ONE_PASS)
    with pytest.raises(InputRefused, match=r"The setting store is .*validation\.unpadded quantizes the merged weights"):
        _ = site.settings


def test_every_check_of_a_stage_is_declared_with_partitions(definitions: dg.Definitions) -> None:
    graph = definitions.resolve_asset_graph()
    expected = {(arrival, COMPLETE.name, True) for arrival in ("fine_tune", "imported_checkpoint")}
    expected |= {("validated_checkpoint", NOT_WORSE.name, False)} | {
        (asset_of(stage), check.name, check.blocking) for stage in STAGES for check in stage.CHECKS
    }
    declared = {
        (key.asset_key.to_user_string(), key.name, graph.get_check_spec(key).blocking) for key in graph.asset_check_keys
    }
    assert declared == expected
    assert all(graph.get_check_spec(key).partitions_def for key in graph.asset_check_keys)


def test_assets_have_owners_descriptions_kinds_and_code_versions(definitions: dg.Definitions) -> None:
    specs = {spec.key.to_user_string(): spec for spec in definitions.resolve_all_asset_specs()}
    for spec in specs.values():
        assert spec.owners == ["team:models"]
        assert spec.description
        assert 1 <= len(spec.kinds) <= 3
    for stage in STAGES:
        assert specs[asset_of(stage)].code_version == stage.CODE_VERSION


def asset_of(stage: ModuleType) -> str:
    return f"{stage.STAGE}_{'tokens' if stage is calibrate else 'checkpoint'}"


def test_steps_on_the_gpu_share_a_pool(definitions: dg.Definitions) -> None:
    pools = {
        asset.key.to_user_string()
        for asset in definitions.assets or ()
        if isinstance(asset, dg.AssetsDefinition) and asset.op.pool == "gpu"
    }
    assert pools == {"calibration_tokens", "quantized_checkpoint", "validated_checkpoint"}


def test_jobs_sensors_and_schedules_are_exactly_these(definitions: dg.Definitions) -> None:
    repository = definitions.get_repository_def()
    assert set(repository.job_names) == {"process_fine_tune", "validate_and_publish", "repair_imported", "__ASSET_JOB"}
    assert [sensor.name for sensor in repository.sensor_defs] == ["fine_tune_inbox", "import_inbox"]
    assert [schedule.name for schedule in repository.schedule_defs] == ["nightly"]


def test_the_code_location_loads_without_torch(site: Site) -> None:
    code = (
        "import sys, dagster as dg; from qwen_pipeline.definitions import defs;"
        "dg.Definitions.validate_loadable(defs());"
        "sys.exit(','.join({'torch', 'transformers', 'pandas', 'matplotlib'} & sys.modules.keys()) or 0)"
    )
    found = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
