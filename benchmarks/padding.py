"""``python -m benchmarks.padding``: quantization of padded models compared with the unpadded one, by layout.

KL(full precision || quantized) on held-out text, by layout, with and without the correction of dead channels, for the
demo's dense base and for mixtures of experts made of it (:mod:`benchmarks.upcycled`). Ties may round either way, so
comparisons are paired: each draw of calibration text goes through all treatments, and the ratio to the unpadded model
is computed draw by draw. Each row is written at once; an interrupted run resumes.
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
from benchmarks.machine import describe_machine
from benchmarks.report import RESULTS, keep, markdown
from benchmarks.upcycled import upcycle
from qwen_pipeline.checkpoint.lazy import open_checkpoint
from qwen_pipeline.checkpoint.store.destinations import Directory
from qwen_pipeline.demo.base import build_base
from qwen_pipeline.demo.texts import Texts, write_texts
from qwen_pipeline.evaluation.logits.streamed import evaluate
from qwen_pipeline.layerwise.model import ComputeContext
from qwen_pipeline.quantization.spec import QuantizerName, QuantSpec
from qwen_pipeline.qwen.padding_spec import Layout, PaddingSpec
from qwen_pipeline.stages import pad, quantize
from qwen_pipeline.text.bounded_tokenizer import BoundedTokenizer
from qwen_pipeline.text.windows import token_windows
from qwen_pipeline.workers.environments import find_environment
from qwen_pipeline.workers.parent import started_worker

GROUP_SIZE = 64
RANKS = {"dense": 3, "experts": 16, "quiet experts": 16}
"""Model -> ranks: 1600 channels become 1728, experts of 768 and shared experts of 832 become 1024."""
ENGINE: QuantizerName = "layerwise"
QUIET = 6
"""Power of two by which the activations of ``quiet experts`` are smaller than the base's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Treatment:
    """A layout, or None for the unpadded model; ``settled``: whether dead channels are corrected."""

    name: str
    layout: Layout | None
    settled: bool = True


TREATMENTS = (
    Treatment(name="unpadded", layout=None),
    Treatment(name="interleave", layout="interleave"),
    Treatment(name="append", layout="append"),
    Treatment(name="split", layout="split"),
    Treatment(name="interleave, not settled", layout="interleave", settled=False),
    Treatment(name="append, not settled", layout="append", settled=False),
)


