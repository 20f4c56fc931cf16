"""``python -m benchmarks.quality``: how far a quantized model is from full precision, by recipe, for the same bits.

KL(full precision || quantized) on held-out text of the calibration's kind and on text of other kinds, for each draw of
calibration text, format and recipe, beside GPTQModel's own loop and, with ``--python``, other quantizers. Ratios to
GPTQModel's defaults are computed draw by draw. Cells are measured by several processes; each is written at once, and a
run that was cut goes on from ``--json``.

The model is the demo's base unless ``--base`` names a copy of it; ``--steps`` trains it off the 4-bit grid that its
weights come from. ``--text`` names texts of other kinds. With ``--base`` nothing is downloaded.
"""

import argparse
import json
import multiprocessing
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, get_args

import torch

from benchmarks.machine import describe_machine
from benchmarks.quality.cells import Cell, Settings, cells, measure, write_code
from benchmarks.quality.contenders import CONTENDERS, PEER, Contender
from benchmarks.quality.models import make_model
from benchmarks.quality.tables import errors_table, losers_of_the_tail, main_table, tail_table
from benchmarks.report import RESULTS, keep, markdown
from qwen_pipeline.demo.texts import write_texts
from qwen_pipeline.quantization.recipes import RECIPES
from qwen_pipeline.quantization.spec import Device, default_device, usable_cores


class Benchmark:
    """The rows of one set of settings; those in the file of results were measured by an earlier run."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._options, self._started = options, time.monotonic()
        self.settings = _settings(options)
        found = json.loads(options.json.read_text()) if options.json.exists() else {"rows": []}
        self.rows: list[dict[str, Any]] = found["rows"]
        self.failures: list[str] = []

    def run(self) -> None:
        """Measure the cells that are missing; none is begun after ``--minutes``."""
        options = self._options
        done = [{name: row[name] for name in Cell.__dataclass_fields__} for row in self.rows]
        wanted = [cell for cell in cells(options.formats, self._recipes, options.seeds) if asdict(cell) not in done]
        if options.jobs == 1:
            for cell in wanted:
                if not self._is_late:
                    self._keep(cell, measure(cell, self.settings))
            return
        spawn = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(options.jobs, mp_context=spawn) as pool:
            waiting = {pool.submit(measure, cell, self.settings): cell for cell in wanted}
            for ended in as_completed(waiting):
                self._take(waiting[ended], ended)
                if self._is_late:
                    for each in waiting:
                        each.cancel()

    @property
    def _recipes(self) -> list[str]:
        names = [*self._options.recipes, *(text.partition("=")[0] for text in self._options.variant)]
        if unknown := [name for name in names if name not in self.settings.contenders]:
            raise SystemExit(f"There is no {unknown[0]}; there are {', '.join(self.settings.contenders)}.")
        return names

    @property
    def _is_late(self) -> bool:
        return time.monotonic() - self._started > 60 * self._options.minutes

    def _take(self, cell: Cell, ended: Future[dict[str, Any]]) -> None:
        if ended.cancelled():
            return
        if error := ended.exception():
            self.failures.append(f"{cell}: {error}")
            print(self.failures[-1], flush=True)
        else:
            self._keep(cell, ended.result())

    def _keep(self, cell: Cell, row: dict[str, Any]) -> None:
        self.rows.append(row)
        short = {text: round(row[text]["kl"], 4) for text in self.settings.texts}
        minutes = (time.monotonic() - self._started) / 60
        print(f"{minutes:.1f} min: {cell} {row['seconds']} s {short}", flush=True)
        self.write()

    def write(self) -> str:
        """Write all rows and their tables to ``--json``, and next to it with the suffix ``.md``; return the tables."""
        machine, day, options = describe_machine(), datetime.now(UTC).date().isoformat(), self._options
        on = torch.cuda.get_device_name() if options.device == "cuda" else f"{machine['cpu']}"
        names = ("samples", "windows", "seq_len", "device", "threads", "jobs", "steps")
        found = {"date": day, "machine": machine, "device": on} | {"settings": {n: getattr(options, n) for n in names}}
        text = f"""# KL(full precision || quantized), nats per token, by recipe

