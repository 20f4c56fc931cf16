"""The faults: their kinds, drawn at random operations, and the process that they happen in."""

import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import Any

from qwen_pipeline_tests import REPOSITORY
from qwen_pipeline_tests.faults.steps import Inputs

_FAIL, _FAIL_FROM, _SHORT, _SHORT_FROM, _SIGNAL, _CUT = range(6)
_OPEN, _READ, _WRITE, _SYNC, _NAME = (1 << bit for bit in range(5))
_ALL = _OPEN | _READ | _WRITE | _SYNC | _NAME
_CHANGES = _WRITE | _SYNC | _NAME


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """A kind of fault.

    Attributes:
        mode: What the shim does at the chosen operation.
        value: An errno or a signal.
        mask: The operations among which one is chosen.
        action: What another process does to the files meanwhile, while the chain is stopped.
        harmless: Whether the chain must end as if nothing had happened.
        inputs: Whether it happens to the inputs, and not to what is written.
    """

    mode: int
    value: int = 0
    mask: int = _ALL
    action: str | None = None
    harmless: bool = False
    inputs: bool = False
    jump: float = 0


KINDS: Mapping[str, Kind] = {
    "killed": Kind(mode=_SIGNAL, value=signal.SIGKILL),
    "killed in the middle of a write": Kind(mode=_CUT, mask=_WRITE),
    "interrupted": Kind(mode=_SIGNAL, value=signal.SIGINT),
    "disk full": Kind(mode=_FAIL_FROM, value=errno.ENOSPC, mask=_CHANGES),
    "disk full for a moment": Kind(mode=_FAIL, value=errno.ENOSPC, mask=_CHANGES),
    "quota exceeded": Kind(mode=_FAIL_FROM, value=errno.EDQUOT, mask=_WRITE),
    "disk fails to read": Kind(mode=_FAIL, value=errno.EIO, mask=_READ),
    "disk fails to read an input": Kind(mode=_FAIL_FROM, value=errno.EIO, mask=_READ, inputs=True),
    "disk fails to write": Kind(mode=_FAIL, value=errno.EIO, mask=_WRITE),
    "disk fails to sync": Kind(mode=_FAIL, value=errno.EIO, mask=_SYNC),
    "no more open files": Kind(mode=_FAIL_FROM, value=errno.EMFILE, mask=_OPEN),
    "no more open files for a moment": Kind(mode=_FAIL, value=errno.EMFILE, mask=_OPEN),
    "store becomes read-only": Kind(mode=_FAIL_FROM, value=errno.EROFS, mask=_OPEN | _CHANGES),
    "permission is lost": Kind(mode=_FAIL_FROM, value=errno.EACCES, mask=_OPEN | _NAME),
    "permission to read inputs is lost": Kind(mode=_FAIL_FROM, value=errno.EACCES, mask=_OPEN, inputs=True),
    "a rename fails": Kind(mode=_FAIL, value=errno.EIO, mask=_NAME),
    "short reads": Kind(mode=_SHORT_FROM, mask=_READ, harmless=True),
    "short reads of inputs": Kind(mode=_SHORT_FROM, mask=_READ, harmless=True, inputs=True),
    "short writes": Kind(mode=_SHORT_FROM, mask=_WRITE, harmless=True),
    "one short write": Kind(mode=_SHORT, mask=_WRITE, harmless=True),
    "workspace removed": Kind(mode=_SIGNAL, value=signal.SIGSTOP, action="remove workspace"),
    "input truncated": Kind(mode=_SIGNAL, value=signal.SIGSTOP, action="truncate", inputs=True),
    "input replaced": Kind(mode=_SIGNAL, value=signal.SIGSTOP, action="replace", inputs=True),
    "input removed": Kind(mode=_SIGNAL, value=signal.SIGSTOP, action="remove input", inputs=True),
    "clock jumps forward": Kind(mode=_FAIL, value=0, mask=0, harmless=True, jump=1e9),
    "clock jumps back": Kind(mode=_FAIL, value=0, mask=0, harmless=True, jump=-1e9),
}  # fmt: skip


class DisturbedProcess:
    """The process that runs the chain with faults."""

    def __init__(self, shim: Path, log: Path) -> None:
        environment = {**os.environ, "LD_PRELOAD": str(shim), "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "qwen_pipeline_tests.faults.server"]
        self._process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log.open("wb"), text=True
        )

    def run(self, kind: Kind, inputs: Inputs, out: Path, *, nth: int, target: Path) -> dict[str, Any]:
        """Run the chain into ``out`` with a fault at the n-th operation; return the outcome."""
        assert self._process.stdin
        assert self._process.stdout
        request = {
            **asdict(kind),
            "nth": nth,
            "below": str(inputs.base.parent if kind.inputs else out),
            "inputs": {name: str(path) if path else None for name, path in asdict(inputs).items()},
            "out": str(out),
            "target": str(target),
        }
        print(json.dumps(request), file=self._process.stdin, flush=True)
        return json.loads(self._process.stdout.readline())

    def end(self) -> None:
        self._process.kill()
        self._process.communicate()


def compiled_shim(root: Path) -> Path:
    """Compile the shim."""
    source = Path(__file__).with_name("shim.c")
    subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", str(root / "shim.so"), str(source), "-ldl"], check=True)
    return root / "shim.so"


def drawn(moment: Random, counts: Mapping[str, int]) -> tuple[str, int]:
    """Draw a kind of fault and the number of the operation at which it happens."""
    name = moment.choice(sorted(KINDS))
    return name, moment.randrange(max(counts[name], 1))
