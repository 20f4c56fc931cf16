"""The chain undisturbed, and the process that disturbs it; made once."""

import shutil
import socket
from collections.abc import Iterator
from dataclasses import dataclass, replace

import pytest

from qwen_pipeline_tests.faults.plans import KINDS, DisturbedProcess, compiled_shim
from qwen_pipeline_tests.faults.steps import Inputs, digests, make_inputs, make_validation, steps, without_processes


@dataclass(frozen=True, slots=True, kw_only=True)
class Undisturbed:
    """The chain undisturbed.

    Attributes:
        expected: Directory -> content digest.
        counts: Kind of fault -> number of operations at which it may happen.
        connections: What was connected to while the chain ran.
    """

    inputs: Inputs
    process: DisturbedProcess
    expected: dict[str, list[str]]
    counts: dict[str, int]
    connections: list[object]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Undisturbed]:
    root = tmp_path_factory.mktemp("faults")
    inputs, store = make_inputs(root / "inputs"), root / "store"
    store.mkdir()
    connections: list[object] = []
    with pytest.MonkeyPatch.context() as patch:
        without_processes(patch)
        patch.setattr(socket.socket, "connect", lambda _, address: connections.append(address))
        for step in steps(inputs, store).values():
            step()
        inputs = replace(inputs, validated=make_validation(inputs, root / "validated", store))
        steps(inputs, store)["published"]()
        process = DisturbedProcess(compiled_shim(root), root / "log")
        of_masks: dict[tuple[int, bool], int] = {}
        for kind in KINDS.values():
            if (sort := (kind.mask, kind.inputs)) not in of_masks:
                (out := root / "counting").mkdir()
                found = process.run(replace(kind, jump=0), inputs, out, nth=-1, target=out)
                assert (found.get("code"), found.get("traceback")) == (0, None), found
                assert digests(out) == digests(store), found
                of_masks[sort] = found["count"]
                shutil.rmtree(out)
        counts = {name: of_masks[kind.mask, kind.inputs] for name, kind in KINDS.items()}
        yield Undisturbed(
            inputs=inputs, process=process, expected=digests(store), counts=counts, connections=connections
        )
        process.end()
