"""Quantization by the real engine, of a tiny model whose every byte can be looked at."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qwen_pipeline.checkpoint.journal import JOURNAL
from qwen_pipeline.checkpoint.lazy import Checkpoint, open_checkpoint
from qwen_pipeline.checkpoint.store.destinations import Artifact, Directory
from qwen_pipeline.checkpoint.store.verify import require_intact
from qwen_pipeline.errors import CheckFailed, InputRefused, QuantizedInputRefused
from qwen_pipeline.progress import Progress
from qwen_pipeline.quantization.checks import CHECKS, check_output
from qwen_pipeline.quantization.losses import ModuleLoss
from qwen_pipeline.quantization.spec import Device, QuantizerName, QuantSpec
from qwen_pipeline.qwen.linears import decoder_linears, load_weight
from qwen_pipeline.reports import load_reports
from qwen_pipeline.stages.quantize import quantize
from qwen_pipeline.transforms.codes.gptq import gptq_format
from qwen_pipeline.workers.environments import WorkerEnvironment, find_environment
from qwen_pipeline_tests import REPOSITORY
from qwen_pipeline_tests.layouts import Layout
from qwen_pipeline_tests.tiny import DENSE_LINEARS, tiny_model, tiny_qwen2, tiny_qwen3

SPEC = QuantSpec(engine="gptqmodel", group_size=32, samples=8, seq_len=64, batch_size=4, threads=2, device="cpu")
CUDA = pytest.param("cuda", marks=pytest.mark.gpu)
DOWN = "model.layers.1.mlp.down_proj.weight"


@dataclass(frozen=True)
class Run:
    source: Path
    calibration: Path
    artifact: Artifact
    progress: list[Progress]

    @property
    def output(self) -> Checkpoint:
        return open_checkpoint(self.artifact.path)


@pytest.fixture(scope="session")
def engine() -> WorkerEnvironment:
    return find_environment("gptqmodel")


@pytest.fixture(scope="session")
def calibration(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("calibration") / "mixed.jsonl"
    texts = [{"text": f"Record {i} speaks of {i * i} things, in prose. " * 3} for i in range(12)]
    talks = [
        {"messages": [{"role": "user", "content": f"How many are {i}?"}, {"role": "assistant", "content": f"{i}."}]}
        for i in range(12)
    ]
    file.write_text("\n".join(json.dumps(record) for record in texts + talks))
    return file


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory, calibration: Path, engine: WorkerEnvironment) -> Run:
    root = tmp_path_factory.mktemp("quantize")
    source = tiny_qwen2(root / "source", intermediate_size=128, shards=2)
    progress: list[Progress] = []
    artifact = quantize(
        source=source,
        destination=Directory(root / "quantized"),
        calibration=calibration,
        spec=SPEC,
        engine=engine,
        observe=progress.append,
    )
    return Run(source=source, calibration=calibration, artifact=artifact, progress=progress)


def test_the_engines_seconds_are_told_from_ours(run: Run) -> None:
    manifest = run.artifact.manifest
    engine, stage = (manifest.result["seconds"][whose] for whose in ("engine", "stage"))
    assert engine.keys() == {"import", "load", "quantize", "save"}
    assert min(*engine.values(), *stage.values()) >= 0
    assert sum(engine.values()) < manifest.run.seconds < sum(engine.values()) + sum(stage.values()) + 0.5


def test_every_check_is_reported_and_passes(run: Run) -> None:
    reports = load_reports(run.artifact.manifest.result)
    assert [report.name for report in reports] == [check.name for check in CHECKS]
    assert all(report.passed for report in reports)


def test_each_module_has_its_loss_in_the_manifest_and_its_remark_in_the_progress(run: Run) -> None:
    losses = run.artifact.manifest.result["losses"]
    assert [loss["module"] for loss in losses] == [
        f"model.layers.{layer}.{kind}" for layer in range(2) for kind in DENSE_LINEARS
    ]
    assert all(0 < loss["loss"] < 1 and loss["samples"] == 8 * 64 for loss in losses)
    told = [event for event in run.progress if event.task == "quantize"]
    assert {(event.done, event.total, event.unit) for event in told} == {(0, 2, "layers"), (1, 2, "layers")}
    assert {event.remark.split(" loss ")[0] for event in told} == {
        loss["module"].removeprefix("model.") for loss in losses
    }


def test_the_derivation_names_tokens_spec_and_versions(run: Run) -> None:
    manifest = run.artifact.manifest
    assert manifest.derivation.inputs.keys() == {"source", "calibration"}
    assert manifest.derivation.inputs["calibration"] == manifest.result["calibration"]["digest"]
    assert SPEC.to_json().items() <= manifest.derivation.spec.items()
    assert manifest.derivation.spec["versions"].keys() == {"gptqmodel", "torch"}
    assert manifest.run.peak_memory_bytes > 300 * 2**20, "the worker's memory counts"


def test_what_is_not_quantized_is_the_source_byte_for_byte(run: Run) -> None:
    source, output = open_checkpoint(run.source), run.output
    weights = {f"{linear.module}.weight" for linear in decoder_linears(source)}
    kept = [name for name in source if name not in weights]
    assert any(name.endswith(".bias") for name in kept)
    for name in kept:
        assert output[name] == source[name]
        assert torch.equal(output.load(name), source.load(name))
        assert output.shards[name] == source.shards[name]
    assert {name: value for name, value in output.config.items() if name != "quantization_config"} == source.config
    for relative, file in source.sidecars.items():
        assert (run.artifact.path / relative).read_bytes() == file.read_bytes()
    assert not weights & output.keys()


def test_the_directory_holds_nothing_else(run: Run) -> None:
    require_intact(run.artifact.path)
    assert sorted(path.name for path in (run.artifact.path / "logs").iterdir()) == [
        "evidence.csv", "evidence.png", "quant_log.csv", "quantize.log",
    ]  # fmt: skip
    assert not any(path.name.startswith(".") for path in run.artifact.path.iterdir())


def test_codes_stand_for_the_weights(run: Run) -> None:
    require_faithful(open_checkpoint(run.source), run.output)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["gptqmodel", "autogptq"])
def test_each_engine_quantizes_on_cuda(run: Run, tmp_path: Path, name: QuantizerName) -> None:
    artifact = quantize(
        source=run.source,
        destination=Directory(tmp_path / "out"),
        calibration=run.calibration,
        spec=replace(SPEC, engine=name, device="cuda"),
        engine=find_environment(name),
    )
    assert all(report.passed for report in load_reports(artifact.manifest.result))
    assert all(0 < loss["loss"] < 1 for loss in artifact.manifest.result["losses"])
    require_faithful(open_checkpoint(run.source), open_checkpoint(artifact.path))
    loaders = find_environment("gptqmodel")
    assert compared(loaders, LOAD_AND_COMPARE, run.source, artifact.path, CUDA_VISIBLE_DEVICES="")["kl"] < 0.1
    assert compared(loaders, LOAD_WITH_GPTQMODEL, run.source, artifact.path)["kl"] < 0.1


@pytest.mark.gpu
@pytest.mark.parametrize("family", ["qwen2", "qwen3_moe"])
def test_gptqmodel_shares_work_among_two_gpus(
    tmp_path: Path, calibration: Path, engine: WorkerEnvironment, family: str
) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    sizes: dict[str, Any] = {"intermediate_size": 128} if family == "qwen2" else {"moe_intermediate_size": 64}
    source = tiny_model(family, tmp_path / "source", **sizes)
    artifacts = [
        quantize(
            source=source,
            destination=Directory(tmp_path / name),
            calibration=calibration,
            spec=replace(SPEC, device="cuda", gpus=2, all_experts=family == "qwen3_moe"),
            engine=engine,
        )
        for name in ("once", "again")
    ]
    require_faithful(open_checkpoint(source), open_checkpoint(artifacts[0].path))
    assert len({artifact.manifest.content_digest for artifact in artifacts}) == 1


@pytest.mark.gpu
@pytest.mark.parametrize("layout", ["saved", "fused"])
@pytest.mark.parametrize("name", ["gptqmodel", "layerwise"])
def test_each_loop_quantizes_experts_on_cuda(run: Run, tmp_path: Path, name: QuantizerName, layout: Layout) -> None:
    artifact = quantize(
        source=tiny_model("qwen3_moe", tmp_path / "source", moe_intermediate_size=64, layout=layout),
        destination=Directory(tmp_path / "out"),
        calibration=run.calibration,
        spec=replace(SPEC, engine=name, device="cuda", all_experts=True),
        engine=find_environment("gptqmodel"),
    )
    output = open_checkpoint(artifact.path)
    assert all(report.passed for report in load_reports(artifact.manifest.result))
    assert sum(".experts." in tensor and tensor.endswith(".qweight") for tensor in output) == 2 * 4 * 3
    require_faithful(open_checkpoint(tmp_path / "source"), output)


def require_faithful(source: Checkpoint, output: Checkpoint) -> None:
    for linear in decoder_linears(source):
        weight_OI = load_weight(source, linear).double()
        error = (dequantized(output, linear.module) - weight_OI).norm() / weight_OI.norm()
        assert error < 0.15, f"{linear.module}: {error}"


def dequantized(output: Checkpoint, module: str) -> torch.Tensor:
    """The oracle: scale * (code - (stored zero + 1)), one nibble at a time, in float64."""
    qweight, qzeros = output.load(f"{module}.qweight"), output.load(f"{module}.qzeros")
    scales_GO, g_idx_I = output.load(f"{module}.scales").double(), output.load(f"{module}.g_idx").long()
    codes_IO = torch.stack([(qweight >> 4 * k) & 15 for k in range(8)], dim=1).flatten(0, 1)
    zeros_GO = torch.stack([(qzeros >> 4 * k) & 15 for k in range(8)], dim=2).flatten(1, 2) + 1
    return (scales_GO[g_idx_I] * (codes_IO - zeros_GO[g_idx_I])).T


def test_transformers_loads_it_and_predicts_nearly_the_same(run: Run, engine: WorkerEnvironment) -> None:
    found = compared(engine, LOAD_AND_COMPARE, run.source, run.artifact.path)
    assert found["missing"] == found["unexpected"] == found["mismatched"] == []
    assert found["kl"] < 0.1


def compared(engine: WorkerEnvironment, loader: str, source: Path, quantized: Path, **variables: str) -> dict[str, Any]:
    printed = subprocess.run(
        [engine.python, "-c", loader, source, quantized],
        capture_output=True, text=True, check=True, env=os.environ | {"GPTQMODEL_CPU_WORKERS": "2"} | variables,
    )  # fmt: skip
    return json.loads(printed.stdout.splitlines()[-1])


LOAD_AND_COMPARE = """
import json, sys, torch
from transformers import AutoModelForCausalLM
ids = torch.arange(256).reshape(4, 64)
def log_probabilities(path):
    model, info = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, output_loading_info=True)
    with torch.inference_mode():
        return model(ids).logits.double().log_softmax(-1), info
