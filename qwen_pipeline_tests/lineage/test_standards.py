"""What a signature writes, read by other people's code: OpenSSF, in-toto, securesystemslib and CycloneDX."""

import json
import shutil
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from cryptography.hazmat.primitives.serialization import load_pem_public_key
from cyclonedx.schema import SchemaVersion
from google.protobuf.json_format import Parse, ParseDict
from in_toto_attestation.v1.statement import Statement
from model_signing import verifying
from securesystemslib.dsse import Envelope
from securesystemslib.exceptions import VerificationError

from qwen_pipeline.checkpoint.digest import digest_file
from qwen_pipeline.checkpoint.manifest import open_manifest
from qwen_pipeline.lineage.sign import load_key, sign_release
from qwen_pipeline_tests.lineage.chained import Chained, write_key

# Classes that protobuf generates, and one that is loaded by its type's name, are not known to type checkers.
StatementMessage: Any = import_module("in_toto_attestation.v1.statement_pb2").Statement
Provenance: Any = import_module("in_toto_attestation.predicates.provenance.v1.provenance_pb2").Provenance
openssf: Any = import_module("model_signing._cli")
SSlibKey: Any = import_module("securesystemslib.signer").SSlibKey


def verify_by_model_signing(chained: Chained) -> None:
    verifier = verifying.Config().use_elliptic_key_verifier(public_key=chained.public_key)
    verifier.verify(chained.release, chained.release / "model.sig")


def test_the_command_of_openssf_verifies_a_release(chained: Chained, tmp_path: Path) -> None:
    """The command is the one of docs/audit.md."""
    copy = chained.copy(tmp_path / "copy")
    command = f"verify key {copy.release} --signature {copy.release}/model.sig --public_key {copy.public_key}".split()
    assert CliRunner().invoke(openssf.main, command).exit_code == 0
    (copy.release / "validation" / "report.json").write_text("{}")
    refused = CliRunner().invoke(openssf.main, command)
    assert refused.exit_code == 1
    assert "validation/report.json" in refused.output


def test_openssf_accepts_the_signature_and_refuses_what_was_changed(chained: Chained, tmp_path: Path) -> None:
    verify_by_model_signing(chained)
    moved = Chained(tmp_path / "moved")
    shutil.copytree(chained.root, moved.root, symlinks=True)
    verify_by_model_signing(moved)
    for name in ("config.json", "manifest.json", "bom.cdx.json", "provenance.intoto.jsonl"):
        before = (moved.release / name).read_bytes()
        (moved.release / name).write_bytes(before + b" ")
        with pytest.raises(ValueError, match=name):
            verify_by_model_signing(moved)
        (moved.release / name).write_bytes(before)
    write_key(moved.key, moved.public_key)
    with pytest.raises(ValueError, match="signature"):
        verify_by_model_signing(moved)
    assert sign_release(moved.release, load_key(moved.key))
    verify_by_model_signing(moved)


def test_in_toto_accepts_the_provenance(chained: Chained) -> None:
    (line,) = (chained.release / "provenance.intoto.jsonl").read_text().splitlines()
    given = json.loads(line)
    keyid = given["signatures"][0]["keyid"]
    key = SSlibKey.from_crypto(load_pem_public_key(chained.public_key.read_bytes()), keyid=keyid)
    envelope = Envelope.from_dict(given)
    assert list(envelope.verify([key], threshold=1)) == [keyid]

    Statement.copy_from_pb(Parse(envelope.payload, StatementMessage())).validate()
    predicate = json.loads(envelope.payload)["predicate"]
    parsed = ParseDict(predicate, Provenance())  # an unknown field raises
    assert parsed.run_details.metadata.invocation_id == open_manifest(chained.release).derivation.key
    digests = [dict(each.digest) for each in parsed.build_definition.resolved_dependencies]
    text = open_manifest(chained.output("validated")).derivation.inputs["text"].removeprefix("sha256:")
    assert {"qwenPipelineContent": text} in digests
    stated = open_manifest(chained.release).run.environment
    for field, algorithm in (("code", "qwenPipelineCode"), ("packages", "qwenPipelinePackages")):
        assert {algorithm: stated[field].removeprefix("sha256:")} in digests

    envelope.payload = envelope.payload.replace(b"quantized", b"quantizee")
    with pytest.raises(VerificationError):
        envelope.verify([key], threshold=1)


def test_cyclonedx_accepts_the_bom(chained: Chained) -> None:
    from cyclonedx.validation.json import JsonStrictValidator  # four seconds

    text = (chained.release / "bom.cdx.json").read_text()
    validator = JsonStrictValidator(SchemaVersion.V1_6)
    assert validator.validate_str(text) is None
    bom = json.loads(text)
    model = bom["metadata"]["component"]
    assert {each["type"] for each in model["modelCard"]["quantitativeAnalysis"]["performanceMetrics"]} >= {"perplexity"}
    assert [each["name"] for each in model["pedigree"]["ancestors"]][-2:] == ["padded", "quantized"]
    files = {each["name"]: each["hashes"][0]["content"] for each in model["components"]}
    assert files["model.safetensors"] == digest_file(chained.release / "model.safetensors").sha256
    model["modelCard"]["quantitativeAnalysis"]["performanceMetrics"][0]["vale"] = "1"
    assert validator.validate_str(json.dumps(bom)) is not None
