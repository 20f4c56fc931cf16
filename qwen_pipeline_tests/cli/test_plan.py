"""``plan``: tables, JSON and a picture from a config alone."""

import json
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen_pipeline.checkpoint.lazy import open_checkpoint
from qwen_pipeline.checkpoint.memory_budget import AvailableResources, estimate_needs, shortages
from qwen_pipeline.cli.plan import plan
from qwen_pipeline.cli.plan_views import CUT_END, group_line, resource_data, resource_view
from qwen_pipeline.errors import InputRefused
from qwen_pipeline.quantization.recipes import RECIPES
from qwen_pipeline.qwen.padding_spec import PaddingSpec
from qwen_pipeline.qwen.tensor_parallel.feasibility import Division
from qwen_pipeline.qwen.tensor_parallel.towers import tower_obstacles
from qwen_pipeline.stages.merge_pad import estimate_resources
from qwen_pipeline_tests.cli.terminal import qwen_pipeline
from qwen_pipeline_tests.qwen.published import QWEN2_5_VL_3B, config_of
from qwen_pipeline_tests.tiny import tiny_qwen2


@pytest.fixture
def model(tmp_path: Path) -> Path:
    config = config_of("Qwen2-72B, Qwen2.5-72B, Qwen2-VL-72B")
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


def test_plan_shows_every_degree(model: Path) -> None:
    for named in (model, model / "config.json"):
        rows = qwen_pipeline("plan", named, "--tp", 1, "--tp", 8, "--group-size", 128, "--json").data["degrees"]
        widths = [(row["degree"], row["sizes"][0]["live"], row["sizes"][0]["target"]) for row in rows]
        assert widths == [(1, 29568, 29568), (8, 29568, 29696)]
    text = qwen_pipeline("plan", model, "--tp", 8).out
    assert "intermediate_size from 29,568 to 29,696" in text
    assert "qwen-pipeline pad --group-size 128 --tp 8" in text


def test_plan_chooses_for_an_engine_within_a_budget(model: Path) -> None:
    data = qwen_pipeline("plan", model, "--engine", "vllm-machete", "--tp", 2, "--json").data
    assert [engine["verdict"] for engine in data["engines"]] == ["silently wrong"]
    best = data["options"][0]
    assert best["sizes"] == {"intermediate_size": [29568, 29696]}
    assert (best["group_size"], best["fits"], data["chosen"]) == (128, True, best["name"])
    assert [(option["name"], option["degrees"]) for option in data["fewer_ranks"]] == [("groups of 128, unpadded", [1])]
    tight = qwen_pipeline("plan", model, "--engine", "vllm-machete", "--tp", 2, "--max-extra", 0.1, "--json").data
    assert [option["name"] for option in tight["options"] if option["fits"]] == ["groups of 64, unpadded"]
    assert tight["chosen"] == "groups of 64, unpadded"
    assert "adds more than 0.1 %" in tight["options"][0]["remark"]
    assert "chosen" in qwen_pipeline("plan", model, "--engine", "vllm", "--tp", 2).out


def test_plan_offers_fewer_ranks_if_no_option_serves(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config_of("Qwen2.5-0.5B")))
    text = " ".join(qwen_pipeline("plan", tmp_path, "--tp", 4).out.split())
    assert "14 attention heads are not divisible by 4" in text
    assert "With fewer ranks: TP 2, groups of 64, unpadded." in text


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_plan_draws_groups_over_ranks_before_and_after(model: Path, tmp_path: Path, suffix: str) -> None:
    picture = tmp_path / f"ranks.{suffix}"
    tight = ("plan", model, "--tp", 2, "--max-extra", 0.1, "--engine", "vllm-machete", "--picture", picture)
    divisions = qwen_pipeline(*tight, "--json").data["divisions"]
    drawn = [(row["when"], row["inputs"], row["group_size"], row["straddling"]) for row in divisions]
    assert drawn == [("unpadded", 29568, 128, [115]), ("chosen", 29568, 64, [])]
    assert picture.stat().st_size > 1000


def test_the_terminal_picture_marks_the_ends_that_cut_groups(model: Path) -> None:
    lines = qwen_pipeline("plan", model, "--tp", 8).out.splitlines()
    ranks = [line for line in lines if line.startswith("│") and ("28.875" in line or "   29   " in line)][:2]
    assert [line.count(CUT_END) for line in ranks] == [7, 0]
    assert [line.count("28.875") for line in ranks] == [8, 0]
    assert ranks[1].count("29") == 8


