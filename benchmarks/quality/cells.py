"""Cells of the comparison: one model, format, draw of calibration text and contender each, measured on its own."""

import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch

from benchmarks.quality.contenders import Contender, Run, run
from benchmarks.quality.divergence import compare_tokens, rounded, token_counts
from qwen_pipeline.checkpoint.lazy import open_checkpoint
from qwen_pipeline.checkpoint.writer import write_bytes
from qwen_pipeline.layerwise.model import ComputeContext
from qwen_pipeline.quantization.spec import Device, QuantSpec
from qwen_pipeline.text.bounded_tokenizer import BoundedTokenizer
from qwen_pipeline.text.windows import token_windows
from qwen_pipeline.transforms.tokenizer_fits import embedding_rows

SOURCES = ("argparse", "asyncio.base_events", "decimal", "difflib", "doctest", "inspect", "tarfile", "turtle")
"""Modules of CPython whose source is text of another kind than its documentation."""
ALL = 10**6
"""More windows than a text has."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """What is measured: a contender's codes for a model, with one draw of calibration text."""

    model: str
    bits: int
    group_size: int
    recipe: str
    seed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What all cells share.

    Attributes:
        models: Directories by name.
        calibration: Text to draw calibration tokens from.
        texts: Text to evaluate on, by name; windows of another length than ``seq_len`` are asked for by
            ``NAME@LENGTH``, and have as many tokens in all.
        samples: Calibration windows.
        windows: Windows of each text.
        seq_len: Their length.
        pythons: Interpreters of other quantizers, by environment.
        contenders: What is compared, by name.
        scratch: Directory for what is written on the way.
    """

    models: Mapping[str, Path]
    calibration: Path
    texts: Mapping[str, Path]
    samples: int
    windows: int
    seq_len: int
    device: Device
    threads: int
    pythons: Mapping[str, Path]
    contenders: Mapping[str, Contender]
    scratch: Path


def cells(formats: Sequence[str], recipes: Sequence[str], seeds: Sequence[int]) -> Iterator[Cell]:
    """Yield the cells of formats ``MODEL:BITS:GROUP``; those of one draw come together."""
    for seed, each in product(seeds, formats):
        model, bits, group_size = each.split(":")
        for recipe in recipes:
            yield Cell(model=model, bits=int(bits), group_size=int(group_size), recipe=recipe, seed=seed)


def measure(cell: Cell, settings: Settings) -> dict[str, Any]:
    """Quantize and evaluate; return the fields of the cell and all figures."""
    torch.set_num_threads(settings.threads)
    source = settings.models[cell.model]
    spec = QuantSpec(
        bits=cell.bits,
        group_size=cell.group_size,
        samples=settings.samples,
        seq_len=settings.seq_len,
        seed=cell.seed,
        device=settings.device,
        threads=settings.threads,
    )
    with tempfile.TemporaryDirectory(dir=settings.scratch) as folder:
        task = Run(
            source=source,
            calibration=settings.calibration,
            spec=spec,
            pythons=settings.pythons,
            folder=Path(folder),
        )
        quantized, costs = run(settings.contenders[cell.recipe], task)
        full, tokenizer = open_checkpoint(source), BoundedTokenizer(source)
        context = ComputeContext(device=torch.device(settings.device), dtype=torch.float32)
        seen = [token for window in _windows(settings.calibration, tokenizer, ALL, 64) for token in window]
        counts = token_counts(seen, embedding_rows(full))
        figures = {
            text: compare_tokens(full, quantized, _windows(file, tokenizer, *_extent(text, settings)), context).summary(
                counts
            )
            for text, file in settings.texts.items()
        }
    return {**asdict(cell), **costs, **rounded(figures)}


def _extent(text: str, settings: Settings) -> tuple[int, int]:
    """Return number and length of a text's windows."""
    _, _, length = text.partition("@")
    seq_len = int(length or settings.seq_len)
    return max(1, settings.windows * settings.seq_len // seq_len), seq_len


def _windows(text: Path, tokenizer: Any, windows: int, seq_len: int) -> list[list[int]]:
    return token_windows(text, tokenizer, windows=windows, seq_len=seq_len)


def write_code(out: Path) -> Path:
    """Write the source of :data:`SOURCES` as JSONL; the same version of CPython gives the same bytes."""
    from importlib.util import find_spec

    specs = [find_spec(name) for name in SOURCES]
    texts = [Path(spec.origin).read_text() for spec in specs if spec and spec.origin]
    write_bytes(out, "".join(json.dumps({"text": text}) + "\n" for text in texts).encode())
    return out
