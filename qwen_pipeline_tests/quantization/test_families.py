"""The quantizer ``layerwise`` on every Qwen family: codes on disk compute the logits in memory, resumed or not."""

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qwen_pipeline.checkpoint.lazy import open_checkpoint
from qwen_pipeline.layerwise.forward import LayerStream, advance
from qwen_pipeline.layerwise.model import ComputeContext
from qwen_pipeline.quantization.recipes import RecipeName
from qwen_pipeline.quantization.spec import QuantSpec
from qwen_pipeline.qwen.linears import decoder_linears
from qwen_pipeline.transforms.codes.packed import quantized_checkpoint
from qwen_pipeline.workers.environments import find_environment
from qwen_pipeline.workers.parent import run_worker
from qwen_pipeline_tests.layouts import Layout, layouts_of
from qwen_pipeline_tests.quantization.targets import LAST_LAYER, logits, windows
from qwen_pipeline_tests.rounding import dequantized
from qwen_pipeline_tests.tiny import LANGUAGE_FAMILIES, load_tiny, tiny_model

SPEC = QuantSpec(engine="layerwise", group_size=32, samples=16, seq_len=64, batch_size=8, threads=1, device="cpu")
CPU = ComputeContext(device=torch.device("cpu"), dtype=torch.float32)
Case = tuple[str, Layout, tuple[int, ...]]
"""A family, a layout on disk, and the dense layers of a mixture."""
QUICK: Sequence[Case] = (("qwen3_next", "fused", ()), ("qwen3_moe", "saved", (0,)))
ALL: Sequence[Case] = [
    *((family, layout, ()) for family in LANGUAGE_FAMILIES for layout in layouts_of(family)),
    *((family, "saved", (1,)) for family in ("qwen2_moe", "qwen3_moe", "qwen3_next")),
]
CASES: Mapping[RecipeName, Sequence[Case]] = {
    "gptq": ALL,
    "fast": [case for case in ALL if case[1] == "saved"],  # a layout is read in the same way by every recipe
}


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return quantized(QUICK, tmp_path_factory.mktemp("learned"), recipe="balanced")


@pytest.fixture(scope="module")
def every(tmp_path_factory: pytest.TempPathFactory) -> Callable[[RecipeName], Path]:
    """Quantize every case of a recipe once: pytest would set up an indirectly parametrized fixture for each test."""
    return cache(lambda recipe: quantized(CASES[recipe], tmp_path_factory.mktemp(recipe), recipe=recipe))


def quantized(cases: Sequence[Case], root: Path, *, recipe: RecipeName = "gptq") -> Path:
    """Quantize tiny models in one worker; return the directory of the sources and the outputs."""
    sources = {name_of(case): source(case, root / "sources" / name_of(case)) for case in cases}
    (root / "out").mkdir()
    run_worker(
        find_environment("gptqmodel").python,
        "qwen_pipeline_tests.quantization.targets:quantize_families",
        {
            "sources": {n: str(s) for n, s in sources.items()},
            "out": str(root / "out"),
            "quant": replace(SPEC, recipe=recipe).to_json(),
        },
        log=root / "log",
    )
    return root


def name_of(case: Case) -> str:
    family, layout, dense = case
    return "-".join((family, layout, *(f"dense{layer}" for layer in dense)))


def source(case: Case, root: Path) -> Path:
    family, layout, dense = case
    sizes: dict[str, Any] = {"mlp_only_layers": list(dense)} if dense else {}
    return tiny_model(family, root, layout=layout, **sizes)


@pytest.mark.slow
@pytest.mark.engine
@pytest.mark.parametrize("case", QUICK, ids=name_of)
def test_codes_of_a_recipe_that_compares_models_and_learns_do_too(learned: Path, tmp_path: Path, case: Case) -> None:
    require_agreement(learned, name_of(case), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "case"),
    [pytest.param(recipe, case, id=f"{recipe}-{name_of(case)}") for recipe, cases in CASES.items() for case in cases],
)
def test_codes_of_every_family_compute_the_logits_in_memory(
    every: Callable[[RecipeName], Path], tmp_path: Path, recipe: RecipeName, case: Case
) -> None:
    require_agreement(every(recipe), name_of(case), tmp_path)


def require_agreement(root: Path, name: str, scratch: Path) -> None:
    """Compare the loop's logits with those of the streamed codes, and with Transformers' of the dequantized weights.

    A loop that is resumed before its last layer must write the same bytes.
    """
    source = open_checkpoint(root / "sources" / name)
    linears = decoder_linears(source)
    packed = open_checkpoint(root / "out" / name)
    assert {linear.module for linear in linears} == {code.rpartition(".")[0] for code in packed}
    codes = quantized_checkpoint(source, packed, linears, SPEC.quantization_config("test:0"))
    own = load_file(root / "out" / name / "own.logits")["logits"]
    last, resumed = (root / "out" / each / f"{LAST_LAYER}.safetensors" for each in (name, f"{name}-resumed"))
    assert resumed.read_bytes() == last.read_bytes()

    stream = LayerStream(codes, windows().split(8), CPU)
    list(advance([stream]))
    torch.testing.assert_close(logits(stream), own, rtol=1e-5, atol=1e-5)

    copy = Path(shutil.copytree(root / "sources" / name, scratch / "dequantized"))
    save_file(dequantized(source, codes, linears), copy / "model.safetensors", {"format": "pt"})
    with torch.no_grad():
        plain = load_tiny(copy)(input_ids=windows()).logits[:, :-1].flatten(0, 1)
    torch.testing.assert_close(plain, own, rtol=1e-4, atol=1e-4)
