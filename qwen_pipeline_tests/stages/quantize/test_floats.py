"""The stage that writes 8-bit floats: without calibration, resumed after a kill, and checked against its source."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qwen_pipeline.checkpoint.journal import JOURNAL, FinishedTensor, Journal
from qwen_pipeline.checkpoint.lazy import open_checkpoint
from qwen_pipeline.checkpoint.manifest import open_manifest
from qwen_pipeline.cli.evidence import evidence as qwen_pipeline_evidence
from qwen_pipeline.errors import CheckFailed, InputRefused
from qwen_pipeline.evaluation.loading import place_tensors
from qwen_pipeline.evaluation.structure.check import Structure
from qwen_pipeline.evaluation.structure.floats import check_floats
from qwen_pipeline.quantization.evidence import load_evidence
from qwen_pipeline.quantization.spec import QuantSpec
from qwen_pipeline.qwen.linears import decoder_linears
from qwen_pipeline.qwen.methods import FP8_LAYOUTS, Method
from qwen_pipeline.qwen.padding_spec import PaddingSpec
from qwen_pipeline.reports import load_reports
from qwen_pipeline.stages.export import export
from qwen_pipeline.stages.pad import pad
from qwen_pipeline.stages.quantize import quantize
from qwen_pipeline.stages.repair import repair
from qwen_pipeline.transforms.codes.dequantize import dequantized
from qwen_pipeline.transforms.codes.fp8 import fp8_format
from qwen_pipeline_tests.tiny import tiny_model

SIZES: dict[str, Any] = {
    "hidden_size": 128, "intermediate_size": 320, "head_dim": 64, "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip
UP = "model.layers.0.mlp.up_proj"
Tensors = dict[str, torch.Tensor]


def rounded(source: Path, method: Method, out: Path) -> Path:
    return quantize(source=source, destination=out, spec=QuantSpec(method=method)).path


@pytest.fixture(scope="module")
def merged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model("qwen2", tmp_path_factory.mktemp("merged") / "merged", shards=2, **SIZES)


@pytest.fixture(scope="module")
def padded(merged: Path) -> Path:
    spec = PaddingSpec(group_size=128, tensor_parallel=2)
    return pad(source=merged, destination=merged.with_name("padded"), spec=spec).path


@pytest.fixture(scope="module")
def outputs(padded: Path) -> dict[Method, Path]:
    return {method: rounded(padded, method, padded.with_name(method)) for method in FP8_LAYOUTS}


def test_the_lineage_needs_no_calibration(padded: Path, outputs: dict[Method, Path]) -> None:
    for method, root in outputs.items():
        manifest = open_manifest(root)
        assert manifest.derivation.inputs == {"source": open_manifest(padded).content_digest}
        assert manifest.derivation.spec == {"method": method}
        outcomes = [report.outcome for report in load_reports(manifest.result)]
        assert outcomes == ["passed", "skipped", "skipped", "passed", "skipped", "skipped"]
        assert quantize(source=padded, destination=root, spec=QuantSpec(method=method)).reused


def test_the_evidence_says_that_layers_were_rounded(outputs: dict[Method, Path]) -> None:
    expected: dict[Method, int] = {"fp8": 4, "fp8-dynamic": 512}
    for method, scales in expected.items():
        row = next(row for row in load_evidence(outputs[method]) if row.module == UP)
        assert (row.rounded, row.loss, row.groups, row.zero_groups) == (True, None, scales, 0)
    assert qwen_pipeline_evidence(outputs["fp8"]).data["summary"]["fallbacks"] == 14


def test_gptq_keeps_its_settings_in_manifests() -> None:
    settings = QuantSpec().to_json()
    assert "method" not in settings
    assert "recipe" not in settings


def test_every_layer_is_rounded_and_everything_else_is_the_source_s(padded: Path, outputs: dict[Method, Path]) -> None:
    source = open_checkpoint(padded)
    weights = {linear.tensor for linear in decoder_linears(source)}
    for root in outputs.values():
        found = open_checkpoint(root)
        form = fp8_format(found.config["quantization_config"])
        assert {name for name, spec in found.items() if spec.dtype == "F8_E4M3"} == weights
        assert found.keys() - source.keys() == {name.replace("weight", form.layout.scale) for name in weights}
        for name in source.keys() - weights:
            assert torch.equal(found.load(name), source.load(name))
        assert check_floats(source, found).problems == []
        assert not place_tensors(root).fault
        full = dequantized(found)
        assert full.keys() == source.keys()
        assert all(torch.isfinite(full.load(name)).all() for name in weights)


def test_split_channels_stay_silent(padded: Path, outputs: dict[Method, Path]) -> None:
    for root in outputs.values():
        findings = check_floats(open_checkpoint(padded), open_checkpoint(root)).padding
        assert findings.twins == 2 * (512 - 320)
        assert findings.audible == []


def test_errors_are_those_of_8_bit_floats(padded: Path, outputs: dict[Method, Path]) -> None:
    for root in outputs.values():
        errors = check_floats(open_checkpoint(padded), open_checkpoint(root)).errors
        assert len(errors) == 14
        assert all(0.015 < error.relative < 0.04 for error in errors)


def double_scale(tensors: Tensors, _: dict[str, Any]) -> None:
    tensors[f"{UP}.weight_scale"][5] *= 2


def other_code(tensors: Tensors, _: dict[str, Any]) -> None:
    codes = tensors[f"{UP}.weight"].view(torch.uint8)
    codes[3, 4] ^= 0b1000


def no_scale(tensors: Tensors, _: dict[str, Any]) -> None:
    tensors[f"{UP}.weight_scale"][7] = 0


def other_layer(tensors: Tensors, _: dict[str, Any]) -> None:
    tensors[f"{UP}.weight"] = tensors["model.layers.1.mlp.up_proj.weight"]


def other_norm(tensors: Tensors, _: dict[str, Any]) -> None:
    tensors["model.norm.weight"][0] += 1


def unnamed_head(_: Tensors, settings: dict[str, Any]) -> None:
    settings["ignore"] = []


def named_layer(_: Tensors, settings: dict[str, Any]) -> None:
    settings["ignore"].append(UP)


def blocks(_: Tensors, settings: dict[str, Any]) -> None:
    settings["config_groups"]["group_0"]["weights"]["strategy"] = "tensor"


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (double_scale, f"{UP}: .* weights are not the 8-bit floats next .* output 5,"),
        (other_code, f"{UP}: 1 of .* output 3, input 4"),
        (no_scale, f"{UP}.weight_scale has 1 values that are not positive"),
        (other_layer, f"{UP}: .* weights are not"),
        (other_norm, "model.norm.weight differs"),
        (unnamed_head, "ignore does not name lm_head"),
        (named_layer, f"ignore excludes {UP}"),
        (blocks, "'strategy': 'tensor'"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_each_damage_is_found(
    damage: Callable[[Tensors, dict[str, Any]], None],
    sentence: str,
    padded: Path,
    outputs: dict[Method, Path],
    tmp_path: Path,
) -> None:
    root = tmp_path / "damaged"
    shutil.copytree(outputs["fp8-dynamic"], root)
    config = json.loads((root / "config.json").read_bytes())
    files = {file: load_file(file) for file in root.glob("*.safetensors")}
    tensors = {name: tensor for held in files.values() for name, tensor in held.items()}
    damage(tensors, config["quantization_config"])
    for file, held in files.items():
        save_file({name: tensors[name] for name in held}, file)
    (root / "config.json").write_text(json.dumps(config))
    found: Structure = check_floats(open_checkpoint(padded), open_checkpoint(root))
    assert len(found.problems) == 1, found.problems
    with pytest.raises(AssertionError, match=sentence):
        raise AssertionError(found.problems[0])


def test_an_interrupted_attempt_keeps_what_is_finished(
    padded: Path, outputs: dict[Method, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    append, lines = Journal.append, list[FinishedTensor]()

    def dying(self: Journal, line: FinishedTensor) -> None:
        if len(lines) == 5:
            raise KeyboardInterrupt
        lines.append(line)
        append(self, line)

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "append", dying)
        with pytest.raises(KeyboardInterrupt):
            rounded(padded, "fp8", tmp_path / "out")
    assert len((tmp_path / "out.partial" / JOURNAL).read_text().splitlines()) == 5
    resumed = rounded(padded, "fp8", tmp_path / "out")
    assert open_manifest(resumed).content_digest == open_manifest(outputs["fp8"]).content_digest


def test_what_does_not_fit_is_refused_with_a_remedy(merged: Path, tmp_path: Path) -> None:
    with pytest.raises(InputRefused, match=r"mlp.gate_proj has out_features 320.*\n.*pad --group-size 128"):
        rounded(merged, "fp8", tmp_path / "out")
    assert rounded(merged, "fp8-dynamic", tmp_path / "dynamic")
    sizes: dict[str, Any] = {**SIZES, "hidden_size": 192, "num_attention_heads": 3}
    narrow = tiny_model("qwen2", tmp_path / "narrow", **sizes)
    with pytest.raises(InputRefused, match=r"q_proj has in_features 192.*\n.*fp8-dynamic"):
        rounded(narrow, "fp8-block", tmp_path / "out")
    with pytest.raises(InputRefused, match=r"GPTQ needs calibration.*\n.*--method fp8"):
        quantize(source=merged, destination=tmp_path / "out", spec=QuantSpec())
    for setting in ({"recipe": "fast"}, {"group_size": 64}, {"sym": False}, {"dynamic": {"q": {"mse": 2.0}}}):
        with pytest.raises(InputRefused, match=f"no {next(iter(setting))}"):
            QuantSpec(method="fp8", **setting)  # pyright: ignore[reportArgumentType]


def test_weights_that_are_not_finite_fail(merged: Path, tmp_path: Path) -> None:
    root = tmp_path / "source"
    shutil.copytree(merged, root)
    file = next(file for file in root.glob("*.safetensors") if f"{UP}.weight" in load_file(file))
    tensors = load_file(file)
    tensors[f"{UP}.weight"][1, 1] = torch.inf
    save_file(tensors, file)
    with pytest.raises(CheckFailed, match=f"{UP}.*not finite"):
        rounded(root, "fp8-dynamic", tmp_path / "out")


def test_other_stages_refuse_8_bit_floats_by_name(outputs: dict[Method, Path], tmp_path: Path) -> None:
    for method, root in outputs.items():
        with pytest.raises(InputRefused, match="8-bit floats"):
            export(source=root, destination=tmp_path / "exported")
        with pytest.raises(InputRefused, match=r"8-bit floats.*\n.*--base-dequantize"):
            repair(source=root, destination=tmp_path / "repaired", tensor_parallel=4)
        with pytest.raises(InputRefused, match="are quantized"):
            rounded(root, method, tmp_path / "again")
    read = pad(
        source=outputs["fp8"], destination=tmp_path / "read", spec=PaddingSpec(tensor_parallel=4), dequantize=True
    )
    assert rounded(read.path, "fp8", tmp_path / "remedied")
