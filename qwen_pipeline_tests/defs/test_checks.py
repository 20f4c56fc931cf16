"""Asset checks of a real instance: status, reason, and what stops a run."""

from collections.abc import Sequence

import dagster as dg
import pytest

from qwen_pipeline.defs.checks import asset_check_result, asset_check_specs
from qwen_pipeline.defs.partitions import FINE_TUNES
from qwen_pipeline.reports import CheckReport, CheckSpec

BLOCKING = CheckSpec(name="serves", description="The engine answers as expected.")
WARNING = CheckSpec(name="not_worse", description="The model is no worse than the previous release.", blocking=False)
KEY = dg.AssetKey("checked")


def run(reports: Sequence[CheckReport]) -> tuple[dict[str, dg.AssetCheckEvaluation], list[str]]:
    """Materialize an asset with these reports and one downstream; return the stored evaluations and finished steps."""

    @dg.asset(name="checked", partitions_def=FINE_TUNES, check_specs=asset_check_specs("checked", [BLOCKING, WARNING]))
    def checked(context: dg.AssetExecutionContext) -> dg.MaterializeResult:  # pyright: ignore[reportMissingTypeArgument, reportUnknownParameterType]
        return dg.MaterializeResult(check_results=[asset_check_result(r, context.partition_key) for r in reports])

    @dg.asset(deps=[checked], partitions_def=FINE_TUNES)
    def downstream() -> None: ...

    with dg.DagsterInstance.ephemeral() as instance:
        instance.add_dynamic_partitions(FINE_TUNES.name or "", ["poet"])
        result = dg.materialize([checked, downstream], partition_key="poet", instance=instance, raise_on_error=False)
        keys = [dg.AssetCheckKey(KEY, spec.name) for spec in (BLOCKING, WARNING)]
        records = instance.event_log_storage.get_latest_asset_check_execution_by_key(keys)
    evaluations = {str(key.name): record.evaluation for key, record in records.items() if record.evaluation}
    return evaluations, [str(event.step_key) for event in result.get_step_success_events()]


def test_a_skipped_check_is_a_warning_with_its_reason_and_blocks_nothing() -> None:
    reason = "No serving engine is configured."
    evaluations, finished = run([BLOCKING.skipped(reason), WARNING.skipped("There is no previous release.")])
    assert finished == ["checked", "downstream"]
    skipped = evaluations["serves"]
    assert skipped.blocking
    assert not skipped.passed
    assert skipped.severity is dg.AssetCheckSeverity.WARN
    assert skipped.description == f"Skipped: {reason}"
    assert [evaluation.metadata["outcome"].value for evaluation in evaluations.values()] == ["skipped", "skipped"]


@pytest.mark.parametrize(
    ("failed", "finished"), [(BLOCKING, []), (WARNING, ["checked", "downstream"])], ids=["blocking", "warning"]
)
def test_only_a_failed_blocking_check_stops_the_run(failed: CheckSpec, finished: list[str]) -> None:
    reports = [
        spec.report(passed=spec is not failed, detail="0.123456 nats", measured=0.123456, limit=1 / 3)
        for spec in (BLOCKING, WARNING)
    ]
    evaluations, succeeded = run(reports)
    assert succeeded == finished
    assert {name: evaluation.passed for name, evaluation in evaluations.items()} == {
        spec.name: spec is not failed for spec in (BLOCKING, WARNING)
    }
    metadata = {key: value.value for key, value in evaluations[failed.name].metadata.items()}
    outcome = "failed" if failed.blocking else "warning"
    assert metadata == {"outcome": outcome, "measured": 0.1235, "limit": 0.3333, "partition": "poet"}
