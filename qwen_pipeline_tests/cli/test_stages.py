"""Stage commands on a tiny model: output, exit codes and refusals."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from qwen_pipeline.checkpoint.manifest import open_manifest
from qwen_pipeline.cli import stages
from qwen_pipeline_tests.cli.terminal import qwen_pipeline, qwen_pipeline_process
from qwen_pipeline_tests.site import Site
from qwen_pipeline_tests.tiny import tiny_qwen2, with_codes
from qwen_pipeline_tests.transforms.codes.test_dequantize import to_fp8


@pytest.fixture
def merged(site: Site, tmp_path: Path) -> Path:
    result = stages.merge(base=site.root / "base", adapter=[site.drop()], out=tmp_path / "merged")
    return Path(result.data["path"])


def test_merge_then_pad_with_json(site: Site, tmp_path: Path) -> None:
    merged, padded = tmp_path / "merged", tmp_path / "padded"
    ended = qwen_pipeline("merge", "--base", site.root / "base", "--adapter", site.drop(), "--out", merged, "--json")
    assert (ended.code, ended.data["stage"], ended.data["path"]) == (0, "merged", str(merged))
    assert not ended.data["reused"]
    assert all(check["passed"] for check in ended.data["checks"])

    pad = ("pad", "--in", merged, "--out", padded, "--group-size", 32, "--tp", 2, "--json")
    first, second = qwen_pipeline(*pad), qwen_pipeline(*pad)
    assert first.data["inputs"] == {"source": ended.data["content_digest"]}
    assert second.data["reused"]
    assert second.data["content_digest"] == first.data["content_digest"]


def test_tables_go_to_standard_output_and_progress_to_standard_error(merged: Path, tmp_path: Path) -> None:
    ended = qwen_pipeline_process("pad", "--in", merged, "--out", tmp_path / "padded", "--tp", 2, "--group-size", 32)
    assert ended.code == 0
    assert "width_divides" in ended.out
    assert str(tmp_path / "padded") in ended.out
    assert "pad: " in ended.err
    assert "pad: " not in ended.out


def test_padding_a_quantized_checkpoint_is_refused_with_the_right_order(tmp_path: Path) -> None:
    quantized = with_codes(tiny_qwen2(tmp_path / "quantized"))
    ended = qwen_pipeline("pad", "--in", quantized, "--out", tmp_path / "padded", "--tp", 2, "--group-size", 32)
    assert ended.code == 2
    assert "merge, then pad, then quantize" in " ".join(ended.err.split())
    assert "Remedy: Pad the merged" in ended.err
    assert "Traceback" not in ended.err
    assert not (tmp_path / "padded").exists()


@pytest.mark.parametrize(
    "arguments",
    [("pad", "--in", "x"), ("pad", "--in", "x", "--out", "y", "--layout", "sideways"), ("nothing",), ("plan",)],
)
def test_wrong_usage_ends_with_2(arguments: tuple[str, ...]) -> None:
    ended = qwen_pipeline(*arguments)
    assert (ended.code, ended.out) == (2, "")
    assert "Usage" in ended.err


def test_json_has_the_refusal_of_a_missing_checkpoint(tmp_path: Path) -> None:
    ended = qwen_pipeline("pad", "--in", tmp_path / "none", "--out", tmp_path / "out", "--json")
    assert ended.code == ended.data["error"]["exit_code"] == 2
    assert ended.data["error"]["remedy"]
    assert not (tmp_path / "out").exists()


def test_a_missing_engine_is_an_environment_error(merged: Path, site: Site, tmp_path: Path) -> None:
    ended = qwen_pipeline(
        *("quantize", "--in", merged, "--out", tmp_path / "out", "--calibration", site.root / "calibration.jsonl"),
        *("--engine-python", tmp_path / "no-python", "--json"),
    )
    assert ended.code == ended.data["error"]["exit_code"] == 3


def test_merge_pad_and_materialize_equal_merge_and_pad(site: Site, merged: Path, tmp_path: Path) -> None:
    recipe, padded = tmp_path / "recipe", tmp_path / "one-pass"
    options = ("--base", site.root / "base", "--adapter", site.drop(), "--group-size", 32, "--tp", 2, "--json")
    two_passes = qwen_pipeline(
        "pad", "--in", merged, "--out", tmp_path / "padded", "--group-size", 32, "--tp", 2, "--json"
    )

    one_pass = qwen_pipeline("merge-pad", *options, "--recipe", recipe, "--out", padded)
    assert one_pass.code == 0
    assert one_pass.data["content_digest"] == two_passes.data["content_digest"]
    assert not list(recipe.glob("*.safetensors"))

    stored = qwen_pipeline("materialize", recipe, "--json")
    assert {"source": stored.data["content_digest"]} == one_pass.data["inputs"]
    assert open_manifest(recipe).contents == open_manifest(merged).contents


def test_merge_pad_takes_weighted_adapters_and_the_revision_of_the_base(site: Site, tmp_path: Path) -> None:
    adapters = ("--adapter", site.drop(), "--weight", 0.5, "--adapter", site.drop("other"), "--weight", 2)
    places = ("--recipe", tmp_path / "recipe", "--out", tmp_path / "padded")
    common = ("--base", site.root / "base", *adapters, "--base-revision", "main", "--json")
    ended = qwen_pipeline("merge-pad", *common, *places, "--group-size", 32, "--tp", 2)
    stored = qwen_pipeline("merge", *common, "--out", tmp_path / "merged")

    assert (ended.code, stored.code) == (0, 0)
    assert ended.data["inputs"] == {"source": stored.data["content_digest"]}
    assert open_manifest(tmp_path / "recipe").derivation == open_manifest(tmp_path / "merged").derivation


def test_convert_then_merge_into_a_quantized_base(site: Site, tmp_path: Path) -> None:
    dropped, trained = site.drop(), tmp_path / "trained"
    shutil.copytree(dropped, trained)
    torch.save(load_file(trained / "adapter_model.safetensors"), trained / "adapter_model.bin")
    (trained / "adapter_model.safetensors").unlink()
    ended = qwen_pipeline("convert", "--from", trained, "--out", tmp_path / "lora", "--json")
    assert (ended.code, ended.data["stage"]) == (0, "converted")

    base = to_fp8(Path(shutil.copytree(site.root / "base", tmp_path / "base")))
    merge = ("merge", "--base", base, "--adapter", tmp_path / "lora", "--out", tmp_path / "merged", "--json")
    assert qwen_pipeline(*merge).code == 2
    assert qwen_pipeline(*merge, "--base-dequantize").code == 0
