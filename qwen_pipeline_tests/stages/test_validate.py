"""Validation end to end on a chain made by the real stages."""

import json
import os
import re
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from qwen_pipeline.checkpoint.store.destinations import Artifact, Directory
from qwen_pipeline.checkpoint.store.verify import require_intact
from qwen_pipeline.errors import CheckpointRefused, EnvironmentFault, InputRefused, QuantizedInputRefused
from qwen_pipeline.evaluation.head_checks import concerning
from qwen_pipeline.evaluation.limits import Limits
from qwen_pipeline.evaluation.report.markdown import report_markdown
from qwen_pipeline.evaluation.tasks.plan import TaskPlan
from qwen_pipeline.evaluation.tensor_parallel.findings import Target
from qwen_pipeline.progress import Progress
from qwen_pipeline.quantization.calibration.spec import CalibrationSpec
from qwen_pipeline.qwen.padding_spec import PaddingSpec
from qwen_pipeline.reports import CheckReport, load_reports
from qwen_pipeline.stages.calibrate import calibrate
from qwen_pipeline.stages.merge import merge
from qwen_pipeline.stages.pad import pad
from qwen_pipeline.stages.validate import CHECKS
from qwen_pipeline.text.bounded_tokenizer import BoundedTokenizer
from qwen_pipeline.text.windows import read_windows
from qwen_pipeline.transforms.codes.base_weights import BaseWeights
from qwen_pipeline.workers.environments import WorkerEnvironment
from qwen_pipeline_tests.chain import GROUP_SIZE, Chain, validate_chain
from qwen_pipeline_tests.rounding import round_to_codes
from qwen_pipeline_tests.tiny import load_tiny, tiny_adapter, tiny_model

UNASKED = ["tool_calls", "thinking_length", "json_answers", "needles_found", "kl_along_context"]
"""What a random model does not do, or a short window does not show."""


def reports(artifact: Artifact) -> dict[str, CheckReport]:
    found = load_reports(artifact.manifest.result)
    assert [report.name for report in found] == [check.name for check in CHECKS]
    return {report.name: report for report in found}


