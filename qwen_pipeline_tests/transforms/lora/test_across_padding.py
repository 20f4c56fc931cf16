"""Merges across padding: an adapter of the live model into the padded one, and the reverse."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from qwen_pipeline.checkpoint.manifest import open_manifest
from qwen_pipeline.checkpoint.store.destinations import Directory
from qwen_pipeline.cli import stages
from qwen_pipeline.cli.inspect import inspect
from qwen_pipeline.errors import AdapterRefused, InputRefused
from qwen_pipeline.models.open import materialize
from qwen_pipeline.qwen.geometry import load_plan
from qwen_pipeline.qwen.padding_spec import Layout, PaddingSpec
from qwen_pipeline.reports import load_reports
from qwen_pipeline.stages.merge import merge
from qwen_pipeline.stages.merge_pad import merge_pad
from qwen_pipeline.stages.pad import pad
from qwen_pipeline.stages.unpad import unpad
from qwen_pipeline.transforms.lora.adapter import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from qwen_pipeline_tests.adapter_kinds import KINDS, Kind, train
from qwen_pipeline_tests.tiny import VOCABULARY, load_tiny, tiny_model

pytestmark = pytest.mark.lengthy

MLP = {"target_modules": ["q_proj", "gate_proj", "up_proj", "down_proj"]}
DOWN = {"target_modules": ["o_proj", "down_proj"]}
INTO_PADDED: list[tuple[Layout, Kind]] = [
    ("interleave", Kind(lora=MLP)),
    ("split", Kind(lora=MLP)),
    ("interleave", Kind(lora={"target_modules": ["q_proj"]})),
    ("append", Kind(lora=MLP | {"use_dora": True})),
    ("interleave", Kind(lora={"target_modules": ["lm_head", "up_proj"]}, tied=True)),
    ("split", KINDS["experts"]),
]
INTO_LIVE: list[tuple[Layout, Kind]] = [
    ("interleave", Kind(lora=MLP)),
    ("append", Kind(lora=DOWN | {"use_dora": True})),
    ("interleave", Kind(lora={"modules_to_save": ["layers.0.mlp"]})),
    ("append", KINDS["experts"]),
    ("split", Kind(lora=DOWN)),
]

Model = Callable[..., tuple[Path, Path]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """Return live and padded models by family and layout, each made once."""
    root, made = tmp_path_factory.mktemp("models"), dict[str, tuple[Path, Path]]()

    def make(
        family: str, layout: Layout, *, tie: bool = False, dtype: torch.dtype = torch.bfloat16
    ) -> tuple[Path, Path]:
        key = f"{family}-{layout}-{tie}-{dtype}"
        if key not in made:
            live = tiny_model(family, root / key / "live", tie=tie, dtype=dtype)
            spec = PaddingSpec(group_size=32, tensor_parallel=4, layout=layout)
            made[key] = live, pad(source=live, destination=Directory(root / key / "padded"), spec=spec).path
        return made[key]

    return make


@pytest.mark.parametrize(("layout", "kind"), INTO_PADDED)
def test_merging_a_live_adapter_into_a_padded_base_equals_padding_after_merging(
    tmp_path: Path, model: Model, kind: Kind, layout: Layout
) -> None:
    live, padded = model("qwen2_moe" if kind.needs_experts else "qwen2", layout, tie=kind.tied)
    train(kind, live, tmp_path / "adapter")
    into_padded = merge(base=padded, fine_tune=tmp_path / "adapter", destination=Directory(tmp_path / "into_padded"))
    into_live = merge(base=live, fine_tune=tmp_path / "adapter", destination=Directory(tmp_path / "into_live"))
    assert into_padded.manifest.result["padding"]["sizes"][0]["layout"] == layout
    unpadded = unpad(source=into_padded.path, destination=Directory(tmp_path / "unpadded"))
    assert unpadded.manifest.content_digest == into_live.manifest.content_digest
    (report,) = (
        report for report in load_reports(into_padded.manifest.result) if report.name == "base_is_the_one_trained_on"
    )
    assert report.passed
    assert "the base was padded from the checkpoint" in report.detail


def test_an_adapter_of_another_model_does_not_pass_as_one_of_the_live_base(tmp_path: Path, model: Model) -> None:
    _, padded = model("qwen2", "interleave")
    train(Kind(lora=DOWN), tiny_model("qwen2", tmp_path / "other", seed=1), tmp_path / "adapter")
    merged = merge(base=padded, fine_tune=tmp_path / "adapter", destination=Directory(tmp_path / "merged"))
    (report,) = (
        report for report in load_reports(merged.manifest.result) if report.name == "base_is_the_one_trained_on"
    )
    assert not report.passed


def trained(kind: Kind, base: Path, root: Path) -> PeftModel:
    """Save an adapter with PEFT after three steps of AdamW from PEFT's default initialization."""
    torch.manual_seed(0)
    defaults: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}
    peft = get_peft_model(load_tiny(base, torch.float32), LoraConfig(**(defaults | dict(kind.lora))))
    optimizer = torch.optim.AdamW([p for p in peft.parameters() if p.requires_grad], lr=0.05, weight_decay=0.1)
    for _ in range(3):
        ids = torch.randint(0, VOCABULARY, (2, 24))
        peft(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    peft.save_pretrained(str(root))
    return peft


@torch.inference_mode()
def logits_of(model: Any) -> torch.Tensor:
    """Return float64 logits; the default for experts, a grouped matrix product, does not support float64."""
    model.set_experts_implementation("eager")
    ids = torch.randint(0, VOCABULARY, (1, 24), generator=torch.Generator().manual_seed(7))
    return model.double().eval()(input_ids=ids).logits


@pytest.mark.parametrize(("layout", "kind"), INTO_LIVE)
def test_an_adapter_trained_on_a_padded_base_computes_the_same_in_the_live_one(
    tmp_path: Path, model: Model, kind: Kind, layout: Layout
) -> None:
    live, padded = model("qwen2_moe" if kind.needs_experts else "qwen2", layout, dtype=torch.float32)
    peft = trained(kind, padded, tmp_path / "adapter")
    merged = merge(
        base=live, fine_tune=tmp_path / "adapter", destination=Directory(tmp_path / "merged"), base_names=["Qwen/Known"]
    )
    reports = {report.name: report for report in load_reports(merged.manifest.result)}
    assert all(report.passed for report in reports.values())
    assert "a checkpoint that was padded from this base" in reports["base_is_the_one_trained_on"].detail
    assert (merged.path / "config.json").read_bytes() == (live / "config.json").read_bytes()
    change = (logits_of(load_tiny(live)) - logits_of(load_tiny(merged.path))).abs().max()
    error = (logits_of(peft.model) - logits_of(load_tiny(merged.path))).abs().max()
    assert error < 1e-5 < change / 1e3


def test_dropping_the_added_channels_from_the_factors_gives_the_same_bytes(tmp_path: Path, model: Model) -> None:
    live, padded = model("qwen2", "interleave")
    trained(Kind(lora=MLP), padded, tmp_path / "adapter")
    ours = merge(base=live, fine_tune=tmp_path / "adapter", destination=Directory(tmp_path / "ours"))
    weights = load_file(tmp_path / "adapter" / ADAPTER_WEIGHTS)
    (size,) = load_plan(open_manifest(padded).result["padding"]).sizes
    for name in weights:
        if "gate_proj.lora_B" in name or "up_proj.lora_B" in name:
            weights[name] = weights[name][size.positions()]
        if "down_proj.lora_A" in name:
            weights[name] = weights[name][:, size.positions()].contiguous()
    save_file(weights, tmp_path / "adapter" / ADAPTER_WEIGHTS)
    cut = merge(base=live, fine_tune=tmp_path / "adapter", destination=Directory(tmp_path / "cut"))
    assert ours.manifest.content_digest == cut.manifest.content_digest


def test_a_recipe_of_a_merge_across_padding_can_be_materialized(tmp_path: Path, model: Model) -> None:
    live, padded = model("qwen2", "interleave")
    trained(Kind(lora=DOWN), padded, tmp_path / "adapter")
    stored = merge(base=live, fine_tune=tmp_path / "adapter", destination=Directory(tmp_path / "stored"))
    recipe, _ = merge_pad(
        base=live,
        fine_tune=tmp_path / "adapter",
        merged=Directory(tmp_path / "recipe"),
        padded=Directory(tmp_path / "again"),
    )
    assert materialize(recipe.path).manifest.content_digest == stored.manifest.content_digest


@pytest.mark.parametrize(
    ("layout", "targets"),
    [("interleave", ["gate_proj", "up_proj"]), ("append", ["gate_up_proj"]), ("split", ["gate_proj"])],
)
def test_an_adapter_that_uses_added_channels_is_refused_by_name(
    tmp_path: Path, model: Model, layout: Layout, targets: list[str]
) -> None:
    fused = targets == ["gate_up_proj"]
    live, padded = model("qwen3_vl_moe" if fused else "qwen2", layout)
    lora = (
        {"target_modules": [], "target_parameters": ["experts.gate_up_proj"]} if fused else {"target_modules": targets}
    )
    train(Kind(lora=lora), padded, tmp_path / "adapter")
    with pytest.raises(AdapterRefused, match=rf"channels that padding added.*{targets[0]}") as refusal:
        merge(base=live, fine_tune=tmp_path / "adapter", destination=Directory(tmp_path / "merged"))
    assert "padded checkpoint that it was trained on" in refusal.value.remedy
    assert not (tmp_path / "merged").exists()
    merge(base=padded, fine_tune=tmp_path / "adapter", destination=Directory(tmp_path / "merged"))


def test_an_added_channel_has_no_effect_if_gate_or_up_is_zero(tmp_path: Path, model: Model) -> None:
    live, padded = model("qwen2", "interleave", dtype=torch.float32)
    peft = train(Kind(lora={"target_modules": ["up_proj", "down_proj"]}), padded, tmp_path / "adapter")
    merged = merge(base=live, fine_tune=tmp_path / "adapter", destination=Directory(tmp_path / "merged"))
    assert (logits_of(peft.model) - logits_of(load_tiny(merged.path))).abs().max() < 1e-5


def test_the_padded_checkpoint_can_be_passed_as_trained_on(tmp_path: Path, model: Model) -> None:
    live, padded = model("qwen2", "interleave")
    trained(Kind(lora=DOWN), padded, tmp_path / "adapter")
    settings = json.loads((tmp_path / "adapter" / ADAPTER_CONFIG).read_bytes())
    (tmp_path / "adapter" / ADAPTER_CONFIG).write_text(json.dumps(settings | {"base_model_name_or_path": "Qwen/Live"}))
    with pytest.raises(AdapterRefused) as refusal:
        stages.merge(base=live, adapter=[tmp_path / "adapter"], out=tmp_path / "merged")
    assert "--trained-on" in refusal.value.remedy
    with pytest.raises(InputRefused, match="no padding map"):
        stages.merge(base=live, adapter=[tmp_path / "adapter"], out=tmp_path / "merged", trained_on=live)
    stages.merge(base=live, adapter=[tmp_path / "adapter"], out=tmp_path / "merged", trained_on=padded)
    seen = inspect(tmp_path / "adapter", base=live, trained_on=padded)
    assert seen.data["trained"] == "padded"
    assert seen.data["lands"]["model.layers.0.mlp.down_proj.weight"]["what"] == ["updated"]
