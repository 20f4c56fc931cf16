"""A release is made only of what passed, byte for byte, and says where it comes from."""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import AutoConfig, AutoTokenizer

from qwen_pipeline.checkpoint.files import copy_file
from qwen_pipeline.checkpoint.lazy import SINGLE_SHARD
from qwen_pipeline.checkpoint.manifest import Manifest, dump_manifest, open_manifest
from qwen_pipeline.checkpoint.store.destinations import Artifact, Directory
from qwen_pipeline.checkpoint.store.verify import require_intact
from qwen_pipeline.errors import CheckFailed, CheckpointRefused
from qwen_pipeline.reports import load_reports
from qwen_pipeline.stages.publish import CHECKS, publish
from qwen_pipeline_tests.chain import Chain


def run(chain: Chain, validated: Path, out: Path, **changes: Any) -> Artifact:
    arguments: dict[str, Any] = {
        "quantized": chain.quantized,
        "validated": validated,
        "destination": Directory(out),
        "base_model": "Qwen/Tiny",
        "fine_tune": "support-bot",
    }
    return publish(**(arguments | changes))


@pytest.fixture(scope="module")
def release(chain: Chain, validated: Artifact, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return run(chain, validated.path, tmp_path_factory.mktemp("published") / "release")


def test_a_release_is_the_checkpoint_its_card_and_its_report(
    chain: Chain, validated: Artifact, release: Artifact
) -> None:
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


def test_a_release_of_files_with_second_names_shares_none_of_them(
    chain: Chain, validated: Artifact, tmp_path: Path
) -> None:
    """Whoever then writes into the other name of a file changes what was quantized, not what was released."""
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


def test_the_card_says_what_a_hub_and_a_person_need(release: Artifact) -> None:
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


def test_a_base_that_is_a_directory_is_named_by_its_last_part(
    chain: Chain, validated: Artifact, tmp_path: Path
) -> None:
    release = run(chain, validated.path, tmp_path / "out", base_model="/models/private/tiny-base")
    texts = [(release.path / file).read_text() for file in ("README.md", "provenance.json")]
    assert all("tiny-base" in text and "/models" not in text for text in texts)


def test_no_report_no_release(chain: Chain, tmp_path: Path) -> None:
    with pytest.raises(CheckpointRefused, match=r"has no manifest\.json"):
        run(chain, tmp_path / "absent", tmp_path / "out")
    with pytest.raises(CheckFailed, match="is a validation of None, not of sha256:"):
        run(chain, chain.padded, tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


Alter = Callable[[Manifest], Manifest]


def of_other_bytes(manifest: Manifest) -> Manifest:
    inputs = {**manifest.derivation.inputs, "candidate": "sha256:" + "0" * 64}
    return replace(manifest, derivation=replace(manifest.derivation, inputs=inputs))


def failed(manifest: Manifest) -> Manifest:
    checks = [{**check, "passed": check["name"] != "kl_divergence"} for check in manifest.result["checks"]]
    return replace(manifest, result={**manifest.result, "checks": checks})


def incomplete(manifest: Manifest) -> Manifest:
    return replace(manifest, result={**manifest.result, "checks": manifest.result["checks"][1:]})


@pytest.mark.parametrize(
    ("alter", "words"),
    [
        (of_other_bytes, r"is a validation of sha256:0{64}, not of sha256:"),
        (failed, "is not published: kl_divergence: "),
        (incomplete, "has no report on structure"),
    ],
)
def test_only_a_passed_validation_of_these_bytes_counts(
    chain: Chain, validated: Artifact, tmp_path: Path, alter: Alter, words: str
) -> None:
    altered = Path(shutil.copytree(validated.path, tmp_path / "validated"))
    (altered / "manifest.json").write_bytes(dump_manifest(alter(validated.manifest)))
    with pytest.raises(CheckFailed, match=words):
        run(chain, altered, tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("file", ["model.safetensors", "tokenizer.json", "config.json"])
def test_a_file_that_changed_after_validation_is_not_released(
    chain: Chain, validated: Artifact, tmp_path: Path, file: str
) -> None:
    tampered = Path(shutil.copytree(chain.quantized, tmp_path / "tampered"))
    data = bytearray((tampered / file).read_bytes())
    data[-20] ^= 1
    (tampered / file).write_bytes(data)
    with pytest.raises(CheckpointRefused, match=f"tampered/{file} is not the file that was validated"):
        run(chain, validated.path, tmp_path / "out", quantized=tampered)
    assert not (tmp_path / "out").exists()


def test_a_report_that_changed_is_not_released(chain: Chain, validated: Artifact, tmp_path: Path) -> None:
    tampered = Path(shutil.copytree(validated.path, tmp_path / "tampered"))
    (tampered / "report.md").write_text("**Passed.**\n")
    with pytest.raises(CheckpointRefused, match=r"tampered/report\.md is not the file that was validated"):
        run(chain, tampered, tmp_path / "out")


def test_copies_share_nothing_that_a_write_could_reach(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "below" / "target"
    source.write_bytes(os.urandom(100_000))
    before = source.read_bytes()
    copy_file(source, target)
    with source.open("r+b") as file:
        file.write(b"changed")
    assert target.read_bytes() == before
