"""The publish stage: only validated bytes are released, with their card, report and provenance."""

import json
import os
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoConfig, AutoTokenizer

from qwen_pipeline.checkpoint.digest import digest_file
from qwen_pipeline.checkpoint.files import copy_file
from qwen_pipeline.checkpoint.lazy import SINGLE_SHARD
from qwen_pipeline.checkpoint.manifest import dump_manifest, open_manifest
from qwen_pipeline.checkpoint.store.destinations import Artifact
from qwen_pipeline.checkpoint.store.verify import require_intact
from qwen_pipeline.config import Settings
from qwen_pipeline.errors import CheckFailed, CheckpointRefused
from qwen_pipeline.evaluation.regression import load_verdict
from qwen_pipeline.evaluation.report.load import load_validation
from qwen_pipeline.reports import load_reports
from qwen_pipeline.stages.publish import CHECKS, publish
from qwen_pipeline.status import status_of
from qwen_pipeline_tests.chain import Chain, validate_chain
from qwen_pipeline_tests.edited_validations import Change, rewritten, seal


def run(chain: Chain, validated: Path, out: Path, **changes: Any) -> Artifact:
    arguments: dict[str, Any] = {
        "quantized": chain.quantized,
        "validated": validated,
        "destination": out,
        "base_model": "Qwen/Tiny",
        "fine_tune": "support-bot",
    }
    return publish(**(arguments | changes))


