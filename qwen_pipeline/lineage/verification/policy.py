"""A policy of a serving host: who may sign, which checks must have passed, accepted bases, and what is recalled."""

import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from qwen_pipeline.errors import InputRefused
from qwen_pipeline.lineage.verification.findings import Finding, Verdict
from qwen_pipeline.lineage.verification.records import RecordedStep
from qwen_pipeline.lineage.verification.trust import Identity, Signer, load_signer

_SECTIONS: Mapping[str, frozenset[str]] = {
    "signers": frozenset(),
    "checks": frozenset({"passed", "may_skip", "may_warn"}),
    "base": frozenset({"digests", "revisions"}),
    "recalled": frozenset({"digests"}),
}
"""Section -> its keys; names of signers are free."""
ANY = "*"
_DIGEST = re.compile("sha256:[0-9a-f]{64}")
OF_HEADS = frozenset({"head_logits", "label_agreement", "reward_order", "embedding_cosine"})
OF_LANGUAGE = frozenset({
    "perplexity_ratio", "kl_divergence", "top1_agreement", "draft_acceptance", "merged_not_worse", "sample_texts",
    "benchmark_tasks", "tool_calls", "thinking_length", "json_answers", "stop_tokens", "needles_found",
    "kl_along_context",
})  # fmt: skip
"""The checks of language models, and those of classifiers, reward models and embedding models: a model has one kind."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """The content of ``policy.toml``.

    Attributes:
        signers: Keys, authorities and identities that may sign; if there are none, a signature is not required.
        passed: Checks that must have passed.
        may_skip: Checks that may have been skipped; ``*`` stands for all that a release may be made without.
        may_warn: Checks that may have ended with a warning; ``*`` stands for all.
        base_digests: Accepted content digests of bases; if empty, any.
        base_revisions: Accepted revisions of bases on the hub, the oldest first; if empty, any.
        recalled: Content digests that no served checkpoint may descend from: bases, adapters, texts, stages.
    """

    signers: Sequence[Signer] = ()
    passed: Sequence[str] = ()
    may_skip: Sequence[str] = (ANY,)
    may_warn: Sequence[str] = (ANY,)
    base_digests: Sequence[str] = ()
    base_revisions: Sequence[str] = ()
    recalled: Sequence[str] = ()


def load_policy(path: Path) -> Policy:
    """Read a policy; the keys of signers are files, relative to it.

    Raises:
        InputRefused: It cannot be read, has an unknown section or key, or a value of another type.
    """
    try:
        given = tomllib.loads(path.read_text())
    except OSError as error:
        raise _refused(path, f"it cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise _refused(path, f"it is not TOML in UTF-8 ({error})") from error
    for section, values in given.items():
        if section not in _SECTIONS:
            raise _refused(path, f"there is no section [{section}]; known are {', '.join(_SECTIONS)}")
        if not isinstance(values, dict):
            raise _refused(path, f"{section} is not a section")
        known = _SECTIONS[section]
        if unknown := [key for key in cast("dict[str, Any]", values) if known and key not in known]:
            raise _refused(path, f"[{section}] has no key {unknown[0]!r}; known are {', '.join(sorted(known))}")
    checks, base = given.get("checks", {}), given.get("base", {})
    return Policy(
        signers=[_signer(path, name, file) for name, file in given.get("signers", {}).items()],
        passed=_texts(path, checks, "passed", ()),
        may_skip=_texts(path, checks, "may_skip", (ANY,)),
        may_warn=_texts(path, checks, "may_warn", (ANY,)),
        base_digests=_digests(path, base),
        base_revisions=_texts(path, base, "revisions", ()),
        recalled=_digests(path, given.get("recalled", {})),
    )


def apply_policy(
    policy: Policy, checks: Sequence[Mapping[str, Any]], steps: Sequence[RecordedStep], *, verdict: Verdict
) -> list[Finding]:
    """Return a finding for each demand of a policy but the signature.

    Args:
        policy: The policy.
        checks: The reports of the validation.
        steps: The steps that the release records, its own among them.
        verdict: Verdict on the demands that are met.
    """
    return [
        *_check_findings(policy, {str(check.get("name")): check for check in checks}, verdict),
        *_base_findings(policy, steps, verdict),
        *_recall_findings(policy, steps, verdict),
    ]


def _check_findings(policy: Policy, checks: Mapping[str, Mapping[str, Any]], verdict: Verdict) -> list[Finding]:
    faults: list[str] = []
    for name in policy.passed:
        if name not in checks:
            faults.append(f"{name} is no check of this validation")
        elif not checks[name].get("passed"):
            faults.append(f"{name} {_outcome(checks[name])}")
    inapplicable = _inapplicable(checks)
    for name, check in checks.items():
        if name in policy.passed or check.get("passed") or name in inapplicable:
            continue
        skipped, warned = check.get("skipped"), check.get("severity") == "WARN"
        allowed = policy.may_skip if skipped else policy.may_warn if warned else ()
        if not {name, ANY} & set(allowed):
            faults.append(f"{name} {_outcome(check)}")
    if faults:
        return [Finding(name="policy.checks", verdict="refuted", detail="; ".join(faults) + ".")]
    skipped = [name for name, check in checks.items() if check.get("skipped") and name not in inapplicable]
    detail = f"{len(checks)} checks are as the policy demands; skipped: {', '.join(skipped) or 'none'}."
    return [Finding(name="policy.checks", verdict=verdict, detail=detail)]


def _inapplicable(checks: Mapping[str, Mapping[str, Any]]) -> frozenset[str]:
    """Return the checks that were skipped because the model is of the other kind, of which some ran."""
    ran = {name for name, check in checks.items() if not check.get("skipped")}
    return OF_HEADS if OF_LANGUAGE & ran else OF_LANGUAGE if OF_HEADS & ran else frozenset()


def _outcome(check: Mapping[str, Any]) -> str:
    return "was skipped" if check.get("skipped") else "warned" if check.get("severity") == "WARN" else "failed"


def _base_findings(policy: Policy, steps: Sequence[RecordedStep], verdict: Verdict) -> list[Finding]:
    merged = [step for step in steps if step.stage == "merged"]
    findings: list[Finding] = []
    for name, accepted, found in (
        ("policy.base", policy.base_digests, [step.inputs.get("base") for step in merged]),
        ("policy.base_revision", policy.base_revisions, [step.spec.get("base_revision") for step in merged]),
    ):
        if not accepted:
            continue
        other = [value for value in found or [None] if value not in accepted]
        detail = f"The base is {', '.join(str(value) for value in found if value) or 'not recorded'}" + (
            ", which the policy does not accept." if other else ", which the policy accepts."
        )
        findings.append(Finding(name=name, verdict="refuted" if other else verdict, detail=detail))
    return findings


def _recall_findings(policy: Policy, steps: Sequence[RecordedStep], verdict: Verdict) -> list[Finding]:
    if not policy.recalled:
        return []
    ancestry = {digest: role for step in steps for role, digest in step.made_from.items()}
    ancestry |= {step.content_digest: step.stage for step in steps}
    if recalled := [f"{ancestry[digest]} {digest}" for digest in policy.recalled if digest in ancestry]:
        detail = f"It descends from what was recalled: {', '.join(recalled)}."
        return [Finding(name="policy.recalled", verdict="refuted", detail=detail)]
    detail = f"None of {len(policy.recalled)} recalled digests is among its {len(ancestry)} ancestors."
    return [Finding(name="policy.recalled", verdict=verdict, detail=detail)]


def _signer(path: Path, name: str, given: object) -> Signer:
    """Return a signer: the path of a PEM file, or a table with ``certificate`` or with ``identity`` and ``issuer``."""
    match given:
        case str(file):
            return load_signer(path.parent / file, name)
        case {"certificate": str(file), **others} if not others or (
            others.keys() == {"subject"} and isinstance(others["subject"], str)
        ):
            return load_signer(path.parent / file, name, subject=others.get("subject", ""))
        case {"identity": str(identity), "issuer": str(issuer), **others} if not others:
            return Identity(name=name, identity=identity, issuer=issuer)
        case _:
            raise _refused(
                path,
                f"the signer {name} is {given!r}, expected the path of a PEM file, or a table with certificate and "
                "perhaps subject, or with identity and issuer",
            )


def _texts(path: Path, section: Mapping[str, Any], key: str, default: Sequence[str]) -> Sequence[str]:
    value = section.get(key, default)
    if not isinstance(value, list | tuple) or not all(isinstance(each, str) for each in cast("list[object]", value)):
        raise _refused(path, f"{key} is {value!r}, expected a list of texts")
    return tuple(cast("list[str]", value))


def _digests(path: Path, section: Mapping[str, Any]) -> Sequence[str]:
    """Return content digests; one that is cut off would never match, and what it recalls would be served."""
    found = _texts(path, section, "digests", ())
    if other := [each for each in found if not _DIGEST.fullmatch(each)]:
        raise _refused(path, f"{other[0]!r} is no content digest, expected sha256: and 64 hexadecimal digits")
    return found


def _refused(path: Path, why: str) -> InputRefused:
    return InputRefused(f"The policy {path} is refused: {why}.", remedy="Correct it; docs/audit.md has an example.")
