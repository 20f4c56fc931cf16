"""Where each fine-tune and import stands: what the store holds, whether it still follows from its inputs, the verdicts.

This reads manifests and validation reports only. It is what ``qwen-pipeline status`` shows and what the nightly
schedule decides by.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from qwen_pipeline.checkpoint.store.destinations import Artifact, CheckpointStore
from qwen_pipeline.config import Settings
from qwen_pipeline.errors import CheckpointRefused, InputRefused
from qwen_pipeline.evaluation.regression import compare, load_verdict
from qwen_pipeline.evaluation.report.load import load_validation
from qwen_pipeline.models.inbox import Arrival, Inbox
from qwen_pipeline.models.open import fine_tune_digest
from qwen_pipeline.reports import CheckReport, load_reports
from qwen_pipeline.stages import calibrate, merge, pad, publish, quantize, repair, validate
from qwen_pipeline.text.records import PARQUET
from qwen_pipeline.text.sources import open_text

State = Literal["missing", "damaged", "stale", "failed", "done"]


@dataclass(frozen=True, slots=True, kw_only=True)
class StageStatus:
    """One stage of one fine-tune.

    Attributes:
        state: ``stale``: made from other inputs than there are now, or by another code version. ``failed``: up to
            date, and a blocking check says that it is not good enough.
        artifact: What the store holds, if anything.
    """

    state: State
    artifact: Artifact | None = None

    @property
    def reports(self) -> list[CheckReport]:
        return load_reports(self.artifact.manifest.result) if self.artifact else []


@dataclass(frozen=True, slots=True, kw_only=True)
class FineTuneStatus:
    """Every stage of one fine-tune or import, in order. ``remark`` says what is odd about its upload, if anything."""

    name: str
    stages: Mapping[str, StageStatus]
    remark: str = ""

    @property
    def needs_work(self) -> bool:
        """Whether running the pipeline may change something: a verdict that stands is not asked for again."""
        state = next((stands.state for stands in self.stages.values() if stands.state != "done"), "done")
        return state in ("missing", "stale") and not self.remark


_MAKERS: Mapping[ModuleType, Mapping[str, str]] = {
    merge: {},
    pad: {"source": merge.STAGE},
    calibrate: {"source": pad.STAGE},
    quantize: {"source": pad.STAGE, "calibration": calibrate.STAGE},
    validate: {"reference": merge.STAGE, "candidate": quantize.STAGE},
    publish: {"quantized": quantize.STAGE, "validated": validate.STAGE},
}
"""Every stage in order, and the stages that make its inputs: role in the derivation -> stage."""

STAGES = tuple(str(stage.STAGE) for stage in _MAKERS)


def fine_tune_statuses(settings: Settings) -> list[FineTuneStatus]:
    """Return the standing of each fine-tune that is in the inbox or in the store, by name."""
    arrivals = {arrival.name: arrival for arrival in Inbox(settings.inbox).arrivals()}
    kept = {path.name for stage in STAGES for path in (settings.store_root / stage).glob("*")}
    return [status_of(settings, name, arrivals.get(name)) for name in sorted(arrivals.keys() | kept)]


def status_of(settings: Settings, name: str, arrival: Arrival | None) -> FineTuneStatus:
    """Compare what the store holds of a fine-tune with its upload and the settings as they are now.

    Without a usable upload, what was made of an earlier one still stands.
    """
    arrived, remark = _look_at(arrival)
    inputs = {"fine_tune": arrived} if arrived else {}
    specs, texts = _specs(settings, name), {calibrate.STAGE: _calibration_text(settings)}
    current: dict[str, str] = {}
    stages: dict[str, StageStatus] = {}
    for stage, makers in _MAKERS.items():
        inputs = {role: current.get(maker) for role, maker in makers.items()} or inputs
        inputs |= texts.get(stage.STAGE, {})
        stages[stage.STAGE] = stands = _stage_status(settings, name, stage, inputs, specs.get(stage.STAGE, {}))
        if stands.artifact and stands.state in ("done", "failed"):
            current[stage.STAGE] = stands.artifact.manifest.content_digest
    return FineTuneStatus(name=name, stages=stages, remark=remark)


def import_statuses(settings: Settings) -> list[FineTuneStatus]:
    """Return the standing of each quantized checkpoint that is among the imports or in the store, by name.

    One that was never read, or changed since, is ``stale`` if it was repaired before: nothing is read to find out.
    """
    arrivals = {arrival.name: arrival for arrival in Inbox(settings.imports).arrivals()}
    kept = {path.name for path in (settings.store_root / repair.STAGE).glob("*")}
    found: list[FineTuneStatus] = []
    for name in sorted(arrivals.keys() | kept):
        digest, remark = _look_at_import(arrivals.get(name))
        inputs = {} if name not in arrivals else {"source": digest}
        spec = {"tensor_parallel": settings.padding_spec.ranks}
        stages = {repair.STAGE: _stage_status(settings, name, repair, inputs, spec)}
        found.append(FineTuneStatus(name=name, stages=stages, remark=remark))
    return found


def _look_at_import(arrival: Arrival | None) -> tuple[str | None, str]:
    """Return the digest of an import, if it is remembered, and what is odd about it."""
    if arrival is None:
        return None, "no longer among the imports"
    if obstacle := arrival.obstacle():
        return None, obstacle
    try:
        return repair.remembered_quantized_digest(arrival.path), ""
    except InputRefused as refusal:
        return None, refusal.what


def _look_at(arrival: Arrival | None) -> tuple[str | None, str]:
    """Return the digest of an upload that can be merged, or None and why there is none."""
    if arrival is None:
        return None, "no longer in the inbox"
    if obstacle := arrival.obstacle():
        return None, obstacle
    try:
        return fine_tune_digest(arrival.path), ""
    except InputRefused as refusal:
        return None, refusal.what


def _specs(settings: Settings, name: str) -> dict[str, Mapping[str, Any]]:
    """The part of each stage's spec that the settings decide for a fine-tune."""
    quantization = settings.quantization
    return {
        pad.STAGE: settings.padding_spec.to_json() | {"towers": settings.padding.towers},
        calibrate.STAGE: {
            **asdict(quantization.calibration),
            "all_experts": quantization.all_experts,
            "min_expert_tokens": settings.calibration.min_expert_tokens,
        },
        quantize.STAGE: quantization.to_json(),
        validate.STAGE: {"limits": asdict(settings.validation.limits_of(name))},
    }


