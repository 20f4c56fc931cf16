"""Every family and kind of adapter: our merge against PEFT's, never further from the float64 result than PEFT's.

If every product and sum is exact in bfloat16, both equal the float64 result bit for bit. DoRA, which takes roots, is
compared in a float32 model instead: ours is the float64 result, rounded once.

The results of the whole matrix are in ``docs/fine-tunes.md``; the slow test compares the table there with its own, or
writes it if ``WRITE_LORA_TABLE`` is set.
"""

import json
import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from qwen_pipeline.qwen.families import FAMILIES
from qwen_pipeline_tests import REPOSITORY
from qwen_pipeline_tests.adapter_kinds import KINDS, Kind, applies, grid, merged_by_peft, put_on_grid, train
from qwen_pipeline_tests.layouts import Layout, layouts_of
from qwen_pipeline_tests.oracles import assert_no_further, merged_with
from qwen_pipeline_tests.tiny import LANGUAGE_FAMILIES, load_tiny, tiny_model

pytestmark = pytest.mark.lengthy

DOCUMENT = REPOSITORY / "docs" / "fine-tunes.md"
_TABLE = re.compile(r"(?s)(<!-- matrix -->\n).*(<!-- end of matrix -->)")

Base = Callable[..., Path]

EVERYTHING = Kind(
    lora={
        "target_modules": KINDS["linear"].lora["target_modules"],
        "target_parameters": [*KINDS["experts"].lora["target_parameters"], "gate.weight"],
    }
)


@pytest.fixture(scope="module")
def base_of(tmp_path_factory: pytest.TempPathFactory) -> Base:
    """Return tiny models by family, layout, tie and dtype, each made once."""
    root, made = tmp_path_factory.mktemp("bases"), dict[str, Path]()

    def make(family: str, layout: Layout, kind: Kind, dtype: torch.dtype = torch.bfloat16) -> Path:
        key = f"{family}-{layout}-{kind.tied}-{dtype}"
        if key not in made:
            made[key] = put_on_grid(tiny_model(family, root / key, layout=layout, tie=kind.tied, dtype=dtype))
        return made[key]

    return make


def merged_state(base: Path, adapter: Path, scratch: Path) -> dict[str, torch.Tensor]:
    """Return the state dict of our merge as Transformers loads it, in float64."""
    merged = merged_with(base, adapter)
    scratch.mkdir()
    save_file(
        {name: merged.load(name).contiguous() for name in merged}, scratch / "model.safetensors", {"format": "pt"}
    )
    (scratch / "config.json").write_text(json.dumps(merged.config))
    return dict(load_tiny(scratch, torch.float64).state_dict())


def assert_equal_bits(kind: Kind, base: Path, scratch: Path) -> None:
    """Assert that ours is the float64 result rounded once, and PEFT's as well where it computes exactly."""
    train(kind, base, scratch / "adapter", values=grid)
    exact = merged_by_peft(kind, base, scratch / "adapter", torch.float64)
    ours = merged_state(base, scratch / "adapter", scratch / "merged")
    dtype = torch.bfloat16 if kind.is_computed_exactly else torch.float32
    theirs = merged_by_peft(kind, base, scratch / "adapter", dtype) if kind.is_computed_exactly else exact
    assert ours.keys() == exact.keys()
    for name, answer in exact.items():
        rounded = answer.to(dtype).double() if answer.is_floating_point() else answer
        assert ours[name].equal(rounded), name
        assert theirs[name].to(answer).equal(answer), name


def largest_error(kind: Kind, base: Path, scratch: Path) -> str:
    """Assert that no tensor of ours is further from float64 than PEFT's; return our largest error over PEFT's."""
    train(kind, base, scratch / "adapter")
    ours = merged_state(base, scratch / "adapter", scratch / "merged")
    exact, theirs = (
        merged_by_peft(kind, base, scratch / "adapter", dtype) for dtype in (torch.float64, torch.bfloat16)
    )
    assert ours.keys() == exact.keys()
    errors = [assert_no_further(name, ours[name], theirs[name], answer) for name, answer in exact.items()]
    our_error, their_error = map(max, zip(*errors, strict=True))
    return f"{our_error / their_error:.1f}" if our_error else "exact"


def exact_base(family: str, kind: Kind, base_of: Base, layout: Layout = "saved") -> Path:
    return base_of(family, layout, kind, torch.bfloat16 if kind.is_computed_exactly else torch.float32)


@pytest.mark.parametrize("number", range(len(KINDS)), ids=list(KINDS))
def test_every_kind_is_exact_in_one_family(tmp_path: Path, number: int, base_of: Base) -> None:
    """Kinds are spread over the families in order; the slow test runs every kind in every family."""
    kind, first = list(KINDS.values())[number], number * len(LANGUAGE_FAMILIES) // len(KINDS)
    families = (*LANGUAGE_FAMILIES[first:], *LANGUAGE_FAMILIES[:first])
    base = next(base for family in families if applies(kind, family, base := exact_base(family, kind, base_of)))
    assert_equal_bits(kind, base, tmp_path)


@pytest.mark.parametrize(
    ("family", "layout"),
    [
        pytest.param(family, layout, marks=[pytest.mark.slow] * (number > 0))
        for family in LANGUAGE_FAMILIES
        for number, layout in enumerate(layouts_of(family)[1:])
    ],
)
def test_every_tensor_is_found_in_every_layout(tmp_path: Path, family: str, layout: Layout, base_of: Base) -> None:
    kind = EVERYTHING if FAMILIES[family].experts else KINDS["linear"]
    assert_equal_bits(kind, base_of(family, layout, kind), tmp_path)


@pytest.mark.slow
def test_the_whole_matrix_is_the_table_in_the_documentation(tmp_path: Path, base_of: Base) -> None:
    cells = {
        family: [cell_of(name, family, base_of, tmp_path / family) for name in KINDS] for family in LANGUAGE_FAMILIES
    }
    rows = [["", *KINDS], ["---"] * (len(KINDS) + 1), *([family, *row] for family, row in cells.items())]
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    text = DOCUMENT.read_text()
    if os.environ.get("WRITE_LORA_TABLE"):
        DOCUMENT.write_text(_TABLE.sub(lambda match: f"{match[1]}{table}\n{match[2]}", text))
    else:
        found = _TABLE.search(text)
        assert found
        assert _without_figures(found[0]) == _without_figures(f"{found[1]}{table}\n{found[2]}")


def cell_of(name: str, family: str, base_of: Base, scratch: Path) -> str:
    kind = KINDS[name]
    base = base_of(family, "saved", kind)
    if not applies(kind, family, base):
        return ""
    for part in ("exact", "error"):
        (scratch / name / part).mkdir(parents=True)
    assert_equal_bits(kind, exact_base(family, kind, base_of), scratch / name / "exact")
    return largest_error(kind, base, scratch / name / "error")


def _without_figures(table: str) -> str:
    """Replace the figures, which may differ in rounding on another machine."""
    return re.sub(r"\d\.\d", "n", table)
