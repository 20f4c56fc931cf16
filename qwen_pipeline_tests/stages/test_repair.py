"""The repair stage on outputs of GPTQModel: formats, loading, logits, ranks."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qwen_pipeline.checkpoint.lazy import open_checkpoint
from qwen_pipeline.checkpoint.store.verify import require_intact
from qwen_pipeline.demo.base import build_base
from qwen_pipeline.errors import CheckpointRefused
from qwen_pipeline.evaluation.tensor_parallel.ranks import weight_over_ranks
from qwen_pipeline.qwen.geometry import load_plan
from qwen_pipeline.reports import load_reports
from qwen_pipeline.stages.repair import CHECKS, open_quantized, plan, repair
from qwen_pipeline.stages.validate import ValidationInputs, ValidationPlan, validate
from qwen_pipeline.workers.environments import find_environment
from qwen_pipeline_tests.chain import write_text
from qwen_pipeline_tests.codes import METHODS, Method, Packing, write_checkpoint_of_codes
from qwen_pipeline_tests.quantizers import logits_of, quantized_by_gptqmodel
from qwen_pipeline_tests.tiny import HIDDEN, tiny_model, tiny_qwen2

FORMATS: dict[str, dict[str, Any]] = {
    "gptq": {},
    "gptq_v2": {"format": "gptq_v2", "sym": False},
    "gptq_8bit": {"bits": 8},
    "act_order": {"desc_act": True},
    "awq": {"quant_method": "awq", "format": "gemm", "sym": False},
}


@pytest.fixture(scope="session")
def live(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of 192 MLP channels: 6 groups of 32, which do not divide among 4 ranks."""
    root = tmp_path_factory.mktemp("imported") / "live"
    return tiny_qwen2(root, intermediate_size=192, num_key_value_heads=4, head_dim=32)


@pytest.fixture(scope="session")
def imported(live: Path) -> Path:
    return quantized_by_gptqmodel(live, live.parent / "gptq", bits=4, group_size=32)


@pytest.mark.slow
def test_a_real_checkpoint_is_repaired_and_computes_the_same(imported: Path, tmp_path: Path) -> None:
    artifact = repair(source=imported, destination=tmp_path / "out", tensor_parallel=4)
    reports = load_reports(artifact.manifest.result)
    assert [report.name for report in reports] == [check.name for check in CHECKS]
    assert all(report.passed for report in reports)
    require_intact(artifact.path)
    before, after = logits_of(imported, artifact.path)
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5)
    assert json.loads((artifact.path / "config.json").read_bytes())["intermediate_size"] == 256
    settings = (imported / "quantize_config.json").read_bytes()
    assert (artifact.path / "quantize_config.json").read_bytes() == settings


@pytest.mark.slow
def test_a_repaired_checkpoint_is_validated_against_its_source_model(
    live: Path, imported: Path, tmp_path: Path
) -> None:
    """The places of the new groups are known from the manifest alone; GPTQModel rewrites the tokenizer's files."""
    repaired = repair(source=imported, destination=tmp_path / "repaired", tensor_parallel=4).path
    text = write_text(tmp_path / "text.jsonl", documents=12, stride=5)
    artifact = validate(
        ValidationInputs(reference=live, candidate=repaired, text=text),
        plan=ValidationPlan(tensor_parallel=4, windows=2, seq_len=64, prompts=["Hi"]),
        destination=tmp_path / "validated",
        engine=find_environment("gptqmodel"),
    )
    found = {report.name: report for report in load_reports(artifact.manifest.result)}
    assert found["tensor_parallel"].passed
    assert found["padding_is_silent"].detail.startswith("All 128 added channels are still zero")
    structure = artifact.manifest.result["findings"]["structure"]
    assert not [text for text in structure["problems"] if "_proj" in text or "config.json has" in text]
    assert [error["relative"] < 0.3 for error in structure["errors"]] == [True] * 14
    assert artifact.manifest.result["padding"] == [{"field": "intermediate_size", "live": 192, "padded": 256}]