@pytest.fixture(scope="module")
def release(chain: Chain, validated: Artifact, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return run(chain, validated.path, tmp_path_factory.mktemp("published") / "release")


def test_a_release_holds_checkpoint_card_and_report(chain: Chain, validated: Artifact, release: Artifact) -> None:
    for root, folder in ((chain.quantized, ""), (validated.path, "validation/")):
        for path in open_manifest(root).contents.files:
            if not path.startswith("logs/"):
                original, copy = root / path, release.path / folder / path
                assert copy.read_bytes() == original.read_bytes()
                assert copy.stat().st_ino != original.stat().st_ino
                assert copy.stat().st_nlink == 1
    assert not list(release.path.rglob("*.log"))
    reports = load_reports(release.manifest.result)
    assert [report.name for report in reports] == [check.name for check in CHECKS]
    assert all(report.passed for report in reports)
    assert release.manifest.derivation.inputs == {
        "quantized": open_manifest(chain.quantized).content_digest,
        "validated": validated.manifest.content_digest,
    }
    require_intact(release.path)
    assert AutoConfig.from_pretrained(release.path).intermediate_size == 128
    assert AutoTokenizer.from_pretrained(release.path).chat_template
    assert run(chain, validated.path, release.path).reused


def test_a_release_of_hard_linked_files_has_copies(chain: Chain, validated: Artifact, tmp_path: Path) -> None:
    """Write into the other hard links of the quantized files: the release does not change."""
    shutil.copytree(chain.quantized, tmp_path / "mutable")
    shutil.copytree(tmp_path / "mutable", tmp_path / "linked", copy_function=os.link)
    release = run(chain, validated.path, tmp_path / "release", quantized=tmp_path / "linked")
    released = {path: path.read_bytes() for path in release.path.rglob("*") if path.is_file()}
    assert all(path.stat().st_nlink == 1 for path in released)

    for path in (tmp_path / "mutable").rglob("*.*"):
        with path.open("r+b") as file:
            file.write(b"overwritten")
    assert (tmp_path / "linked" / SINGLE_SHARD).read_bytes().startswith(b"overwritten")
    assert {path: path.read_bytes() for path in released} == released
    require_intact(release.path)


def test_the_card_has_the_fields_of_the_hub_and_the_instructions_for_users(release: Artifact) -> None:
    _, front_matter, card = (release.path / "README.md").read_text().split("---\n", 2)
    assert yaml.safe_load(front_matter) == {
        "base_model": "Qwen/Tiny",
        "base_model_relation": "quantized",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["gptq", "4-bit", "qwen2"],
    }
    for words in (
        "# support-bot, GPTQ 4 bits",
        "A fine-tune of [Qwen/Tiny](https://huggingface.co/Qwen/Tiny)",
        "vllm serve support-bot --tensor-parallel-size 2",
        "heads: **1, 2** (of",
        "Each MLP has 128 channels instead of the base's 96, so that",
        "The added channels are zeros.",
        "| quantized | 0.1 |",
        release.manifest.derivation.inputs["quantized"],
    ):
        assert words in card


def test_provenance_chains_every_digest_and_names_no_directory(chain: Chain, release: Artifact) -> None:
    text = (release.path / "provenance.json").read_text()
    provenance = json.loads(text)
    steps = {step["stage"]: step for step in provenance["steps"]}
    assert list(steps) == ["padded", "quantized", "validated"]
    assert steps["quantized"]["inputs"]["source"] == steps["padded"]["content_digest"]
    assert steps["validated"]["inputs"]["candidate"] == steps["quantized"]["content_digest"]
    assert steps["validated"]["inputs"]["reference"] == steps["padded"]["inputs"]["source"]
    assert steps["quantized"]["spec"]["bits"] == 4
    assert str(chain.merged.parent) not in text


def test_a_base_directory_is_named_by_its_last_part(chain: Chain, validated: Artifact, tmp_path: Path) -> None:
    release = run(chain, validated.path, tmp_path / "out", base_model="/models/private/tiny-base")
    texts = [(release.path / file).read_text() for file in ("README.md", "provenance.json")]
    assert all("tiny-base" in text and "/models" not in text for text in texts)


def test_nothing_is_published_without_a_validation(chain: Chain, tmp_path: Path) -> None:
    with pytest.raises(CheckpointRefused, match=r"has no manifest\.json"):
        run(chain, tmp_path / "absent", tmp_path / "out")
    with pytest.raises(CheckFailed, match="holds a padded output, not a validation of sha256:"):
        run(chain, chain.padded, tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


SKIPPED = {"skipped": True, "passed": False, "measured": None, "limit": None}


def test_a_release_names_the_optional_checks_that_were_skipped(
    chain: Chain, validated: Artifact, tmp_path: Path
) -> None:
    partly = rewritten(validated.path, tmp_path / "partly", {"checks": {"merged_not_worse": SKIPPED}})
    release = run(chain, partly, tmp_path / "out")
    words = (
        "checks that ran, with warnings: sample_texts; skipped: merged_not_worse, tool_calls, thinking_length,"
        " json_answers, needles_found, kl_along_context, serves, benchmark_tasks"
    )
    (passed, _) = load_reports(release.manifest.result)
    assert passed.detail == f"Passed: 10 of 11 {words}."
    assert f"before release: passed: 10 of 11 {words}." in (release.path / "README.md").read_text()


CANDIDATE = {"candidate": "sha256:" + "0" * 64}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"checks": {"kl_divergence": {"passed": False}}}, "is not published: kl_divergence: "),
        ({"checks": {"kl_divergence": SKIPPED}}, "is not published: kl_divergence was skipped: "),
        ({"checks": {"float16_range": SKIPPED}}, "is not published: float16_range was skipped: "),
        ({"checks": {"padding_is_silent": SKIPPED}}, "is not published: padding_is_silent was skipped: "),
        (CANDIDATE, r"is a validation of sha256:0{64}, not of sha256:"),
    ],
)
def test_only_a_passed_validation_of_these_bytes_is_published(
    chain: Chain, validated: Artifact, tmp_path: Path, change: Change, words: str
) -> None:
    altered = rewritten(validated.path, tmp_path / "validated", change)
    with pytest.raises(CheckFailed, match=words):
        run(chain, altered, tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("files", [("manifest.json",), ("report.json",), ("manifest.json", "report.json")])
def test_a_failed_check_that_was_edited_to_passed_is_not_published(
    chain: Chain, validated: Artifact, tmp_path: Path, files: Sequence[str]
) -> None:
    failed = rewritten(validated.path, tmp_path / "failed", {"checks": {"kl_divergence": {"passed": False}}})
    edited = rewritten(failed, tmp_path / "edited", {"checks": {"kl_divergence": {"passed": True}}}, files=files)
    with pytest.raises(CheckpointRefused, match="edited is damaged: ") as refusal:
        run(chain, edited, tmp_path / "out")
    assert refusal.value.remedy == f"Delete {edited} and validate again."
    assert not list(tmp_path.glob("out*"))


@pytest.mark.slow
def test_an_edited_validation_is_not_reused_and_its_remedy_works(
    chain: Chain, validated: Artifact, tmp_path: Path
) -> None:
    failed = {"checks": {"kl_divergence": {"passed": False}}}
    edited = rewritten(validated.path, tmp_path / "edited", failed, files=["manifest.json"])
    with pytest.raises(CheckpointRefused, match="edited is damaged: ") as refusal:
        validate_chain(chain, edited)
    assert refusal.value.remedy == f"Delete {edited} and validate again."

    shutil.rmtree(edited)
    again = validate_chain(chain, edited)
    assert again.manifest.content_digest == validated.manifest.content_digest
    assert run(chain, edited, tmp_path / "out").path.is_dir()


def test_an_edited_candidate_in_the_manifest_is_not_published(
    chain: Chain, validated: Artifact, tmp_path: Path
) -> None:
    """The derivation is not covered by the content digest either."""
    other = rewritten(validated.path, tmp_path / "other", CANDIDATE)
    manifest = open_manifest(other)
    inputs = {**manifest.derivation.inputs, "candidate": open_manifest(chain.quantized).content_digest}
    edited = replace(manifest, derivation=replace(manifest.derivation, inputs=inputs))
    (other / "manifest.json").write_bytes(dump_manifest(edited))
    with pytest.raises(CheckpointRefused, match="its manifest states the candidate sha256:"):
        run(chain, other, tmp_path / "out")


def test_a_validation_that_was_edited_with_its_digests_has_another_content_digest(
    chain: Chain, validated: Artifact, tmp_path: Path
) -> None:
    forged = rewritten(validated.path, tmp_path / "forged", {"checks": {"kl_divergence": {"measured": 0.0}}})
    release = run(chain, forged, tmp_path / "out")
    assert release.manifest.derivation.inputs["validated"] != validated.manifest.content_digest


REMOVED, TWICE = {"remove": True}, {"twice": True}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"checks": {"structure": REMOVED}}, "there is no report on structure"),
        ({"checks": {"structure": TWICE}}, "there are 2 reports on structure"),
        ({"checks": {"structure": {"name": "other"}}}, "other is no check of a validation"),
        ({"checks": {"serves": {"skipped": True, "passed": True}}}, "serves is skipped and passed at once"),
        ({"checks": {"kl_divergence": {"measured": 0.31}}}, "kl_divergence is passed, but 0.31 is beyond its limit"),
        ({"checks": {"kl_divergence": {"measured": "nan"}}}, "kl_divergence is passed, but nan is beyond its limit"),
        ({"checks": {"kl_divergence": {"measured": "low"}}}, "kl_divergence compares 'low' with .*, expected two"),
        ({"checks": {"top1_agreement": {"measured": 0.69}}}, "top1_agreement is passed, but 0.69 is beyond its limit"),
        (
            {"checks": {"kl_divergence": {"measured": None}}},
            "kl_divergence is passed without a measured value, but has the limit",
        ),
        ({"checks": {"kl_divergence": {"measured": 10**400}}}, "checks: int too large to convert to float"),
        (
            {"checks": {"kl_divergence": {"measured": 5.0, "limit": 9.0}}},
            "kl_divergence has the limit 9.0, but its spec gives 0.3",
        ),
        (
            {"checks": {"structure": {"passed": False, "severity": "WARN"}}},
            "structure is a warning, but a failure of it blocks",
        ),
        (
            {"checks": {"serves": {"passed": True, "skipped": False}}},
            "serves is passed, but its findings say that it did not run",
        ),
        ({"text": None}, "text: Input should be a valid string"),
        ({"checks": {"structure": {"passed": 1}}}, "0.passed: Input should be a valid boolean"),
        ({"checks": {"structure": {"passed": "true"}}}, "0.passed: Input should be a valid boolean"),
        ({"checks": {"structure": {"passed": None}}}, "0.passed: Input should be a valid boolean"),
        ({"checks": {"structure": {"skipped": 0}}}, "0.skipped: Input should be a valid boolean"),
        ({"checks": {"structure": {"measured": True}}}, "0.measured.float: Input should be a valid number"),
        ({"checks": {"structure": {"measured": [1]}}}, "0.measured.float: Input should be a valid number"),
        ({"checks": {"structure": {"severity": "INFO"}}}, "0.severity: Input should be 'ERROR' or 'WARN'"),
        ({"checks": {"structure": {"detail": 5}}}, "0.detail: Input should be a valid string"),
        ({"checks": {"structure": {"more": 5}}}, "more"),
        ({"checks": None}, "checks: Input should be a valid array"),
        ({"checks": 5}, "checks: Input should be a valid array"),
        ({"checks": [5]}, "checks.0"),
        ({"candidate": None}, "candidate: Input should be a valid string"),
        ({"findings": []}, "findings: "),
        ({"padding": [{"field": "intermediate_size"}]}, "padding.0.live: Field required"),
        ({"lineage": "none"}, "lineage: "),
    ],
)
def test_a_malformed_report_is_refused_and_shown_as_damaged(
    chain: Chain, validated: Artifact, tmp_path: Path, change: Change, words: str
) -> None:
    root = tmp_path / "store" / "validated" / "bot" / "0"
    malformed = rewritten(validated.path, root, change)
    (root.parent / "latest").symlink_to("0")
    with pytest.raises(CheckpointRefused, match=words):
        run(chain, malformed, tmp_path / "out")
    settings = Settings(base_model="base", workspace=tmp_path)
    assert status_of(settings, "bot", None).stages["validated"].state == "damaged"
    with pytest.raises(CheckpointRefused, match=words):
        load_validation(malformed, open_manifest(malformed))
    with pytest.raises(CheckpointRefused, match=words):
        load_verdict(malformed)
    shutil.rmtree(malformed)
    assert status_of(settings, "bot", None).stages["validated"].state == "missing"


