"""The state of every stage of each fine-tune and import: what the store holds, and whether it is up to date and good.

Only manifests and validation reports are read. ``qwen-pipeline status`` shows the states, and the nightly schedule
decides by them.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal

from qwen_pipeline.checkpoint.store.destinations import Artifact, CheckpointStore
from qwen_pipeline.config import Settings
from qwen_pipeline.errors import CheckpointRefused, InputRefused
from qwen_pipeline.evaluation.regression import compare, load_verdict
from qwen_pipeline.evaluation.report.load import load_validation
from qwen_pipeline.models.inbox import Arrival, Inbox
from qwen_pipeline.models.open import fine_tune_digest
from qwen_pipeline.reports import CheckReport, load_reports
from qwen_pipeline.stages import calibrate, merge, pad, publish, quantize, repair, validate
from qwen_pipeline.text.record_files import PARQUET
from qwen_pipeline.text.sources import open_text

if TYPE_CHECKING:  # pandas takes long to import, and only status_frame needs it
    import pandas as pd

State = Literal["missing", "damaged", "stale", "failed", "done"]


@dataclass(frozen=True, slots=True, kw_only=True)
class StageStatus:
    """One stage of one fine-tune.

    Attributes:
        state: ``missing``: the store has no output. ``damaged``: its manifest or report cannot be trusted; the
            directory has to be deleted. ``stale``: made from other inputs or settings than the present ones, or by
            another code version. ``failed``: up to date, but a blocking check failed or a required one was
            skipped. ``done``: up to date and good.
        artifact: The output in the store, unless it is missing or damaged.
        failed_checks: Names of the blocking checks that failed and of the required ones that were skipped.
        fault: Why it is damaged.
    """

    state: State
    artifact: Artifact | None = None
    failed_checks: tuple[str, ...] = ()
    fault: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class FineTuneStatus:
    """Every stage of one fine-tune or import, in order.

    Attributes:
        remark: Why its upload cannot be used; empty if it can.
    """

    name: str
    stages: Mapping[str, StageStatus]
    remark: str = ""

    @property
    def needs_work(self) -> bool:
        """True if a run would make progress: the first stage that is not done is missing or stale.

        A stage that failed or is damaged would end the same way again.
        """
        state = next((status.state for status in self.stages.values() if status.state != "done"), "done")
        return state in ("missing", "stale") and not self.remark


_MAKERS: Mapping[ModuleType, Mapping[str, str]] = {
    merge: {},
    pad: {"source": merge.STAGE},
    calibrate: {"source": pad.STAGE},
    quantize: {"source": pad.STAGE, "calibration": calibrate.STAGE},
    validate: {"reference": merge.STAGE, "candidate": quantize.STAGE},
    publish: {"quantized": quantize.STAGE, "validated": validate.STAGE},
}
"""Stage, in order -> the stages that make its inputs, by their role in the derivation."""

STAGES = tuple(str(stage.STAGE) for stage in _MAKERS)
FRAME_COLUMNS = ("name", "stage", "state", "digest", "path", "failed_checks", "remark")


def fine_tune_statuses(settings: Settings) -> list[FineTuneStatus]:
    """Return the status of each fine-tune in the inbox or in the store, sorted by name."""
    arrivals = {arrival.name: arrival for arrival in Inbox(settings.inbox).arrivals()}
    kept = {path.name for stage in STAGES for path in (settings.store_root / stage).glob("*")}
    return [status_of(settings, name, arrivals.get(name)) for name in sorted(arrivals.keys() | kept)]


def status_of(settings: Settings, name: str, arrival: Arrival | None) -> FineTuneStatus:
    """Compare the outputs of a fine-tune in the store with its upload and the current settings.

    Without a usable upload, the outputs of an earlier one are not stale.
    """
    digest, remark = _upload_digest(arrival)
    inputs = {"fine_tune": digest} if digest else {}
    specs, texts = _specs(settings, name), {calibrate.STAGE: _calibration_text(settings)}
    current: dict[str, str] = {}
    stages: dict[str, StageStatus] = {}
    for stage, makers in _MAKERS.items():
        inputs = {role: current.get(maker) for role, maker in makers.items()} or inputs
        inputs |= texts.get(stage.STAGE, {})
        stages[stage.STAGE] = status = _stage_status(settings, name, stage, inputs, specs.get(stage.STAGE, {}))
        if status.artifact and status.state in ("done", "failed"):
            current[stage.STAGE] = status.artifact.manifest.content_digest
    return FineTuneStatus(name=name, stages=stages, remark=remark)


def import_statuses(settings: Settings) -> list[FineTuneStatus]:
    """Return the status of each quantized checkpoint among the imports or in the store, sorted by name.

    No weights are read: a repaired one is ``stale`` if the digest of the import is not cached, or the import changed.
    """
    arrivals = {arrival.name: arrival for arrival in Inbox(settings.imports).arrivals()}
    kept = {path.name for path in (settings.store_root / repair.STAGE).glob("*")}
    found: list[FineTuneStatus] = []
    for name in sorted(arrivals.keys() | kept):
        digest, remark = _import_digest(arrivals.get(name))
        inputs = {} if name not in arrivals else {"source": digest}
        spec = {"tensor_parallel": settings.padding_spec.ranks}
        stages = {repair.STAGE: _stage_status(settings, name, repair, inputs, spec)}
        found.append(FineTuneStatus(name=name, stages=stages, remark=remark))
    return found


def status_frame(settings: Settings) -> "pd.DataFrame":
    """Return the status of every fine-tune and import as a table, one row for each stage.

    The columns are ``name``, ``stage``, ``state``, ``digest`` and ``path`` of the output (empty cells without one),
    ``failed_checks`` (names of the checks that failed, or were required and skipped, separated by commas) and
    ``remark`` (what is wrong with the output, or with the upload).
    """
    import pandas as pd

    rows = [
        {
            "name": found.name,
            "stage": stage,
            "state": status.state,
            "digest": status.artifact.manifest.content_digest if status.artifact else None,
            "path": str(status.artifact.path) if status.artifact else None,
            "failed_checks": ", ".join(status.failed_checks),
            "remark": status.fault or found.remark,
        }
        for found in [*fine_tune_statuses(settings), *import_statuses(settings)]
        for stage, status in found.stages.items()
    ]
    return pd.DataFrame(rows, columns=list(FRAME_COLUMNS))


def _import_digest(arrival: Arrival | None) -> tuple[str | None, str]:
    """Return the cached digest of an import, if there is one, and why the import cannot be used."""
    if arrival is None:
        return None, "no longer among the imports"
    if obstacle := arrival.obstacle():
        return None, obstacle
    try:
        return repair.remembered_quantized_digest(arrival.path), ""
    except InputRefused as refusal:
        return None, refusal.what


def _upload_digest(arrival: Arrival | None) -> tuple[str | None, str]:
    """Return the digest of an upload that can be merged, or None and why it cannot."""
    if arrival is None:
        return None, "no longer in the inbox"
    if obstacle := arrival.obstacle():
        return None, obstacle
    try:
        return fine_tune_digest(arrival.path), ""
    except InputRefused as refusal:
        return None, refusal.what


def _specs(settings: Settings, name: str) -> dict[str, Mapping[str, Any]]:
    """Return the part of each stage's spec that the settings decide for a fine-tune."""
    quantization = settings.quantization
    return {
        pad.STAGE: settings.padding_spec.to_json() | {"towers": settings.padding.towers},
        calibrate.STAGE: {
            **asdict(quantization.calibration),
            "all_experts": quantization.all_experts,
            "min_expert_tokens": settings.calibration.min_expert_tokens,
            **asdict(settings.calibration.text_spec),
        },
        quantize.STAGE: quantization.to_json() | {"recipe": quantization.recipe},
        validate.STAGE: {"limits": asdict(settings.validation.limits_of(name))},
    }


