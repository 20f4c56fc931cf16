"""The order of the stages, from digests alone: names and times of directories prove nothing.

A stage's input is named by its content digest, which covers every tensor. So where a digest is one stage's output and
another's input, the first came before the second.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence

from qwen_pipeline.checkpoint.store.canonical import content_digest
from qwen_pipeline.lineage.verification.findings import Finding, Verdict
from qwen_pipeline.lineage.verification.intact import RELEASE
from qwen_pipeline.lineage.verification.records import REPORT, STEPS, Record, RecordedStep

VALIDATION = "validation/"
CARD = "README.md"

Steps = Mapping[tuple[str, str], RecordedStep]
"""Content digest and stage -> the step. A stage that changes nothing, such as padding where every rank holds whole
groups already, gives the digest of its input."""
Strength = Callable[[RecordedStep], Verdict]
"""Returns the verdict that a link through a step deserves: whether its bytes are here, signed, or only recorded."""


def by_digest(steps: Iterable[RecordedStep]) -> dict[tuple[str, str], RecordedStep]:
    return {(step.content_digest, step.stage): step for step in steps}


def find_step(steps: Steps, digest: str | None, stage: str = "") -> RecordedStep | None:
    """Return the step that made a digest: that of a stage, or else one that changed its input."""
    if step := steps.get((digest or "", stage)):
        return step
    made = [step for step in steps.values() if step.content_digest == digest]
    return next((step for step in made if digest not in step.inputs.values()), made[0] if made else None)


def makers_of(digest: str, step: RecordedStep, makers: Sequence[RecordedStep]) -> list[RecordedStep]:
    """Return the steps, of those that give an input's digest, that made it for a step.

    Two steps may give the same bytes: tokens of one text, drawn for two fine-tunes. Those count that share most inputs
    with the step that used them.
    """
    given = set(step.inputs.values()) - {digest}
    shared = {maker.key: len(given & set(maker.inputs.values())) for maker in makers if maker.key != step.key}
    return [maker for maker in makers if shared.get(maker.key) == max(shared.values(), default=0)]


def released_digests(release: Record) -> dict[str, str]:
    """Return the content digests that a release's own files give: of what was quantized, and of its validation."""
    sha256 = release.sha256()
    quantized = {
        path: digest for path, digest in sha256.items() if not path.startswith(VALIDATION) and path not in (CARD, STEPS)
    }
    return {
        "quantized": content_digest(release.tensors, quantized),
        "validated": content_digest({}, release.sha256(VALIDATION)),
    }


def prove_release(release: Record, candidate: str, *, verdict: Verdict) -> list[Finding]:
    """Compare a release's files with the digests of its inputs, and its report's candidate with both.

    Args:
        release: The manifest of the release.
        candidate: The content digest that its validation report is about.
        verdict: Verdict on the statements that hold.
    """
    stated, found = release.step.inputs, released_digests(release)
    findings: list[Finding] = []
    for role, statement in (("quantized", "released_is_quantized"), ("validated", "report_is_validation")):
        same = stated.get(role) == found[role]
        detail = (
            f"Its files give the content digest {short(found[role])}, which is its input {role}."
            if same
            else f"Its files give the content digest {found[role]}, its manifest states {stated.get(role)}."
        )
        findings.append(Finding(name=statement, verdict=verdict if same else "refuted", detail=detail))
    same = candidate == found["quantized"]
    detail = (
        f"{REPORT} is about {short(candidate)}, the weights and files that are released."
        if same
        else f"{REPORT} is about {candidate}, the released files give {found['quantized']}."
    )
    return [*findings, Finding(name="validated_is_published", verdict=verdict if same else "refuted", detail=detail)]


def prove_order(end: RecordedStep, steps: Steps, strength: Strength) -> list[Finding]:
    """Return a finding for each statement about the order of the stages behind a step.

    Args:
        end: The last step: a release, or any step before it.
        steps: Every step that is known.
        strength: See :data:`Strength`.
    """
    release = end if end.stage == RELEASE else None
    validated = find_step(steps, release.inputs.get("validated"), "validated") if release else _if(end, "validated")
    candidate = (validated and validated.inputs.get("candidate")) or (release and release.inputs.get("quantized"))
    quantized = find_step(steps, candidate, "quantized") if candidate else _if(end, "quantized")
    if not quantized:
        return []
    padded, findings = find_step(steps, quantized.inputs.get("source"), "padded"), list[Finding]()
    findings.append(_is_stage("padding_before_quantization", quantized, "source", padded, "padded", strength))
    if padded and padded.stage == "padded":
        merged = find_step(steps, padded.inputs.get("source"), "merged")
        findings.append(_is_stage("merging_before_padding", padded, "source", merged, "merged", strength))
    if validated and padded:
        for role, expected in (("padded", padded.content_digest), ("reference", padded.inputs.get("source"))):
            findings += _same_input("validation_measured_this_chain", validated, role, expected, strength)
    calibration = find_step(steps, quantized.inputs.get("calibration"), "calibration")
    if calibration and padded and calibration.inputs.get("source") == padded.content_digest:  # else: the same tokens
        findings += _same_input("calibrated_on_padded", calibration, "source", padded.content_digest, strength)
    return findings


def short(digest: str) -> str:
    """Return the first digits of a content digest."""
    return digest.removeprefix("sha256:")[:12]


def _if(step: RecordedStep, stage: str) -> RecordedStep | None:
    return step if step.stage == stage else None


def _is_stage(
    name: str, child: RecordedStep, role: str, parent: RecordedStep | None, stage: str, strength: Strength
) -> Finding:
    """State that a step's input is the output of a stage."""
    digest = child.inputs.get(role, "")
    if parent is None:
        detail = f"No record says what made {short(digest) or 'the input'}, from which {child.stage} was made."
        return Finding(name=name, verdict="claimed", detail=detail)
    if parent.stage != stage:
        detail = f"{child.stage} was made from {short(digest)}, which is {parent.stage}, not {stage}."
        return Finding(name=name, verdict="refuted", detail=detail)
    verdict = max(strength(child), strength(parent), key=_WEAKNESS.__getitem__)
    detail = f"The content digest of {stage}, {short(digest)}, is the input {role} of {child.stage}."
    return Finding(name=name, verdict=verdict, detail=detail)


def _same_input(name: str, child: RecordedStep, role: str, expected: str | None, strength: Strength) -> list[Finding]:
    stated = child.inputs.get(role)
    if stated is None or expected is None:
        return []
    if stated != expected:
        detail = f"The input {role} of {child.stage} is {short(stated)}, in this chain it is {short(expected)}."
        return [Finding(name=name, verdict="refuted", detail=detail)]
    detail = f"The input {role} of {child.stage} is {short(stated)}, as in this chain."
    return [Finding(name=name, verdict=strength(child), detail=detail)]


_WEAKNESS: Mapping[Verdict, int] = {"proven": 0, "attested": 1, "claimed": 2, "refuted": 3}
