"""Time that the threads of one pass spend in each step: ``python -m benchmarks.stalls BASE ADAPTER OUT``.

Seconds are added up over threads, each step without the steps within it. The difference between wall clock and
processor time is waiting: for the disk, for a file's lock, for its turn, or for the GIL.
"""

import argparse
import functools
import importlib
import os
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from qwen_pipeline.qwen.padding_spec import DEFAULT_LAYOUT, Layout, PaddingSpec

PACKAGE = "qwen_pipeline"
STEPS: Mapping[str, Sequence[tuple[str, str]]] = {
    "read": [("checkpoint.safetensors_file", "_read_into")],
    "add updates": [("transforms.lora.low_rank", "_add")],
    "pad": [("transforms.padding.pad", "placed")],
    "map of channels": [("transforms.padding.pad", "source_map")],
    "look for NaN": [("checkpoint.digest", "is_finite")],
    "hash": [("checkpoint.tree_hash", "blake3")],
    "write": [("checkpoint.shard_file", "ShardFile._write")],
    "begin writeback": [("checkpoint.shard_file", "begin_writeback")],
    "finish a shard": [("checkpoint.shard_file", "ShardFile._finish")],
    "all else in a job": [("checkpoint.writer", "_CheckpointWriter._write_block")],
    "take the next job": [("checkpoint.thread_pool", "_ThreadPool.next_job")],
}


class Ledger:
    """Wall clock and processor seconds of each step, over all threads."""

    def __init__(self) -> None:
        self.clock: dict[str, float] = defaultdict(float)
        self.core: dict[str, float] = defaultdict(float)
        self.count: dict[str, int] = defaultdict(int)
        self._lock = threading.Lock()
        self._within = threading.local()

    def timed(self, step: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            above, self._within.spent = getattr(self._within, "spent", (0.0, 0.0)), (0.0, 0.0)
            clock, core = time.perf_counter(), time.thread_time()
            try:
                return function(*args, **kwargs)
            finally:
                clock, core = time.perf_counter() - clock, time.thread_time() - core
                inner = self._within.spent
                self._within.spent = (above[0] + clock, above[1] + core)
                with self._lock:
                    self.clock[step] += clock - inner[0]
                    self.core[step] += core - inner[1]
                    self.count[step] += 1

        return wrapper


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=Path)
    parser.add_argument("adapter", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--layout", choices=get_args(Layout), default=DEFAULT_LAYOUT)
    parser.add_argument("--threads", type=int, help="number of threads; default: cores + 2")
    options = parser.parse_args()

    from qwen_pipeline.checkpoint import thread_pool
    from qwen_pipeline.checkpoint.store.destinations import Directory
    from qwen_pipeline.stages.merge_pad import merge_pad

    ledger = Ledger()
    if options.threads:
        thread_pool.pool_size = lambda: options.threads
    for step, places in STEPS.items():
        for module, path in places:
            *owners, name = path.split(".")
            owner = functools.reduce(getattr, owners, importlib.import_module(f"{PACKAGE}.{module}"))
            setattr(owner, name, ledger.timed(step, getattr(owner, name)))
    began, used = time.perf_counter(), os.times()
    merge_pad(
        base=options.base,
        fine_tune=options.adapter,
        merged=Directory(options.out / "merged"),
        padded=Directory(options.out / "padded"),
        spec=PaddingSpec(layout=options.layout),
    )
    seconds, now = time.perf_counter() - began, os.times()
    print(f"{seconds:.1f} s, user {now.user - used.user:.1f} s, system {now.system - used.system:.1f} s")
    print("| step | calls | clock, s | of a core, s | waited, s |\n| --- | --- | --- | --- | --- |")
    for step in sorted(ledger.clock, key=lambda step: -ledger.clock[step]):
        clock, core = ledger.clock[step], ledger.core[step]
        print(f"| {step} | {ledger.count[step]} | {clock:.1f} | {core:.1f} | {clock - core:.1f} |")


if __name__ == "__main__":
    main()
