"""The difference between two outputs, stage by stage: inputs, settings, code, environment, figures, tensors, files."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, cast

from qwen_pipeline.lineage.library import Library, recorded_steps
from qwen_pipeline.lineage.verification.intact import RELEASE
from qwen_pipeline.lineage.verification.records import Record, RecordedStep, read_record

STAGES = ("merged", "padded", "calibration", "quantized", "validated", "published")
_ABSENT = "absent"


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """One value that differs.

    Attributes:
        stage: The stage that it belongs to.
        kind: ``input``, ``setting``, ``code``, ``environment``, ``check``, ``figure``, ``tensor`` or ``file``.
        name: Its name, such as ``quantization.bits``.
        before: Its value in the first output; ``absent`` if it has none.
        after: Its value in the second one.
    """

    stage: str
    kind: str
    name: str
    before: Any
    after: Any

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def differences(before: Record, after: Record, library: Library) -> list[Difference]:
    """Compare two outputs and the stages behind them, the first stage first."""
    chains = [_chain(record, library) for record in (before, after)]
    found: list[Difference] = []
    for stage in dict.fromkeys([*STAGES, before.step.stage, after.step.stage]):
        pair = [chain.get(stage) for chain in chains]
        if any(pair):
            found += _stage_differences(stage, *pair)
    return found


def summary(found: Sequence[Difference]) -> dict[str, int]:
    """Return the number of differences of each kind."""
    return {kind: sum(each.kind == kind for each in found) for kind in dict.fromkeys(each.kind for each in found)}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Output:
    step: RecordedStep
    record: Record | None


def _chain(end: Record, library: Library) -> dict[str, _Output]:
    """Return stage -> output, of the chain behind a directory, as far as it is recorded."""
    known = {step.content_digest: step for step in recorded_steps(end.root)}
    chain = dict[str, _Output]()
    todo: list[tuple[RecordedStep, Record | None]] = [(end.step, end)]
    while todo:
        step, record = todo.pop()
        if step.stage in chain:
            continue
        chain[step.stage] = _Output(step=step, record=record)
        fitting = {each for known_step in known.values() for each in (known_step.key, known_step.content_digest)}
        for digest in step.made_from.values():
            if place := library.find(digest, near=end.root, chain=fitting):
                parent = read_record(place)
                known |= {each.content_digest: each for each in recorded_steps(place)}
                todo.append((parent.step, parent))
            elif recorded := known.get(digest):
                todo.append((recorded, None))
    return chain


def _stage_differences(stage: str, before: _Output | None, after: _Output | None) -> Iterator[Difference]:
    for kind, take in _KINDS.items():
        old, new = (take(output) if output else {} for output in (before, after))
        if old is None or new is None:
            continue
        for name in sorted(old.keys() | new.keys()):
            values = old.get(name, _ABSENT), new.get(name, _ABSENT)
            if values[0] != values[1]:
                yield Difference(stage=stage, kind=kind, name=name, before=values[0], after=values[1])


def _settings(output: _Output) -> Mapping[str, Any]:
    return dict(_flat(output.step.spec))


def _environment(output: _Output) -> Mapping[str, Any] | None:
    return dict(output.record.run.get("environment") or {}) if output.record else None


def _checks(output: _Output) -> Mapping[str, Any] | None:
    if not output.record:
        return None
    checks: list[Mapping[str, Any]] = output.record.result.get("checks") or []
    return {str(check["name"]): _outcome(check) for check in checks}


def _figures(output: _Output) -> Mapping[str, Any] | None:
    if not output.record:
        return None
    measured = dict(_flat((output.record.result.get("findings") or {}).get("models") or {}))
    checks: list[Mapping[str, Any]] = output.record.result.get("checks") or []
    return measured | {str(check["name"]): check.get("measured") for check in checks}


def _outcome(check: Mapping[str, Any]) -> str:
    return "skipped" if check.get("skipped") else "passed" if check.get("passed") else "not passed"


def _tensors(output: _Output) -> Mapping[str, Any] | None:
    if not output.record or output.step.stage == RELEASE:  # its tensors are those of the quantized checkpoint
        return None
    return {name: f"{dtype} {shape} {digest[:12]}" for name, (dtype, shape, digest) in output.record.tensors.items()}


def _files(output: _Output) -> Mapping[str, Any] | None:
    return {path: digest[:12] for path, digest in output.record.sha256().items()} if output.record else None


_KINDS = {
    "input": lambda output: output.step.inputs,
    "setting": _settings,
    "code": lambda output: {"code_version": output.step.code_version},
    "environment": _environment,
    "check": _checks,
    "figure": _figures,
    "tensor": _tensors,
    "file": _files,
}


def _flat(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the leaves of nested mappings with their dotted names."""
    for name, each in cast("Mapping[str, Any]", value).items():
        path = f"{prefix}{name}"
        if isinstance(each, Mapping) and each:
            yield from _flat(each, f"{path}.")
        else:
            yield path, each
