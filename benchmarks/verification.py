"""``python -m benchmarks.verification``: verify a release's files, beside other programs on as many cores.

Files are in the page cache, so that hashing is measured and not the disk. Programs and our own comparison take turns.
Seconds of processors hardly depend on what else the machine does; seconds of the clock do.
"""

import argparse
import json
import os
import resource
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file

from benchmarks.machine import describe_machine
from qwen_pipeline.lineage.verification.hashing import FileHash, hash_files
from qwen_pipeline.lineage.verification.intact import RELEASE, compare
from qwen_pipeline.lineage.verification.records import Record, RecordedStep

PROGRAMS = ("sha256sum", "b3sum", "openssl dgst -sha256")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=int, default=512, help="size of a shard")
    parser.add_argument("--shards", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        record = make_release(Path(scratch), given.shards, given.megabytes)
        print(json.dumps(measure(record, given.rounds), indent=2))


def make_release(root: Path, shards: int, megabytes: int) -> Record:
    """Write shards of random weights, and return a record as a release's manifest has it."""
    for number in range(shards):
        rows = megabytes * 2**20 // (4096 * 2 * 8)
        tensors = {f"{number}.{name}": torch.randn(rows, 4096).to(torch.bfloat16) for name in range(8)}
        save_file(tensors, root / f"model-{number}.safetensors")
    files = {path.name: path for path in root.iterdir()}
    found = {name: each for name, each in hash_files(files, whole=lambda _: True).items() if isinstance(each, FileHash)}
    step = RecordedStep(stage=RELEASE, content_digest="", inputs={}, spec={}, code_version="", key="")
    return Record(
        root=root,
        step=step,
        tensors={name: tensor for each in found.values() for name, tensor in each.tensors.items()},
        files={name: {"bytes": each.bytes, "sha256": each.sha256} for name, each in found.items()},
        recipe={},
    )


def measure(record: Record, rounds: int) -> dict[str, object]:
    """Return the best of some rounds of each contender, and what share of each program's speed ours is."""
    contenders: dict[str, Callable[[], object]] = {"verify": lambda: compare(record)}
    paths, cores = [str(record.root / name) for name in record.files], len(os.sched_getaffinity(0))
    for program in [each for each in PROGRAMS if shutil.which(each.split()[0])]:
        command = ["xargs", "-P", str(cores), "-n", "1", *program.split()]
        contenders[program] = lambda command=command: subprocess.run(
            command, input="\n".join(paths).encode(), stdout=subprocess.DEVNULL, check=True
        )
    best = {name: {"seconds": float("inf"), "processor_seconds": float("inf")} for name in contenders}
    for _ in range(rounds):
        for name, run in contenders.items():
            for figure, seconds in timed(run).items():
                best[name][figure] = min(best[name][figure], seconds)
    return {
        "machine": describe_machine(),
        "load": os.getloadavg()[0],
        "gigabytes": record.nbytes / 1e9,
        "best": best,
        "speed_of_ours": {name: ratios(best[name], best["verify"]) for name in contenders if name != "verify"},
    }


def timed(run: Callable[[], object]) -> dict[str, float]:
    used, started = processor_seconds(), time.perf_counter()
    assert not isinstance(wrong := run(), dict) or not wrong
    return {"seconds": time.perf_counter() - started, "processor_seconds": processor_seconds() - used}


def ratios(theirs: Mapping[str, float], ours: Mapping[str, float]) -> dict[str, float]:
    return {figure: round(theirs[figure] / ours[figure], 2) for figure in theirs}


def processor_seconds() -> float:
    """Return the seconds of processors that this process and its ended children used."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)


if __name__ == "__main__":
    main()
