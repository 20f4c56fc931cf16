"""Damaged files are read or refused by name: no other error, no hang, no memory.

``FUZZ_EXECUTIONS=1000000 make test-slow`` reads as many of each kind; ``docs/security.md`` has the last figures.
"""

import os
import resource
import time
from pathlib import Path
from random import Random

import pytest

from qwen_pipeline_tests.fuzzing.mutate import mutated
from qwen_pipeline_tests.fuzzing.readers import READERS, errors_of

FEW, MANY = 300, int(os.environ.get("FUZZ_EXECUTIONS", "3000"))


@pytest.mark.timeout(36_000)
@pytest.mark.parametrize("executions", [FEW, pytest.param(MANY, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", READERS)
def test_mutations_are_read_or_refused(name: str, executions: int, tmp_path: Path) -> None:
    reader, random = READERS[name], Random(executions)
    read = errors_of(reader, tmp_path)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert [read(seed) for seed in reader.seeds] == [None] * len(reader.seeds), "the seeds are sound"
    for number in range(executions):
        data, began = mutated(random.choice(reader.seeds), random), time.monotonic()
        try:
            error = read(data)
        except Exception as error:
            error.add_note(f"execution {number}: {data[:2000]!r}")
            raise
        assert error is None or (error.what and error.remedy)
        assert time.monotonic() - began < 5, data[:2000]
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000, "kilobytes"
