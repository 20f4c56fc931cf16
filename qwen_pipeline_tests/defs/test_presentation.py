"""The assets in the UI: documented settings, freshness, links to the code, and the condition of automation."""

import inspect
import linecache
from datetime import timedelta
from typing import Any

import dagster as dg
import pytest

from qwen_pipeline.definitions import code_location
from qwen_pipeline.defs.partitions import FINE_TUNES
from qwen_pipeline_tests.site import FINE_TUNE, Site

CHAIN = ("fine_tune", "merged_checkpoint", "padded_checkpoint", "calibration_tokens", "quantized_checkpoint",
         "validated_checkpoint", "published_checkpoint", "production_release")  # fmt: skip


def specs_of(site: Site) -> dict[str, dg.AssetSpec]:
    specs = code_location(site.settings).resolve_all_asset_specs()
    return {spec.key.to_user_string(): spec for spec in specs}


def test_an_asset_leads_to_the_function_that_materializes_it(site: Site) -> None:
    for name, spec in specs_of(site).items():
        (reference,) = spec.metadata["dagster/code_references"].code_references
        lines = linecache.getlines(reference.file_path)[reference.line_number - 1 :]
        assert f"def {name}(" in "".join(inspect.getblock(lines)), name
    site.configure('\n[assets]\nsource_url = "https://example.org/pipeline/blob/main/"\n')
    (reference,) = specs_of(site)["padded_checkpoint"].metadata["dagster/code_references"].code_references
    assert reference.url.startswith("https://example.org/pipeline/blob/main/qwen_pipeline/defs/assets.py#L")


def test_freshness_is_expected_where_the_settings_say_so(site: Site) -> None:
    policies = {name: spec.freshness_policy for name, spec in specs_of(site).items() if spec.freshness_policy}
    assert policies == {"lineage_audit": dg.FreshnessPolicy.time_window(fail_window=timedelta(days=8))}
    site.configure("\n[assets]\nbase_days = 30\nrelease_days = 7\n")
    policies = {name: spec.freshness_policy for name, spec in specs_of(site).items() if spec.freshness_policy}
    assert policies.keys() == {"lineage_audit", "base_model", "published_checkpoint"}


@pytest.fixture
def instance() -> Any:
    with dg.DagsterInstance.ephemeral() as ephemeral:
        ephemeral.add_dynamic_partitions(FINE_TUNES.name or "", [FINE_TUNE])
        yield ephemeral


def make(instance: dg.DagsterInstance, version: str, *names: str, partition: str | None = FINE_TUNE) -> None:
    for name in names:
        tags = {"dagster/data_version": f"{name} {version}"}
        instance.report_runless_asset_event(dg.AssetMaterialization(name, partition=partition, tags=tags))


def test_nothing_is_automatic_by_default(site: Site) -> None:
    assert not any(spec.automation_condition for spec in specs_of(site).values())
    assert "automation" not in {each.name for each in code_location(site.settings).sensors or ()}


def test_automation_makes_again_what_another_upload_made_stale(site: Site, instance: dg.DagsterInstance) -> None:
    site.configure("\n[assets]\nautomation = true\n")
    definitions, cursor = code_location(site.settings), None
    assert "automation" in {each.name for each in definitions.sensors or ()}

    def requested() -> set[str]:
        nonlocal cursor
        found = dg.evaluate_automation_conditions(definitions, instance, cursor=cursor)
        cursor = found.cursor
        return {each for each in CHAIN if found.get_requested_partitions(dg.AssetKey(each))}

    assert requested() == set()  # what no run has made is the sensor's
    make(instance, "1", "base_model", partition=None)
    make(instance, "1", *CHAIN)
    assert requested() == set()
    make(instance, "1", "fine_tune")
    assert requested() == set()
    make(instance, "2", "fine_tune")
    assert requested() == set(CHAIN[1:])  # in one run, which a blocking check stops
    assert requested() == set()
    make(instance, "2", *CHAIN[1:])
    assert requested() == set()
