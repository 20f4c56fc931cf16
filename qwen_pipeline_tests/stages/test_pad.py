"""The pad stage: its plan, its config, its refusals, and its resumption after a kill."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from qwen_pipeline.checkpoint.store.destinations import Artifact
from qwen_pipeline.checkpoint.store.verify import require_intact
from qwen_pipeline.errors import InputRefused, QuantizedInputRefused
from qwen_pipeline.qwen.geometry import load_plan
from qwen_pipeline.qwen.padding_spec import PaddingSpec
from qwen_pipeline.qwen.tensor_parallel.plan import Targets
from qwen_pipeline.reports import CheckReport, load_reports
from qwen_pipeline.stages.pad import CHECKS, pad
from qwen_pipeline.transforms.padding.pad import source_map
from qwen_pipeline_tests.oracles import logits
from qwen_pipeline_tests.tiny import HIDDEN, tiny_qwen2, tiny_qwen3, with_codes

KILLED = "qwen_pipeline_tests.stages.killed_stage"
SPEC = PaddingSpec(group_size=32, tensor_parallel=2)


def reports_of(artifact: Artifact) -> dict[str, CheckReport]:
    reports = load_reports(artifact.manifest.result)
    assert [report.name for report in reports] == [check.name for check in CHECKS]
    return {report.name: report for report in reports}


def test_a_padded_checkpoint_loads_and_has_the_logits_of_the_live_one(tmp_path: Path) -> None:
    live = tiny_qwen3(tmp_path / "live", shards=3)
    padded = pad(source=live, destination=tmp_path / "padded", spec=SPEC)

    config = json.loads((padded.path / "config.json").read_text())
    assert config == json.loads((live / "config.json").read_text()) | {"intermediate_size": 128}
    assert config["hidden_size"] == HIDDEN
    assert (logits(padded.path) - logits(live)).abs().max() < 1e-12
    assert all(report.passed for report in reports_of(padded).values())
    (size,) = load_plan(padded.manifest.result["padding"]).sizes
    up = "model.layers.0.mlp.up_proj.weight"
    before, after = (_load(root, up) for root in (live, padded.path))
    assert torch.equal(after, before[source_map(size, up)])
    require_intact(padded.path)
    assert pad(source=live, destination=tmp_path / "padded", spec=SPEC).reused


def test_a_checkpoint_that_divides_already_is_carried_unchanged(tmp_path: Path) -> None:
    live = tiny_qwen2(tmp_path / "live", intermediate_size=128)
    padded = pad(source=live, destination=tmp_path / "padded", spec=SPEC)
    assert not load_plan(padded.manifest.result["padding"]).changes
    assert (padded.path / "config.json").read_bytes() == (live / "config.json").read_bytes()
    assert (padded.path / "model.safetensors").stat().st_size == (live / "model.safetensors").stat().st_size
    assert all(report.passed for report in reports_of(padded).values())


def test_attention_that_does_not_divide_is_a_warning(tmp_path: Path) -> None:
    live = tiny_qwen2(tmp_path / "live")
    padded = pad(source=live, destination=tmp_path / "padded", spec=PaddingSpec(group_size=32, tensor_parallel=3))
    report = reports_of(padded)["attention_divides"]
    assert not report.passed
    assert not report.blocks
    assert "4 attention heads are not divisible by 3" in str(report.measured)


def test_targets_decide_the_padded_width(tmp_path: Path) -> None:
    live = tiny_qwen2(tmp_path / "live")

    def width(name: str, targets: Targets) -> int:
        padded = pad(source=live, destination=tmp_path / name, spec=PaddingSpec(group_size=32, targets=targets))
        assert padded.manifest.derivation.spec["targets"] == {name: list(at) for name, at in targets.items()}
        assert all(report.passed for report in reports_of(padded).values())
        return load_plan(padded.manifest.result["padding"]).sizes[0].padded

    assert width("one rank", {"vllm-exllama": (1,)}) == 96
    assert width("two", {"vllm-exllama": (1,), "sglang-gptq": (2,)}) == 128
    with pytest.raises(InputRefused, match="vllm-exllama at TP 3: refused: 4 attention heads"):
        width("three", {"vllm-exllama": (3,)})


def test_a_quantized_input_is_refused_naming_order_and_remedy(tmp_path: Path) -> None:
    root = with_codes(tiny_qwen2(tmp_path / "quantized"))
    with pytest.raises(QuantizedInputRefused, match="merge, then pad, then quantize") as refusal:
        pad(source=root, destination=tmp_path / "out" / "padded")
    assert "Pad the merged full-precision checkpoint, then quantize again" in refusal.value.remedy
    assert not (tmp_path / "out").exists()


def test_an_unknown_family_is_refused_by_name(tmp_path: Path) -> None:
    root = tiny_qwen2(tmp_path / "live")
    config = json.loads((root / "config.json").read_text())
    (root / "config.json").write_text(json.dumps(config | {"model_type": "llama"}))
    with pytest.raises(InputRefused, match="'llama' is not supported"):
        pad(source=root, destination=tmp_path / "padded")


def test_a_killed_padding_resumes_to_the_same_content(tmp_path: Path) -> None:
    live, out = tiny_qwen2(tmp_path / "live", shards=3), tmp_path / "padded"
    killed = subprocess.run([sys.executable, "-m", KILLED, "pad", str(live), str(out)])
    assert killed.returncode == -signal.SIGKILL
    assert not out.exists()

    resumed = pad(source=live, destination=out, spec=SPEC)
    again = pad(source=live, destination=tmp_path / "again", spec=SPEC)
    assert resumed.manifest.content_digest == again.manifest.content_digest
    assert require_intact(out).contents.files == again.manifest.contents.files


def _load(root: Path, name: str) -> torch.Tensor:
    tensors = {name: tensor for shard in root.glob("*.safetensors") for name, tensor in load_file(shard).items()}
    return tensors[name]
