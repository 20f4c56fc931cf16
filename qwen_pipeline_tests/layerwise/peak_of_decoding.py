"""Decode three tokens with the model MODEL, without memory for layers; print the bytes by which memory grew."""

import sys
from pathlib import Path

import torch

from qwen_pipeline.checkpoint.lazy import open_checkpoint
from qwen_pipeline.checkpoint.measure import resident_peak
from qwen_pipeline.layerwise.decoding import Decoder
from qwen_pipeline.layerwise.model import ComputeContext


def main() -> None:
    context = ComputeContext(device=torch.device("cpu"), dtype=torch.float32)
    decoder = Decoder(open_checkpoint(Path(sys.argv[1])), context, budget=0)
    Path("/proc/self/clear_refs").write_text("5")
    before = resident_peak()
    decoder.answers([[5, 6, 7], [8] * 30], stops=(), limit=3)
    print(resident_peak() - before)


if __name__ == "__main__":
    main()