{day}, {on}, {options.jobs} processes of {options.threads} threads. Models trained for {options.steps} steps;
calibration {options.samples} x {options.seq_len} tokens, evaluation {options.windows} x {options.seq_len} tokens of
each text. Each cell: mean KL, and the mean ± standard error over draws of calibration text of its ratio to {PEER}'s own
loop with its defaults; perplexity and top-1 are those of the first text.

{_sections(self.rows, list(self.settings.texts))}
"""
        keep(options.json.with_suffix(""), text, {**found, "failures": self.failures, "rows": self.rows})
        return text


def _sections(rows: Sequence[dict[str, Any]], texts: Sequence[str]) -> str:
    losers = losers_of_the_tail(rows, texts)
    said = "\n".join(f"- {each}" for each in losers) or "No recipe wins the mean and loses the tail."
    parts = [
        markdown(main_table(rows, texts)),
        f"## Tail, rare tokens and positions\n\nRatios to {PEER}'s.\n\n{markdown(tail_table(rows, texts))}",
        said,
    ]
    learned = errors_table(rows)
    if len(learned):
        parts.append(f"## Learned layers\n\n{markdown(learned)}")
    return "\n\n".join(parts)


def _settings(options: argparse.Namespace) -> Settings:
    scratch: Path = options.scratch
    scratch.mkdir(parents=True, exist_ok=True)
    texts = write_texts(scratch)
    held_out = options.held_out or texts.held_out
    found = {"held-out": held_out, "code": write_code(scratch / "code.jsonl")}
    found |= {name: Path(file) for name, _, file in (each.partition("=") for each in options.text)}
    found |= {f"held-out@{length}": held_out for length in options.lengths}
    names = list(dict.fromkeys(each.partition(":")[0] for each in options.formats))
    make: dict[str, Any] = {"base": options.base, "steps": options.steps, "device": options.device}
    return Settings(
        models={name: make_model(name, scratch, training=texts.training, **make) for name in names},
        calibration=options.calibration or texts.calibration,
        texts=found,
        samples=options.samples,
        windows=options.windows,
        seq_len=options.seq_len,
        device=options.device,
        threads=options.threads,
        contenders={**CONTENDERS, **_variants(options.variant)},
        pythons={name: Path(python) for name, _, python in (each.partition("=") for each in options.python)},
        scratch=scratch,
    )


def _variants(texts: Sequence[str]) -> dict[str, Contender]:
    """Return recipes of other settings than ``fast``, given as ``NAME=JSON``."""
    pairs = (text.split("=", 1) for text in texts)
    return {name: Contender(library="layerwise", options=json.loads(settings)) for name, settings in pairs}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--formats", nargs="+", default=["dense:4:64", "dense:4:32"], metavar="MODEL:BITS:GROUP")
    parser.add_argument("--recipes", nargs="+", default=[*reversed(list(RECIPES)), PEER], help=", ".join(CONTENDERS))
    parser.add_argument(
        "--variant",
        action="append",
        default=[],
        metavar="NAME=JSON",
        help="a recipe with other settings than fast's, by step, and other settings of the quantizer; repeatable",
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="draws of calibration text")
    parser.add_argument("--samples", type=int, default=16, help="calibration windows")
    parser.add_argument("--windows", type=int, default=8, help="windows of each text for evaluation")
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--lengths", type=int, nargs="*", default=[], help="other lengths of held-out windows")
    parser.add_argument("--steps", type=int, default=0, help="steps of training before quantization")
    parser.add_argument("--device", choices=get_args(Device), default=default_device())
    parser.add_argument("--threads", type=int, default=usable_cores())
    parser.add_argument("--jobs", type=int, default=1, help="cells measured at a time")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no cell after this time")
    parser.add_argument("--base", type=Path, help="the demo's base, if it was built before")
    parser.add_argument("--calibration", type=Path, help="calibration text; default: the demo's")
    parser.add_argument("--held-out", type=Path, help="text of the same kind; default: the demo's")
    parser.add_argument("--text", action="append", default=[], metavar="NAME=FILE", help="repeatable")
    parser.add_argument("--python", action="append", default=[], metavar="ENVIRONMENT=PYTHON", help="repeatable")
    parser.add_argument("--scratch", type=Path, default=Path(tempfile.gettempdir()) / "benchmark-quality")
    parser.add_argument("--json", type=Path, default=RESULTS / "quality.json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    benchmark = Benchmark(options)
    benchmark.run()
    print(benchmark.write())


if __name__ == "__main__":
    main()
