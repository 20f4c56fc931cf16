"""The asset ``inbox``: every upload that waits for a person, with the reason, and a check that there is none."""

# pyright: reportMissingTypeArgument=false, reportUnknownParameterType=false
# Dagster recognizes MaterializeResult in a signature only without its type argument.

from contextlib import suppress
from datetime import UTC, datetime
from typing import Any

import dagster as dg

from qwen_pipeline.checkpoint.store.canonical import canonical_sha256
from qwen_pipeline.defs.metadata import text_table
from qwen_pipeline.defs.resources import PipelineSettings, Steps, WorkspaceResource
from qwen_pipeline.errors import listed
from qwen_pipeline.intake.record import Intake, Judged, open_intake, quarantined_imports

INBOX_GROUP = "arrivals"
NOTHING_QUARANTINED = dg.AssetCheckSpec(
    "nothing_quarantined",
    asset="inbox",
    description="Every upload has been taken: each has a base and a recipe, and nothing in it is refused.",
)
_COLUMNS = {
    "fine_tune": "Its name; imports/NAME is a quantized checkpoint among the imports.",
    "state": "quarantined, or incomplete if the upload stopped before its end.",
    "reason": "Why it is not taken.",
    "remedy": "What to do. It is taken by itself once its files or the settings change.",
    "since": "When it was found.",
}


@dg.asset(group_name=INBOX_GROUP, kinds={"report"}, check_specs=[NOTHING_QUARANTINED])
def inbox(
    context: dg.AssetExecutionContext, workspace: WorkspaceResource, settings: PipelineSettings, steps: Steps
) -> dg.MaterializeResult:
    """The uploads that have arrived, and those among them that are quarantined, with the reason.

    The sensor `fine_tune_inbox` updates it. A quarantined upload has no partition and no run. It does not hold up
    others, and is judged again when its files or the settings change.
    """
    with steps.run(context), open_intake(settings.resolve(workspace)) as intake:
        arrivals = list(workspace.fine_tunes.arrivals())
        for arrival in arrivals:
            with suppress(OSError):  # it is being removed
                intake.judge(arrival)
        intake.keep([arrival.name for arrival in arrivals])
    return dg.MaterializeResult(
        data_version=dg.DataVersion(quarantine_digest(intake)),
        metadata=_metadata(intake),
        check_results=[dg.AssetCheckResult(check_name=NOTHING_QUARANTINED.name, **_finding(intake))],
    )


def quarantine_digest(intake: Intake) -> str:
    """Return a digest of the quarantined uploads and their reasons."""
    return "sha256:" + canonical_sha256(
        [[name, found.placement.reason] for name, found in _quarantined(intake).items()]
    )


def _quarantined(intake: Intake) -> dict[str, Judged]:
    """Return the quarantined uploads, and the imports among them as their sensor recorded them."""
    return intake.quarantined | quarantined_imports(intake.settings.workspace)


def inbox_events(intake: Intake) -> list[dg.AssetMaterialization | dg.AssetCheckEvaluation]:
    """Return the events with which a sensor updates the asset without a run."""
    key = dg.AssetKey("inbox")
    return [
        dg.AssetMaterialization(
            key, metadata=_metadata(intake), tags={"dagster/data_version": quarantine_digest(intake)}
        ),
        dg.AssetCheckEvaluation(asset_key=key, check_name=NOTHING_QUARANTINED.name, **_finding(intake)),
    ]


def _finding(intake: Intake) -> dict[str, Any]:
    reasons = [f"{name}: {found.placement.reason}" for name, found in _quarantined(intake).items()]
    placed = sum(found.placement.state == "placed" for found in intake.judged.values())
    return {
        "passed": not reasons,
        "severity": dg.AssetCheckSeverity.WARN,
        "description": listed(reasons) or f"All {placed} uploads are taken.",
        "metadata": {"quarantined": len(reasons)},
    }


def _metadata(intake: Intake) -> dict[str, Any]:
    rows = [
        {
            "fine_tune": name,
            "state": found.placement.state,
            "reason": found.placement.reason,
            "remedy": found.placement.remedy,
            "since": f"{datetime.fromtimestamp(found.since, UTC):%Y-%m-%d %H:%M} UTC",
        }
        for name, found in _quarantined(intake).items()
    ]
    return {
        "quarantine": text_table(rows, _COLUMNS),
        "quarantined": len(rows),
        "taken": sum(found.placement.state == "placed" for found in intake.judged.values()),
    }
