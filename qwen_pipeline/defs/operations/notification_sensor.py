"""The sensor that notifies people of failed runs, quarantined uploads, warnings, releases, the log and a full disk."""

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import dagster as dg

from qwen_pipeline.config.notify import Notify
from qwen_pipeline.defs.resources import PipelineSettings, WorkspaceResource
from qwen_pipeline.errors import listed
from qwen_pipeline.intake.placement import Placement
from qwen_pipeline.intake.record import load_quarantine
from qwen_pipeline.notifications import Notification, send
from qwen_pipeline.releases.announcements import announce

_ENDINGS: Mapping[str, Any] = {
    "failed": dg.DagsterEventType.RUN_FAILURE,
    "canceled": dg.DagsterEventType.RUN_CANCELED,
    "succeeded": dg.DagsterEventType.RUN_SUCCESS,
}
_BATCH, _LISTED = 50, 6
_RELEASE = "published_checkpoint"


def notification_sensor(notify: Notify) -> dg.SensorDefinition:
    """Return the sensor for a section of the settings.

    The cursor moves past an event only after its message was accepted: while an address cannot be reached, ticks fail
    with the reason, and the next one sends again. What happened before the first tick is not sent.
    """

    @dg.sensor(
        name="notifications",
        minimum_interval_seconds=30,
        default_status=dg.DefaultSensorStatus.RUNNING,
        description="Notifies people of failed runs, quarantined uploads, warnings, releases, promotions, approvals,"
        " recalls and a disk that is nearly full (`[notify]`).",
    )
    def notifications(
        context: dg.SensorEvaluationContext, workspace: WorkspaceResource, settings: PipelineSettings
    ) -> dg.SkipReason:
        instance = context.instance
        state: dict[str, Any] = json.loads(context.cursor) if context.cursor else _latest(instance)
        sent: list[str] = []

        def deliver(notification: Notification) -> None:
            if notification.event in notify.events:
                send(notification, notify)
                sent.append(notification.title)

        try:
            for ending, record in _ended(instance, state):
                for notification in _of_run(instance, ending, record, notify):
                    deliver(notification)
                state[ending] = record.storage_id
            quarantine = {name: found.placement for name, found in load_quarantine(Path(workspace.root)).items()}
            known = state.setdefault("quarantined", sorted(quarantine))
            if new := {name: placement for name, placement in quarantine.items() if name not in known}:
                deliver(_quarantined(new, notify))
            state["quarantined"] = sorted(quarantine)
            free = _free_bytes(workspace)
            is_low = free is not None and free < notify.min_free_gb * 1e9
            if is_low and not state["disk_low"]:
                deliver(_disk_low(workspace, free or 0, notify))
            state["disk_low"] = is_low
            sent += announce(settings.resolve(workspace), notify)
        finally:
            context.update_cursor(json.dumps(state, sort_keys=True))
        return dg.SkipReason(f"Sent: {'; '.join(sent)}" if sent else "Nothing new.")

    return notifications


def _latest(instance: dg.DagsterInstance) -> dict[str, Any]:
    """Return the state that skips everything that has happened already."""
    state: dict[str, Any] = {"disk_low": False}
    for ending, kind in _ENDINGS.items():
        records = instance.fetch_run_status_changes(kind, limit=1).records
        state[ending] = records[0].storage_id if records else 0
    return state


def _ended(instance: dg.DagsterInstance, state: Mapping[str, Any]) -> Iterator[tuple[str, dg.EventLogRecord]]:
    """Yield the runs that ended since the last tick, with their ending, oldest first."""
    found: list[tuple[str, dg.EventLogRecord]] = []
    for ending, kind in _ENDINGS.items():
        since = dg.RunStatusChangeRecordsFilter(kind, after_storage_id=state[ending])
        records = instance.fetch_run_status_changes(since, limit=_BATCH, ascending=True).records
        found += [(ending, record) for record in records]
    yield from sorted(found, key=lambda each: each[1].storage_id)


