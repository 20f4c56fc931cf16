"""Every broken checkpoint of the zoo is caught by its check; valid ones pass."""

from pathlib import Path

import pytest

from qwen_pipeline.checkpoint.lazy import Checkpoint, open_checkpoint
from qwen_pipeline.checkpoint.store.destinations import Directory
from qwen_pipeline.errors import CheckpointRefused
from qwen_pipeline.evaluation.structure.check import check_structure
from qwen_pipeline.evaluation.tensor_parallel.findings import ANY_ENGINE, Target
from qwen_pipeline.qwen.geometry import plan_padding
from qwen_pipeline.qwen.padding_spec import PaddingSpec
from qwen_pipeline.stages.pad import pad
from qwen_pipeline.transforms.codes.formats import code_format
from qwen_pipeline.transforms.codes.repair import plan_repair, repair
from qwen_pipeline.transforms.padding.pad import pad as padded_view
from qwen_pipeline_tests import REPOSITORY
from qwen_pipeline_tests.chain import GROUP_SIZE, Chain
from qwen_pipeline_tests.damages import Healthy
from qwen_pipeline_tests.evaluation.simulated import find_targets
from qwen_pipeline_tests.rounding import round_to_codes
from qwen_pipeline_tests.tiny import tiny_model
from qwen_pipeline_tests.zoo import SPECIMENS, table

DOCUMENT = REPOSITORY / "docs" / "validation.md"


@pytest.fixture(scope="session")
def healthy(chain: Chain, tmp_path_factory: pytest.TempPathFactory) -> Healthy:
    root = tmp_path_factory.mktemp("mixture")
    mixture = tiny_model("qwen3_moe", root / "full")
    return Healthy(
        merged=chain.merged,
        padded=chain.padded,
        quantized=chain.quantized,
        mixture=mixture,
        packed_mixture=round_to_codes(mixture, root / "packed", group_size=GROUP_SIZE),
    )


def findings(source: Checkpoint, candidate: Checkpoint, ranks: int) -> dict[str, str]:
    """Return the faults that each check without a forward pass finds."""
    structure = check_structure(source, candidate)
    try:
        targets = find_targets(source, candidate, [Target(engine=ANY_ENGINE, degree=ranks)])
        wrong = [row.sentence for row in targets if row.refuses or row.answers_wrongly]
    except CheckpointRefused as refusal:
        wrong = [refusal.what]
    found = {"structure": structure.problems, "padding_is_silent": structure.padding.audible, "ranks_agree": wrong}
    return {check: "\n".join(faults) for check, faults in found.items() if faults}


@pytest.mark.parametrize("name", SPECIMENS)
def test_each_broken_checkpoint_is_caught_by_its_check(healthy: Healthy, tmp_path: Path, name: str) -> None:
    specimen = SPECIMENS[name]
    specimen.make(healthy, tmp_path / "broken")
    source = open_checkpoint(getattr(healthy, specimen.source))
    if specimen.caught_by == "opening":
        with pytest.raises(CheckpointRefused):
            open_checkpoint(tmp_path / "broken")
        return
    found = findings(source, open_checkpoint(tmp_path / "broken"), specimen.ranks)
    assert specimen.says in found.pop(specimen.caught_by)
    assert found.keys() <= {"ranks_agree", "padding_is_silent"}  # a fault may cause these too


@pytest.mark.parametrize(
    "family", ["qwen2", "qwen3", "qwen3_moe", "qwen2_moe", "qwen3_next", "qwen3_vl", "qwen3_vl_moe"]
)
def test_valid_checkpoints_of_every_kind_pass(tmp_path: Path, family: str) -> None:
    source = tiny_model(family, tmp_path / "source")
    candidate = round_to_codes(source, tmp_path / "candidate", group_size=GROUP_SIZE)
    assert findings(open_checkpoint(source), open_checkpoint(candidate), ranks=1) == {}


@pytest.mark.parametrize("layout", ["interleave", "append", "split"])
def test_valid_padded_checkpoints_pass(healthy: Healthy, tmp_path: Path, layout: str) -> None:
    source = pad(
        source=healthy.merged,
        destination=Directory(tmp_path / "padded"),
        spec=PaddingSpec(group_size=GROUP_SIZE, tensor_parallel=2, layout=layout),  # pyright: ignore[reportArgumentType]
    ).path
    candidate = round_to_codes(source, tmp_path / "candidate", group_size=GROUP_SIZE)
    assert findings(open_checkpoint(source), open_checkpoint(candidate), ranks=2) == {}


def test_codes_of_a_real_quantizer_pass(healthy: Healthy) -> None:
    assert findings(open_checkpoint(healthy.padded), open_checkpoint(healthy.quantized), ranks=2) == {}


def test_a_repaired_checkpoint_passes(healthy: Healthy, tmp_path: Path) -> None:
    before = open_checkpoint(round_to_codes(healthy.merged, tmp_path / "narrow", group_size=GROUP_SIZE))
    form = code_format(before.config["quantization_config"])
    after = repair(before, form, plan_repair(before.config, form, tensor_parallel=2))
    merged = open_checkpoint(healthy.merged)
    plan = plan_padding(merged.config, group_size=GROUP_SIZE, tensor_parallel=2, layout="groups")
    assert findings(merged, before, ranks=2).keys() == {"ranks_agree"}
    assert findings(padded_view(merged, plan), after, ranks=2) == {}


def test_the_document_shows_the_zoo() -> None:
    assert len(SPECIMENS) >= 25
    assert table() in DOCUMENT.read_text(), f"Paste into {DOCUMENT}:\n{table()}"
