"""The audit of all releases, and its schedule."""

# pyright: reportMissingTypeArgument=false, reportUnknownParameterType=false
# Dagster recognizes MaterializeResult in a signature only without its type argument.

import time
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

import dagster as dg

from qwen_pipeline.defs.metadata import significant, text_table
from qwen_pipeline.defs.resources import PipelineSettings, Steps, WorkspaceResource
from qwen_pipeline.errors import listed

if TYPE_CHECKING:
    from qwen_pipeline.audits import ReleaseAudit

AUDIT_GROUP = "audit"
SOUND = dg.AssetCheckSpec(
    "releases_are_sound",
    asset="lineage_audit",
    description="No release, and nothing behind it, contradicts its records or was recalled.",
)
_COLUMNS = {
    "fine_tune": "Its name.",
    "release": "First digits of its content digest.",
    "state": "verified, stale, orphaned, recalled or tampered.",
    "pointers": "Pointers that lead to it.",
    "signer": "First digits of the key that signed it.",
    "faults": "What contradicts its records.",
    "path": "Its directory.",
}


@dg.asset(group_name=AUDIT_GROUP, kinds={"report"}, check_specs=[SOUND])
def lineage_audit(
    context: dg.AssetExecutionContext, workspace: WorkspaceResource, settings: PipelineSettings, steps: Steps
) -> dg.MaterializeResult:
    """The state of every release: each byte behind it that is here is read and compared with its digest.

    The check fails if a file, a manifest or the store's log was changed, if this instance recorded something else, or
    if a release descends from something that was recalled. The numbers can be plotted over time.
    """
    from qwen_pipeline.audits import STATES, audit_releases
    from qwen_pipeline.checkpoint.store.log import head
    from qwen_pipeline.defs.operations.recorded_runs import LOG_DIGEST, LOG_LINES, recorded_findings

    store, started = workspace.store.root.resolve(), time.perf_counter()
    with steps.run(context) as observe:
        found = audit_releases(
            settings.resolve(workspace),
            witness=lambda audit: recorded_findings(audit, store, context.instance),
            observe=observe,
        )
    counts = Counter(release.state for release in found)
    wrong = [release for release in found if release.state in ("tampered", "recalled")]
    detail = listed([f"{release.fine_tune} {release.path.name}: {release.faults[0]}" for release in wrong])
    lines, digest = head(store)
    return dg.MaterializeResult(
        metadata={
            "releases": _table(found),
            "count": len(found),
            **{state: counts[state] for state in STATES},
            "signed": sum(release.signer is not None for release in found),
            "in_production": sum(any(name.endswith("/production") for name in each.pointers) for each in found),
            "faults": sum(len(release.faults) for release in found),
            "gigabytes": significant(sum(release.nbytes for release in found) / 1e9),
            "seconds": significant(time.perf_counter() - started),
            "store": str(store),
            LOG_LINES: lines,
            LOG_DIGEST: digest,
        },
        check_results=[
            dg.AssetCheckResult(
                check_name=SOUND.name, passed=not wrong, description=detail or f"{len(found)} releases are sound."
            )
        ],
    )


def _table(found: "Sequence[ReleaseAudit]") -> dg.TableMetadataValue:
    records = [
        {
            "fine_tune": release.fine_tune,
            "release": release.digest.removeprefix("sha256:")[:12],
            "state": release.state,
            "pointers": ", ".join(release.pointers),
            "signer": (release.signer or "")[:16],
            "faults": listed(release.faults, limit=2),
            "path": str(release.path),
        }
        for release in found
    ]
    return text_table(records, _COLUMNS)


audit_lineage = dg.define_asset_job(
    "audit_lineage",
    selection=dg.AssetSelection.groups(AUDIT_GROUP),
    description="Read every byte behind every release, and compare it with its digest.",
)
weekly_audit = dg.ScheduleDefinition(
    name="weekly_audit",
    job=audit_lineage,
    cron_schedule="0 4 * * 0",
    default_status=dg.DefaultScheduleStatus.RUNNING,
    description="Audits every release on Sundays. It reads the whole store once for each release.",
)
