"""The state of every stage of each fine-tune and import: what the store holds, and whether it is up to date and good.

Only manifests and validation reports are read. ``qwen-pipeline status`` shows the states, and the nightly schedule
decides by them.
"""

import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal

from qwen_pipeline.checkpoint.manifest import Manifest, find_manifest
from qwen_pipeline.checkpoint.store.destinations import Artifact, CheckpointStore
from qwen_pipeline.checkpoint.store.products import product
from qwen_pipeline.config import Settings, settings_of
from qwen_pipeline.errors import CheckpointRefused, InputRefused
from qwen_pipeline.evaluation.regression import compare, load_verdict
from qwen_pipeline.evaluation.report.load import load_validation
from qwen_pipeline.intake.placement import Placement
from qwen_pipeline.intake.record import Intake, Judged, open_intake
from qwen_pipeline.lineage.pointers import history
from qwen_pipeline.models.inbox import Arrival, Inbox
from qwen_pipeline.models.open import fine_tune_digest
from qwen_pipeline.quantization.spec import LEFT_OUT
from qwen_pipeline.reports import CheckReport, load_reports
from qwen_pipeline.stages import calibrate, merge, pad, publish, quantize, repair, validate
from qwen_pipeline.text.record_files import PARQUET
from qwen_pipeline.text.sources import open_text
from qwen_pipeline.transforms.codes.base_weights import base_weights

if TYPE_CHECKING:  # pandas takes long to import, and only status_frame needs it
    import pandas as pd

State = Literal["missing", "damaged", "stale", "failed", "dropped", "done"]
_GOOD: tuple[State, State] = ("done", "dropped")


@dataclass(frozen=True, slots=True, kw_only=True)
class StageStatus:
    """One stage of one fine-tune.

    Attributes:
        state: ``missing``: the store has no output. ``damaged``: its manifest or report cannot be trusted; the
            directory has to be deleted. ``stale``: made from other inputs or settings than the present ones, or by
            another code version. ``failed``: up to date, but a blocking check failed or a required one was
            skipped. ``dropped``: it was done, and retention removed it; a run makes it again if it needs it. ``done``:
            up to date and good.
        artifact: The output in the store, unless it is missing or damaged; of a dropped one its manifest.
        failed_checks: Names of the blocking checks that failed and of the required ones that were skipped.
        fault: Why it is damaged.
    """

    state: State
    artifact: Artifact | None = None
    failed_checks: tuple[str, ...] = ()
    fault: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class FineTuneStatus:
    """Every stage of one product of a fine-tune, or of one import, in order.

    Attributes:
        name: The product's key, ``<fine-tune>`` or ``<fine-tune>@<recipe>``; or the import's name.
        base: The name of its base, if the settings have several and its upload says which.
        remark: Why its upload cannot be used; empty if it can.
        is_quarantined: Whether the upload waits for a person.
    """

    name: str
    stages: Mapping[str, StageStatus]
    base: str = ""
    remark: str = ""
    is_quarantined: bool = False

    @property
    def needs_work(self) -> bool:
        """True if a run would make progress: the first stage that is not done or dropped is missing or stale.

        A stage that failed or is damaged would end the same way again.
        """
        return self.first_open[1] in ("missing", "stale") and not self.remark

    @property
    def first_open(self) -> tuple[str, State]:
        """The first stage that is not done or dropped, and its state; the last one if all are."""
        states: list[tuple[str, State]] = [(stage, status.state) for stage, status in self.stages.items()]
        return next((each for each in states if each[1] not in _GOOD), states[-1])

    @property
    def urgency(self) -> int:
        """A number that is lower the sooner a person has to look: 0 for what is quarantined."""
        if self.is_quarantined:
            return 0
        if (state := self.first_open[1]) in ("damaged", "failed"):
            return 1
        if self.remark:
            return 4 if state in _GOOD else 2
        return 5 if state in _GOOD else 3


_MAKERS: Mapping[ModuleType, Mapping[str, str]] = {
    merge: {},
    pad: {"source": merge.STAGE},
    calibrate: {"source": pad.STAGE},
    quantize: {"source": pad.STAGE, "calibration": calibrate.STAGE},
    validate: {"reference": merge.STAGE, "candidate": quantize.STAGE},
    publish: {"quantized": quantize.STAGE, "validated": validate.STAGE},
}
"""Stage, in order -> the stages that make its inputs, by their role in the derivation."""


def _makers(settings: Settings) -> Mapping[ModuleType, Mapping[str, str]]:
    """Return the stages that the settings require, with the makers of their inputs."""
    if settings.quantization.needs_calibration:
        return _MAKERS
    without = {stage: makers for stage, makers in _MAKERS.items() if stage is not calibrate}
    return {**without, quantize: {"source": pad.STAGE}}


