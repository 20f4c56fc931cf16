"""Read mutations of a kind of file: ``python -m qwen_pipeline_tests.fuzzing READER COUNT [SEED]``.

With ``coverage`` in place of the count, atheris chooses them by the code that they reach; it must be installed.
"""

import resource
import sys
import tempfile
import time
from importlib import import_module
from pathlib import Path
from random import Random
from typing import Any

from qwen_pipeline_tests.fuzzing.mutate import mutated
from qwen_pipeline_tests.fuzzing.readers import READERS, errors_of


def main(name: str, count: str, seed: str = "1") -> None:
    reader = READERS[name]
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as scratch:
        read = errors_of(reader, Path(scratch) / "read")
        if count == "coverage":
            atheris: Any = import_module("atheris")

            (corpus := Path(scratch) / "corpus").mkdir()
            for number, content in enumerate(reader.seeds):
                (corpus / str(number)).write_bytes(content)
            atheris.instrument_all()
            atheris.Setup([sys.argv[0], str(corpus), "-max_len=20000", *sys.argv[3:]], read)
            atheris.Fuzz()
        random, refused, slowest, began = Random(int(seed)), 0, 0.0, time.monotonic()
        for number in range(int(count)):
            data = mutated(random.choice(reader.seeds), random)
            before = time.monotonic()
            try:
                refused += read(data) is not None
            except Exception as error:
                error.add_note(f"execution {number} of seed {seed}: {data[:2000]!r}")
                raise
            slowest = max(slowest, time.monotonic() - before)
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(
            f"{name}: {int(count):,} executions, {refused:,} refused, slowest {slowest:.2f} s, {memory:,.0f} MB,"
            f" {time.monotonic() - began:.0f} s"
        )


if __name__ == "__main__":
    main(*sys.argv[1:])
