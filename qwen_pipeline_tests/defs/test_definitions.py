"""The code location: the exact set of definitions in each mode, and a light-weight import."""

import subprocess
import sys
from types import ModuleType

import dagster as dg
import pytest

from qwen_pipeline.definitions import code_location
from qwen_pipeline.defs.arrivals.inbox_asset import NOTHING_QUARANTINED
from qwen_pipeline.defs.operations.lineage_assets import SOUND
from qwen_pipeline.defs.stage_assets import COMPLETE, FINE_TUNE_GROUP
from qwen_pipeline.errors import InputRefused
from qwen_pipeline.evaluation.regression import NOT_WORSE
from qwen_pipeline.releases import gates
from qwen_pipeline.stages import calibrate, merge, pad, publish, quantize, repair, validate
from qwen_pipeline_tests.site import Site

STAGES = (merge, pad, calibrate, quantize, validate, publish, repair)


@pytest.fixture
def definitions(site: Site) -> dg.Definitions:
    return code_location(site.settings)


UNPARTITIONED = (SOUND, NOTHING_QUARANTINED)
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
    "production_release": {"published_checkpoint"},
    "lineage_audit": set[str](),
    "retention": set[str](),
    "inbox": set[str](),
}
WITH_UNPADDED = {
    **PARENTS,
    "unpadded_quantized_checkpoint": {"merged_checkpoint", "calibration_tokens"},
    "validated_checkpoint": {"merged_checkpoint", "quantized_checkpoint", "unpadded_quantized_checkpoint"},
}
WITH_OTHER_MERGE = {
    **PARENTS,
    "otherwise_merged_checkpoint": {"base_model", "fine_tune"},
    "validated_checkpoint": {"merged_checkpoint", "quantized_checkpoint", "otherwise_merged_checkpoint"},
}
OF_FLOATS = {asset: parents - {"calibration_tokens"} for asset, parents in WITH_UNPADDED.items()}
del OF_FLOATS["calibration_tokens"]
IN_ONE_PASS = "\n[store]\nmerged = false\n"


@pytest.mark.parametrize(
    ("more", "parents"),
    [
        ("", PARENTS),
        (IN_ONE_PASS, PARENTS),
        ("unpadded = true\n", WITH_UNPADDED),
        ("other_merge = true\n" + IN_ONE_PASS, WITH_OTHER_MERGE),
    ],
)
def test_the_asset_graph_is_exactly_this_one(
    site: Site, monkeypatch: pytest.MonkeyPatch, more: str, parents: dict[str, set[str]]
) -> None:
    monkeypatch.setenv("QWEN_PIPELINE_BASE_NF4", "double")
    site.configure(more)
    definitions = code_location(site.settings)
    dg.Definitions.validate_loadable(definitions)
    graph = definitions.resolve_asset_graph()
    assert parents == {
        key.to_user_string(): {parent.to_user_string() for parent in graph.get(key).parent_keys}
        for key in graph.get_all_asset_keys()
    }


def test_8_bit_floats_need_no_calibration(site: Site) -> None:
    file = site.root / "qwen_pipeline.toml"
    file.write_text(file.read_text().replace("group_size = 32\n", 'method = "fp8"\n') + "unpadded = true\n")
    definitions = code_location(site.settings)
    dg.Definitions.validate_loadable(definitions)
    graph = definitions.resolve_asset_graph()
    assert {
        key.to_user_string(): {parent.to_user_string() for parent in graph.get(key).parent_keys}
        for key in graph.get_all_asset_keys()
    } == OF_FLOATS


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
    """Return asset -> its spec and its checks. The link to the code is left out: it is that of the step."""
    graph = definitions.resolve_asset_graph()
    checks = {key: {check.name for check in graph.get(key).check_keys} for key in graph.get_all_asset_keys()}
    return {
        spec.key.to_user_string(): (
            spec.replace_attributes(
                metadata={k: v for k, v in spec.metadata.items() if k != "dagster/code_references"}
            ),
            checks[spec.key],
        )
        for spec in definitions.resolve_all_asset_specs()
    }


def test_another_merge_needs_a_base_that_is_rounded(site: Site) -> None:
    site.configure("other_merge = true\n")
    with pytest.raises(InputRefused, match=r"The setting validation is .*base_nf4 is not set"):
        _ = site.settings


def test_quantizing_without_padding_needs_stored_merged_weights(site: Site) -> None:
    site.configure("unpadded = true\n" + IN_ONE_PASS)
    with pytest.raises(InputRefused, match=r"The setting store is .*validation\.unpadded quantizes the merged weights"):
        _ = site.settings


def test_every_check_of_a_stage_is_declared_with_partitions(definitions: dg.Definitions) -> None:
    graph = definitions.resolve_asset_graph()
    expected = {(arrival, COMPLETE.name, True) for arrival in ("fine_tune", "imported_checkpoint")}
    expected |= {(spec.asset_key.to_user_string(), spec.name, False) for spec in UNPARTITIONED}
    expected |= {("validated_checkpoint", NOT_WORSE.name, False)} | {
        (asset_of(stage), check.name, check.blocking) for stage in STAGES for check in stage.CHECKS
    }
    expected |= {("production_release", check.name, check.blocking) for check in gates.CHECKS}
    declared = {
        (key.asset_key.to_user_string(), key.name, graph.get_check_spec(key).blocking) for key in graph.asset_check_keys
    }
    assert declared == expected
    partitioned = graph.asset_check_keys - {spec.key for spec in UNPARTITIONED}
    assert all(graph.get_check_spec(key).partitions_def for key in partitioned)


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
    jobs = {"process_fine_tune", "validate_and_publish", "promote_release", "repair_imported"}
    jobs |= {"audit_lineage", "collect_garbage"}
    assert set(repository.job_names) == jobs | {"__ASSET_JOB"}
    assert [sensor.name for sensor in repository.sensor_defs] == ["fine_tune_inbox", "import_inbox"]
    assert [schedule.name for schedule in repository.schedule_defs] == ["nightly", "weekly_audit", "weekly_retention"]


@pytest.mark.parametrize(
    ("more", "waits"),
    [("", False), ('[release]\napproval = "required"\n', True), ('[release]\npromote = "manual"\n', True)],
)
def test_a_run_ends_with_the_promotion_if_it_waits_for_no_person(site: Site, more: str, waits: bool) -> None:
    site.configure(more)
    definitions = code_location(site.settings)
    graph = definitions.resolve_asset_graph()
    jobs = {name: definitions.resolve_job_def(name) for name in ("process_fine_tune", "promote_release")}
    steps = {name: {node.name for node in job.nodes} for name, job in jobs.items()}
    assert ("production_release" not in steps["process_fine_tune"]) == waits
    assert steps["promote_release"] == {"production_release"}
    assert graph.get(dg.AssetKey("production_release")).group_name == ("release" if waits else FINE_TUNE_GROUP)


def test_the_code_location_loads_without_torch(site: Site) -> None:
    code = (
        "import sys, dagster as dg; from qwen_pipeline.definitions import defs;"
        "dg.Definitions.validate_loadable(defs());"
        "sys.exit(','.join({'torch', 'transformers', 'pandas', 'matplotlib'} & sys.modules.keys()) or 0)"
    )
    found = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
