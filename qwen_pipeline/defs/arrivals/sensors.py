"""The sensors of the two inboxes: one run for each product of a complete upload, and others if its content changes."""

import time
from dataclasses import dataclass, field

import dagster as dg

from qwen_pipeline.checkpoint.store.products import product
from qwen_pipeline.defs.arrivals.admission import Admission
from qwen_pipeline.defs.arrivals.cursor import Cursor, Upload, load_cursor
from qwen_pipeline.defs.arrivals.inbox_asset import inbox_events, quarantine_digest
from qwen_pipeline.defs.jobs import process_fine_tune, repair_imported
from qwen_pipeline.defs.operations.retention_assets import collect_garbage
from qwen_pipeline.defs.partitions import FINE_TUNES, IMPORTS, PARTITION_TAG
from qwen_pipeline.defs.resources import PipelineSettings, WorkspaceResource
from qwen_pipeline.errors import listed
from qwen_pipeline.intake.placement import Placement
from qwen_pipeline.intake.record import Intake, open_intake
from qwen_pipeline.models.inbox import Arrival, Inbox

ARRIVAL_TAG = "qwen_pipeline/arrival"
"""Tag of a run: ``<product>@<content digest>``. Runs started from the command line have it too."""
TICK_SECONDS = 20
"""Seconds after which a tick leaves the uploads that it has not judged yet to the next one; Dagster ends one at 60."""

_UNSUCCESSFUL = (dg.DagsterRunStatus.FAILURE, dg.DagsterRunStatus.CANCELED)
_QUEUED = [dg.DagsterRunStatus.QUEUED, dg.DagsterRunStatus.NOT_STARTED]
_LISTED = 12


@dg.sensor(
    jobs=[process_fine_tune, collect_garbage],
    minimum_interval_seconds=15,
    default_status=dg.DefaultSensorStatus.RUNNING,
    description="Processes each fine-tune in the inbox once its upload is complete, and again if its content changes."
    " What cannot be taken is quarantined: see the asset inbox.",
)
def fine_tune_inbox(
    context: dg.SensorEvaluationContext, workspace: WorkspaceResource, settings: PipelineSettings
) -> dg.SensorResult:
    with open_intake(settings.resolve(workspace)) as intake:
        tick = Tick(context, process_fine_tune.name, workspace.fine_tunes, FINE_TUNES, intake)
        tick.admission = admission = Admission(intake.settings, context.instance)
        cursor = tick.evaluate()
        tick.requests += admission.retention_requests()
        quarantine = quarantine_digest(intake)
        events = inbox_events(intake) if quarantine != tick.previous.quarantine else []
    return tick.result(cursor.replace(quarantine=quarantine), events)


@dg.sensor(
    job=repair_imported,
    minimum_interval_seconds=15,
    default_status=dg.DefaultSensorStatus.RUNNING,
    description="Repairs each imported checkpoint once its upload is complete, and again if its content changes."
    " What cannot be repaired is quarantined: see the asset inbox.",
)
def import_inbox(
    context: dg.SensorEvaluationContext, workspace: WorkspaceResource, settings: PipelineSettings
) -> dg.SensorResult:
    with open_intake(settings.resolve(workspace), of="imports") as intake:
        tick = Tick(context, repair_imported.name, workspace.quantized_imports, IMPORTS, intake)
        cursor = tick.evaluate()
    return tick.result(cursor, [])