@pytest.mark.parametrize("data", [b"", b"[]", b"null", b"{", b"\xff", b"[" * 100_000])
def test_a_report_that_is_not_a_json_object_is_refused(
    chain: Chain, validated: Artifact, tmp_path: Path, data: bytes
) -> None:
    broken = Path(shutil.copytree(validated.path, tmp_path / "broken"))
    seal(broken, data, open_manifest(broken).result)
    with pytest.raises(CheckpointRefused, match=r"broken is damaged: report\.json"):
        run(chain, broken, tmp_path / "out")


@pytest.mark.parametrize("file", ["model.safetensors", "tokenizer.json", "config.json"])
def test_a_file_that_changed_after_validation_is_not_published(
    chain: Chain, validated: Artifact, tmp_path: Path, file: str
) -> None:
    tampered = Path(shutil.copytree(chain.quantized, tmp_path / "tampered"))
    data = bytearray((tampered / file).read_bytes())
    data[-20] ^= 1
    (tampered / file).write_bytes(data)
    with pytest.raises(CheckpointRefused, match=f"tampered/{file} is not the file that was validated"):
        run(chain, validated.path, tmp_path / "out", quantized=tampered)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "file", ["optimizer.pt", "training_args.bin", "modeling.py", ".env", "a/b.json", "spk_dict.pt"]
)
def test_only_listed_files_are_released(chain: Chain, validated: Artifact, tmp_path: Path, file: str) -> None:
    held = tmp_path / "held"
    shutil.copytree(chain.quantized, held)
    (held / file).parent.mkdir(exist_ok=True)
    torch.save({"voices": [torch.zeros(2), Counter()]}, tmp_path / "voices")
    (tmp_path / "voices").rename(held / file)
    manifest = open_manifest(held)
    files = {**manifest.contents.files, file: digest_file(held / file)}
    contents = replace(manifest.contents, files=files)
    (held / "manifest.json").write_bytes(
        dump_manifest(replace(manifest, contents=contents, content_digest=contents.digest))
    )
    forged = rewritten(validated.path, tmp_path / "forged", {"candidate": contents.digest})
    inputs = {**open_manifest(forged).derivation.inputs, "candidate": contents.digest}
    edited = open_manifest(forged)
    (forged / "manifest.json").write_bytes(
        dump_manifest(replace(edited, derivation=replace(edited.derivation, inputs=inputs)))
    )
    with pytest.raises(
        CheckpointRefused, match=f"held has files .* not hold: '{file}'|{file} names collections.Counter"
    ):
        run(chain, forged, tmp_path / "out", quantized=held)
    assert not (tmp_path / "out").exists()


