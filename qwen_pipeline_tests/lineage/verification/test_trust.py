"""Certificates of an authority of one's own and of Sigstore, verified offline, by our code and by OpenSSF's."""

import json
import shutil
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from cryptography import x509

from qwen_pipeline.errors import InputRefused
from qwen_pipeline.lineage.audit import audit
from qwen_pipeline.lineage.keyless import keyless
from qwen_pipeline.lineage.library import Sources, open_library
from qwen_pipeline.lineage.pointers import judge, move
from qwen_pipeline.lineage.sign import load_key, sign_release
from qwen_pipeline.lineage.verification.findings import Finding
from qwen_pipeline.lineage.verification.model_signature import files_statement, signed_files, signer_hint
from qwen_pipeline.lineage.verification.policy import load_policy
from qwen_pipeline.lineage.verification.trust import Authority, Identity, Signer, given_signers, load_signer
from qwen_pipeline.lineage.verification.verify import verify
from qwen_pipeline_tests.lineage.chained import NAME, Chained
from qwen_pipeline_tests.lineage.verification.certified import SUBJECT, Party

RECORDED = Path(__file__).parent / "sigstore"
"""``model.sig`` of OpenSSF's own tests (sigstore/model-transparency, Apache-2.0), by Sigstore's public services."""
OF_RECORDED = Identity(name="recorded", identity="stefanb@us.ibm.com", issuer="https://sigstore.verify.ibm.com/oauth2")
openssf: Any = import_module("model_signing._cli")


def sign(release: Path, signer: Party, *between: Party) -> None:
    place = release.parent / "signer"
    signer.write(place, *between)
    sign_release(release, load_key(place.with_suffix(".pem"), place.with_suffix(".crt")))


def trusting(party: Party, subject: str = "") -> Authority:
    return Authority(name="acme", certificates=[party.certificate], subject=subject)


def signer_of(release: Path, trusted: Signer) -> str | None:
    found = signed_files(release, [trusted])
    return None if isinstance(found, Finding) else found[1].name


def test_a_certificate_of_ones_own_authority_is_verified_by_us_and_by_openssf(chained: Chained, tmp_path: Path) -> None:
    copy = chained.copy(tmp_path / "copy")
    root, other = Party("root"), Party("root")
    between = Party("between", root, path_length=0)
    signer = Party("release", between, usage="digital_signature")
    sign(copy.release, signer, between)
    authority, stranger = tmp_path / "ca.pem", tmp_path / "stranger.pem"
    authority.write_bytes(root.pem)
    stranger.write_bytes(other.pem)

    found = verify(copy.release, keys=given_signers([authority]))
    assert (found.faults, found.signer) == ([], f"ca.pem: {SUBJECT}")
    assert {each.name: each.verdict for each in found.findings}["provenance"] == "proven"
    assert verify(copy.release, keys=given_signers([stranger])).faults[0].detail.endswith("not signed by stranger.pem.")
    assert signer_hint(copy.release)
    before = (copy.release / "model.sig").read_bytes()
    assert not sign_release(
        copy.release, load_key(copy.release.parent / "signer.pem", copy.release.parent / "signer.crt")
    )
    assert (copy.release / "model.sig").read_bytes() == before

    arguments = ["verify", "certificate", str(copy.release), "--signature", str(copy.release / "model.sig")]
    for chain, code in ((authority, 0), (stranger, 1)):
        ended = CliRunner().invoke(openssf.main, [*arguments, "--certificate_chain", str(chain)])
        assert ended.exit_code == code, ended.output
    (copy.release / "config.json").write_bytes(b"{}")
    assert CliRunner().invoke(openssf.main, [*arguments, "--certificate_chain", str(authority)]).exit_code == 1

    key = load_key(copy.release.parent / "signer.pem")
    move(copy.store, NAME, "production", copy.release, reason="made", key=key)
    judge(copy.store, NAME, copy.release, approved=True, reason="read", key=key)
    stated = audit(
        copy.release, library=open_library([copy.store]), sources=Sources([]), keys=given_signers([authority])
    )
    assert {each.name: each.verdict for each in stated.findings}["statements_are_signed"] == "attested"


def test_a_policy_names_authorities_subjects_and_identities(chained: Chained, tmp_path: Path) -> None:
    copy = chained.copy(tmp_path / "copy")
    root = Party("root")
    sign(copy.release, Party("release", root, usage="digital_signature"))
    (tmp_path / "ca.pem").write_bytes(root.pem)
    shutil.copy(copy.public_key, tmp_path / "release.pub")

    def faults(signer: str) -> list[str]:
        (tmp_path / "policy.toml").write_text(f"[signers]\nteam = {signer}\n")
        return [each.name for each in verify(copy.release, policy=load_policy(tmp_path / "policy.toml")).faults]

    assert faults('"ca.pem"') == []
    assert faults(f'{{certificate = "ca.pem", subject = "{SUBJECT}"}}') == []
    assert faults('{certificate = "ca.pem", subject = "release@acme.example"}') == []
    assert faults('{certificate = "ca.pem", subject = "CN=other"}') == ["signature"]
    assert faults('{identity = "a@b.c", issuer = "https://d"}') == ["signature"]
    for wrong in ('{certificate = "ca.pem", subjekt = "x"}', '{identity = "a@b.c"}', "1"):
        with pytest.raises(InputRefused, match="the signer team is"):
            faults(wrong)
    with pytest.raises(InputRefused, match="holds no certificate, so it has no subject"):
        faults('{certificate = "release.pub", subject = "x"}')