reference, _ = log_probabilities(sys.argv[1])
candidate, info = log_probabilities(sys.argv[2])
kl = (reference.exp() * (reference - candidate)).sum(-1).mean().item()
names = {kind: sorted(info[f"{kind}_keys"]) for kind in ("missing", "unexpected", "mismatched")}
print(); print(json.dumps({"kl": kl, **names}))
"""

LOAD_WITH_GPTQMODEL = """
import json, sys, torch
from gptqmodel import BACKEND, GPTQModel
from transformers import AutoModelForCausalLM
ids = torch.arange(256).reshape(4, 64)
candidate = GPTQModel.load(sys.argv[2], device="cuda:0", backend=BACKEND.GPTQ_TORCH).model
reference = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
with torch.inference_mode():
    exact = reference(ids).logits.double().log_softmax(-1)
    close = candidate(ids.cuda()).logits.double().cpu().log_softmax(-1)
print(); print(json.dumps({"kl": (exact.exp() * (exact - close)).sum(-1).mean().item()}))
"""


def test_a_hessian_that_cannot_be_solved_fails_the_check(
    tmp_path: Path, calibration: Path, engine: WorkerEnvironment
) -> None:
    source = broken(tiny_qwen2(tmp_path / "source", intermediate_size=128), "model.layers.1.input_layernorm.weight")

    artifact = quantize(
        source=source, destination=Directory(tmp_path / "out"), calibration=calibration, spec=SPEC, engine=engine
    )

    failed = {report.name: report for report in load_reports(artifact.manifest.result) if report.blocks}
    assert failed.keys() == {"no_rounding_fallback", "losses_finite"}
    assert failed["no_rounding_fallback"].measured == len(DENSE_LINEARS)
    assert "model.layers.1.self_attn.q_proj" in failed["no_rounding_fallback"].detail


ASKED = {
    "asymmetric": {"sym": False},
    "act-order": {"desc_act": True},
    "asymmetric act-order": {"sym": False, "desc_act": True, "group_size": 64},
    "no group order": {"act_group_aware": False},
    "8 bits": {"bits": 8, "group_size": 64},
    "documents": {"packing": "documents"},
}


@pytest.mark.slow
@pytest.mark.parametrize("asked", ASKED)
def test_a_qwen3_is_quantized_as_asked(
    tmp_path: Path, calibration: Path, engine: WorkerEnvironment, asked: str
) -> None:
    source = tiny_qwen3(tmp_path / "source", intermediate_size=128, hidden_size=128)
    spec = replace(SPEC, **ASKED[asked])
    artifact = quantize(
        source=source, destination=Directory(tmp_path / "out"), calibration=calibration, spec=spec, engine=engine
    )
    output = open_checkpoint(artifact.path)
    assert all(report.passed for report in load_reports(artifact.manifest.result))
    assert "lm_head.weight" in output
    stated = output.config["quantization_config"]
    assert {name: stated[name] for name in ("bits", "group_size", "sym", "desc_act")} == {
        name: getattr(spec, name) for name in ("bits", "group_size", "sym", "desc_act")
    }
    form = gptq_format(output.config)
    for linear in decoder_linears(open_checkpoint(source)):
        packed = form.load(output, linear.module)
        weight_OI = open_checkpoint(source).load(f"{linear.module}.weight").double()
        error = (packed.weight_rows(0, linear.out_features).double() - weight_OI).norm() / weight_OI.norm()
        assert error < (0.01 if spec.bits == 8 else 0.15), f"{linear.module}: {error}"
        assert packed.is_in_order or spec.desc_act


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gptqmodel", "layerwise"])
def test_modules_take_settings_of_their_own(
    run: Run, tmp_path: Path, engine: WorkerEnvironment, name: QuantizerName
) -> None:
    """Also one of those that share their inputs, and with them a Hessian."""
    own = {"model.layers.1.mlp.down_proj": 0.3, "model.layers.0.self_attn.k_proj": 0.2}
    dynamic = {re.escape(module): {"damp_percent": damp} for module, damp in own.items()}
    artifact = quantize(
        source=run.source, destination=Directory(tmp_path / "out"), calibration=run.calibration,
        spec=replace(SPEC, engine=name, dynamic=dynamic), engine=engine,
    )  # fmt: skip
    damp = {loss["module"]: loss["damp"] for loss in artifact.manifest.result["losses"]}
    assert {module: share for module, share in damp.items() if share != 0.05} == pytest.approx(own)
    assert all(report.passed for report in load_reports(artifact.manifest.result))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gptqmodel", "layerwise"])
def test_every_expert_may_get_every_token(
    tmp_path: Path, calibration: Path, engine: WorkerEnvironment, name: QuantizerName
) -> None:
    source = tiny_model("qwen3_moe", tmp_path / "source", moe_intermediate_size=64, hidden_size=64)
    artifact = quantize(
        source=source, destination=Directory(tmp_path / "out"), calibration=calibration,
        spec=replace(SPEC, engine=name, all_experts=True), engine=engine,
    )  # fmt: skip
    losses = artifact.manifest.result["losses"]
    assert {loss["samples"] for loss in losses if ".experts." in loss["module"]} == {8 * 64}
    assert all(report.passed for report in load_reports(artifact.manifest.result))


@pytest.mark.slow
def test_a_loss_that_is_not_a_number_stops_the_run(
    tmp_path: Path, calibration: Path, engine: WorkerEnvironment
) -> None:
    source = broken(tiny_qwen2(tmp_path / "source", intermediate_size=128), DOWN)
    with pytest.raises(CheckFailed, match=r"mlp\.down_proj"):
        quantize(
            source=source, destination=Directory(tmp_path / "out"), calibration=calibration, spec=SPEC, engine=engine
        )
    assert not (tmp_path / "out").exists()


def broken(source: Path, name: str) -> Path:
    """Put one NaN into a tensor."""
    tensors = load_file(source / "model.safetensors")
    tensors[name].view(-1)[3] = float("nan")
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    return source


@pytest.mark.parametrize("device", [pytest.param("cpu", marks=pytest.mark.slow), CUDA])
@pytest.mark.parametrize(
    ("family", "width", "resumes"),
    [("qwen2", "intermediate_size", False), ("qwen3_moe", "moe_intermediate_size", True)],
)
def test_killed_and_run_again_it_ends_in_the_same_bytes(
    tmp_path: Path, calibration: Path, engine: WorkerEnvironment, family: str, width: str, resumes: bool, device: Device
) -> None:
    """GPTQModel's own loop goes on after the layers it finished, where it can; its every loss is known then too."""
    sizes: dict[str, Any] = {"hidden_size": 64, "num_hidden_layers": 4, width: 64}
    source = tiny_model(family, tmp_path / "source", **sizes)
    spec = replace(SPEC, device=device)
    wanted = partial(quantize, source=source, calibration=calibration, spec=spec, engine=engine)
    undisturbed, out = wanted(destination=Directory(tmp_path / "undisturbed")), tmp_path / "out"
    with subprocess.Popen(
        [sys.executable, "-c", QUANTIZE, source, out, calibration, json.dumps(spec.to_json())],
        cwd=REPOSITORY, stdout=subprocess.PIPE, text=True,
    ) as parent:  # fmt: skip
        assert parent.stdout is not None
        assert any("layers.2" in line for line in parent.stdout)
        workers = descendants(parent.pid)
        parent.send_signal(signal.SIGKILL)
    assert workers
    deadline = time.monotonic() + 10
    while any(Path(f"/proc/{pid}").exists() for pid in workers):
        assert time.monotonic() < deadline, "orphans"
        time.sleep(0.05)
    assert not out.exists()

    seen: list[Progress] = []
    again = wanted(destination=Directory(out), observe=seen.append)

    assert (min(event.done for event in seen if event.task == "quantize") >= 2) == resumes
    assert again.manifest.contents.tensors == undisturbed.manifest.contents.tensors
    assert again.manifest.content_digest == undisturbed.manifest.content_digest
    assert [told(loss) for loss in again.manifest.result["losses"]] == [
        told(loss) for loss in undisturbed.manifest.result["losses"]
    ]
    assert wanted(destination=Directory(out)).reused


