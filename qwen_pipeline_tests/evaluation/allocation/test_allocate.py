"""Divergences of parts against those of whole models, and what an allocation chooses."""

import json
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch

from qwen_pipeline.checkpoint.lazy import Checkpoint, open_checkpoint
from qwen_pipeline.errors import InputRefused
from qwen_pipeline.evaluation.allocation import parts
from qwen_pipeline.evaluation.allocation.goals import Goal
from qwen_pipeline.evaluation.allocation.parts import Part, divergences_of_parts
from qwen_pipeline.evaluation.allocation.units import composed, units_of
from qwen_pipeline.evaluation.logits.streamed import evaluate
from qwen_pipeline.layerwise.model import ComputeContext
from qwen_pipeline.quantization.spec import QuantSpec
from qwen_pipeline.qwen.fused import built_kind, require_alike
from qwen_pipeline.qwen.linears import decoder_linears
from qwen_pipeline.qwen.precision import KEEP
from qwen_pipeline.stages.allocate import AllocationInputs, allocate
from qwen_pipeline_tests.chain import write_text
from qwen_pipeline_tests.rounding import round_to_codes
from qwen_pipeline_tests.tiny import tiny_model, tiny_qwen2

pytestmark = pytest.mark.lengthy

CPU = ComputeContext(device=torch.device("cpu"), dtype=torch.float32)
WINDOWS = list(torch.arange(96).reshape(3, 32) * 7 % 256)


@pytest.fixture(scope="module", params=["qwen2", "qwen3_moe"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, and beside it codes of 4 bits in groups of 32 and of 64."""
    root = tmp_path_factory.mktemp(request.param)
    if request.param == "qwen2":
        tiny_qwen2(root / "model", intermediate_size=128)
    else:
        tiny_model("qwen3_moe", root / "model", moe_intermediate_size=64, hidden_size=64, head_dim=32)
    for size in (32, 64):
        round_to_codes(root / "model", root / f"g{size}", group_size=size)
    return root


def opened(root: Path) -> tuple[Checkpoint, list[Checkpoint]]:
    return open_checkpoint(root / "model"), [open_checkpoint(root / f"g{size}") for size in (32, 64)]


def test_parts_diverge_as_whole_models_with_one_unit_in_codes(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The oracle evaluates each model by itself; with a small budget there are several passes."""
    source, candidates = opened(model)
    units, by_word = units_of(source, candidates)
    found = divergences_of_parts(source, by_word, units, WINDOWS, CPU)
    assert len(found) == 2 * len(units)
    roles = {f"{part.unit} {part.word}": part for part in list(found)[::3]}
    models = {role: composed(source, by_word, [units[part.unit]], [part.word]) for role, part in roles.items()}
    figures = evaluate({"full": source, **models}, WINDOWS, reference="full", compared=list(models), context=CPU)
    for role, part in roles.items():
        divergence = figures[role].divergence
        assert divergence
        assert divergence.mean > 0
        assert found[part] == pytest.approx(divergence.mean, rel=1e-4, abs=1e-10)
    monkeypatch.setattr(parts, "HIDDEN_BYTES", 1)
    assert divergences_of_parts(source, by_word, units, WINDOWS, CPU) == pytest.approx(found, rel=1e-5)


def test_an_allocation_keeps_its_goal_and_can_be_quantized(model: Path, tmp_path: Path) -> None:
    text = write_text(tmp_path / "text.jsonl", documents=12, stride=5)
    whole = sum(spec.nbytes for spec in open_checkpoint(model / "g64").values())

    def chosen(goal: Goal) -> dict[str, Any]:
        inputs = AllocationInputs(
            source=model / "model", candidates=(model / "g32", model / "g64"), text=text, goal=goal, seq_len=32
        )
        return dict(allocate(inputs, tmp_path / "out"))

    found = chosen(Goal(measure="bytes", value=1.05 * whole))
    assert whole < found["bytes"] <= 1.05 * whole
    assert found["measured_kl"] < next(each["kl"] for each in found["uniform"] if each["precision"] == "4g64")
    anchors = found["anchors"]
    assert [each["bytes"] for each in anchors] == sorted(each["bytes"] for each in anchors)
    assert anchors[0]["kl"] == pytest.approx(max(each["kl"] for each in found["uniform"]), rel=1e-6)
    settings = tomllib.loads((tmp_path / "out" / "modules.toml").read_text())["quantization"]
    assert json.loads((tmp_path / "out" / "allocation.json").read_text())["modules"] == settings["modules"]
    assert (tmp_path / "out" / "curve.png").stat().st_size > 10_000
    spec = QuantSpec(**settings, device="cpu", threads=1)
    linears = decoder_linears(open_checkpoint(model / "model"))
    require_alike(linears, spec.precision_of)
    by_unit = {(unit["layer"], unit["module"]): unit["precision"] for unit in found["units"]}
    for (layer, module), word in by_unit.items():
        named = next(each for each in linears if (each.layer, built_kind(each.kind)) == (layer, module))
        assert str(spec.precision_of(named.module)) == word

    by_kl = chosen(Goal(measure="kl", value=found["predicted_kl"]))
    assert by_kl["bytes"] <= found["bytes"]
    assert by_kl["predicted_kl"] <= found["predicted_kl"]
    assert chosen(Goal(measure="bits", value=16))["measured_kl"] == pytest.approx(0, abs=1e-12)
    with pytest.raises(InputRefused, match="No choice has at most 3 bits; the smallest"):
        chosen(Goal(measure="bits", value=3))


def test_candidates_that_do_not_fit_are_refused(model: Path) -> None:
    source, (first, _) = opened(model)
    with pytest.raises(InputRefused, match="Two candidates have 4g32"):
        units_of(source, [first, first])
    with pytest.raises(InputRefused, match="no candidate"):
        units_of(source, [])
    assert Part(0, KEEP) not in divergences_of_parts(source, {}, [], WINDOWS, CPU)