def test_a_chain_that_does_not_hold_is_refused(chained: Chained, tmp_path: Path) -> None:
    copy = chained.copy(tmp_path / "copy")
    root, one = Party("root"), Party("one")
    tight = Party("tight", root, path_length=0)
    below, ended = Party("below", tight), Party("ended", root, days=(-90, -60))
    hosts = x509.NameConstraints(permitted_subtrees=[x509.DNSName("acme.example")], excluded_subtrees=None)
    narrow = Party("narrow", root, extension=hosts)
    person = Party("person", root, usage="digital_signature")
    cases: dict[str, list[Party]] = {
        "sound": [Party("a", tight, usage="digital_signature"), tight],
        "expired since": [Party("a", root, usage="digital_signature", days=(-30, -1))],
        "another authority": [Party("a", one, usage="digital_signature"), one],
        "may not sign": [Party("a", root, usage="key_agreement")],
        "issued by no authority": [Party("a", person, usage="digital_signature"), person],
        "too many authorities": [Party("a", below, usage="digital_signature"), below, tight],
        "an authority that had ended": [Party("a", ended, usage="digital_signature"), ended],
        "a condition that is not understood": [Party("a", narrow, usage="digital_signature"), narrow],
        "a link is missing": [Party("a", tight, usage="digital_signature")],
        "itself": [Party("root", usage="digital_signature")],
    }
    accepted: dict[str, str] = {}
    for case, (signer, *between) in cases.items():
        sign(copy.release, signer, *between)
        if name := signer_of(copy.release, trusting(root)):
            accepted[case] = name
    assert accepted.keys() == {"sound", "expired since"}
    assert ", certified until 20" in accepted["expired since"]
    assert signer_of(copy.release, trusting(one)) is None

    place = copy.release.parent / "signer"
    Party("other", root, usage="digital_signature").write(place.with_name("other"))
    with pytest.raises(InputRefused, match="is not one of the signing key"):
        load_key(place.with_suffix(".pem"), place.with_name("other.crt"))
    for wrong in (place.with_suffix(".pem"), tmp_path / "absent"):
        with pytest.raises(InputRefused, match=r"holds no X\.509 certificates|cannot be read"):
            load_key(place.with_suffix(".pem"), wrong)
    broken = tmp_path / "broken.pem"
    broken.write_text("-----BEGIN CERTIFICATE-----\n?\n")
    with pytest.raises(InputRefused, match="holds no X"):
        load_signer(broken)


def test_a_signature_of_sigstore_is_verified_without_a_network(tmp_path: Path) -> None:
    """The bundle was made by Sigstore's public services; its trust root is part of the package."""
    found = signed_files(RECORDED, [OF_RECORDED])
    assert not isinstance(found, Finding)
    assert found[0].keys() == {"signme-1", "signme-2"}
    assert found[1].name == f"{OF_RECORDED.identity} ({OF_RECORDED.issuer})"
    assert signer_of(RECORDED, Identity(name="x", identity="someone@else.org", issuer=OF_RECORDED.issuer)) is None
    assert signer_of(RECORDED, Identity(name="x", identity=OF_RECORDED.identity, issuer="https://other")) is None
    bundle = json.loads((RECORDED / "model.sig").read_bytes())
    bundle["dsseEnvelope"]["payload"] = bundle["dsseEnvelope"]["payload"].replace("A", "B", 1)
    (tmp_path / "model.sig").write_text(json.dumps(bundle))
    assert signer_of(tmp_path, OF_RECORDED) is None
    bundle = json.loads((RECORDED / "model.sig").read_bytes())
    del bundle["verificationMaterial"]["tlogEntries"]
    (tmp_path / "model.sig").write_text(json.dumps(bundle))
    assert signer_of(tmp_path, OF_RECORDED) is None


def test_keyless_signing_needs_a_token_and_sigstore_takes_our_statement(monkeypatch: pytest.MonkeyPatch) -> None:
    statement: Any = import_module("sigstore.dsse").Statement
    assert statement(json.dumps(files_statement("bot", {"a": "0" * 64})).encode())
    for name in ("SIGSTORE_ID_TOKEN", "ACTIONS_ID_TOKEN_REQUEST_URL", "GITLAB_CI", "BUILDKITE", "CIRCLECI"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(InputRefused, match="no OpenID Connect token"), keyless():
        pass
