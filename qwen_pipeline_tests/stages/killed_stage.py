"""A merge or a padding that kills itself once a tensor is finished.

Run as ``python -m qwen_pipeline_tests.stages.killed_stage merge BASE ADAPTER OUT`` or ``... pad SOURCE OUT``.
"""

import os
import signal
import sys
from pathlib import Path

from qwen_pipeline.checkpoint.journal import JOURNAL
from qwen_pipeline.progress import Progress
from qwen_pipeline.qwen.padding_spec import PaddingSpec
from qwen_pipeline.stages.merge import merge
from qwen_pipeline.stages.pad import pad

SPEC = PaddingSpec(group_size=32, tensor_parallel=2)


def main(stage: str, *paths: str) -> None:
    *inputs, out = map(Path, paths)

    def kill_once_journaled(_: Progress) -> None:
        if (out.with_name(f"{out.name}.partial") / JOURNAL).exists():
            os.kill(os.getpid(), signal.SIGKILL)

    if stage == "merge":
        merge(base=inputs[0], fine_tune=inputs[1], destination=out, observe=kill_once_journaled)
    else:
        pad(source=inputs[0], destination=out, spec=SPEC, observe=kill_once_journaled)


if __name__ == "__main__":
    main(*sys.argv[1:])
