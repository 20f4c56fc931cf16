"""Quantize SOURCE into OUT with CALIBRATION and a SPEC in JSON; print a line for each module."""

import json
import sys
from pathlib import Path

from qwen_pipeline.checkpoint.store.destinations import Directory
from qwen_pipeline.progress import Progress
from qwen_pipeline.quantization.spec import QuantSpec
from qwen_pipeline.stages.quantize import quantize
from qwen_pipeline.workers.environments import find_environment


def report(event: Progress) -> None:
    if event.task == "quantize":
        print(event.remark, flush=True)


def main() -> None:
    source, out, calibration = map(Path, sys.argv[1:4])
    quantize(
        source=source,
        destination=Directory(out),
        calibration=calibration,
        spec=QuantSpec(**json.loads(sys.argv[4])),
        engine=find_environment("gptqmodel"),
        observe=report,
    )


if __name__ == "__main__":
    main()