@dataclass(slots=True)
class Tick:
    """One evaluation of a sensor: an upload that is complete, marked so or unchanged since the last one, is judged.

    Attributes:
        intake: Judges an upload.
        requests: The runs to request.
        waiting: A sentence for each upload that was not taken.
        admission: Decides which runs may start, and before which others; all may if there is none.
    """

    context: dg.SensorEvaluationContext
    job: str
    inbox: Inbox
    partitions: dg.DynamicPartitionsDefinition
    intake: Intake
    requests: list[dg.RunRequest] = field(default_factory=list[dg.RunRequest])
    waiting: list[str] = field(default_factory=list[str])
    previous: Cursor = field(init=False)
    is_mounted: bool = True
    admission: Admission | None = None

    def __post_init__(self) -> None:
        self.previous = load_cursor(self.context.cursor)

    def evaluate(self) -> Cursor:
        """Judge the uploads that changed, or whose judgement depends on other rules, and return the new cursor.

        An inbox that is missing, or empty on another file system than before, is not mounted: nothing is removed then.
        """
        device = self.inbox.root.stat().st_dev if self.inbox.root.is_dir() else None
        arrivals = list(self.inbox.arrivals())
        if device is None or (not arrivals and self.previous.device not in (None, device)):
            self.is_mounted = False
            if self.previous.device is not None:
                self._wait(f"{self.inbox.root} is not there, or its file system is not mounted.")
            return self.previous
        end = time.monotonic() + TICK_SECONDS
        uploads = {arrival.name: self._look(arrival, end) for arrival in arrivals}
        self.intake.keep(uploads)
        return self.previous.replace(device=device, uploads=uploads)

    def result(
        self, cursor: Cursor, events: list[dg.AssetMaterialization | dg.AssetCheckEvaluation]
    ) -> dg.SensorResult:
        """Return the runs, partitions and events of this tick. A fine-tune that was removed loses its partitions."""
        known = self.context.instance.get_dynamic_partitions(self.partitions.name or "")
        gone = [key for key in known if self.is_mounted and product(key).fine_tune not in cursor.uploads]
        _cancel_queued(self.context.instance, gone)
        changes = [
            *([self.partitions.build_delete_request(gone)] if gone else []),
            self.partitions.build_add_request([each.partition_key for each in self.requests if each.partition_key]),
        ]
        skipped = listed(self.waiting, limit=_LISTED) or f"Nothing new in {self.inbox.root}."
        return dg.SensorResult(
            run_requests=self.requests,
            dynamic_partitions_requests=changes,
            asset_events=events,
            skip_reason=None if self.requests else skipped,
            cursor=cursor.dump(),
        )

    def _look(self, arrival: Arrival, end: float) -> Upload:
        """Return the cursor's entry of an upload; request its runs if it is complete and was not taken yet."""
        name, before = f"{arrival.name[:100]!r}", self.previous.uploads.get(arrival.name)
        try:
            found = Upload(fingerprint=arrival.fingerprint)
            is_unchanged = before is not None and before.fingerprint == found.fingerprint
            if before and is_unchanged and before.taken == self.intake.rules:
                return before
            if not is_unchanged and not arrival.is_marked_complete:
                self._wait(f"{name}: the upload may still be changing; checking again at the next tick")
            elif time.monotonic() > end:
                self._wait(f"{name}: there are many uploads; it is judged at the next tick")
            else:
                placement = self.intake.judge(arrival).placement
                if placement.state != "placed":
                    self._wait(f"{name}: {placement.reason}")
                    return found
                if self._request(placement, arrival):
                    return found.replace(taken=self.intake.rules)
        except OSError:
            self._wait(f"{name}: the upload is still changing")
            return Upload(fingerprint="")
        return found

    def _request(self, placement: Placement, arrival: Arrival) -> bool:
        """Request the runs of an upload's products; return whether none of them has to wait."""
        refused: list[str] = []
        for key in placement.products:
            content = f"{key}@{arrival.identity}"
            if (run_key := _run_key(self.context.instance, content)) is None:
                continue
            if self.admission and (reason := self.admission.refuse(key)):
                refused.append(f"{key}: {reason}")
                continue
            tags = {ARRIVAL_TAG: content, **(self.admission.tags(key, placement.base) if self.admission else {})}
            self.requests.append(dg.RunRequest(job_name=self.job, partition_key=key, run_key=run_key, tags=tags))
        for reason in refused:
            self._wait(reason)
        return not refused

    def _wait(self, reason: str) -> None:
        self.waiting.append(reason)
        self.context.log.info(reason)


def _run_key(instance: dg.DagsterInstance, arrival: str) -> str | None:
    """Return the key of a run of this content, or None if it already has one that did not fail.

    Dagster starts no second run with the same key. Content that comes again after a run that failed gets a new key.
    """
    runs = instance.get_runs(filters=dg.RunsFilter(tags={ARRIVAL_TAG: arrival}))
    if any(run.status not in _UNSUCCESSFUL for run in runs):
        return None
    return f"{arrival}#{len(runs)}" if runs else arrival


def _cancel_queued(instance: dg.DagsterInstance, partitions: list[str]) -> None:
    """Cancel the runs of partitions that have not begun."""
    for key in partitions:
        for run in instance.get_runs(filters=dg.RunsFilter(tags={PARTITION_TAG: key}, statuses=_QUEUED)):
            instance.report_run_canceling(run, "Its fine-tune was removed from the inbox.")
            instance.report_run_canceled(run)