def told(loss: Mapping[str, Any]) -> dict[str, Any]:
    """Return what does not depend on the moment."""
    return {name: loss[name] for name in ("module", "loss", "samples", "damp")}


@pytest.mark.slow
def test_an_engine_that_has_delivered_is_not_started_again(run: Run, tmp_path: Path, engine: WorkerEnvironment) -> None:
    """What was written of its codes is not written again either."""
    out, seen = tmp_path / "out", list[Progress]()
    wanted = partial(
        quantize,
        source=run.source,
        destination=Directory(out),
        calibration=run.calibration,
        spec=SPEC,
        engine=engine,
    )

    def interrupt(_: Progress) -> None:
        if (out.with_name("out.partial") / JOURNAL).exists():
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        wanted(observe=interrupt)
    again = wanted(observe=seen.append)
    assert "quantize" not in {event.task for event in seen}
    assert next(event.done for event in seen if event.task == "write quantized checkpoint") > 0
    assert again.manifest.content_digest == run.artifact.manifest.content_digest
    assert sum(again.manifest.result["seconds"]["stage"].values()) > 0


QUANTIZE = """
import json, sys
from pathlib import Path
from qwen_pipeline.checkpoint.store.destinations import Directory
from qwen_pipeline.workers.environments import find_environment
from qwen_pipeline.quantization.spec import QuantSpec
from qwen_pipeline.stages.quantize import quantize
source, out, calibration = map(Path, sys.argv[1:4])
tell = lambda event: print(event.remark, flush=True) if event.task == "quantize" else None
quantize(source=source, destination=Directory(out), calibration=calibration, spec=QuantSpec(**json.loads(sys.argv[4])),
         engine=find_environment("gptqmodel"), observe=tell)
"""


