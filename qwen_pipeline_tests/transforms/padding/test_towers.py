"""Padding of vision and audio towers: only on request, only zeros, the same function, and undone bit for bit."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from qwen_pipeline.checkpoint.lazy import open_checkpoint
from qwen_pipeline.checkpoint.store.destinations import Artifact, Directory
from qwen_pipeline.cli.tables import repair_table
from qwen_pipeline.errors import AdapterRefused, CheckpointRefused, InputRefused
from qwen_pipeline.evaluation.origin import quantized_from, widened
from qwen_pipeline.evaluation.structure.check import check_structure
from qwen_pipeline.qwen.channels import sized_tensors
from qwen_pipeline.qwen.geometry import PaddedSize, dump_plan, load_plan, plan_between, plan_padding, with_towers
from qwen_pipeline.qwen.padding_spec import PaddingSpec
from qwen_pipeline.qwen.towers import TOWERS, towers_of
from qwen_pipeline.reports import load_reports
from qwen_pipeline.stages.merge import merge
from qwen_pipeline.stages.pad import pad
from qwen_pipeline.stages.repair import repair
from qwen_pipeline.stages.unpad import unpad
from qwen_pipeline_tests.adapter_kinds import Kind, train
from qwen_pipeline_tests.qwen.published import QWEN2_5_VL_3B
from qwen_pipeline_tests.rounding import round_to_codes
from qwen_pipeline_tests.tiny import INTERMEDIATE, tiny_model, tiny_qwen2
from qwen_pipeline_tests.towers import logits_on_an_image, tower_outputs

WITH_WIDTH_FIELD = [family for family in TOWERS if family != "qwen2_vl"]
"""Families whose configs have a field for the width of the towers' MLPs."""
FAST_OR_SLOW = [
    pytest.param(
        family, marks=() if family in ("qwen2_5_vl", "qwen3_omni_moe_thinker", "qwen3_asr") else pytest.mark.slow
    )
    for family in WITH_WIDTH_FIELD
]
"""The same families, of which three different ones run always, and the others in slow tests."""
RANKS = 5


@dataclass(frozen=True)
class Case:
    family: str
    live: Path
    padded: Artifact

    @property
    def sizes(self) -> list[PaddedSize]:
        return [size for size in load_plan(self.padded.manifest.result["padding"]).sizes if size.of_tower]

    @property
    def tensors(self) -> Iterator[tuple[torch.Tensor, torch.Tensor, int]]:
        """Yield the live and the padded tensors that have channels of a tower, with the axis of the channels."""
        live, padded = open_checkpoint(self.live), open_checkpoint(self.padded.path)
        for size in self.sizes:
            for name, channels in sized_tensors(padded, size.field).items():
                yield live.load(name), padded.load(name), channels.axis


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case]:
    return {}


@pytest.fixture
def case(request: pytest.FixtureRequest, cases: dict[str, Case], tmp_path_factory: pytest.TempPathFactory) -> Case:
    family: str = request.param
    if family not in cases:
        root = tmp_path_factory.mktemp(family)
        live = tiny_model(family, root / "live", dtype=torch.float64, shards=2)
        out = Directory(root / "padded")
        padded = pad(source=live, destination=out, spec=PaddingSpec(group_size=32, tensor_parallel=RANKS, towers=True))
        cases[family] = Case(family, live, padded)
    return cases[family]


@pytest.mark.parametrize("case", WITH_WIDTH_FIELD, indirect=True)
def test_towers_are_padded_to_a_width_that_ranks_can_share_and_added_channels_are_zero(case: Case) -> None:
    assert [(size.live, size.padded, size.layout) for size in case.sizes] == [(96, 100, "append")] * len(case.sizes)
    assert len(case.sizes) == len(TOWERS[case.family])
    config, live_config = (json.loads((root / "config.json").read_text()) for root in (case.padded.path, case.live))
    assert [tower.width(config) for tower in towers_of(config)] == [100] * len(case.sizes)
    assert [tower.width(live_config) for tower in towers_of(live_config)] == [96] * len(case.sizes)
    assert all(report.passed for report in load_reports(case.padded.manifest.result)[:3])
    for live, padded, axis in case.tensors:
        assert torch.equal(padded.narrow(axis, 0, INTERMEDIATE), live)
        assert not padded.narrow(axis, INTERMEDIATE, 4).any()


