"""Steps without a quantizer: materializations, faults, retries, and merging and padding in a single pass."""

import shutil
from pathlib import Path

import dagster as dg
import pytest

from qwen_pipeline.checkpoint.manifest import Derivation
from qwen_pipeline.checkpoint.store.derive import Built, derive
from qwen_pipeline.checkpoint.store.destinations import CheckpointStore
from qwen_pipeline.checkpoint.store.verify import contents_of_directory
from qwen_pipeline.defs.resources import StepRunner
from qwen_pipeline.errors import CheckFailed, EnvironmentFault, InputRefused, PipelineError, QuantizedInputRefused
from qwen_pipeline.qwen.geometry import load_plan
from qwen_pipeline.reports import dump_reports
from qwen_pipeline.runner.dagster_home import open_instance
from qwen_pipeline.runner.headless import Outcome, materialize
from qwen_pipeline.stages import merge
from qwen_pipeline.status import fine_tune_statuses
from qwen_pipeline_tests.site import FINE_TUNE, Site
from qwen_pipeline_tests.tiny import tiny_model, tiny_qwen2, with_codes


def steps(site: Site, outcome: Outcome) -> dict[str, str]:
    """Return the steps that were started -> SUCCESS or FAILURE."""
    with open_instance(site.settings) as instance:
        stats = instance.get_run_step_stats(outcome.run_id)
    return {step.step_key: step.status.value for step in stats if step.status}


def test_merging_and_padding_are_stored_in_the_instance(site: Site) -> None:
    site.drop()
    selection = ["base_model", "fine_tune", "merged_checkpoint", "padded_checkpoint"]
    outcome = materialize(site.settings, FINE_TUNE, only=selection)
    assert outcome.fault is None
    with open_instance(site.settings) as instance:
        for artifact in outcome.artifacts:
            key = dg.AssetKey(f"{artifact.manifest.derivation.stage}_checkpoint")
            (record,) = instance.fetch_materializations(key, limit=1).records
            stored = record.asset_materialization
            assert stored
            assert stored.partition == FINE_TUNE
            assert (stored.tags or {})["dagster/data_version"] == artifact.manifest.content_digest
            assert stored.metadata["path"].value == str(artifact.path)
            assert stored.metadata["inputs"].value == dict(artifact.manifest.derivation.inputs)


def test_an_incomplete_upload_stops_the_run(site: Site) -> None:
    (site.drop() / "adapter_model.safetensors").unlink()
    selection = ["base_model", "fine_tune", "merged_checkpoint"]
    outcome = materialize(site.settings, FINE_TUNE, only=selection)
    assert steps(site, outcome) == {"base_model": "SUCCESS", "fine_tune": "FAILURE"}
    assert isinstance(outcome.fault, CheckFailed)
    assert "complete" in outcome.fault.what
    check = dg.AssetCheckKey(dg.AssetKey("fine_tune"), "complete")
    with open_instance(site.settings) as instance:
        record = instance.event_log_storage.get_latest_asset_check_execution_by_key([check])[check]
    assert (record.partition, record.status.value) == (FINE_TUNE, "FAILED")


def test_padding_quantized_weights_is_refused_with_the_right_order(site: Site, tmp_path: Path) -> None:
    quantized = with_codes(tiny_qwen2(tmp_path / "quantized"))

    def build(partial: Path) -> Built:
        shutil.copytree(quantized, partial, dirs_exist_ok=True)
        return Built(contents=contents_of_directory(partial))

    slot = CheckpointStore(site.settings.store_root).slot(FINE_TUNE)
    derive(Derivation(stage="merged", inputs={}, spec={}, code_version="1"), slot, build)
    outcome = materialize(site.settings, FINE_TUNE, only=["padded_checkpoint"])
    assert isinstance(outcome.fault, QuantizedInputRefused)
    assert "merge, then pad, then quantize" in outcome.fault.what
    assert "Pad the merged" in outcome.fault.remedy
    assert not list(site.settings.store_root.glob("padded/*/*"))


