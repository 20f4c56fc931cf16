"""Eight processes on one store, killed at random, leave what one process would have made.

``STORE_SECONDS=600 make test-slow`` goes on for ten minutes; eight seconds without the variable.
"""

import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from qwen_pipeline.errors import DestinationLocked
from qwen_pipeline_tests.faults.conftest import Undisturbed
from qwen_pipeline_tests.faults.steps import (
    digests,
    finished,
    require_clean,
    require_nothing_partial,
    steps,
    without_processes,
)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(7200),
    pytest.mark.skipif(shutil.which("cc") is None, reason="the shim needs a C compiler"),
]
SECONDS, PROCESSES = float(os.environ.get("STORE_SECONDS", "8")), 8


def started(chain: Mapping[str, Callable[[], object]]) -> int:
    """Fork a process that runs the chain until every stage is done; another one may have the lock of a stage."""
    if child := os.fork():
        return child
    left = list(chain)
    while left:
        try:
            chain[left[0]]()
            left.pop(0)
        except DestinationLocked:
            time.sleep(0.01)
        except BaseException:
            import traceback

            traceback.print_exc()
            os._exit(1)
    os._exit(0)


def test_processes_that_are_killed_leave_what_one_would_have_made(undisturbed: Undisturbed, tmp_path: Path) -> None:
    moment, deadline = random.Random(8), time.monotonic() + SECONDS
    kills = rounds = 0
    with pytest.MonkeyPatch.context() as patch:
        without_processes(patch)
        while time.monotonic() < deadline:
            (out := tmp_path / f"{rounds}").mkdir()
            chain = steps(undisturbed.inputs, out)
            running = {started(chain) for _ in range(PROCESSES)}
            for _ in range(moment.randrange(3 * PROCESSES)):
                time.sleep(moment.uniform(0, 0.1))
                require_nothing_partial(out)
                if running:
                    os.kill(victim := moment.choice(sorted(running)), signal.SIGKILL)
                    ended, status = os.waitpid(victim, 0)
                    assert os.waitstatus_to_exitcode(status) in (0, -signal.SIGKILL), "a process failed"
                    kills += status != 0
                    running.discard(ended)
                    running.add(started(chain))
            for process in running:
                assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 0, "a process failed"
            assert digests(out) == undisturbed.expected
            assert len(finished(out)) == len(undisturbed.expected)
            require_clean(out)
            shutil.rmtree(out)
            rounds += 1
    print(f"{rounds} rounds of {PROCESSES} processes, {kills} kills")
    assert rounds
