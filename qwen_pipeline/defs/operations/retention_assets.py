"""Retention: removal of outputs that no rule keeps, and its schedule."""

# pyright: reportMissingTypeArgument=false, reportUnknownParameterType=false
# Dagster recognizes MaterializeResult in a signature only without its type argument.

from collections.abc import Sequence
from typing import TYPE_CHECKING

import dagster as dg

from qwen_pipeline.defs.metadata import significant, text_table
from qwen_pipeline.defs.resources import PipelineSettings, Steps, WorkspaceResource
from qwen_pipeline.defs.runs import uses_of

if TYPE_CHECKING:
    from qwen_pipeline.retention.rules import Decision

RETENTION_GROUP = "retention"
_ROWS = 200
_COLUMNS = {
    "stage": "The stage that made it.",
    "fine_tune": "Its name.",
    "megabytes": "On the disk.",
    "rule": "The setting that decides.",
    "outcome": "dropped, or why it was kept.",
    "path": "Its directory.",
}


@dg.asset(group_name=RETENTION_GROUP, kinds={"report"})
def retention(
    context: dg.AssetExecutionContext, workspace: WorkspaceResource, settings: PipelineSettings, steps: Steps
) -> dg.MaterializeResult:
    """Remove the outputs that no rule of `[store.keep]` keeps, and what interrupted runs left behind.

    What a pointer leads to, an unfinished run uses, or nothing can make again stays. Manifests stay too: what was
    removed can be proven, and made again with the same digest.
    """
    from qwen_pipeline.retention.collect import collect

    with steps.run(context) as observe:
        found = collect(
            settings.resolve(workspace), uses=uses_of(context.instance, but=context.run.run_id), observe=observe
        )
    return dg.MaterializeResult(
        metadata={
            "outputs": _table([*found.dropped, *found.kept]),
            "dropped": len(found.dropped),
            "kept": len(found.kept),
            "abandoned": len(found.abandoned),
            "gigabytes": significant(found.nbytes / 1e9),
        }
    )


def _table(decisions: "Sequence[Decision]") -> dg.TableMetadataValue:
    records = [
        {
            "stage": each.stage,
            "fine_tune": each.fine_tune,
            "megabytes": f"{each.nbytes / 1e6:.1f}",
            "rule": each.rule,
            "outcome": each.kept or "dropped",
            "path": str(each.path),
        }
        for each in decisions[:_ROWS]
    ]
    return text_table(records, _COLUMNS)


collect_garbage = dg.define_asset_job(
    "collect_garbage",
    selection=dg.AssetSelection.groups(RETENTION_GROUP),
    description="Remove the outputs that no rule of [store.keep] keeps.",
)
weekly_retention = dg.ScheduleDefinition(
    name="weekly_retention",
    job=collect_garbage,
    cron_schedule="0 5 * * 0",
    default_status=dg.DefaultScheduleStatus.STOPPED,
    description="Removes outputs on Sundays by the rules of [store.keep]. Off until it is switched on.",
)
