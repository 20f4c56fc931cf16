"""Write a checkpoint with one tensor of half a GiB, and print the bytes by which peak memory grew."""

import sys
from pathlib import Path

import torch

from qwen_pipeline.checkpoint.lazy import Checkpoint, LazyTensor
from qwen_pipeline.checkpoint.measure import resident_peak
from qwen_pipeline.checkpoint.safetensors_file import TensorSpec
from qwen_pipeline.checkpoint.writer import write_checkpoint

SPEC = TensorSpec(dtype="BF16", shape=(2**18, 1024))

if __name__ == "__main__":
    big = LazyTensor(spec=SPEC, read=lambda start, stop: torch.ones(stop - start, 1024, dtype=torch.bfloat16))
    before = resident_peak()
    checkpoint = Checkpoint(config={}, tensors={"w": big}, shards={"w": "model.safetensors"})
    write_checkpoint(checkpoint, Path(sys.argv[1]), task="")
    print(resident_peak() - before)
