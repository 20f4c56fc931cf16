"""Peak memory of the streamed evaluation against depth, beside plain Transformers with a whole model in memory.

``python -m benchmarks.evaluation_memory`` evaluates models of Qwen2.5-3B's widths and growing depth in float32 on the
CPU, by this package and by Transformers on the same windows, each in its own process. This package evaluates two
models, full precision and its codes, and compares every prediction; Transformers computes the perplexity of the full
precision alone. A figure is the high-water mark of resident memory above that of the libraries, which are imported
before. The vocabulary is smaller than the published one, whose embedding and head would take most of Transformers'
memory.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from matplotlib.figure import Figure

from benchmarks.machine import describe_machine
from benchmarks.models import WIDTHS, Widths, linears, write_base
from benchmarks.report import RESULTS, keep
from qwen_pipeline.plotting import BETTER, INK, WORSE, add_axes, save_plot
from qwen_pipeline_tests.rounding import round_to_codes

VOCABULARY = 8192
WINDOWS, SEQ_LEN = 8, 128
GROUP_SIZE = 64
FLOAT = 4

_PEAK = """
import json, sys
from pathlib import Path
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, Qwen2ForCausalLM
from qwen_pipeline.checkpoint.lazy import open_checkpoint
from qwen_pipeline.checkpoint.measure import resident_peak
from qwen_pipeline.evaluation.logits.streamed import evaluate
from qwen_pipeline.layerwise.model import ComputeContext

base, codes, count, seq_len, vocabulary = Path(sys.argv[1]), Path(sys.argv[2]), *map(int, sys.argv[3:])
windows = list(torch.randint(0, vocabulary, (count, seq_len), generator=torch.Generator().manual_seed(0)))

def streamed():
    models = {"full precision": open_checkpoint(base), "codes": open_checkpoint(codes)}
    context = ComputeContext(device=torch.device("cpu"), dtype=torch.float32)
    found = evaluate(models, windows, reference="full precision", compared=["codes"], context=context)
    return found["full precision"].perplexity

@torch.inference_mode()
def whole():
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    surprise = [cross_entropy(model(window[None]).logits[0, :-1].double(), window[1:]) for window in windows]
    return torch.stack(surprise).mean().exp().item()

Path("/proc/self/clear_refs").write_text("5")
before = resident_peak()
"""
_STREAMED, _TRANSFORMERS = (
    f"{_PEAK}print(json.dumps([{name}(), resident_peak() - before]))" for name in ("streamed", "whole")
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """Peaks in bytes at one depth, and the perplexity that both computed."""

    layers: int
    streamed: int
    transformers: int
    perplexity: float


def measure(widths: Widths, layers: int) -> Row:
    """Evaluate a random model of that depth in both ways.

    Raises:
        AssertionError: They do not compute the same perplexity.
    """
    with tempfile.TemporaryDirectory() as scratch:
        base = write_base(widths, layers, Path(scratch) / "base")
        codes = round_to_codes(base, Path(scratch) / "codes", group_size=GROUP_SIZE)
        (perplexity, streamed), (other, transformers) = (_run(code, base, codes) for code in (_STREAMED, _TRANSFORMERS))
    assert abs(perplexity / other - 1) < 1e-4, f"{perplexity} is not {other}"
    return Row(layers=layers, streamed=int(streamed), transformers=int(transformers), perplexity=perplexity)


def layer_bytes(widths: Widths) -> int:
    """Return the size of one layer in float32, norms and biases left out."""
    return FLOAT * sum(outputs * inputs for outputs, inputs in linears(widths).values())


def activation_bytes(widths: Widths) -> int:
    """Return the size of two models' hidden states, and of gate, up and their product for one window."""
    return FLOAT * SEQ_LEN * (2 * WINDOWS * widths.hidden_size + 3 * widths.intermediate_size)


def bound(widths: Widths) -> float:
    """Return one and a half layers and the activations, in bytes."""
    return 1.5 * layer_bytes(widths) + activation_bytes(widths)


def _run(code: str, base: Path, codes: Path) -> tuple[float, float]:
    numbers = map(str, (WINDOWS, SEQ_LEN, VOCABULARY))
    command = [sys.executable, "-c", code, str(base), str(codes), *numbers]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], check=True, stdout=subprocess.PIPE, text=True)
    perplexity, peak = json.loads(done.stdout.splitlines()[-1])
    return perplexity, peak


def draw(rows: Sequence[Row], most: float, path: Path) -> None:
    """Draw both curves on logarithmic axes, and the bound for this package."""
    figure = Figure(figsize=(7.2, 3.4), layout="constrained")
    axes = add_axes(figure)
    depths = [row.layers for row in rows]
    for label, values, color in (
        ("Transformers, one whole model", [row.transformers for row in rows], WORSE),
        ("streamed, two models", [row.streamed for row in rows], BETTER),
    ):
        axes.plot(depths, [value / 1e6 for value in values], label=label, color=color, linewidth=1.5, marker="o")
    axes.axhline(most / 1e6, color=INK, linestyle="--", linewidth=1, label="1.5 layers and activations")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(depths, list(map(str, depths)))
    axes.set_xlabel("decoder layers", color=INK, fontsize=9)
    axes.set_ylabel("peak memory above libraries, MB", color=INK, fontsize=9)
    axes.legend(frameon=False, labelcolor=INK, fontsize=8)
    save_plot(figure, path)


def write_results(name: str, widths: Widths, rows: Sequence[Row]) -> None:
    """Write ``evaluation-memory.json``, ``.md`` and ``.png`` beside the other results."""
    most = bound(widths)
    day, machine = datetime.now(UTC).date().isoformat(), describe_machine()
    table = "\n".join(
        f"| {row.layers} | {row.streamed / 1e6:.0f} | {row.streamed / most:.2f} | {row.transformers / 1e6:.0f} |"
        for row in rows
    )
    text = f"""# Peak memory of evaluating, above the imported libraries

{day}, {machine["cpu"]}, {machine["cores"]} cores, float32. Widths of Qwen2.5-{name.upper()} ({widths.hidden_size} x
{widths.intermediate_size}) with a vocabulary of {VOCABULARY}, {WINDOWS} windows of {SEQ_LEN} tokens; a layer is
{layer_bytes(widths) / 1e6:.1f} MB in float32, and 1.5 of them with the activations of two models {most / 1e6:.1f} MB.
Streamed: full precision and its 4-bit codes together, every prediction compared. Transformers: full precision alone.

| layers | streamed, MB | of 1.5 layers and activations | Transformers, MB |
| --- | --- | --- | --- |
{table}

![Peak memory against depth](evaluation-memory.png)
"""
    found = {
        "date": day,
        "machine": machine,
        "widths": asdict(widths),
        "windows": WINDOWS,
        "seq_len": SEQ_LEN,
        "bound_bytes": int(most),
        "rows": [asdict(row) for row in rows],
    }
    keep(RESULTS / "evaluation-memory", text, found)
    draw(rows, most, RESULTS / "evaluation-memory.png")
    print(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", default="3b", choices=sorted(WIDTHS), help="of which published model")
    parser.add_argument("--layers", type=int, nargs="+", default=[2, 4, 8])
    options = parser.parse_args()
    widths = replace(WIDTHS[options.widths], vocab_size=VOCABULARY)
    write_results(options.widths, widths, [measure(widths, layers) for layers in options.layers])


if __name__ == "__main__":
    main()