@given(inputs=st.integers(1, 5000), group_size=st.sampled_from([32, 64, 128]), ranks=st.integers(1, 16))
def test_a_group_straddles_if_a_rank_ends_inside_it(inputs: int, group_size: int, ranks: int) -> None:
    division = Division(kind="mlp.down_proj", inputs=inputs, group_size=group_size, ranks=ranks)
    owners = [
        {Fraction(channel) * ranks // inputs for channel in (start, start + n - 1)} for start, n in division.groups()
    ]
    whole = inputs % ranks == 0
    assert not whole or division.straddling == {number for number, on in enumerate(owners) if len(on) > 1}
    assert any(division.is_cut) == bool(division.straddling)
    assert sum(n for _, n in division.groups()) == inputs
    for columns in (72, 2 * ranks):
        assert len(group_line(division, columns)) == columns + 2


def test_plan_compares_needed_and_available_resources(tmp_path: Path) -> None:
    base, out = tiny_qwen2(tmp_path / "base"), tmp_path / "not" / "there"
    data = plan(model=str(base), tp=[2], group_size=32, out=out).data
    assert [cost["recipe"] for cost in data["recipes"]["estimates"]] == list(RECIPES)
    shown = data["outlay"]
    merging, both, one_pass, unstored = shown["ways"]
    stored = open_checkpoint(base).nbytes
    assert merging["disk_bytes"] == one_pass["read_bytes"] == stored
    assert both["disk_bytes"] == stored + one_pass["disk_bytes"]
    assert (unstored["read_bytes"], unstored["disk_bytes"]) == (stored, 0)
    assert one_pass["memory_bytes"] == estimate_needs(disk_bytes=0).memory_bytes
    assert shown["place"] == str(out)
    assert shown["room"]["disk_bytes"] > both["disk_bytes"]
    assert not any(way["refused"] for way in shown["ways"])


def test_shortages_are_those_that_the_stages_would_report(tmp_path: Path) -> None:
    estimate = estimate_resources(tiny_qwen2(tmp_path / "base"), PaddingSpec(group_size=32, tensor_parallel=2))
    assert estimate
    _, both, one_pass, _ = estimate.ways
    available = AvailableResources(disk_bytes=both.needs.disk_bytes - 1, memory_bytes=None, open_files=None)
    assert not list(shortages(one_pass.needs, available, tmp_path))
    (fault,) = shortages(both.needs, available, tmp_path)
    assert [way["refused"] for way in resource_data(estimate, available, tmp_path)["ways"]] == [
        [], [fault.what], [], [],
    ]  # fmt: skip
    table, *refusals = resource_view(estimate, available, tmp_path)
    assert [str(refusal) for refusal in refusals] == [f"merge, then pad would be refused: {fault.what} {fault.remedy}"]
    assert table.row_count == 5


def test_plan_shows_a_refused_tower_and_its_remedy(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(QWEN2_5_VL_3B))
    text = " ".join(qwen_pipeline("plan", tmp_path, "--tp", 8).out.split())
    assert tower_obstacles(QWEN2_5_VL_3B, {"vllm": [8]})[0] in text
    assert "--tp 8, then" in text
    (unpadded,) = plan(model=str(tmp_path), tp=[2, 8]).data["towers"]
    assert [prediction["verdict"] for prediction in unpadded["servings"]] == ["ok", "refused"]
    assert unpadded["refusals"]
    with_towers = plan(model=str(tmp_path), tp=[2, 8], towers=True)
    (padded,) = with_towers.data["towers"]
    assert (padded["live"], padded["padded"], padded["refusals"]) == (3420, 3424, [])
    assert "pad --group-size 128 --tp 8 --towers" in str(with_towers.view[0])


def test_plan_refuses_to_pad_towers_of_a_model_without_any(model: Path) -> None:
    assert plan(model=str(model), tp=[2]).data["towers"] == []
    with pytest.raises(InputRefused, match="no vision or audio tower"):
        plan(model=str(model), tp=[2], towers=True)


def test_plan_refuses_unknown_models_and_engines(tmp_path: Path, model: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert qwen_pipeline("plan", tmp_path / "empty").code == 2
    assert qwen_pipeline("plan", model, "--engine", "vlm").code == 2


def test_8_bit_floats_are_planned_in_whole_blocks(model: Path) -> None:
    blocks = plan(str(model), tp=[4, 8], method="fp8")
    assert blocks.data["chosen"] == "fp8, padded"
    assert "pad --group-size 128 --tp 8, then qwen-pipeline quantize --method fp8." in str(blocks.view[0])
    assert {row["verdict"] for row in blocks.data["engines"]} == {"refused"}
    channels = plan(str(model), tp=[8], method="fp8-dynamic")
    assert channels.data["chosen"] == "fp8-dynamic, unpadded"
    assert "Run: qwen-pipeline quantize --method fp8-dynamic." in str(channels.view[0])