class Benchmark:
    """The rows of one set of settings, in a scratch directory from which an interrupted run resumes."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._options = options
        self._scratch: Path = options.scratch
        self._journal = self._scratch / f"rows-{options.samples}-{options.windows}-{options.seq_len}.jsonl"
        self._texts: Texts = write_texts(self._scratch)
        lines = self._journal.read_text().splitlines() if self._journal.exists() else []
        self.rows: list[dict[str, Any]] = [json.loads(line) for line in lines]

    def run(self) -> None:
        """Measure every treatment of every model, one draw of calibration text after the other."""
        for seed in self._options.seeds:
            for name in self._options.models:
                done = {(row["model"], row["treatment"], row["seed"]) for row in self.rows}
                missing = [at for at in TREATMENTS if at.name in self._options.treatments]
                self._measure(name, [at for at in missing if (name, at.name, seed) not in done], seed)

    def prepare(self) -> None:
        """Make the models in every layout."""
        for name in self._options.models:
            model = self._model(name)
            for treatment in TREATMENTS:
                if treatment.layout and treatment.name in self._options.treatments:
                    padded_model(self._scratch, name, model, treatment.layout)

    def _measure(self, name: str, treatments: Sequence[Treatment], seed: int) -> None:
        """Quantize with each treatment, then compare all results with full precision in one pass."""
        if not treatments:
            return
        model = self._model(name)
        with tempfile.TemporaryDirectory(dir=self._scratch) as out:
            quantized = {at.name: self._quantized(name, model, at, seed, Path(out) / at.name) for at in treatments}
            for treatment, kl in self._divergences(model, quantized).items():
                self.rows.append({"model": name, "treatment": treatment, "seed": seed, "kl": kl})
                with self._journal.open("a") as file:
                    print(json.dumps(self.rows[-1]), file=file)
                print(json.dumps(self.rows[-1]), flush=True)

    def _model(self, name: str) -> Path:
        base = self._options.base or build_base(self._scratch / "base").path
        if name == "dense":
            return base
        out = self._scratch / name.replace(" ", "-")
        return out if out.exists() else upcycle(base, out, quiet=QUIET if name.startswith("quiet") else 0)

    def _quantized(self, name: str, model: Path, treatment: Treatment, seed: int, out: Path) -> Path:
        options = self._options
        spec = QuantSpec(
            engine=ENGINE,
            group_size=GROUP_SIZE,
            samples=options.samples,
            seq_len=options.seq_len,
            seed=seed,
            threads=torch.get_num_threads(),
        )

        def start_unsettled(python: Path, _: str, **named: Any) -> Any:
            return started_worker(python, unsettled.TARGET, **named)

        with patch.object(quantize, "started_worker", started_worker if treatment.settled else start_unsettled):
            return quantize.quantize(
                source=padded_model(self._scratch, name, model, treatment.layout) if treatment.layout else model,
                destination=Directory(out),
                calibration=self._texts.calibration,
                spec=spec,
                engine=find_environment(spec.environment, options.engine_python),
            ).path

    def _divergences(self, model: Path, quantized: Mapping[str, Path]) -> dict[str, float]:
        options = self._options
        windows = token_windows(
            self._texts.held_out, BoundedTokenizer(model), windows=options.windows, seq_len=options.seq_len
        )
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        figures = evaluate(
            {"full": open_checkpoint(model)} | {name: open_checkpoint(path) for name, path in quantized.items()},
            [torch.tensor(window) for window in windows],
            reference="full",
            compared=list(quantized),
            context=ComputeContext(device=device, dtype=torch.float32),
        )
        return {name: at.divergence.mean for name, at in figures.items() if at.divergence}


def padded_model(scratch: Path, name: str, model: Path, layout: Layout) -> Path:
    """Return a model of :data:`RANKS` padded for its ranks, below ``scratch``; an existing one is reused."""
    out = Directory(scratch / f"{name.replace(' ', '-')}-{layout}")
    return pad.pad(
        source=model,
        destination=out,
        spec=PaddingSpec(group_size=GROUP_SIZE, tensor_parallel=RANKS[name], layout=layout),
    ).path


def table(rows: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """Return treatment x model: the mean KL, and its ratio to the unpadded model's, draw by draw.

    The ratio is shown as the mean, its standard error and the number of draws.
    """
    kl = pd.DataFrame(rows).set_index(["model", "treatment", "seed"])["kl"].unstack("seed")
    shown: dict[str, dict[str, str]] = {}
    for (model, treatment), draws in kl.iterrows():  # pyright: ignore[reportGeneralTypeIssues]
        ratio = (draws / kl.loc[(model, "unpadded")]).dropna()
        error = f" ± {ratio.std() / len(ratio) ** 0.5:.3f}" if len(ratio) > 1 else ""
        drawn = "" if treatment == "unpadded" else f", {ratio.mean():.3f}{error} of {len(ratio)}"
        shown.setdefault(str(model), {})[str(treatment)] = f"{draws.mean():.4f}{drawn}"
    frame = pd.DataFrame(shown).fillna("")
    frame = frame.loc[[treatment.name for treatment in TREATMENTS if treatment.name in frame.index]]
    return frame.rename_axis("treatment").reset_index()


def arguments(description: str | None, *, windows: int) -> argparse.ArgumentParser:
    """Return a parser of the options of every benchmark of padding: tokens, the demo's base, an engine, a directory."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--samples", type=int, default=24, help="calibration windows")
    parser.add_argument("--windows", type=int, default=windows, help="held-out windows")
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--base", type=Path, help="the demo's base, if it was built before")
    parser.add_argument("--engine-python", type=Path, help="interpreter that has gptqmodel")
    parser.add_argument("--scratch", type=Path, default=Path(tempfile.gettempdir()) / "benchmark-padding")
    return parser


def main() -> None:
    names = [treatment.name for treatment in TREATMENTS]
    parser = arguments(__doc__, windows=32)
    parser.add_argument("--models", nargs="+", choices=RANKS, default=list(RANKS))
    parser.add_argument("--treatments", nargs="+", choices=names, default=names)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3], help="draws of calibration text")
    parser.add_argument(
        "--prepare", action="store_true", help="only make the models, so that several runs can share them"
    )
    parser.add_argument("--out", type=Path, default=RESULTS / "padding", help="path without suffix")
    options = parser.parse_args()
    options.scratch.mkdir(parents=True, exist_ok=True)
    benchmark = Benchmark(options)
    if options.prepare:
        benchmark.prepare()
        return
    benchmark.run()
    write_results(benchmark.rows, options)


def write_results(rows: Sequence[Mapping[str, Any]], options: argparse.Namespace) -> None:
    """Write all rows and their table to ``--out`` with the suffixes ``.json`` and ``.md``."""
    machine, day = describe_machine(), datetime.now(UTC).date().isoformat()
    device = (
        torch.cuda.get_device_name() if torch.cuda.is_available() else f"{machine['cpu']}, {machine['cores']} cores"
    )
    text = f"""# KL(full precision || quantized), nats per token, and its ratio to the unpadded model's

{day}, {device}. 4 bits in groups of {GROUP_SIZE}; calibration {options.samples} x {options.seq_len} tokens, evaluation
{options.windows} x {options.seq_len} held-out tokens. Each cell: mean KL, mean ratio ± standard error of the
number of draws of calibration text. Ratios are computed draw by draw.

{markdown(table(rows))}
"""
    settings = {name: getattr(options, name) for name in ("samples", "windows", "seq_len")}
    found = {"date": day, "machine": machine, "device": device, "settings": settings, "rows": list(rows)}
    keep(options.out, text, found)
    print(text)


if __name__ == "__main__":
    main()
