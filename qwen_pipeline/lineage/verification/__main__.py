"""``python -m qwen_pipeline.lineage.verification``: the command ``verify`` without the rest of the command line."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from qwen_pipeline.errors import PipelineError
from qwen_pipeline.lineage.verification.findings import in_one_line
from qwen_pipeline.lineage.verification.policy import load_policy
from qwen_pipeline.lineage.verification.trust import given_signers
from qwen_pipeline.lineage.verification.verify import Verification, verify

REFUTED = 1
CRASHED, INTERRUPTED = 70, 130
_EXIT_CODES = (
    "Exit codes: 0 verified, 1 a statement is refuted, 2 the input or the usage was refused, "
    "3 environment error, 130 interrupted, 70 error in this program."
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Verify a release, print the findings, and return the exit code."""
    parser = argparse.ArgumentParser("qwen-pipeline-verify", description="Verify a release.", epilog=_EXIT_CODES)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--key", type=Path, action="append", default=[], help="P-256 public key, or certificate (PEM)")
    parser.add_argument("--identity", help="account that signed with Sigstore")
    parser.add_argument("--issuer", help="OpenID Connect issuer of the account")
    parser.add_argument("--policy", type=Path, help="policy.toml: who may sign, and what must have passed")
    parser.add_argument("--json", action="store_true", help="print one JSON object, and nothing else")
    given = parser.parse_args(arguments)
    try:
        keys = given_signers(given.key, given.identity, given.issuer)
        policy = load_policy(given.policy) if given.policy else None
        found = verify(given.directory, keys=keys, policy=policy)
    except PipelineError as error:
        return _fail(error, given.json)
    except KeyboardInterrupt:
        return INTERRUPTED
    print(json.dumps(found.to_json()) if given.json else "\n".join(lines_of(found)))
    return REFUTED if found.faults else 0


def lines_of(found: Verification) -> list[str]:
    """Return the findings as lines of text, and the verdict."""
    width = max(len(finding.name) for finding in found.findings)
    lines = [
        in_one_line(f"{finding.verdict:<8}  {finding.name:<{width}}  {finding.detail}") for finding in found.findings
    ]
    verdict = f"{len(found.faults)} statements are refuted" if found.faults else "verified"
    return [*lines, in_one_line(f"{found.root}: {verdict}, {found.files} files, {found.nbytes / 1e6:.1f} MB")]


def _fail(error: PipelineError, as_json: bool) -> int:
    if as_json:
        what = {"kind": type(error).__name__, "what": error.what, "remedy": error.remedy, "exit_code": error.exit_code}
        print(json.dumps({"error": what}))
    print("\n".join(map(in_one_line, f"Refused: {error}".splitlines())), file=sys.stderr)
    return error.exit_code


def script() -> None:
    """Run :func:`main` as a program."""
    sys.exit(main())


if __name__ == "__main__":
    script()