def _calibration_text(settings: Settings) -> dict[str, str]:
    """The digest of the text as it is now, where it is a file that is read as it is."""
    source = settings.calibration.source
    if source is None or not (file := Path(source)).is_file() or file.suffix == PARQUET:
        return {}
    return {"text": open_text(file).digest()}


_UNSAID: Mapping[str, Any] = {"towers": False}
"""What a spec means where it says nothing: a request that was not made is no part of it."""


def _stage_status(
    settings: Settings, name: str, stage: ModuleType, inputs: Mapping[str, str | None], spec: Mapping[str, Any]
) -> StageStatus:
    try:
        artifact = CheckpointStore(settings.store_root).latest(stage.STAGE, name)
        if artifact is None:
            return StageStatus(state="missing")
        made, reports = artifact.manifest.derivation, load_reports(artifact.manifest.result)
        if made.code_version != stage.CODE_VERSION:
            return StageStatus(state="stale", artifact=artifact)
        if stage is validate:
            reports = load_validation(artifact.path, artifact.manifest).checks
    except CheckpointRefused:
        return StageStatus(state="damaged")
    if not (inputs.items() <= made.inputs.items() and spec.items() <= {**_UNSAID, **made.spec}.items()):
        return StageStatus(state="stale", artifact=artifact)
    return StageStatus(state="failed" if any(report.blocks for report in reports) else "done", artifact=artifact)


def against_last_release(store: CheckpointStore, fine_tune: str, validated: Artifact) -> CheckReport:
    """Hold a validation against that of the last release of other bytes, which is what is served until now."""
    candidate = validated.manifest.derivation.inputs["candidate"]
    released = [
        release
        for release in store.finished(publish.STAGE, fine_tune)
        if release.manifest.derivation.inputs["quantized"] != candidate
    ]
    return compare(load_verdict(released[-1].path) if released else None, load_verdict(validated.path))


def calibration_of(store: CheckpointStore, fine_tune: str, quantized: Artifact) -> Path | None:
    """Return the tokens that a quantized checkpoint was made with, if they are still there."""
    digest = quantized.manifest.derivation.inputs["calibration"]
    made = store.finished(calibrate.STAGE, fine_tune)
    return next((each.path for each in made if each.manifest.content_digest == digest), None)


def version_before(store: CheckpointStore, fine_tune: str, quantized: Artifact) -> Artifact | None:
    """Return the quantized checkpoint of other bytes that was made last before this one, if it is still there."""
    made = [
        each
        for each in store.finished(quantize.STAGE, fine_tune)
        if each.manifest.run.started < quantized.manifest.run.started
        and each.manifest.content_digest != quantized.manifest.content_digest
        and "evidence" in each.manifest.result
    ]
    return made[-1] if made else None