STAGES = tuple(str(stage.STAGE) for stage in _MAKERS)
FRAME_COLUMNS = ("name", "stage", "state", "digest", "path", "failed_checks", "remark")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Recipe:
    """The settings of one recipe, the current digest of its calibration text, and why it cannot be used."""

    settings: Settings
    texts: Mapping[str, str] = field(default_factory=dict[str, str])
    fault: str = ""


def _recipe(settings: Settings, name: str | None) -> _Recipe:
    try:
        own = settings_of(settings, name)
        return _Recipe(settings=own, texts=_calibration_text(own))
    except InputRefused as refusal:
        return _Recipe(settings=settings, fault=refusal.what)


def fine_tune_statuses(settings: Settings) -> list[FineTuneStatus]:
    """Return the status of each product of a fine-tune in the inbox or the store; first those that need a person."""
    arrivals = {arrival.name: arrival for arrival in Inbox(settings.inbox).arrivals()}
    keys = {name: set[str]() for name in arrivals}
    for kept in CheckpointStore(settings.store_root).products(STAGES):
        keys.setdefault(kept.fine_tune, set()).add(kept.key)
    recipe = cache(partial(_recipe, settings))
    found: list[FineTuneStatus] = []
    with open_intake(settings) as intake:
        for name, stored in keys.items():
            judged = _judged(intake, arrivals.get(name))
            digest, remark = _upload_digest(intake, arrivals.get(name), judged.placement.reason)
            for key in {*judged.placement.products, *stored} or {name}:
                status = _status(recipe(product(key).recipe), key, digest, remark)
                base, is_quarantined = judged.placement.base, judged.is_quarantined
                found.append(replace(status, base=base, is_quarantined=is_quarantined))
        intake.keep(arrivals)
    return sorted(found, key=lambda status: (status.urgency, status.name))


def _judged(intake: Intake, arrival: Arrival | None, *, place: str = "in the inbox") -> Judged:
    reason = f"no longer {place}"
    with suppress(OSError):
        if arrival:
            reason = "it is still changing"
            return intake.judge(arrival)
    return Judged(fingerprint="", rules="", placement=Placement(state="incomplete", reason=reason), since=time.time())


def _upload_digest(intake: Intake, arrival: Arrival | None, reason: str) -> tuple[str | None, str]:
    """Return the digest of an upload that can be merged, or None and why it cannot."""
    if arrival is None or reason:
        return None, reason
    try:
        return intake.digest(arrival), ""
    except (InputRefused, OSError) as refusal:
        return None, refusal.what if isinstance(refusal, InputRefused) else str(refusal)


def status_of(settings: Settings, key: str, arrival: Arrival | None) -> FineTuneStatus:
    """Compare the outputs of a product in the store with its upload and the current settings of its recipe.

    Without a usable upload, the outputs of an earlier one are not stale.
    """
    remark = arrival.obstacle() if arrival else "no longer in the inbox"
    digest = None
    if arrival and not remark:
        try:
            digest = fine_tune_digest(arrival.path)
        except InputRefused as refusal:
            remark = refusal.what
    return _status(_recipe(settings, product(key).recipe), key, digest, remark or "")


def _status(recipe: _Recipe, key: str, digest: str | None, remark: str) -> FineTuneStatus:
    own = recipe.settings
    specs = {} if recipe.fault else _specs(own, product(key).fine_tune)
    texts = {calibrate.STAGE: recipe.texts}
    inputs = {"fine_tune": digest} if digest else {}
    current: dict[str, str] = {}
    stages: dict[str, StageStatus] = {}
    for stage, makers in _makers(own).items():
        inputs = {role: current.get(maker) for role, maker in makers.items()} or inputs
        inputs |= texts.get(stage.STAGE, {})
        stages[stage.STAGE] = status = _stage_status(own, key, stage, inputs, specs.get(stage.STAGE, {}))
        if status.artifact and status.state in ("failed", *_GOOD):
            current[stage.STAGE] = status.artifact.manifest.content_digest
    return FineTuneStatus(name=key, stages=stages, remark=remark or recipe.fault)


def import_statuses(settings: Settings) -> list[FineTuneStatus]:
    """Return the status of each quantized checkpoint among the imports or in the store; first what needs a person.

    No weights are read: a repaired one is ``stale`` if the digest of the import is not cached, or the import changed.
    """
    arrivals = {arrival.name: arrival for arrival in Inbox(settings.imports).arrivals()}
    kept = {path.name for path in (settings.store_root / repair.STAGE).glob("*")}
    found: list[FineTuneStatus] = []
    with open_intake(settings, of="imports") as intake:
        for name in arrivals.keys() | kept:
            judged = _judged(intake, arrivals.get(name), place="among the imports")
            digest, remark = _import_digest(arrivals.get(name), judged.placement.reason)
            inputs = {} if name not in arrivals else {"source": digest}
            spec = {"tensor_parallel": settings.padding_spec.ranks}
            stages = {repair.STAGE: _stage_status(settings, name, repair, inputs, spec)}
            status = FineTuneStatus(name=name, stages=stages, remark=remark, is_quarantined=judged.is_quarantined)
            found.append(status)
        intake.keep(arrivals)
    return sorted(found, key=lambda status: (status.urgency, status.name))


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


