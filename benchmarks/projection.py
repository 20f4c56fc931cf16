"""Projected cost of merging and padding a large model, from its sizes alone: ``python -m benchmarks.projection``."""

from collections.abc import Iterator
from dataclasses import dataclass

from qwen_pipeline.checkpoint.memory_budget import estimate_needs
from qwen_pipeline.checkpoint.thread_pool import pool_size

RATES = (0.4, 1.2, 5.0)
"""GB per second of a disk: a network volume, a cloud server's disk, a workstation's NVMe."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """A model's size in bytes, and what padding for 8 ranks in groups of 128 adds to it."""

    name: str
    nbytes: int
    added: int


def _qwen25_72b() -> Model:
    mlp = 3 * 8192
    attention = 2 * 8192 * 8192 + 2 * 1024 * 8192 + 8192 + 2 * 1024
    numbers = 80 * (mlp * 29568 + attention + 2 * 8192) + 2 * 152064 * 8192 + 8192
    return Model(name="Qwen2.5-72B", nbytes=2 * numbers, added=2 * 80 * mlp * (29696 - 29568))


def _qwen3_235b() -> Model:
    attention = 2 * 64 * 128 * 4096 + 2 * 4 * 128 * 4096 + 2 * 128
    experts = 128 * 3 * 1536 * 4096 + 128 * 4096
    numbers = 94 * (attention + experts + 2 * 4096) + 2 * 151936 * 4096 + 4096
    widened = 128 * 3 * 4096 * (2048 - 1536)
    return Model(name="Qwen3-235B-A22B", nbytes=2 * numbers, added=2 * 94 * widened)


MODELS = (_qwen25_72b(), _qwen3_235b())


def table() -> str:
    """Return the Markdown table of docs/performance.md."""
    times = " | ".join(f"at {rate} GB/s" for rate in RATES)
    head = f"| model | way | read, GB | written, GB | {times} | memory, MB |"
    return "\n".join([head, "| --- " * (5 + len(RATES)) + "|", *_rows()])


def _rows() -> Iterator[str]:
    memory = estimate_needs(disk_bytes=0).memory_bytes / pool_size()
    for model in MODELS:
        padded = model.nbytes + model.added
        ways = (
            ("merge, then pad", 2 * model.nbytes, model.nbytes + padded),
            ("one pass", model.nbytes, padded),
        )
        for way, read, written in ways:
            times = " | ".join(_minutes(max(read, written) / 1e9 / rate) for rate in RATES)
            moved = f"{read / 1e9:.0f} | {written / 1e9:.0f}"
            yield f"| {model.name} | {way} | {moved} | {times} | {memory / 1e6:.0f} a thread |"


def _minutes(seconds: float) -> str:
    return f"{seconds / 60:.1f} min"


if __name__ == "__main__":
    print(table())
