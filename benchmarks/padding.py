"""``python -m benchmarks.padding``: does a padded model quantize as well as the unpadded one, and split better?

KL(full precision || quantized) on held-out text, by layout, with and without the remedy for dead channels, for the
demo's dense base and for mixtures of experts made of it (:mod:`benchmarks.upcycled`). Which way codes round is a matter
of luck, so every figure is a mean over several draws of calibration text, the same for all treatments.
"""

import argparse
import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pandas as pd
import torch

from benchmarks import unsettled
from benchmarks.__main__ import RESULTS, describe_machine
from benchmarks.upcycled import upcycle
from qwen_pipeline.checkpoint.lazy import open_checkpoint
from qwen_pipeline.checkpoint.store import Directory
from qwen_pipeline.corpus import load_tokenizer
from qwen_pipeline.demo.base import build_base
from qwen_pipeline.demo.texts import Texts, write_texts
from qwen_pipeline.engines.environment import find_environment
from qwen_pipeline.engines.protocol import QuantSpec
from qwen_pipeline.evaluation.streamed import evaluate
from qwen_pipeline.evaluation.text import token_windows
from qwen_pipeline.layerwise.forward import Place
from qwen_pipeline.qwen.geometry import Layout
from qwen_pipeline.stages import pad, quantize
from qwen_pipeline.workers.parent import run_worker

GROUP_SIZE = 64
RANKS = {"dense": 3, "experts": 16, "quiet experts": 16}
"""Model -> ranks: 1600 channels become 1728, experts of 768 and shared experts of 832 become 1024."""
QUIET = 6
"""Doublings by which quiet experts' activations are smaller than the base's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Treatment:
    """A layout, or None for the unpadded model; ``settled`` is whether dead channels are."""

    name: str
    layout: Layout | None
    settled: bool = True


TREATMENTS = (
    Treatment(name="unpadded", layout=None),
    Treatment(name="interleave, not settled", layout="interleave", settled=False),
    Treatment(name="append, not settled", layout="append", settled=False),
    Treatment(name="interleave", layout="interleave"),
    Treatment(name="append", layout="append"),
    Treatment(name="split", layout="split"),
)


def measure(
    models: Mapping[str, Path],
    texts: Texts,
    *,
    seeds: int,
    windows: int,
    seq_len: int,
    python: Path | None,
    scratch: Path,
    treatments: Sequence[Treatment] = TREATMENTS,
) -> list[dict[str, Any]]:
    """Return a row for each model, treatment and seed: the KL in nats per token."""
    rows: list[dict[str, Any]] = []
    for name, model in models.items():
        held_out = token_windows(texts.held_out, load_tokenizer(model), windows=windows, seq_len=seq_len)
        for treatment in treatments:
            source = model if treatment.layout is None else _padded(model, name, treatment.layout, scratch)
            for seed in range(seeds):
                with tempfile.TemporaryDirectory(dir=scratch) as out:
                    quantized = _quantized(source, texts, treatment, seed, seq_len, python, Path(out) / "quantized")
                    kl = _divergence(model, quantized, held_out)
                rows.append({"model": name, "treatment": treatment.name, "seed": seed, "kl": kl})
                print(json.dumps(rows[-1]), flush=True)
    return rows


def _padded(model: Path, name: str, layout: Layout, scratch: Path) -> Path:
    out = Directory(scratch / f"{name.replace(' ', '-')}-{layout}")
    return pad.pad(
        source=model, destination=out, group_size=GROUP_SIZE, tensor_parallel=RANKS[name], layout=layout
    ).path


def _quantized(
    source: Path, texts: Texts, treatment: Treatment, seed: int, seq_len: int, python: Path | None, out: Path
) -> Path:
    spec = QuantSpec(engine="layerwise", group_size=GROUP_SIZE, samples=24, seq_len=seq_len, seed=seed)

    def run_unsettled(python: Path, _: str, *rest: Any, **named: Any) -> Any:
        return run_worker(python, unsettled.TARGET, *rest, **named)

    with patch.object(quantize, "run_worker", run_worker if treatment.settled else run_unsettled):
        return quantize.quantize(
            source=source,
            destination=Directory(out),
            calibration=texts.calibration,
            spec=spec,
            engine=find_environment(spec.environment, python),
        ).path


def _divergence(model: Path, quantized: Path, windows: Sequence[Sequence[int]]) -> float:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    figures = evaluate(
        {"full": open_checkpoint(model), "quantized": open_checkpoint(quantized)},
        [torch.tensor(window) for window in windows],
        reference="full",
        compared=["quantized"],
        place=Place(device=device, dtype=torch.float32),
    )
    divergence = figures["quantized"].divergence
    assert divergence is not None
    return divergence.mean


def table(rows: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """Return treatment x model: the mean KL, and its ratio to the unpadded model's, seed by seed, with its error."""
    kl = pd.DataFrame(rows).set_index(["model", "treatment", "seed"])["kl"].unstack("seed")
    shown: dict[str, dict[str, str]] = {}
    for (model, treatment), draws in kl.iterrows():  # pyright: ignore[reportGeneralTypeIssues]
        ratio = draws / kl.loc[model, "unpadded"]
        error = f" +- {ratio.std() / len(ratio) ** 0.5:.3f}" if len(ratio) > 1 else ""
        shown.setdefault(str(model), {})[str(treatment)] = f"{draws.mean():.4f} ({ratio.mean():.3f}{error})"
    frame = pd.DataFrame(shown).reindex([treatment.name for treatment in TREATMENTS])
    return frame.rename_axis("treatment").reset_index()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", choices=RANKS, default=list(RANKS))
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--base", type=Path, help="the demo's base, if it was built before")
    parser.add_argument("--engine-python", type=Path, help="interpreter that has gptqmodel")
    parser.add_argument("--scratch", type=Path, default=Path(tempfile.gettempdir()) / "benchmark-padding")
    asked = parser.parse_args()
    asked.scratch.mkdir(parents=True, exist_ok=True)
    base = asked.base or build_base(asked.scratch / "base").path
    models = {"dense": base}
    for name, quiet in (("experts", 0), ("quiet experts", QUIET)):
        out = asked.scratch / name.replace(" ", "-")
        models[name] = out if out.exists() else upcycle(base, out, quiet=quiet)
    rows = measure(
        {name: models[name] for name in asked.models},
        write_texts(asked.scratch),
        seeds=asked.seeds,
        windows=asked.windows,
        seq_len=asked.seq_len,
        python=asked.engine_python,
        scratch=asked.scratch,
    )
    machine, day = describe_machine(), datetime.now(UTC).date().isoformat()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else machine["cpu"]
    shown = table(rows)
    lines = [list(shown.columns), ["---"] * shown.shape[1], *map(list, shown.to_numpy())]
    text = f"""# KL(full precision || quantized), nats per token, and its ratio to the unpadded model's

{day}, {device}. 4 bits in groups of {GROUP_SIZE}, 24 calibration windows of {asked.seq_len} tokens,
{asked.windows} held-out windows; mean over {asked.seeds} draws of calibration text, the ratio with its standard error.

{chr(10).join(f"| {' | '.join(map(str, line))} |" for line in lines)}
"""
    (RESULTS / "padding.md").write_text(text)
    (RESULTS / "padding.json").write_text(
        json.dumps({"date": day, "machine": machine, "device": device, "rows": rows}, indent=2) + "\n"
    )
    print(text)


if __name__ == "__main__":
    main()
