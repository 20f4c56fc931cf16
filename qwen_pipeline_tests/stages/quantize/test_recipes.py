"""Recipes other than GPTQ: codes of the same format, whose negative scales every reader takes."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from qwen_pipeline.checkpoint.lazy import open_checkpoint
from qwen_pipeline.checkpoint.store.destinations import Artifact, Directory
from qwen_pipeline.checkpoint.store.stage_input import open_input
from qwen_pipeline.evaluation.structure.check import check_structure
from qwen_pipeline.models.open import padded_recipe
from qwen_pipeline.quantization.evidence import STEP_ERRORS, evidence_frame
from qwen_pipeline.quantization.plot import draw_steps
from qwen_pipeline.qwen.padding_spec import Layout, PaddingSpec
from qwen_pipeline.reports import load_reports
from qwen_pipeline.stages.export import export
from qwen_pipeline.stages.pad import pad, prepare
from qwen_pipeline.stages.quantize import quantize
from qwen_pipeline.stages.repair import repair
from qwen_pipeline.transforms.codes.gptq import gptq_format
from qwen_pipeline_tests.chain import GROUP_SIZE, Chain, validate_chain
from qwen_pipeline_tests.quantization.test_layerwise import SPEC
from qwen_pipeline_tests.quantizers import logits_of
from qwen_pipeline_tests.rounding import save_dequantized
from qwen_pipeline_tests.stages.quantize.quantizing import require_passed
from qwen_pipeline_tests.stages.test_export import weights_by_compressed_tensors

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", params=["interleave", "split"])
def layout(request: pytest.FixtureRequest) -> Layout:
    return request.param


@pytest.fixture(scope="module")
def padded(chain: Chain, layout: Layout, tmp_path_factory: pytest.TempPathFactory) -> Path:
    spec = PaddingSpec(group_size=GROUP_SIZE, tensor_parallel=2, layout=layout)
    return pad(source=chain.merged, destination=tmp_path_factory.mktemp(layout) / "padded", spec=spec).path


@pytest.fixture(scope="module")
def fast(chain: Chain, padded: Path) -> Artifact:
    return quantized(chain, padded, "fast")


def quantized(chain: Chain, source: Path, recipe: Any, **changes: Any) -> Artifact:
    out = Directory(source.with_name(f"{recipe}-{len(list(source.parent.iterdir()))}"))
    return quantize(
        source=source, destination=out, calibration=chain.text.with_name("calibration.jsonl"),
        spec=replace(SPEC, recipe=recipe, **changes), engine=chain.engine,
    )  # fmt: skip


def test_the_format_is_the_same_and_scales_have_both_signs(fast: Artifact, padded: Path, chain: Chain) -> None:
    require_passed(fast)
    output, before = open_checkpoint(fast.path), open_checkpoint(padded)
    assert dict(output) == dict(open_checkpoint(chain.quantized))
    scales = torch.cat([output.load(name).flatten() for name in output if name.endswith(".scales")])
    assert 0.2 < (scales < 0).float().mean() < 0.8
    structure = check_structure(before, output)
    assert not structure.problems
    assert not structure.padding.audible
    assert structure.padding.channels + structure.padding.twins == 2 * 32
    assert [set(layer["errors"]) for layer in fast.manifest.result["layers"]] == [{"output"}] * 2
    assert all(0 < layer["errors"]["output"] < 0.1 for layer in fast.manifest.result["layers"])


def test_codes_do_not_depend_on_stored_weights(fast: Artifact, layout: Layout, chain: Chain, tmp_path: Path) -> None:
    spec = PaddingSpec(group_size=GROUP_SIZE, tensor_parallel=2, layout=layout)
    unstored = prepare(open_input("source", chain.merged), spec).write_recipe(
        tmp_path / "padded", lambda: padded_recipe(chain.merged), task="pad"
    )
    assert not list(unstored.path.glob("*.safetensors"))
    again = quantized(chain, unstored.path, "fast")
    assert again.manifest.derivation == fast.manifest.derivation
    assert again.manifest.content_digest == fast.manifest.content_digest
    assert validate_chain(replace(chain, padded=unstored.path, quantized=again.path), tmp_path / "validated")


def test_what_each_step_gained_is_recorded_and_drawn(fast: Artifact, chain: Chain, tmp_path: Path) -> None:
    frame = evidence_frame(fast.path)
    assert (frame["searched_error"] < frame["gptq_error"]).all()
    assert [set(STEP_ERRORS) <= loss.keys() for loss in fast.manifest.result["losses"]] == [True] * len(frame)
    caption = draw_steps(fast.path, tmp_path / "steps.png")
    assert caption
    assert "geometric means" in caption
    assert (tmp_path / "steps.png").stat().st_size
    assert draw_steps(chain.quantized, tmp_path / "none.png") is None
    assert not (tmp_path / "none.png").exists()


def test_a_learned_layer_comes_closer_and_its_padding_is_preserved(chain: Chain, padded: Path, fast: Artifact) -> None:
    artifact = quantized(chain, padded, "balanced")
    require_passed(artifact)
    structure = check_structure(open_checkpoint(padded), open_checkpoint(artifact.path))
    assert not structure.problems
    assert not structure.padding.audible
    learned = [layer["errors"] for layer in artifact.manifest.result["layers"]]
    first = fast.manifest.result["layers"][0]["errors"]["output"]
    assert learned[0]["before_learning"] == pytest.approx(first, rel=1e-3)
    assert all(errors["output"] < 1.0001 * errors["before_learning"] for errors in learned)  # or the codes are kept
    assert "Learned rounding leaves" in str(draw_steps(artifact.path, artifact.path.with_name("steps.png")))


def test_transformers_computes_with_negative_scales_what_the_weights_say(
    chain: Chain, fast: Artifact, padded: Path, tmp_path: Path
) -> None:
    """GPTQModel's CPU kernel takes them; the oracle has dequantized weights in full precision."""
    whole = save_dequantized(padded, fast.path, tmp_path / "dequantized")
    found, expected = logits_of(fast.path, whole)
    torch.testing.assert_close(found, expected, rtol=2e-3, atol=2e-3)
    validated = validate_chain(replace(chain, padded=padded, quantized=fast.path), tmp_path / "validated")
    outcomes = {report.name: report.outcome for report in load_reports(validated.manifest.result)}
    for check in ("structure", "loads_in_transformers", "padding_is_silent", "tensor_parallel", "ranks_agree"):
        assert outcomes[check] == "passed", outcomes


def test_negative_scales_are_exported_to_compressed_tensors(fast: Artifact, tmp_path: Path) -> None:
    artifact = export(source=fast.path, destination=tmp_path / "out")
    assert load_reports(artifact.manifest.result)[0].passed
    quantized, exported = open_checkpoint(fast.path), open_checkpoint(artifact.path)
    assert (exported.load("model.layers.0.mlp.up_proj.weight_scale") < 0).any()
    form = gptq_format(quantized.config)
    for module, weight_OI in weights_by_compressed_tensors(quantized, exported):
        assert torch.equal(weight_OI, form.load(quantized, module).weight_rows(0, len(weight_OI)))


def test_negative_scales_are_repaired(chain: Chain, tmp_path: Path) -> None:
    """The model before its padding has 3 groups, which 2 ranks cannot share."""
    source = quantized(chain, Path(shutil.copytree(chain.merged, tmp_path / "merged")), "fast").path
    artifact = repair(source=source, destination=tmp_path / "out", tensor_parallel=2)
    assert all(report.passed for report in load_reports(artifact.manifest.result))
    assert not open_checkpoint(artifact.path).config["intermediate_size"] % (2 * GROUP_SIZE)
    before, after = logits_of(source, artifact.path)
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5)