@pytest.mark.parametrize("case", WITH_WIDTH_FIELD, indirect=True)
def test_float64_outputs_of_towers_are_unchanged(case: Case) -> None:
    live, padded = tower_outputs(case.live), tower_outputs(case.padded.path)
    assert len(live) == len(case.sizes)
    for name, before in live.items():
        assert before.abs().max() > 0.1
        assert (padded[name] - before).abs().max() < 1e-12


@pytest.mark.parametrize("case", [f for f in WITH_WIDTH_FIELD if TOWERS[f][0].part == "vision"], indirect=True)
def test_float64_logits_on_an_image_are_unchanged(case: Case) -> None:
    assert (logits_on_an_image(case.padded.path) - logits_on_an_image(case.live)).abs().max() < 1e-12


@pytest.mark.parametrize("case", ["qwen2_5_vl"], indirect=True)
def test_a_changed_weight_of_a_tower_changes_outputs_and_logits(case: Case, tmp_path: Path) -> None:
    """The outputs that the tests above compare do depend on the towers."""
    root = tiny_model("qwen2_5_vl", tmp_path / "other", dtype=torch.float64)
    tensors = load_file(root / "model.safetensors")
    (name,) = (name for name in tensors if name.endswith("visual.blocks.0.mlp.down_proj.weight"))
    tensors[name][0, 0] += 1
    save_file(tensors, root / "model.safetensors", {"format": "pt"})
    assert (tower_outputs(root)["visual"] - tower_outputs(case.live)["visual"]).abs().max() > 1e-3
    assert (logits_on_an_image(root) - logits_on_an_image(case.live)).abs().max() > 1e-3


@pytest.mark.parametrize("case", FAST_OR_SLOW, indirect=True)
def test_unpadding_undoes_padding_of_towers(case: Case, tmp_path: Path) -> None:
    back = unpad(source=case.padded.path, destination=Directory(tmp_path / "back"))
    same = pad(
        source=case.live, destination=Directory(tmp_path / "same"), spec=PaddingSpec(group_size=1, tensor_parallel=1)
    )
    assert back.manifest.contents == same.manifest.contents


@pytest.mark.parametrize("case", FAST_OR_SLOW, indirect=True)
def test_without_a_request_no_tensor_of_a_tower_changes(case: Case, tmp_path: Path) -> None:
    not_requested = pad(
        source=case.live,
        destination=Directory(tmp_path / "out"),
        spec=PaddingSpec(group_size=32, tensor_parallel=RANKS),
    )
    assert "towers" not in not_requested.manifest.derivation.spec
    same = pad(
        source=case.live, destination=Directory(tmp_path / "same"), spec=PaddingSpec(group_size=1, tensor_parallel=1)
    )
    live, padded, tower_padded = (made.manifest.contents.tensors for made in (same, not_requested, case.padded))
    channels = {name for size in case.sizes for name in sized_tensors(open_checkpoint(case.live), size.field)}
    assert channels
    assert all(live[name] == padded[name] != tower_padded[name] for name in channels)
    assert {name for name in live if padded[name] != tower_padded[name]} == channels