def test_a_sound_checkpoint_passes_and_the_report_shows_it(chain: Chain, validated: Artifact) -> None:
    found = reports(validated)
    skipped = [report for report in concerning(list(found.values())) if report.skipped]
    assert [report.name for report in skipped] == [*UNASKED, "serves", "benchmark_tasks"]
    assert all(report.passed for name, report in found.items() if not report.skipped and name != "sample_texts")
    assert reports(validated)["padding_is_silent"].measured == pytest.approx(0, abs=1e-9)
    assert validated.manifest.derivation.inputs.keys() == {"base", "reference", "padded", "candidate", "text"}
    assert [step["stage"] for step in validated.manifest.result["lineage"]] == ["padded"]
    assert validated.manifest.run.peak_memory_bytes > 200e6  # the worker's
    require_intact(validated.path)

    report = (validated.path / "report.md").read_text()
    assert report.startswith("# Validation report\n\n**Passed: ")
    for words in (
        "| quantized |",
        "| padding_is_silent |",
        "| ⏭️ **skipped** | serves |",
        "(perplexity.png)",
        "(quantization_error.png)",
        "> Hi",
    ):
        assert words in report
    for file in ("report.json", "perplexity.png", "quantization_error.png"):
        assert (validated.path / file).stat().st_size > 500
    assert json.loads((validated.path / "report.json").read_text()) == validated.manifest.result
    assert not re.search(r"/tmp|/home|20\d\d-", report + (validated.path / "report.json").read_text())

    page = (validated.path / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 4
    assert not re.search(r"(src|href)=\"(?!data:)", page)
    for words in ("Passed: ", "padding_is_silent", "<blockquote>Hi</blockquote>", "<td>quantized</td>"):
        assert words in page

    inlined = report_markdown(validated.path)
    assert inlined.count("data:image/png;base64,") == 4
    assert ".png)" not in inlined
    assert "data:image" not in report_markdown(validated.path, max_inline_bytes=100)

    assert validate_chain(chain, validated.path).reused


@pytest.mark.slow
def test_without_the_padded_checkpoint_the_reference_is_padded_on_the_fly(chain: Chain, tmp_path: Path) -> None:
    padded = pad(
        source=chain.merged,
        destination=Directory(tmp_path / "padded"),
        spec=PaddingSpec(group_size=GROUP_SIZE, tensor_parallel=2, layout="interleave"),
    )
    codes = round_to_codes(padded.path, tmp_path / "codes", group_size=GROUP_SIZE)
    found = reports(validate_chain(chain, tmp_path / "out", candidate=codes, padded=None, base=None))
    assert found["structure"].passed
    assert found["padding_is_silent"].passed
    assert found["padding_is_silent"].detail == (
        "All 64 added channels are still zero; all 0 split ones have equal rows."
    )


def test_a_candidate_padded_by_the_pipeline_requires_its_padded_checkpoint(chain: Chain, tmp_path: Path) -> None:
    with pytest.raises(InputRefused, match=r"--padded DIR"):
        validate_chain(chain, tmp_path / "out", padded=None, base=None)


@pytest.mark.slow
def test_the_unpadded_model_calibration_and_the_previous_version_are_shown_if_given(
    chain: Chain, tmp_path: Path
) -> None:
    unpadded = round_to_codes(chain.merged, tmp_path / "unpadded", group_size=GROUP_SIZE)
    tokens = calibrated(chain, tmp_path / "tokens", samples=16)
    out = validate_chain(
        chain, tmp_path / "out", unpadded=unpadded, calibration=tokens, before=chain.quantized, base=None
    )
    assert out.manifest.derivation.inputs.keys() >= {"unpadded", "calibration", "before"}
    assert re.search(r"On (its calibration tokens|held-out text) it is \d", reports(out)["float16_range"].detail)
    kl = {
        role: figures["divergence"]["mean"]
        for role, figures in out.manifest.result["findings"]["models"].items()
        if figures["divergence"]
    }
    assert list(kl) == ["padded", "quantized", "quantized unpadded"]
    cost = f"is {kl['quantized'] / kl['quantized unpadded']:.3f} times that of the merged model quantized without"
    for file in ("report.md", "report.html"):
        text = (out.path / file).read_text()
        assert cost in text
        assert "quantized unpadded" in text
        assert "Losses of 14 modules are 1.000 times those of the version before" in text


@pytest.mark.slow
def test_both_merges_of_a_qlora_are_measured_on_the_text(chain: Chain, tmp_path: Path) -> None:
    adapter = tiny_adapter(chain.merged, tmp_path / "adapter")
    readings = {"merged": BaseWeights(), "merged otherwise": BaseWeights(nf4="double")}
    roots = {
        role: merge(base=chain.merged, fine_tune=adapter, destination=tmp_path / role, base_weights=weights).path
        for role, weights in readings.items()
    }
    candidate = round_to_codes(roots["merged"], tmp_path / "candidate", group_size=GROUP_SIZE)
    with pytest.raises(InputRefused, match="is not the merge of"):
        validate_chain(
            chain, tmp_path / "out", reference=roots["merged"], other_merge=chain.merged, candidate=candidate,
            padded=None,
        )  # fmt: skip
    out = validate_chain(
        chain, tmp_path / "out", reference=roots["merged"], other_merge=roots["merged otherwise"],
        candidate=candidate, padded=None,
    )  # fmt: skip
    windows, _ = read_windows(chain.text, BoundedTokenizer(chain.merged), windows=2, seq_len=64)
    tokens = torch.tensor(windows)
    found = out.manifest.result["findings"]["models"]
    for role, root in roots.items():
        logits = load_tiny(root)(input_ids=tokens).logits[:, :-1].flatten(0, 1)
        loss = torch.nn.functional.cross_entropy(logits, tokens[:, 1:].flatten())
        assert found[role]["perplexity"] == pytest.approx(loss.exp().item(), rel=1e-4)
    assert found["merged"]["perplexity"] != found["merged otherwise"]["perplexity"]
    assert found["merged otherwise"]["divergence"]["mean"] > 0
    for file in ("report.md", "report.html"):
        assert (
            "merged otherwise onto the base rounded to NF4 as by QLoRA (base_nf4 double)"
            in (out.path / file).read_text()
        )


def test_calibration_that_it_was_not_quantized_on_is_refused(chain: Chain, tmp_path: Path) -> None:
    with pytest.raises(InputRefused, match=r"was not quantized on the tokens of .*/tokens"):
        validate_chain(chain, tmp_path / "out", calibration=calibrated(chain, tmp_path / "tokens", samples=8))


def test_a_previous_version_without_losses_is_refused(chain: Chain, tmp_path: Path) -> None:
    with pytest.raises(InputRefused, match=r"has no logs/evidence\.csv"):
        validate_chain(chain, tmp_path / "out", before=chain.padded)


def calibrated(chain: Chain, out: Path, *, samples: int) -> Path:
    """Draw calibration tokens, for 16 samples those of the chain's quantization."""
    text = chain.merged.parent / "calibration.jsonl"
    spec = CalibrationSpec(samples=samples, seq_len=64)
    return calibrate(source=chain.padded, text=text, destination=Directory(out), spec=spec).path


def test_only_the_unpadded_twin_shows_the_cost_of_padding(chain: Chain, tmp_path: Path) -> None:
    other = round_to_codes(chain.merged, tmp_path / "other", group_size=48)
    with pytest.raises(InputRefused, match="other has another code format than the candidate, so it cannot show"):
        validate_chain(chain, tmp_path / "out", unpadded=other)
    with pytest.raises(InputRefused, match="is padded, was quantized from another model, so"):
        validate_chain(chain, tmp_path / "out", unpadded=chain.quantized)
    with pytest.raises(InputRefused, match="merged has another code format"):
        validate_chain(chain, tmp_path / "out", unpadded=chain.merged)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_the_same_inputs_give_the_same_bytes(chain: Chain, validated: Artifact, tmp_path: Path) -> None:
    progress: list[Progress] = []
    again = validate_chain(chain, tmp_path / "again", observe=progress.append)
    assert again.manifest.content_digest == validated.manifest.content_digest
    tasks = {event.task: event for event in progress if event.done}
    assert tasks["evaluate"].done == tasks["evaluate"].total == 2
    assert tasks["compare weights"].done == 14


def test_a_candidate_that_cannot_be_loaded_fails_with_the_reason(chain: Chain, tmp_path: Path) -> None:
    broken = Path(shutil.copytree(chain.quantized, tmp_path / "broken", ignore=_manifest))
    tensors = load_file(broken / "model.safetensors")
    del tensors["model.layers.0.mlp.gate_proj.scales"]
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})

    found = reports(validate_chain(chain, tmp_path / "out", candidate=broken, base=None))
    failed = {name for name, report in found.items() if report.blocks}
    unmeasured = {"perplexity_ratio", "kl_divergence", "top1_agreement"}
    assert failed == {"structure", "ranks_agree", "loads_in_transformers"} | unmeasured
    assert found["structure"].detail == "model.layers.0.mlp.gate_proj.scales is missing."
    assert "gate_proj.scales" in found["loads_in_transformers"].detail
    report = (tmp_path / "out" / "report.md").read_text()
    assert report.startswith("# Validation report\n\n**Failed: structure, ")
    assert "*no answer*" in report