@pytest.mark.slow
@pytest.mark.parametrize("experts", ["qwen2_moe", "qwen3_moe"])
def test_a_real_mixture_whose_experts_do_not_divide_is_repaired(tmp_path: Path, experts: str) -> None:
    """Experts of 96 channels are 3 groups of 32 and do not divide among 2 ranks, nor does a shared expert of 160."""
    sizes: dict[str, Any] = {"num_experts": 4, "num_key_value_heads": 4, "head_dim": 32, "moe_intermediate_size": 96}
    sizes |= {"shared_expert_intermediate_size": 160} if experts == "qwen2_moe" else {}
    live = tiny_model(experts, tmp_path / "live", **sizes)
    imported = quantized_by_gptqmodel(live, tmp_path / "imported", bits=4, group_size=32)
    artifact = repair(source=imported, destination=tmp_path / "out", tensor_parallel=2)
    assert all(report.passed for report in load_reports(artifact.manifest.result))
    plan = load_plan(artifact.manifest.result["padding"])
    widths = {"moe_intermediate_size": (96, 128)}
    widths |= {"shared_expert_intermediate_size": (160, 192)} if experts == "qwen2_moe" else {}
    assert {size.field: (size.live, size.padded) for size in plan.sizes} == widths

    form, before, after = open_quantized(imported).form, open_checkpoint(imported), open_checkpoint(artifact.path)
    downs = [name.removesuffix(".qweight") for name in before if name.endswith("down_proj.qweight")]
    assert len(downs) == 2 * (4 + (experts == "qwen2_moe"))
    for down in downs:
        size = next(size for size in plan.sizes if size.live == before[f"{down}.g_idx"].shape[0])
        weight = form.load(before, down).weight_rows(0, HIDDEN)
        held = weight_over_ranks(form.load(after, down), "in", 2).read(0, HIDDEN)
        assert torch.equal(held[:, size.positions()], weight)
        assert held.count_nonzero() == weight.count_nonzero()
        unrepaired = weight_over_ranks(form.load(before, down), "in", 2).read(0, HIDDEN)
        assert not torch.equal(unrepaired, weight), "two ranks load it, and scale with the wrong groups"
    logits, repaired_logits = logits_of(imported, artifact.path)
    torch.testing.assert_close(repaired_logits, logits, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", FORMATS)
def test_every_format_of_gptqmodel_is_repaired(live: Path, tmp_path: Path, name: str) -> None:
    imported = quantized_by_gptqmodel(live, tmp_path / "imported", **({"bits": 4, "group_size": 32} | FORMATS[name]))
    artifact = repair(source=imported, destination=tmp_path / "out", tensor_parallel=4)
    failed = {report.name for report in load_reports(artifact.manifest.result) if not report.passed}
    assert failed == ({"inputs_in_order"} if name == "act_order" else set())
    before, after = logits_of(imported, artifact.path)
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_the_demo_model_quantized_unpadded_is_right_on_three_ranks_only_after_repair(tmp_path: Path) -> None:
    """1600 channels are 25 groups of 64; 27 are whole on 3 ranks."""
    base = build_base(tmp_path / "base").path
    imported = quantized_by_gptqmodel(base, tmp_path / "imported", bits=4, group_size=64)
    artifact = repair(source=imported, destination=tmp_path / "out", tensor_parallel=3)
    assert all(report.passed for report in load_reports(artifact.manifest.result))
    logits, repaired_logits = logits_of(imported, artifact.path)
    torch.testing.assert_close(repaired_logits, logits, rtol=1e-4, atol=1e-4)

    form, (size,) = open_quantized(imported).form, load_plan(artifact.manifest.result["padding"]).sizes
    assert (size.live, size.padded) == (1600, 1728)
    before, after = open_checkpoint(imported), open_checkpoint(artifact.path)
    for layer in (0, 29):
        down = f"model.layers.{layer}.mlp.down_proj"
        live, held = form.load(before, down), weight_over_ranks(form.load(after, down), "in", 3).read(0, 576)
        assert torch.equal(held[:, size.positions()], live.weight_rows(0, 576))
        assert held.count_nonzero() == live.weight_rows(0, 576).count_nonzero()
        assert weight_over_ranks(live, "in", 3).spec.shape == (576, 1584), "16 inputs belong to no rank"
        on_two = weight_over_ranks(live, "in", 2).read(0, 576)
        assert not torch.equal(on_two, live.weight_rows(0, 576)), "two ranks load it, and scale with the wrong groups"


@pytest.mark.slow
def test_a_repeated_repair_is_reused_and_gives_the_same_digest(imported: Path, tmp_path: Path) -> None:
    first = repair(source=imported, destination=tmp_path / "out", tensor_parallel=4)
    again = repair(source=imported, destination=tmp_path / "out", tensor_parallel=4)
    other = repair(source=imported, destination=tmp_path / "other", tensor_parallel=4)
    assert again.reused
    assert other.manifest.content_digest == first.manifest.content_digest


@pytest.mark.parametrize("method", METHODS)
def test_a_checkpoint_that_divides_already_is_carried_unchanged(tmp_path: Path, method: Method) -> None:
    write_checkpoint_of_codes(tmp_path / "in", Packing(method=method, group_size=16), width=64)
    artifact = repair(source=tmp_path / "in", destination=tmp_path / "out", tensor_parallel=4)
    assert not plan(tmp_path / "in", tensor_parallel=4).changes
    before, after = (open_checkpoint(root) for root in (tmp_path / "in", artifact.path))
    assert all(torch.equal(before.load(name), after.load(name)) for name in before)
    assert (artifact.path / "config.json").read_bytes() == (tmp_path / "in" / "config.json").read_bytes()


def test_a_damaged_code_fails_the_proof(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_checkpoint_of_codes(tmp_path / "in", Packing(method="gptq", group_size=16), width=48)
    from qwen_pipeline.stages import repair as stage

    write = stage.write_checkpoint

    def write_and_damage(*args: Any, **kwargs: Any) -> Any:
        contents = write(*args, **kwargs)
        file = args[1] / "model.safetensors"
        tensors = load_file(file)
        tensors["model.layers.0.mlp.down_proj.qweight"][0, 0] ^= 1
        tensors["model.layers.0.mlp.up_proj.qweight"][0, -1] ^= 1
        save_file(tensors, file)
        return contents

    monkeypatch.setattr(stage, "write_checkpoint", write_and_damage)
    artifact = repair(source=tmp_path / "in", destination=tmp_path / "out", tensor_parallel=2)
    failed = {report.name: report.detail for report in load_reports(artifact.manifest.result) if not report.passed}
    assert failed.keys() == {"live_weights_identical", "new_weights_are_zero"}
    assert "down_proj: 1 of 1536" in failed["live_weights_identical"]
    assert "up_proj: 1 new" in failed["new_weights_are_zero"]


def test_the_file_names_of_autogptq_are_supported(tmp_path: Path) -> None:
    source = tmp_path / "in"
    write_checkpoint_of_codes(source, Packing(method="gptq", group_size=16), width=48)
    (source / "model.safetensors").rename(source / "gptq_model-4bit-16g.safetensors")
    config = json.loads((source / "config.json").read_bytes())
    settings = config.pop("quantization_config")
    del settings["quant_method"]
    (source / "config.json").write_text(json.dumps(config))
    (source / "quantize_config.json").write_text(json.dumps(settings))
    out = repair(source=source, destination=tmp_path / "out", tensor_parallel=2).path
    assert {path.name for path in out.iterdir()} == {
        "config.json", "manifest.json", "model.safetensors", "quantize_config.json"
    }  # fmt: skip
    assert json.loads((out / "config.json").read_bytes())["quantization_config"]["quant_method"] == "gptq"


def test_shards_are_renamed_to_the_names_that_loaders_expect(tmp_path: Path) -> None:
    source = tmp_path / "in"
    write_checkpoint_of_codes(source, Packing(method="gptq", group_size=16), width=48)
    tensors = load_file(source / "model.safetensors")
    (source / "model.safetensors").unlink()
    halves = {
        "gptq_model-1-of-2.safetensors": sorted(tensors)[:5],
        "gptq_model-2-of-2.safetensors": sorted(tensors)[5:],
    }
    for file, names in halves.items():
        save_file({name: tensors[name] for name in names}, source / file)
    index = {"weight_map": {name: file for file, names in halves.items() for name in names}}
    (source / "gptq_model.safetensors.index.json").write_text(json.dumps(index))
    out = repair(source=source, destination=tmp_path / "out", tensor_parallel=2).path
    assert set(open_checkpoint(out).shards.values()) == {"model-1-of-2.safetensors", "model-2-of-2.safetensors"}


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        (None, "not quantized"),
        ({"quant_method": "bitsandbytes"}, "'bitsandbytes'"),
        ({"quant_method": "awq", "bits": 4, "group_size": 16, "version": "gemv"}, "'gemv'"),
        ({"quant_method": "gptq", "bits": 3, "group_size": 16}, "bits 3"),
        ({"quant_method": "compressed-tensors", "format": "float-quantized"}, "float-quantized"),
    ],
)
def test_an_unsupported_format_is_refused_by_name(tmp_path: Path, settings: dict[str, Any] | None, named: str) -> None:
    packing = Packing(method="gptq")
    write_checkpoint_of_codes(tmp_path / "in", packing, width=48, config={"quantization_config": settings})
    with pytest.raises(CheckpointRefused, match=named):
        open_quantized(tmp_path / "in")