def _import_digest(arrival: Arrival | None, reason: str) -> tuple[str | None, str]:
    """Return the cached digest of an import, if there is one, and why the import cannot be used."""
    if arrival is None or reason:
        return None, reason
    try:
        return repair.remembered_quantized_digest(arrival.path), ""
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
            **settings.calibration.text_spec.to_json(),
        },
        quantize.STAGE: {**LEFT_OUT, **quantization.to_json()},
        validate.STAGE: {"limits": asdict(settings.validation.limits_of(name))},
    }


def _calibration_text(settings: Settings) -> dict[str, str]:
    """Return the current digest of the calibration text, if it is a file and not Parquet or a data set."""
    source = settings.calibration.source
    if source is None or not (file := Path(source)).is_file() or file.suffix == PARQUET:
        return {}
    return {"text": open_text(file).digest()}


_SPEC_DEFAULTS: Mapping[str, Any] = {"towers": False, **LEFT_OUT}
"""Values of fields that a spec leaves out, so that its derivation key stays that of versions without them."""


def _stage_status(
    settings: Settings, name: str, stage: ModuleType, inputs: Mapping[str, str | None], spec: Mapping[str, Any]
) -> StageStatus:
    try:
        store = CheckpointStore(settings.store_root)
        found = store.latest(stage.STAGE, name)
        artifact = found or store.last_dropped(stage.STAGE, name)
        if artifact is None:
            return StageStatus(state="missing")
        made = artifact.manifest.derivation
        failed = [report for report in load_reports(artifact.manifest.result) if report.blocks]
        outdated = made.code_version != stage.CODE_VERSION
        if stage is validate and found and not outdated:
            failed = load_validation(artifact.path, artifact.manifest).blocking
    except CheckpointRefused as refusal:
        return StageStatus(state="damaged", fault=refusal.what)
    current = inputs.items() <= made.inputs.items() and spec.items() <= {**_SPEC_DEFAULTS, **made.spec}.items()
    good: State = "done" if found else "dropped"
    state: State = "stale" if outdated or not current else "failed" if failed else good
    return StageStatus(state=state, artifact=artifact, failed_checks=tuple(report.name for report in failed))


def against_last_release(store: CheckpointStore, key: str, validated: Artifact) -> CheckReport:
    """Compare a product's validation with its release in production, or else the last one of different weights."""
    candidate = validated.manifest.derivation.inputs["candidate"]
    with suppress(CheckpointRefused):  # the log was changed, which promotions and audits name
        production = history(store.root, key).target("production")
        served = find_manifest(production) if production else None
        if production and served and served.derivation.inputs.get("quantized") != candidate:
            return compare(load_verdict(production), load_verdict(validated.path))
    released = [
        release
        for release in store.finished(publish.STAGE, key)
        if release.manifest.derivation.inputs.get("quantized") != candidate
    ]
    return compare(load_verdict(released[-1].path) if released else None, load_verdict(validated.path))


def latest_manifests(store: CheckpointStore, key: str) -> Iterator[Manifest]:
    """Yield the manifests of a product's latest outputs, also of those that retention removed, in order."""
    for stage in STAGES:
        if found := store.latest(stage, key) or store.last_dropped(stage, key):
            yield found.manifest


def calibration_of(store: CheckpointStore, key: str, quantized: Artifact) -> Path | None:
    """Return the directory of the calibration tokens of a quantized checkpoint, if it has any and they are stored."""
    digest = quantized.manifest.derivation.inputs.get("calibration")
    made = store.finished(calibrate.STAGE, key)
    return next((each.path for each in made if each.manifest.content_digest == digest), None)


def other_merge_of(store: CheckpointStore, key: str, merged: Artifact) -> Artifact:
    """Return the merge of the same base and fine-tune that did not round the base to NF4.

    Raises:
        CheckpointRefused: There is none.
    """
    own = merged.manifest.derivation
    for each in reversed(store.finished(merge.STAGE, key)):
        made = each.manifest.derivation
        if made.inputs == own.inputs and base_weights(made.spec) == replace(base_weights(own.spec), nf4=None):
            return each
    raise CheckpointRefused(
        f"There is no merge of {key!r} onto the base as it is stored below {store.root}.",
        remedy=f"Run the stages before it: qwen-pipeline run {product(key).arguments}",
    )


def version_before(store: CheckpointStore, key: str, quantized: Artifact) -> Artifact | None:
    """Return the product's last quantized checkpoint of different weights before this one, if it is still stored."""
    made = [
        each
        for each in store.finished(quantize.STAGE, key)
        if each.manifest.run.started < quantized.manifest.run.started
        and each.manifest.content_digest != quantized.manifest.content_digest
        and "evidence" in each.manifest.result
    ]
    return made[-1] if made else None