def descendants(pid: int) -> list[int]:
    children = [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return [*children, *(grandchild for child in children for grandchild in descendants(child))]


class TestRefusals:
    """What cannot be quantized is refused before anything is written or started."""

    @pytest.fixture
    def source(self, tmp_path: Path) -> Path:
        return tiny_qwen2(tmp_path / "source", intermediate_size=128)

    def refused(self, source: Path, calibration: Path, tmp_path: Path, spec: QuantSpec = SPEC) -> InputRefused:
        nothing = WorkerEnvironment(name="gptqmodel", python=Path("/nowhere/python"))
        with pytest.raises(InputRefused) as caught:
            quantize(
                source=source, destination=Directory(tmp_path / "out"), calibration=calibration, spec=spec,
                engine=nothing,
            )  # fmt: skip
        assert not list(tmp_path.glob("out*"))
        return caught.value

    def test_codes(self, run: Run, calibration: Path, tmp_path: Path) -> None:
        fault = self.refused(run.artifact.path, calibration, tmp_path)
        assert isinstance(fault, QuantizedInputRefused)
        assert "merge, then pad, then quantize" in fault.remedy

    def test_codes_whose_config_was_lost(self, run: Run, calibration: Path, tmp_path: Path) -> None:
        copy = Path(shutil.copytree(run.artifact.path, tmp_path / "copy"))
        shutil.copy(run.source / "config.json", copy / "config.json")
        assert isinstance(self.refused(copy, calibration, tmp_path), QuantizedInputRefused)

    def test_a_width_of_partial_groups(self, calibration: Path, tmp_path: Path) -> None:
        source = tiny_qwen2(tmp_path / "odd", intermediate_size=96)
        fault = self.refused(source, calibration, tmp_path, replace(SPEC, group_size=64))
        assert "down_proj has in_features 96, which is not a multiple of 64" in fault.what
        assert "Pad the checkpoint first" in fault.remedy

    def test_an_override_that_no_module_takes(self, source: Path, calibration: Path, tmp_path: Path) -> None:
        spec = replace(SPEC, dynamic={r"mlp\.dwon_proj": {"damp_percent": 0.1}})
        fault = self.refused(source, calibration, tmp_path, spec)
        assert "dwon_proj" in fault.what

    def test_filling_for_experts(self, calibration: Path, tmp_path: Path) -> None:
        source = tiny_model("qwen3_moe", tmp_path / "mixture", moe_intermediate_size=64)
        fault = self.refused(source, calibration, tmp_path, replace(SPEC, packing="documents"))
        assert "filling" in fault.what

    @pytest.mark.parametrize("family", ["qwen3_moe", "qwen3_next"])
    def test_dense_layers_beside_mixtures(self, calibration: Path, tmp_path: Path, family: str) -> None:
        sizes: dict[str, Any] = {
            "moe_intermediate_size": 64,
            "shared_expert_intermediate_size": 64,
            "intermediate_size": 128,
        }
        source = tiny_model(family, tmp_path / "mixture", mlp_only_layers=[1], **sizes)
        fault = self.refused(source, calibration, tmp_path)
        assert "Layer 1 of this mixture of experts is dense" in fault.what
        assert "layerwise" in fault.remedy

    def test_windows_longer_than_the_model(self, source: Path, calibration: Path, tmp_path: Path) -> None:
        fault = self.refused(source, calibration, tmp_path, replace(SPEC, samples=1, seq_len=513))
        assert "512 positions" in fault.what

    def test_too_little_text(self, source: Path, calibration: Path, tmp_path: Path) -> None:
        fault = self.refused(source, calibration, tmp_path, replace(SPEC, samples=1000))
        assert "1000 windows of 64 need 64,000" in fault.what


class TestChecks:
    """Each check fails for what it names, on checkpoints that no engine should write."""

    def failed(self, output: Checkpoint, run: Run) -> dict[str, str]:
        losses = [ModuleLoss(**loss) for loss in run.artifact.manifest.result["losses"]]
        reports = check_output(output, decoder_linears(open_checkpoint(run.source)), losses, SPEC)
        assert [report.name for report in reports] == [check.name for check in CHECKS]
        return {report.name: report.detail for report in reports if not report.passed}

    def test_a_module_without_codes(self, run: Run) -> None:
        output = run.output
        tensors = {name: tensor for name, tensor in output.tensors.items() if "layers.1.mlp.down_proj" not in name}
        failed = self.failed(replace(output, tensors=tensors), run)
        assert failed.keys() == {"every_module_quantized"}
        assert "1 of 14 modules: model.layers.1.mlp.down_proj" in failed["every_module_quantized"]

    @pytest.mark.parametrize("value", [float("inf"), float("nan"), 0.0])
    def test_a_scale_that_is_no_scale(self, run: Run, value: float) -> None:
        name = "model.layers.0.mlp.up_proj.scales"
        scales = run.output.load(name)
        scales[1, 2] = value
        wrong = replace(run.output.tensors[name], read=lambda start, stop: scales[start:stop])
        assert self.failed(run.output.replace(tensors={name: wrong}), run).keys() == {"scales_finite"}

    def test_more_damping_than_asked_only_warns(self, run: Run) -> None:
        losses = [ModuleLoss(**loss | {"damp": 0.06}) for loss in run.artifact.manifest.result["losses"]]
        *_, damping, _ = check_output(run.output, decoder_linears(open_checkpoint(run.source)), losses, SPEC)
        assert not damping.passed
        assert not damping.blocks

    @pytest.mark.parametrize(("tokens", "passes"), [(127, False), (128, True)])
    def test_an_expert_that_hardly_any_token_reached(self, run: Run, tokens: int, passes: bool) -> None:
        starved = "model.layers.0.mlp.experts.3.up_proj"
        row = ModuleLoss(module=starved, loss=0.1, samples=tokens, damp=0.05, rounded=False)
        *_, fed = check_output(run.output, (), [row], SPEC)
        assert fed.passed == passes
        assert not fed.blocks
        assert (starved in fed.detail) == (not passes)
