"""The code location: exactly these assets, checks and instigators, and it loads without what computes."""

import subprocess
import sys
from types import ModuleType

import dagster as dg
import pytest

from qwen_pipeline.defs.assets import COMPLETE
from qwen_pipeline.defs.build import code_location
from qwen_pipeline.defs.resources import Pipeline
from qwen_pipeline.errors import InputRefused
from qwen_pipeline.evaluation.regression import NOT_WORSE
from qwen_pipeline.stages import calibrate, merge, pad, publish, quantize, repair, validate
from qwen_pipeline_tests.site import Site

STAGES = (merge, pad, calibrate, quantize, validate, publish, repair)


@pytest.fixture
def definitions(site: Site) -> dg.Definitions:
    return code_location(Pipeline(site.settings))


def test_the_graph_is_complete_and_in_order(definitions: dg.Definitions) -> None:
    dg.Definitions.validate_loadable(definitions)
    graph = definitions.resolve_asset_graph()
    parents = {
        key.to_user_string(): sorted(parent.to_user_string() for parent in graph.get(key).parent_keys)
        for key in graph.get_all_asset_keys()
    }
    assert parents == {
        "base_model": [],
        "fine_tune": [],
        "merged_checkpoint": ["base_model", "fine_tune"],
        "padded_checkpoint": ["merged_checkpoint"],
        "calibration_tokens": ["padded_checkpoint"],
        "quantized_checkpoint": ["calibration_tokens", "padded_checkpoint"],
        "validated_checkpoint": ["merged_checkpoint", "quantized_checkpoint"],
        "published_checkpoint": ["quantized_checkpoint", "validated_checkpoint"],
        "imported_checkpoint": [],
        "repaired_checkpoint": ["imported_checkpoint"],
    }


def test_the_model_without_padding_is_quantized_where_the_settings_ask_for_it(site: Site) -> None:
    site.configure("unpadded = true\n")
    graph = code_location(Pipeline(site.settings)).resolve_asset_graph()
    compared, validated = dg.AssetKey("unpadded_quantized"), dg.AssetKey("validated_checkpoint")
    assert graph.get(compared).parent_keys == {dg.AssetKey("merged_checkpoint"), dg.AssetKey("calibration_tokens")}
    assert compared in graph.get(validated).parent_keys
    assert len(graph.get(validated).parent_keys) == 3
    assert not graph.get(compared).check_keys
    site.configure("\n[store]\nmerged = false\n")
    with pytest.raises(InputRefused, match=r"The setting store is .*validation\.unpadded quantizes the merged weights"):
        _ = site.settings


def test_every_promised_check_is_declared_for_each_partition(definitions: dg.Definitions) -> None:
    graph = definitions.resolve_asset_graph()
    promised = {(arrival, COMPLETE.name, True) for arrival in ("fine_tune", "imported_checkpoint")}
    promised |= {("validated_checkpoint", NOT_WORSE.name, False)} | {
        (asset_of(stage), check.name, check.blocking) for stage in STAGES for check in stage.CHECKS
    }
    declared = {
        (key.asset_key.to_user_string(), key.name, graph.get_check_spec(key).blocking) for key in graph.asset_check_keys
    }
    assert declared == promised
    assert all(graph.get_check_spec(key).partitions_def for key in graph.asset_check_keys)


def test_assets_say_who_what_and_by_which_version(definitions: dg.Definitions) -> None:
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


def test_instigators_and_jobs(definitions: dg.Definitions) -> None:
    repository = definitions.get_repository_def()
    assert set(repository.job_names) == {"process_fine_tune", "validate_and_publish", "repair_imported", "__ASSET_JOB"}
    assert [sensor.name for sensor in repository.sensor_defs] == ["fine_tune_inbox", "import_inbox"]
    assert [schedule.name for schedule in repository.schedule_defs] == ["nightly"]


def test_the_module_loads_without_what_computes(site: Site) -> None:
    code = (
        "import sys, dagster as dg; from qwen_pipeline.definitions import defs;"
        "dg.Definitions.validate_loadable(defs());"
        "sys.exit(','.join({'torch', 'transformers', 'pandas', 'matplotlib'} & sys.modules.keys()) or 0)"
    )
    found = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
