"""``python -m benchmarks.down_projections``: the effect of padding on the one kind of layer whose codes it can change.

Padding adds outputs to ``gate_proj`` and ``up_proj``, whose rows are quantized one by one, and inputs to ``down_proj``.
So padding changes only the error of ``down_proj``. It is measured layer by layer, with the inputs of the full-precision
model, calibrated and evaluated on different text. Random effects are small, unlike in the divergence of whole models
(:mod:`benchmarks.padding`).
"""

import argparse
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from math import exp, log
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pandas as pd
import torch
from torch import Tensor

from benchmarks.machine import describe_machine
from benchmarks.padding import GROUP_SIZE, QUIET, RANKS, arguments, padded_model
from benchmarks.report import RESULTS, keep, markdown
from benchmarks.upcycled import ROUTED, STEP, upcycle
from qwen_pipeline.checkpoint.lazy import Checkpoint, open_checkpoint
from qwen_pipeline.checkpoint.manifest import open_manifest
from qwen_pipeline.demo.base import build_base
from qwen_pipeline.demo.texts import write_texts
from qwen_pipeline.layerwise.forward import LayerStream
from qwen_pipeline.layerwise.model import ComputeContext
from qwen_pipeline.progress import Observe, Progress
from qwen_pipeline.quantization import solver
from qwen_pipeline.quantization.spec import QuantSpec
from qwen_pipeline.qwen.geometry import PaddedSize, load_plan
from qwen_pipeline.qwen.padding_spec import Layout
from qwen_pipeline.text.bounded_tokenizer import BoundedTokenizer
from qwen_pipeline.text.windows import token_windows
from qwen_pipeline.transforms.padding.splitting import split_map
from qwen_pipeline.workers.environments import find_environment
from qwen_pipeline.workers.parent import run_worker

LAYOUTS: tuple[Layout, ...] = ("interleave", "append", "split")
SPEC = QuantSpec(engine="layerwise", group_size=GROUP_SIZE, device="cpu")


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A kind of ``down_proj`` in a model: the last ``width`` channels of the dense base's, or all of them.

    Attributes:
        quiet: Power of two by which its inputs are smaller than the base's.
    """

    name: str
    module: str
    width: int
    quiet: int = 0


CASES = (
    Case(name="dense", module="mlp", width=1600),
    Case(name="experts", module="mlp.experts.0", width=ROUTED),
    Case(name="quiet experts", module="mlp.experts.0", width=ROUTED, quiet=QUIET),
)


def measure(job: Mapping[str, Any], observe: Observe) -> Mapping[str, Any]:
    """Return rows of squared errors, one for each case, layer and treatment; runs beside the solver."""
    torch.set_num_threads(job["threads"])
    base = open_checkpoint(Path(job["models"]["dense"]))
    windows = [torch.tensor([window]) for window in (*job["calibration"], *job["held_out"])]
    stream = LayerStream(base, windows, ComputeContext(device=torch.device("cpu"), dtype=torch.float32))
    rows: list[dict[str, Any]] = []
    for layer, module in enumerate(stream.iter_layers()):
        if layer % job["every"] == job["every"] - 1:
            inputs = [x[0] for x in stream.inputs_within(layer, module, "mlp.down_proj")]
            cut = len(job["calibration"])
            rows += _layer(job, layer, torch.cat(inputs[:cut]), torch.cat(inputs[cut:]))
        stream.run(layer, module)
        observe(Progress(task="quantize", done=layer + 1, total=len(stream.parts), unit="layers"))
    return {"rows": rows}


@torch.inference_mode()
def _layer(job: Mapping[str, Any], layer: int, calibration: Tensor, held_out: Tensor) -> Iterator[dict[str, Any]]:
    for case in CASES:
        owner = f"model.layers.{layer}.{case.module}"
        seen, unseen = (x[:, -case.width :] / 2.0**case.quiet for x in (calibration, held_out))
        live = open_checkpoint(Path(job["models"][case.name]))
        weight = _weight(live, owner)
        yield _row(case, layer, "unpadded", _error(weight, seen, unseen, settled=True))
        for layout in LAYOUTS:
            root = Path(job["padded"][case.name][layout])
            (size,) = (at for at in load_plan(open_manifest(root).result["padding"]).sizes if at.live == case.width)
            wide, wide_seen, wide_unseen = (
                _weight(open_checkpoint(root), owner),
                *(_widened(x, size, owner) for x in (seen, unseen)),
            )
            yield _row(case, layer, layout, _error(wide, wide_seen, wide_unseen, settled=True))
            if layout != "split":
                error = _error(wide, wide_seen, wide_unseen, settled=False)
                yield _row(case, layer, f"{layout}, not settled", error)
            if layout == "interleave":
                damp = SPEC.damp_percent * size.live / size.padded
                error = _error(wide, wide_seen, wide_unseen, settled=False, damp_percent=damp)
                yield _row(case, layer, "interleave, damp_percent times the live share", error)


def _weight(checkpoint: Checkpoint, owner: str) -> Tensor:
    return checkpoint.load(f"{owner}.down_proj.weight").float()


def _widened(x_NI: Tensor, size: PaddedSize, owner: str) -> Tensor:
    if size.layout == "split":
        return x_NI[:, split_map(size, owner)]
    wide = x_NI.new_zeros(len(x_NI), size.padded)
    wide[:, size.positions()] = x_NI
    return wide


def _error(weight_OI: Tensor, seen: Tensor, unseen: Tensor, *, settled: bool, **changes: Any) -> float:
    """Return the squared error of the outputs on held-out text, relative to the squared outputs."""
    hessian = solver.Hessian(inputs=seen.shape[1])
    hessian.add(seen)
    settle = solver.settle_dead_channels if settled else lambda *_: None
    with patch.object(solver, "settle_dead_channels", settle):
        (solved,) = solver.solve({"down_proj": weight_OI}, hessian, replace(SPEC, **changes))
    rounded_OI = solved.packed.weight_rows(0, len(weight_OI))
    exact = unseen @ weight_OI.T
    return ((unseen @ rounded_OI.T - exact).square().sum() / exact.square().sum()).item()


def _row(case: Case, layer: int, treatment: str, error: float) -> dict[str, Any]:
    return {"model": case.name, "layer": layer, "treatment": treatment, "error": error}


def table(rows: list[dict[str, Any]]) -> pd.DataFrame:
    """Return treatment x model: the geometric mean over layers of the error relative to the unpadded layer's."""
    errors = pd.DataFrame(rows).pivot(index=["model", "layer"], columns="treatment", values="error")
    means = errors.div(errors["unpadded"], axis=0).map(log).groupby("model").mean().map(exp).T
    order = list(dict.fromkeys(row["treatment"] for row in rows))
    return means.loc[order, [case.name for case in CASES]].round(3).reset_index()