@pytest.mark.parametrize("case", ["qwen3_vl"], indirect=True)
def test_adapters_are_merged_across_the_padding_of_a_tower(case: Case, tmp_path: Path) -> None:
    """In both directions; an adapter that changes added channels of a tower without gates is refused."""
    train(Kind(lora={"target_modules": r".*visual.*linear_fc[12]"}), case.live, tmp_path / "live")
    into_padded, into_live = (
        merge(base=base, fine_tune=tmp_path / "live", destination=Directory(tmp_path / name))
        for base, name in ((case.padded.path, "into_padded"), (case.live, "into_live"))
    )
    unpadded = unpad(source=into_padded.path, destination=Directory(tmp_path / "unpadded"))
    assert unpadded.manifest.content_digest == into_live.manifest.content_digest

    train(Kind(lora={"target_modules": r".*visual.*linear_fc2"}), case.padded.path, tmp_path / "padded")
    wide, narrow = (
        merge(base=base, fine_tune=tmp_path / "padded", destination=Directory(tmp_path / name))
        for base, name in ((case.padded.path, "wide"), (case.live, "narrow"))
    )
    assert (logits_on_an_image(wide.path) - logits_on_an_image(narrow.path)).abs().max() < 1e-6
    assert (logits_on_an_image(case.live) - logits_on_an_image(narrow.path)).abs().max() > 1e-3

    train(Kind(lora={"target_modules": r".*visual.*linear_fc1"}), case.padded.path, tmp_path / "used")
    with pytest.raises(AdapterRefused, match=r"channels that padding added.*linear_fc1"):
        merge(base=case.live, fine_tune=tmp_path / "used", destination=Directory(tmp_path / "none"))


