"""Verification of a release where it is served: signature, bytes, order, policy, and how fast the command starts."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qwen_pipeline.checkpoint.store.canonical import ATTESTATIONS
from qwen_pipeline.errors import CheckpointRefused, InputRefused
from qwen_pipeline.evaluation import head_checks
from qwen_pipeline.evaluation.behaviour.checks import BEHAVIOUR_CHECKS
from qwen_pipeline.lineage.sign import PASSPHRASE_VARIABLE, load_key, sign_release
from qwen_pipeline.lineage.verification import intact, verify
from qwen_pipeline.lineage.verification import policy as policy_module
from qwen_pipeline.lineage.verification.__main__ import main
from qwen_pipeline.lineage.verification.envelopes import load_public_key
from qwen_pipeline.lineage.verification.findings import Finding
from qwen_pipeline.lineage.verification.model_signature import signed_files
from qwen_pipeline.lineage.verification.policy import load_policy
from qwen_pipeline.lineage.verification.verify import Verification
from qwen_pipeline.lineage.zipapp import build
from qwen_pipeline_tests.cli.terminal import qwen_pipeline
from qwen_pipeline_tests.lineage.chained import Chained, write_key

WEIGHTS = "model.safetensors"


def verified(chained: Chained, policy: str = "", *, key: bool = True) -> Verification:
    """Verify the release with its key and a policy, given as text."""
    keys = [load_public_key(chained.public_key)] if key else []
    (chained.root / "policy.toml").write_text(policy)
    return verify.verify(
        chained.release, keys=keys, policy=load_policy(chained.root / "policy.toml") if policy else None
    )


def test_a_signed_release_is_verified(chained: Chained) -> None:
    found = verified(chained)
    assert not found.faults
    assert found.signer == "release.pub"
    verdicts = {finding.name: finding.verdict for finding in found.findings}
    assert verdicts["signature"] == verdicts["provenance"] == verdicts["files"] == verdicts["tensors"] == "proven"
    assert verdicts["validated_is_published"] == "proven"
    assert verdicts["padding_before_quantization"] == "attested"
    unsigned = verified(chained, key=False)
    assert not unsigned.faults
    assert {finding.name: finding.verdict for finding in unsigned.findings}["signature"] == "claimed"


def test_without_blake3_the_order_rests_on_the_signature(chained: Chained, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (intact, verify):
        monkeypatch.setattr(module, "can_hash_tensors", lambda: False)
    monkeypatch.setattr("qwen_pipeline.lineage.verification.hashing.blake3", None)
    found = verified(chained)
    verdicts = {finding.name: finding.verdict for finding in found.findings}
    assert (verdicts["files"], verdicts["tensors"]) == ("proven", "claimed")
    assert verdicts["validated_is_published"] == "attested"
    assert not found.faults


def write(root: Path, name: str, change: Callable[[bytes], bytes]) -> None:
    (root / name).write_bytes(change((root / name).read_bytes()))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda root: (root / "model.sig").unlink(), "There is no model.sig"),
        (lambda root: write(root, "model.sig", lambda data: data[:-9]), "model.sig is not valid JSON"),
        (lambda root: write(root, "bom.cdx.json", lambda data: data + b" "), "bom.cdx.json is not the file"),
        (lambda root: (root / "bom.cdx.json").unlink(), "bom.cdx.json is signed, and missing"),
        (lambda root: (root / "extra.py").write_text("x"), "extra.py is not signed"),
        (lambda root: write(root, "config.json", lambda data: data + b" "), "config.json has bytes"),
        (
            lambda root: write(root, "model.safetensors", lambda data: data[:-1] + b"\xff"),
            "model.safetensors has sha256",
        ),
        (lambda root: write(root, "manifest.json", lambda data: data + b"\n"), "manifest.json is not the file"),
    ],
)
def test_what_was_changed_after_signing_is_named(
    chained: Chained, tmp_path: Path, damage: Callable[[Path], object], words: str
) -> None:
    copy = chained.copy(tmp_path / "copy")
    damage(copy.release)
    assert words in " ".join(finding.detail for finding in verified(copy).faults)


def test_no_bit_of_a_signature_can_be_flipped(chained: Chained, tmp_path: Path) -> None:
    """Neither in what is signed, nor in the bundle around it."""
    keys, data = [load_public_key(chained.public_key)], (chained.release / "model.sig").read_bytes()
    for place in [*range(320), *range(320, len(data) * 8, 331)]:
        changed = bytearray(data)
        changed[place // 8] ^= 1 << place % 8
        (tmp_path / "model.sig").write_bytes(changed)
        assert isinstance(signed_files(tmp_path, keys), Finding), place


def test_another_key_is_refused_and_signing_again_replaces_it(chained: Chained, tmp_path: Path) -> None:
    copy = chained.copy(tmp_path / "copy")
    before = (copy.release / "model.sig").read_bytes()
    assert not sign_release(copy.release, load_key(copy.key))
    assert (copy.release / "model.sig").read_bytes() == before
    write_key(copy.key, copy.public_key)
    assert verified(copy).faults[0].detail == "model.sig is not signed by release.pub."
    assert sign_release(copy.release, load_key(copy.key))
    assert not verified(copy).faults


def test_a_damaged_release_is_not_signed(chained: Chained, tmp_path: Path) -> None:
    copy = chained.copy(tmp_path / "copy")
    for name in ATTESTATIONS:
        (copy.release / name).unlink()
    write(copy.release, WEIGHTS, lambda data: data[:-1] + b"\xff")
    with pytest.raises(CheckpointRefused, match="is not signed, because it does not match its manifest"):
        sign_release(copy.release, load_key(copy.key))
    with pytest.raises(CheckpointRefused, match="only releases are signed"):
        sign_release(copy.output("padded"), load_key(copy.key))
    with pytest.raises(CheckpointRefused, match="holds a padded output, not a release"):
        verify.verify(copy.output("padded"))


def test_keys_are_p256_and_a_passphrase_is_in_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    private, public = tmp_path / "key.pem", tmp_path / "key.pub"
    write_key(private, public, b"secret")
    for passphrase in (None, "wrong"):
        if passphrase:
            monkeypatch.setenv(PASSPHRASE_VARIABLE, passphrase)
        with pytest.raises(InputRefused, match="is not a private P-256 key in PEM that can be read"):
            load_key(private)
    monkeypatch.setenv(PASSPHRASE_VARIABLE, "secret")
    assert load_key(private).public.keyid == load_public_key(public).keyid
    for path in (public, tmp_path / "absent.pem", tmp_path):
        with pytest.raises(InputRefused, match=r"is not a private P-256|cannot be read"):
            load_key(path)


POLICY = """
[signers]
release-team = "release.pub"
"""
UNASKED = '"draft_acceptance", ' + ", ".join(f'"{check.name}"' for check in BEHAVIOUR_CHECKS)


@pytest.mark.parametrize(
    ("policy", "words"),
    [
        (POLICY, ""),
        (
            POLICY + f'[checks]\npassed = ["kl_divergence"]\nmay_skip = [{UNASKED}, "serves", "benchmark_tasks"]\n',
            "",
        ),
        (POLICY + '[checks]\npassed = ["serves"]\n', "policy.checks: serves was skipped."),
        (POLICY + '[checks]\npassed = ["unheard_of"]\n', "policy.checks: unheard_of is no check of this validation."),
        (
            POLICY + f'[checks]\nmay_skip = [{UNASKED}, "serves"]\n',
            "policy.checks: benchmark_tasks was skipped.",
        ),
        (POLICY + '[base]\nrevisions = ["a09a354"]\n', "policy.base_revision: The base is "),
        (POLICY + '[recalled]\ndigests = ["SOURCE"]\n', "policy.recalled: It descends from what was recalled: "),
        (POLICY + '[recalled]\ndigests = ["sha256:' + "0" * 64 + '"]\n', ""),
    ],
)
def test_a_policy_decides(chained: Chained, tmp_path: Path, policy: str, words: str) -> None:
    copy = chained.copy(tmp_path / "copy")
    padded = json.loads((copy.output("padded") / "manifest.json").read_bytes())
    found = verified(copy, policy.replace("SOURCE", padded["derivation"]["inputs"]["source"]), key=False)
    assert found.signer == "release-team"
    faults = [f"{finding.name}: {finding.detail}" for finding in found.faults]
    assert (faults == []) if not words else (len(faults) == 1 and words in faults[0])


def test_the_kinds_of_checks_are_those_of_the_validation() -> None:
    assert frozenset(check.name for check in head_checks.HEAD_CHECKS) == policy_module.OF_HEADS
    assert policy_module.OF_LANGUAGE == head_checks.OF_LANGUAGE


@pytest.mark.parametrize(
    "policy",
    [
        "[signer]\n",
        "[checks]\npasses = []\n",
        "[checks]\npassed = 1\n",
        "checks = 1",
        "?",
        '[recalled]\ndigests = ["sha256:3d634234f864"]\n',
        '[base]\ndigests = ["3d634234f864"]\n',
    ],
)
def test_a_policy_that_is_not_understood_is_refused(tmp_path: Path, policy: str) -> None:
    (tmp_path / "policy.toml").write_text(policy)
    with pytest.raises(InputRefused, match=r"The policy .* is refused"):
        load_policy(tmp_path / "policy.toml")


def run(*command: object, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*map(str, command)], capture_output=True, text=True, check=False, **options)


def test_exit_codes_and_json(chained: Chained, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    key = str(chained.public_key)
    assert main([str(chained.release), "--key", key, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["verified"]
    assert main([str(tmp_path)]) == 2
    assert "has no manifest.json" in capsys.readouterr().err
    copy = chained.copy(tmp_path / "copy")
    shutil.copy(copy.key, copy.release / "extra")
    assert main([str(copy.release), "--key", key]) == 1
    assert "refuted   files" in capsys.readouterr().out


@pytest.mark.lengthy
def test_the_zipapp_verifies_without_the_package_and_starts_fast(chained: Chained, tmp_path: Path) -> None:
    """Processor time is measured, so that a busy machine does not matter."""
    archive = build(tmp_path / "verify.pyz")
    assert archive.read_bytes() == build(tmp_path / "again.pyz").read_bytes()
    before = os.times()
    ended = run(sys.executable, "-I", "-S", archive, chained.release, cwd=tmp_path)
    after = os.times()
    assert ended.returncode == 0, ended.stderr
    assert "verified, " in ended.stdout
    assert after.children_user + after.children_system - before.children_user - before.children_system < 0.5
    used = "import sys, qwen_pipeline.lineage.verification.__main__; print(*sys.modules)"
    loaded = {name.partition(".")[0] for name in run(sys.executable, "-c", used).stdout.split()}
    assert not loaded & {"torch", "pydantic", "dagster", "typer", "rich", "numpy", "transformers", "cryptography"}


@pytest.mark.lengthy
def test_the_command_imports_nothing_that_verification_does_not_need(chained: Chained) -> None:
    """``qwen-pipeline verify`` starts in under 0.3 s, since it imports no more than the command line itself."""
    verified = f"verify {chained.release} --key {chained.public_key}".split()
    code = (
        "import sys; from qwen_pipeline.cli import app\n"
        f"try: app({verified})\n"
        "except SystemExit as ended: assert not ended.code\n"
        "print(*sys.modules)"
    )
    before = os.times()
    ended = run(sys.executable, "-c", code)
    after = os.times()
    assert ended.returncode == 0, ended.stderr
    loaded = {name.partition(".")[0] for name in ended.stdout.splitlines()[-1].split()}
    assert {"cryptography", "typer"} <= loaded
    assert not loaded & {"torch", "pydantic", "dagster", "numpy", "pandas", "transformers", "jinja2"}
    assert after.children_user + after.children_system - before.children_user - before.children_system < 0.6


def test_names_of_files_do_not_write_findings(
    chained: Chained, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A name may hold whatever a file system takes: a line that looks like a finding, a terminal's commands, bytes."""
    release = Path(shutil.copytree(chained.release, tmp_path / "release"))
    Path(os.fsdecode(bytes(release) + b"/\xff\nproven    signature  It is signed.\x1b[2J")).touch()
    assert main([str(release), "--key", str(chained.public_key)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert not [line for line in lines if line.startswith("proven    signature")]
    assert r"\udcff\nproven    signature  It is signed.\x1b[2J is not in the manifest" in "\n".join(lines)
    assert main([str(release), "--json"]) == 1
    assert not json.loads(capsys.readouterr().out)["verified"]
    ended = qwen_pipeline("verify", release)
    assert (ended.code, len(ended.err.splitlines())) == (1, 2)


@pytest.mark.parametrize("name", ["model.sig", "provenance.intoto.jsonl", "bom.cdx.json", "tokenizer.json"])
def test_what_would_never_end_is_not_read(chained: Chained, tmp_path: Path, name: str) -> None:
    copy = chained.copy(tmp_path / "copy")
    (copy.release / name).unlink()
    os.mkfifo(copy.release / name)
    assert name in str(verified(copy).faults)
    assert name in str(copy.audit().faults)


def test_what_a_lost_signature_covered_is_named(chained: Chained, tmp_path: Path) -> None:
    copy = chained.copy(tmp_path / "copy")
    (copy.release / "model.sig").unlink()
    (signature,) = (each for each in verified(copy, key=False).findings if each.name == "signature")
    assert signature.verdict == "claimed"
    assert signature.detail == "It is not signed, so nothing covers bom.cdx.json, provenance.intoto.jsonl."


@pytest.mark.parametrize("size", ["1e400", "-1", '"1"', "true", "null"])
def test_a_size_that_is_no_number_is_refused(chained: Chained, tmp_path: Path, size: str) -> None:
    release = Path(shutil.copytree(chained.release, tmp_path / "release"))
    manifest = release / "manifest.json"
    manifest.write_text(re.sub(r'"bytes": ?\d+', f'"bytes": {size}', manifest.read_text(), count=1))
    (fault,) = verify.verify(release).faults
    assert "has no number of bytes" in fault.detail