def test_an_input_whose_blocking_check_failed_is_refused_in_another_run_too(site: Site) -> None:
    reports = dump_reports([merge.CHECKS[0].report(passed=False, detail="Two adapters collide.")])
    slot = CheckpointStore(site.settings.store_root).slot(FINE_TUNE)

    def build(partial: Path) -> Built:
        (partial / "config.json").write_text("{}")
        return Built(contents=contents_of_directory(partial), result={"checks": reports})

    derive(Derivation(stage="merged", inputs={}, spec={}, code_version="1"), slot, build)
    outcome = materialize(site.settings, FINE_TUNE, only=["padded_checkpoint"])
    assert isinstance(outcome.fault, CheckFailed)
    assert "Two adapters collide." in outcome.fault.what


@pytest.mark.parametrize("fault", [InputRefused("no", remedy="yes"), CheckFailed("bad", remedy="better")])
def test_a_permanent_fault_is_not_retried(fault: PipelineError) -> None:
    with pytest.raises(dg.Failure) as failure, StepRunner().run(dg.build_asset_context()):
        raise fault
    assert not failure.value.allow_retries
    assert failure.value.description == str(fault)
    assert failure.value.metadata["remedy"].value == fault.remedy


@pytest.mark.parametrize(("faults", "success"), [(1, True), (2, True), (3, False)])
def test_a_temporary_fault_is_retried_twice(faults: int, success: bool) -> None:
    attempts: list[int] = []

    @dg.asset
    def disk(context: dg.AssetExecutionContext) -> None:
        with StepRunner(retry_delays=(0, 0)).run(context):
            attempts.append(context.retry_number)
            if len(attempts) <= faults:
                raise EnvironmentFault("the disk is full", remedy="free space")

    assert dg.materialize([disk], raise_on_error=False).success == success
    assert attempts == list(range(min(faults, 2) + 1))


def test_without_stored_merged_weights_one_step_materializes_both_checkpoints(site: Site) -> None:
    site.drop()
    site.configure("\n[store]\nmerged = false\n")
    selection = ["base_model", "fine_tune", "merged_checkpoint", "padded_checkpoint"]
    outcome = materialize(site.settings, FINE_TUNE, only=selection)
    assert outcome.fault is None
    recipe, padded = outcome.artifacts
    assert recipe.manifest.recipe
    assert not list(recipe.path.glob("*.safetensors"))
    assert not recipe.reused
    assert not padded.reused
    assert padded.manifest.derivation.inputs == {"source": recipe.manifest.content_digest}


def test_towers_are_padded_and_nothing_is_stored_if_set_so(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.rmtree(site.root / "base")
    tiny_model("qwen3_vl", site.root / "base")
    site.drop()
    monkeypatch.setenv("QWEN_PIPELINE_PADDING__TENSOR_PARALLEL", "5")
    monkeypatch.setenv("QWEN_PIPELINE_PADDING__TOWERS", "true")
    site.configure("\n[store]\nmerged = false\npadded = false\n")
    selection = ["base_model", "fine_tune", "merged_checkpoint", "padded_checkpoint"]
    outcome = materialize(site.settings, FINE_TUNE, only=selection)
    assert outcome.fault is None
    _, padded = outcome.artifacts
    assert not list(padded.path.glob("*.safetensors"))
    assert [(size.field, size.padded) for size in load_plan(padded.manifest.result["padding"]).sizes] == [
        ("intermediate_size", 160),
        ("vision_config.intermediate_size", 100),
    ]
    states: list[str] = []
    for towers in ("true", "false"):
        monkeypatch.setenv("QWEN_PIPELINE_PADDING__TOWERS", towers)
        (found,) = fine_tune_statuses(site.settings)
        states.append(found.stages["padded"].state)
    assert states == ["done", "stale"]