def main() -> None:
    parser = arguments(__doc__, windows=16)
    parser.add_argument("--thirds", type=int, default=1, help="of every third layer, measure one in this many")
    options = parser.parse_args()
    options.scratch.mkdir(parents=True, exist_ok=True)
    base, texts = options.base or build_base(options.scratch / "base").path, write_texts(options.scratch)
    models = {"dense": base}
    for name, quiet in (("experts", 0), ("quiet experts", QUIET)):
        out = options.scratch / name.replace(" ", "-")
        models[name] = out if out.exists() else upcycle(base, out, quiet=quiet)
    tokenizer = BoundedTokenizer(base)
    seen = token_windows(texts.calibration, tokenizer, windows=options.samples, seq_len=options.seq_len)
    held_out = token_windows(texts.held_out, tokenizer, windows=options.windows, seq_len=options.seq_len)
    job = {
        "threads": torch.get_num_threads(),
        "every": STEP * options.thirds,
        "models": {name: str(root) for name, root in models.items()},
        "padded": {
            name: {layout: str(padded_model(options.scratch, name, root, layout)) for layout in LAYOUTS}
            for name, root in models.items()
        },
        "calibration": [list(window) for window in seen],
        "held_out": [list(window) for window in held_out],
    }
    python = find_environment("gptqmodel", options.engine_python).python
    done = run_worker(python, "benchmarks.down_projections:measure", job, log=options.scratch / "down-projections.log")
    write_results(done.value["rows"], options)


def write_results(rows: list[dict[str, Any]], options: argparse.Namespace) -> None:
    """Write ``down-projections.json`` and ``down-projections.md`` beside the other results."""
    machine, day = describe_machine(), datetime.now(UTC).date().isoformat()
    ranks = ", ".join(f"{name} {count}" for name, count in RANKS.items())
    text = f"""# Squared error of down_proj's outputs on held-out text, relative to the unpadded layer's

{day}, {machine["cpu"]}, {machine["cores"]} cores. 4 bits in groups of {GROUP_SIZE}, padded for ranks: {ranks}.
Calibration {options.samples} x {options.seq_len} tokens, evaluation {options.windows} x {options.seq_len}. Geometric
mean over one layer of every {STEP * options.thirds}.

{markdown(table(rows))}
"""
    settings = {name: getattr(options, name) for name in ("samples", "windows", "seq_len", "thirds")}
    found = {"date": day, "machine": machine, "settings": settings, "rows": rows}
    keep(RESULTS / "down-projections", text, found)
    print(text)


if __name__ == "__main__":
    main()