def _of_run(
    instance: dg.DagsterInstance, ending: str, record: dg.EventLogRecord, notify: Notify
) -> Iterator[Notification]:
    run = instance.get_run_by_id(record.run_id)
    if run is None:  # deleted meanwhile
        return
    subject = f"{run.tags.get('dagster/partition') or run.job_name}"
    link = f"{notify.ui.rstrip('/')}/runs/{run.run_id}"
    if ending == "canceled":
        yield Notification(event="failed", title=f"{subject}: the run was cancelled", body=link)
        return
    checks = _checks(instance, run.run_id)
    if ending == "failed":
        reasons = [*_failures(instance, run.run_id), *(text for text, blocks in checks if blocks)]
        body = "\n\n".join([*(reasons or [record.event_log_entry.user_message]), link])
        yield Notification(event="failed", title=f"{subject}: the run failed", body=body)
        return
    if release := _release(instance, run.run_id):
        yield Notification(event="released", title=f"{subject}: released", body=f"{release}\n\n{link}")
    if warnings := [text for text, _ in checks]:
        title = f"{subject}: {len(warnings)} checks warned" if len(warnings) > 1 else f"{subject}: a check warned"
        yield Notification(event="warned", title=title, body="\n\n".join([*warnings, link]))


def _failures(instance: dg.DagsterInstance, run_id: str) -> Iterator[str]:
    """Yield the step and the reason of each failure of a step that is not merely a consequence of another one."""
    for entry in instance.all_logs(run_id, of_type=dg.DagsterEventType.STEP_FAILURE):
        event = entry.get_dagster_event()
        failure = event.step_failure_data
        if failure.user_failure_data:
            yield f"{event.step_key}: {failure.user_failure_data.description}"
        elif failure.error and "AssetCheckFailed" not in (failure.error.cls_name or ""):
            yield f"{event.step_key}: {(failure.error.cause or failure.error).message.strip()}"


def _checks(instance: dg.DagsterInstance, run_id: str) -> list[tuple[str, bool]]:
    """Return the checks of a run that ran and did not pass, and whether each blocks."""
    found: list[tuple[str, bool]] = []
    for entry in instance.all_logs(run_id, of_type=dg.DagsterEventType.ASSET_CHECK_EVALUATION):
        check = entry.get_dagster_event().asset_check_evaluation_data
        outcome = check.metadata.get("outcome")
        if not check.passed and not (outcome and outcome.value == "skipped"):
            name = f"{check.asset_key.to_user_string()} {check.check_name}"
            found.append((f"{name}: {check.description}", check.severity is dg.AssetCheckSeverity.ERROR))
    return found


def _release(instance: dg.DagsterInstance, run_id: str) -> str | None:
    """Return path and digest of the release that a run made; None if it made none, or found it made before."""
    for entry in instance.all_logs(run_id, of_type=dg.DagsterEventType.ASSET_MATERIALIZATION):
        made = entry.get_dagster_event().step_materialization_data.materialization
        if made.asset_key == dg.AssetKey(_RELEASE) and not made.metadata["reused"].value:
            return f"{made.metadata['path'].value}\n{made.metadata['content_digest'].value}"
    return None


def _quarantined(placements: Mapping[str, Placement], notify: Notify) -> Notification:
    names = listed(list(placements))
    texts = [f"{name}: {placement.reason}\n{placement.remedy}" for name, placement in placements.items()]
    link = f"{notify.ui.rstrip('/')}/assets/inbox"
    return Notification(event="quarantined", title=f"{names}: not taken", body="\n\n".join([*texts[:_LISTED], link]))


def _free_bytes(workspace: WorkspaceResource) -> int | None:
    root = workspace.store.root
    existing = next((each for each in (root, *root.parents) if each.exists()), None)
    return shutil.disk_usage(existing).free if existing else None


def _disk_low(workspace: WorkspaceResource, free: int, notify: Notify) -> Notification:
    return Notification(
        event="disk_low",
        title=f"The disk of {workspace.store.root} has {free / 1e9:.1f} GB left",
        body=f"That is less than notify.min_free_gb = {notify.min_free_gb:g}. A run that needs more will stop, and "
        "continue where it stopped once there is space.",
    )
