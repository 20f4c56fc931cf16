"""A new validation is held against what was released before it, never against itself."""

from dataclasses import replace
from pathlib import Path

from qwen_pipeline.checkpoint.store.destinations import Artifact, CheckpointStore
from qwen_pipeline.stages.publish import publish
from qwen_pipeline.status import against_last_release
from qwen_pipeline_tests.chain import Chain


def test_the_last_release_of_other_bytes_is_the_measure(chain: Chain, validated: Artifact, tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    publish(
        quantized=chain.quantized,
        validated=validated.path,
        destination=store.slot("bot"),
        base_model="Qwen/Tiny",
        fine_tune="bot",
    )
    assert "no earlier release" in against_last_release(store, "bot", validated).detail

    derivation = replace(
        validated.manifest.derivation, inputs={**validated.manifest.derivation.inputs, "candidate": "x"}
    )
    later = replace(validated, manifest=replace(validated.manifest, derivation=derivation))
    report = against_last_release(store, "bot", later)
    assert report.passed
    assert report.measured == 1.0
    assert "no earlier release" in against_last_release(store, "another", later).detail