def _calibration_text(settings: Settings) -> dict[str, str]:
    """Return the current digest of the calibration text, if it is a file and not Parquet or a data set."""
    source = settings.calibration.source
    if source is None or not (file := Path(source)).is_file() or file.suffix == PARQUET:
        return {}
    return {"text": open_text(file).digest()}


_SPEC_DEFAULTS: Mapping[str, Any] = {"towers": False, "recipe": "gptq"}
"""Values of fields that a spec leaves out, so that its derivation key stays that of versions without them."""


def _stage_status(
    settings: Settings, name: str, stage: ModuleType, inputs: Mapping[str, str | None], spec: Mapping[str, Any]
) -> StageStatus:
    try:
        artifact = CheckpointStore(settings.store_root).latest(stage.STAGE, name)
        if artifact is None:
            return StageStatus(state="missing")
        made = artifact.manifest.derivation
        failed = [report for report in load_reports(artifact.manifest.result) if report.blocks]
        outdated = made.code_version != stage.CODE_VERSION
        if stage is validate and not outdated:
            failed = load_validation(artifact.path, artifact.manifest).blocking
    except CheckpointRefused as refusal:
        return StageStatus(state="damaged", fault=refusal.what)
    current = inputs.items() <= made.inputs.items() and spec.items() <= {**_SPEC_DEFAULTS, **made.spec}.items()
    state: State = "stale" if outdated or not current else "failed" if failed else "done"
    return StageStatus(state=state, artifact=artifact, failed_checks=tuple(report.name for report in failed))


def against_last_release(store: CheckpointStore, fine_tune: str, validated: Artifact) -> CheckReport:
    """Compare a validation with that of the last release of different weights, the one that is being served."""
    candidate = validated.manifest.derivation.inputs["candidate"]
    released = [
        release
        for release in store.finished(publish.STAGE, fine_tune)
        if release.manifest.derivation.inputs.get("quantized") != candidate
    ]
    return compare(load_verdict(released[-1].path) if released else None, load_verdict(validated.path))


def calibration_of(store: CheckpointStore, fine_tune: str, quantized: Artifact) -> Path | None:
    """Return the directory of the calibration tokens of a quantized checkpoint, if the store still has it."""
    digest = quantized.manifest.derivation.inputs["calibration"]
    made = store.finished(calibrate.STAGE, fine_tune)
    return next((each.path for each in made if each.manifest.content_digest == digest), None)


def version_before(store: CheckpointStore, fine_tune: str, quantized: Artifact) -> Artifact | None:
    """Return the last quantized checkpoint of different weights made before this one, if the store still has it."""
    made = [
        each
        for each in store.finished(quantize.STAGE, fine_tune)
        if each.manifest.run.started < quantized.manifest.run.started
        and each.manifest.content_digest != quantized.manifest.content_digest
        and "evidence" in each.manifest.result
    ]
    return made[-1] if made else None