@pytest.mark.slow
def test_packed_experts_are_measured_although_transformers_cannot_load_them(chain: Chain, tmp_path: Path) -> None:
    mixture = tiny_model("qwen3_moe", tmp_path / "mixture")
    packed = round_to_codes(mixture, tmp_path / "packed", group_size=GROUP_SIZE)
    changes = {"reference": mixture, "candidate": packed, "padded": None, "base": None, "tensor_parallel": 1}
    at_random = Limits(min_top1_agreement=0)
    found = reports(validate_chain(chain, tmp_path / "out", limits=at_random, **changes))
    assert {name for name, report in found.items() if report.blocks} == set()
    assert not found["loads_in_transformers"].passed
    assert "missing_keys: model.layers.0.mlp.experts.down_proj" in found["loads_in_transformers"].detail
    assert found["top1_agreement"].measured
    for name in ("structure", "ranks_agree", "kl_divergence", "float16_range"):
        assert found[name].passed, found[name].detail
    answers = json.loads((tmp_path / "out" / "report.json").read_text())["findings"]["samples"][0]
    assert answers["candidate"]["tokens"]


@pytest.mark.slow
def test_tasks_that_cannot_run_fail_their_check_and_the_report_is_written(chain: Chain, tmp_path: Path) -> None:
    absent = TaskPlan(python=tmp_path / "python", versions={}, tasks=["arc_easy"])
    found = reports(validate_chain(chain, tmp_path / "out", base=None, tasks=absent))
    assert found["benchmark_tasks"].blocks
    assert "No scores: " in found["benchmark_tasks"].detail
    assert "cannot be started: No such file" in found["benchmark_tasks"].detail
    found = {report.name: report for report in concerning(list(found.values()))}
    assert {name for name, report in found.items() if report.skipped} == {"merged_not_worse", *UNASKED, "serves"}
    others = found.keys() - {"merged_not_worse", *UNASKED, "serves", "benchmark_tasks", "sample_texts"}
    assert all(found[name].passed for name in others)


