"""Run two forward passes of the model MODEL side by side; print the bytes by which memory grew."""

import sys
from pathlib import Path

import torch

from qwen_pipeline.checkpoint.lazy import open_checkpoint
from qwen_pipeline.checkpoint.measure import resident_peak
from qwen_pipeline.layerwise.forward import LayerStream, advance
from qwen_pipeline.layerwise.model import ComputeContext


def main() -> None:
    batches = list(torch.randint(0, 300, (1, 1, 16)))
    context = ComputeContext(device=torch.device("cpu"), dtype=torch.float32)
    stream = LayerStream(open_checkpoint(Path(sys.argv[1])), batches, context)
    Path("/proc/self/clear_refs").write_text("5")
    before = resident_peak()
    list(advance([stream, stream]))
    print(resident_peak() - before)


if __name__ == "__main__":
    main()
