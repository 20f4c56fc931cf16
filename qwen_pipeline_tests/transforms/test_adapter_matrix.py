"""Family by kind: what we merge is what PEFT merges, and never further from the float64 answer than PEFT is.

The figures of the whole matrix are in ``docs/lora.md``; the slow test compares the table there with what it finds, or
writes it when ``WRITE_LORA_TABLE`` is set.
"""

import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from qwen_pipeline.checkpoint.writer import write_checkpoint
from qwen_pipeline_tests.adapter_kinds import KINDS, applies, peft_answer, train
from qwen_pipeline_tests.layouts import layouts_of
from qwen_pipeline_tests.oracles import merged_with
from qwen_pipeline_tests.tiny import LANGUAGE_FAMILIES, load_tiny, tiny_model

DOCUMENT = Path(__file__).parents[2] / "docs" / "lora.md"
_TABLE = re.compile(r"(?s)(<!-- matrix -->\n).*(<!-- end of matrix -->)")

Base = Callable[..., Path]


@pytest.fixture(scope="module")
def base_of(tmp_path_factory: pytest.TempPathFactory) -> Base:
    """Return tiny models by family, layout and tie, each made once."""
    root, made = tmp_path_factory.mktemp("bases"), dict[str, Path]()

    def make(family: str, layout: str, *, tied: bool) -> Path:
        key = f"{family}-{layout}-{tied}"
        if key not in made:
            made[key] = tiny_model(family, root / key, layout=layout, tie=tied)  # pyright: ignore[reportArgumentType]
        return made[key]

    return make


def compare(kind: str, base: Path, scratch: Path) -> str:
    """Assert that no tensor of ours is further from float64 than PEFT's; return our largest error as a part of its."""
    scratch.mkdir()
    train(KINDS[kind], base, scratch / "adapter")
    (scratch / "merged").mkdir()
    write_checkpoint(merged_with(base, scratch / "adapter"), scratch / "merged", task="merge")
    ours = load_tiny(scratch / "merged", torch.float64).state_dict()
    exact, theirs = (
        peft_answer(KINDS[kind], base, scratch / "adapter", dtype) for dtype in (torch.float64, torch.bfloat16)
    )
    assert ours.keys() == exact.keys()
    largest = {"ours": 0.0, "theirs": 0.0}
    for name, answer in exact.items():
        errors = {
            who: (of[name].double() - answer).abs().max().item() for who, of in (("ours", ours), ("theirs", theirs))
        }
        assert errors["ours"] <= errors["theirs"], name
        largest = {who: max(largest[who], errors[who]) for who in largest}
    return f"{largest['ours'] / largest['theirs']:.1f}" if largest["ours"] else "exact"


def row_of(family: str, base_of: Base, scratch: Path, layout: str = "saved") -> list[str]:
    """Return the figure of each kind for a family."""
    return [
        compare(kind, base_of(family, layout, tied=wanted.tied), scratch / f"{layout}-{number}")
        if applies(wanted, family)
        else ""
        for number, (kind, wanted) in enumerate(KINDS.items())
    ]


@pytest.mark.parametrize("family", ["qwen2", "qwen3_5_moe", "qwen3_vl_moe"])
def test_a_dense_a_hybrid_and_a_vision_family(tmp_path: Path, family: str, base_of: Base) -> None:
    assert any(row_of(family, base_of, tmp_path))


@pytest.mark.parametrize("family", LANGUAGE_FAMILIES)
def test_experts_are_found_in_every_layout(tmp_path: Path, family: str, base_of: Base) -> None:
    for layout in layouts_of(family)[1:]:
        for kind in ("linear", *(kind for kind in ("experts", "router, down") if applies(KINDS[kind], family))):
            compare(kind, base_of(family, layout, tied=False), tmp_path / f"{layout}-{kind}")


@pytest.mark.slow
def test_the_whole_matrix_is_the_table_in_the_documentation(tmp_path: Path, base_of: Base) -> None:
    rows = [["", *KINDS], ["---"] * (len(KINDS) + 1)]
    for family in LANGUAGE_FAMILIES:
        (tmp_path / family).mkdir()
        rows.append([family, *row_of(family, base_of, tmp_path / family)])
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    text = DOCUMENT.read_text()
    if os.environ.get("WRITE_LORA_TABLE"):
        DOCUMENT.write_text(_TABLE.sub(lambda match: f"{match[1]}{table}\n{match[2]}", text))
    else:
        found = _TABLE.search(text)
        assert found
        assert _without_figures(found[0]) == _without_figures(f"{found[1]}{table}\n{found[2]}")


def _without_figures(table: str) -> str:
    """Blur what another machine may round otherwise."""
    return re.sub(r"\d\.\d", "n", table)