@pytest.mark.slow
def test_a_measurement_that_dies_is_an_environment_fault_and_not_a_verdict(chain: Chain, tmp_path: Path) -> None:
    """Kill the worker, then use an environment without its packages; the next run succeeds."""

    def kill(progress: Progress) -> None:
        if progress.task == "evaluate":
            for pid in Path("/proc/thread-self/children").read_text().split():
                os.kill(int(pid), signal.SIGKILL)

    with pytest.raises(EnvironmentFault, match=r"worker:measure was killed by SIGKILL.*memory ran out"):
        validate_chain(chain, tmp_path / "out", observe=kill)
    bare = WorkerEnvironment(name="gptqmodel", python=Path(sys.executable))
    with pytest.raises(EnvironmentFault, match=r"lacks gptqmodel"):
        validate_chain(chain, tmp_path / "out", engine=bare)
    assert not (tmp_path / "out").exists()
    assert not validate_chain(chain, tmp_path / "out").reused


def test_ranks_that_would_give_wrong_answers_block(chain: Chain, tmp_path: Path) -> None:
    """Validate the unpadded twin of the chain, whose three groups two ranks cannot share."""
    narrow = round_to_codes(chain.merged, tmp_path / "narrow", group_size=GROUP_SIZE)
    targets = [Target.parse("vllm-exllama:2"), Target.parse("lmdeploy-turbomind:2"), Target.parse("vllm-exllama:1")]
    out = validate_chain(chain, tmp_path / "out", candidate=narrow, padded=None, base=None, targets=targets)
    report = reports(out)["ranks_agree"]
    assert report.blocks
    assert report.measured == 2
    assert "vllm-exllama at 2 gives wrong answers without an error: 2 of 14 weights differ" in report.detail
    assert "same next token" in report.detail
    assert "lmdeploy-turbomind at 2 refuses it: refused: groups of 32: expected 128" in report.detail
    page = (out.path / "report.html").read_text()
    assert "Tensor parallelism by engine" in page
    assert "12 of 14 equal" in page


@pytest.mark.slow
def test_a_byte_that_changed_since_quantization_is_refused(chain: Chain, tmp_path: Path) -> None:
    tampered = Path(shutil.copytree(chain.quantized, tmp_path / "tampered"))
    tensors = load_file(tampered / "model.safetensors")
    scales = tensors["model.layers.0.mlp.gate_proj.scales"]
    scales[0, 0] = scales[0, 0].nextafter(scales[0, 1] * 0)
    save_file(tensors, tampered / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointRefused, match=r"does not match its manifest.*model\.safetensors"):
        validate_chain(chain, tmp_path / "out", candidate=tampered)
    assert not (tmp_path / "out").exists()


def test_wrong_inputs_are_refused_before_anything_is_written(chain: Chain, tmp_path: Path) -> None:
    with pytest.raises(QuantizedInputRefused, match="reference"):
        validate_chain(chain, tmp_path / "out", reference=chain.quantized)
    with pytest.raises(InputRefused, match="fewer than one window of 100000"):
        validate_chain(chain, tmp_path / "out", seq_len=100_000)
    with pytest.raises(InputRefused, match="does not exist"):
        validate_chain(chain, tmp_path / "out", text=tmp_path / "absent.txt")
    cut = Path(shutil.copytree(chain.quantized, tmp_path / "cut"))
    (cut / "model.safetensors").write_bytes((cut / "model.safetensors").read_bytes()[:-9])
    with pytest.raises(CheckpointRefused, match=r"cut/model\.safetensors"):
        validate_chain(chain, tmp_path / "out", candidate=cut)
    assert not list(tmp_path.glob("out*"))


def test_tokens_beyond_a_vocabulary_are_refused(chain: Chain, tmp_path: Path) -> None:
    small = Path(shutil.copytree(chain.merged, tmp_path / "small"))
    config = json.loads((small / "config.json").read_text())
    (small / "config.json").write_text(json.dumps(config | {"vocab_size": 100}))
    with pytest.raises(InputRefused, match="the base model's vocabulary has 100"):
        validate_chain(chain, tmp_path / "out", base=small)


def _manifest(_: str, names: list[str]) -> list[str]:
    return [name for name in names if name == "manifest.json"]
