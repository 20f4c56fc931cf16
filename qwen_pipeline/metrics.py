"""Figures for Prometheus, in the text format that node_exporter's textfile collector reads.

They are read from manifests, so that they need no server of their own: products by state, the seconds and bytes of each
stage's latest output, and the free space of the store's disk.
"""

import shutil
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import get_args

from qwen_pipeline.config import Settings
from qwen_pipeline.costs import cost, gpu_seconds
from qwen_pipeline.status import FineTuneStatus, State, fine_tune_statuses, import_statuses

_PREFIX = "qwen_pipeline_"
_ESCAPES = str.maketrans({"\\": r"\\", '"': r"\"", "\n": r"\n"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """A gauge: its name without the prefix, a sentence about it, and its labels and value of each sample."""

    name: str
    text: str
    samples: Sequence[tuple[Mapping[str, str], float]]


def gather_metrics(settings: Settings) -> list[Metric]:
    """Read all manifests of the store and return the metrics."""
    found = [*fine_tune_statuses(settings), *import_statuses(settings)]
    states = Counter(state_of(product) for product in found)
    outputs = [
        ({"name": product.name, "stage": stage}, status.artifact.manifest)
        for product in found
        for stage, status in product.stages.items()
        if status.artifact
    ]
    return [
        Metric(
            name="products",
            text="Fine-tunes and imports by state: that of the first stage that is not done.",
            samples=[({"state": state}, states[state]) for state in get_args(State)],
        ),
        Metric(
            name="stage_seconds",
            text="Seconds that making the latest output of a stage took.",
            samples=[(labels, manifest.run.seconds) for labels, manifest in outputs],
        ),
        Metric(
            name="stage_bytes",
            text="Bytes of the latest output of a stage.",
            samples=[(labels, manifest.contents.nbytes) for labels, manifest in outputs],
        ),
        Metric(
            name="stage_gpu_seconds",
            text="Seconds times GPUs of making the latest output of a stage.",
            samples=[(labels, gpu_seconds(manifest)) for labels, manifest in outputs],
        ),
        Metric(
            name="stage_cost",
            text="Cost of making the latest output of a stage, at the prices of [costs].",
            samples=[
                (labels, price) for labels, made in outputs if (price := cost([made], settings.costs)) is not None
            ],
        ),
        Metric(
            name="disk_free_bytes", text="Free bytes of the disk of the store.", samples=[({}, _free_bytes(settings))]
        ),
        Metric(
            name="metrics_timestamp_seconds", text="Unix time of these metrics.", samples=[({}, round(time.time(), 3))]
        ),
    ]


def state_of(product: FineTuneStatus) -> State:
    """Return the state of the first stage that is not done; of one that retention removed, the next one counts."""
    return product.first_open[1]


def prometheus_text(metrics: Sequence[Metric]) -> str:
    """Return metrics in the text exposition format, version 0.0.4."""
    return "".join(f"{line}\n" for metric in metrics for line in _lines(metric))


def _lines(metric: Metric) -> Iterator[str]:
    name = _PREFIX + metric.name
    yield f"# HELP {name} {metric.text}"
    yield f"# TYPE {name} gauge"
    for labels, value in metric.samples:
        pairs = ",".join(f'{label}="{text.translate(_ESCAPES)}"' for label, text in labels.items())
        yield f"{name}{{{pairs}}} {value!r}" if pairs else f"{name} {value!r}"


def _free_bytes(settings: Settings) -> int:
    root = settings.store_root.absolute()
    return shutil.disk_usage(next(path for path in (root, *root.parents) if path.exists())).free