@pytest.fixture(scope="module")
def codes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a quantized vision-language model whose attention 5 ranks can share, but not its MLPs of 96 channels."""
    root = tmp_path_factory.mktemp("codes")
    live = tiny_model("qwen3_vl", root / "live", num_attention_heads=5, num_key_value_heads=5)
    return round_to_codes(live, root / "gptq", group_size=16)


def test_repair_pads_towers_on_request(codes: Path, tmp_path: Path) -> None:
    requested = repair(source=codes, destination=Directory(tmp_path / "requested"), tensor_parallel=RANKS, towers=True)
    plain = repair(source=codes, destination=Directory(tmp_path / "plain"), tensor_parallel=RANKS)
    for artifact in (requested, plain):
        assert all(report.passed for report in load_reports(artifact.manifest.result))
    sizes = load_plan(requested.manifest.result["padding"]).sizes
    assert [(size.field, size.live, size.padded) for size in sizes] == [
        ("intermediate_size", 96, 160),
        ("vision_config.intermediate_size", 96, 100),
    ]
    without, padded = open_checkpoint(plain.path), open_checkpoint(requested.path)
    of_tower = sized_tensors(padded, "vision_config.intermediate_size")
    assert len(of_tower) == 3  # fc1 with its bias, fc2
    for name, channels in of_tower.items():
        assert torch.equal(padded.load(name).narrow(channels.axis, 0, 96), without.load(name))
        assert not padded.load(name).narrow(channels.axis, 96, 4).any()
    same, other = (made.manifest.contents.tensors for made in (plain, requested))
    assert {name for name in same if same[name] != other[name]} == of_tower.keys()
    table = repair_table(load_plan(requested.manifest.result["padding"]))
    assert list(table.columns[-1].cells) == ["1.2 -> 2", "19.2 -> 20 channels"]


def test_a_quantized_tower_is_not_repaired(codes: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(codes, tmp_path / "gptq"))
    tensors = load_file(root / "model.safetensors")
    (name,) = (name for name in tensors if name.endswith("visual.blocks.0.mlp.linear_fc2.weight"))
    tensors[name.replace("weight", "qweight")] = tensors.pop(name)
    save_file(tensors, root / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointRefused, match=r"visual\.blocks\.0\.mlp\.linear_fc2\.weight is missing"):
        repair(source=root, destination=Directory(tmp_path / "out"), tensor_parallel=RANKS, towers=True)


def test_nonzero_added_channels_of_a_tower_fail_the_structure_check(codes: Path, tmp_path: Path) -> None:
    """With the padded checkpoint and without it, where the merged one is padded again."""
    merged = open_checkpoint(codes.parent / "live")
    out = Directory(tmp_path / "padded")
    padded = pad(
        source=codes.parent / "live",
        destination=out,
        spec=PaddingSpec(group_size=16, tensor_parallel=RANKS, layout="append", towers=True),
    )
    root = round_to_codes(padded.path, tmp_path / "gptq", group_size=16)
    for before in (open_checkpoint(padded.path), None):
        source = quantized_from(merged, before, open_checkpoint(root), root)
        found = check_structure(source, open_checkpoint(root))
        assert not [problem for problem in found.problems if "visual" in problem or "config.json" in problem]
    tensors = load_file(root / "model.safetensors")
    (name,) = (name for name in tensors if name.endswith("visual.blocks.0.mlp.linear_fc2.weight"))
    tensors[name][3, 98] = 2**-10
    save_file(tensors, root / "model.safetensors", {"format": "pt"})
    for before in (open_checkpoint(padded.path), None):
        source = quantized_from(merged, before, open_checkpoint(root), root)
        assert (
            f"{name} is not what it was before quantization." in check_structure(source, open_checkpoint(root)).problems
        )
    assert widened(merged.config, open_checkpoint(root).config)[1] == {
        "field": "vision_config.intermediate_size", "live": 96, "padded": 100,
    }  # fmt: skip


def test_widths_that_are_computed_from_other_fields_cannot_be_padded(tmp_path: Path) -> None:
    live = tiny_model("qwen2_vl", tmp_path / "live")
    shared = pad(
        source=live,
        destination=Directory(tmp_path / "padded"),
        spec=PaddingSpec(group_size=32, tensor_parallel=2, towers=True),
    )
    assert [size.field for size in load_plan(shared.manifest.result["padding"]).sizes] == ["intermediate_size"]
    with pytest.raises(InputRefused, match="96 channels, embed_dim times mlp_ratio, which 5 ranks cannot share"):
        pad(
            source=live,
            destination=Directory(tmp_path / "no"),
            spec=PaddingSpec(group_size=32, tensor_parallel=5, towers=True),
        )


def test_padding_towers_of_a_model_without_towers_is_refused(tmp_path: Path) -> None:
    live = tiny_qwen2(tmp_path / "live")
    with pytest.raises(InputRefused, match="qwen2 has no vision or audio tower"):
        pad(
            source=live,
            destination=Directory(tmp_path / "padded"),
            spec=PaddingSpec(group_size=32, tensor_parallel=2, towers=True),
        )


def test_a_missing_tensor_of_a_tower_is_refused_by_name(tmp_path: Path) -> None:
    live = tiny_model("qwen3_asr", tmp_path / "live")
    tensors = load_file(live / "model.safetensors")
    name = next(name for name in tensors if name.endswith("audio_tower.layers.0.fc2.weight"))
    del tensors[name]
    save_file(tensors, live / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointRefused, match=r"audio_tower\.layers\.0\.fc2\.weight is missing"):
        pad(
            source=live,
            destination=Directory(tmp_path / "padded"),
            spec=PaddingSpec(group_size=32, tensor_parallel=5, towers=True),
        )


@given(width=st.integers(1, 10_000), ranks=st.integers(1, 16))
def test_a_tower_is_padded_to_the_least_width_that_ranks_can_share(width: int, ranks: int) -> None:
    config = {**QWEN2_5_VL_3B, "vision_config": {**QWEN2_5_VL_3B["vision_config"], "intermediate_size": width}}
    decoder = plan_padding(config, group_size=128, tensor_parallel=ranks)
    plan = with_towers(decoder, config, ranks=ranks)
    assert plan.sizes[:-1] == decoder.sizes
    size = plan.sizes[-1]
    assert size.padded % ranks == 0
    assert 0 <= size.zeros < ranks
    assert size.positions().tolist() == list(range(width))
    assert load_plan(json.loads(json.dumps(dump_plan(plan)))) == plan
    wide = {**config, "vision_config": {**config["vision_config"], "intermediate_size": size.padded}}
    assert [found for found in plan_between(config, wide, group_size=1).sizes if found.of_tower] == (
        [size] if size.zeros else []
    )
    assert towers_of(config)[0].weights(config, size.padded) >= towers_of(config)[0].weights(config, width)


def test_the_published_width_of_qwen2_5_vl_needs_four_more_channels_for_8_ranks() -> None:
    plan = with_towers(plan_padding(QWEN2_5_VL_3B, group_size=128, tensor_parallel=8), QWEN2_5_VL_3B, ranks=8)
    assert [(size.field, size.live, size.padded) for size in plan.sizes] == [
        ("intermediate_size", 11008, 11264),
        ("vision_config.intermediate_size", 3420, 3424),
    ]