def test_a_release_names_no_directory_of_this_machine(chain: Chain, release: Artifact) -> None:
    for path in release.path.rglob("*"):
        if path.is_file() and path.suffix != ".safetensors":
            assert str(chain.merged.parent).encode() not in path.read_bytes(), path


def test_a_changed_report_is_not_published(chain: Chain, validated: Artifact, tmp_path: Path) -> None:
    tampered = Path(shutil.copytree(validated.path, tmp_path / "tampered"))
    (tampered / "report.md").write_text("**Passed.**\n")
    with pytest.raises(CheckpointRefused, match=r"tampered/report\.md is not the file that was validated"):
        run(chain, tampered, tmp_path / "out")


def test_a_missing_file_is_named(chain: Chain, validated: Artifact, tmp_path: Path) -> None:
    partly = Path(shutil.copytree(validated.path, tmp_path / "partly"))
    (partly / "report.md").unlink()
    with pytest.raises(CheckpointRefused, match=r"partly/report\.md is missing"):
        run(chain, partly, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("edited", [{"candidate": "sha256:" + "0" * 64}, {"text": "sha256:1"}])
def test_the_figures_of_a_release_are_those_that_its_manifest_covers(
    validated: Artifact, release: Artifact, tmp_path: Path, edited: Change
) -> None:
    assert load_verdict(release.path) == load_verdict(validated.path)
    copy = Path(shutil.copytree(release.path, tmp_path / "copy"))
    report = copy / "validation" / "report.json"
    report.write_text(json.dumps(json.loads(report.read_bytes()) | edited))
    with pytest.raises(CheckpointRefused, match=r"validation/report\.json has the SHA-256"):
        load_verdict(copy)


def test_copies_share_no_bytes_with_the_source(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "below" / "target"
    source.write_bytes(os.urandom(100_000))
    before = source.read_bytes()
    copy_file(source, target)
    with source.open("r+b") as file:
        file.write(b"changed")
    assert target.read_bytes() == before
