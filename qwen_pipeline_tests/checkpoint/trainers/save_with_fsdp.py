"""Saves a model that two processes share with FSDP, with ``torch.distributed.checkpoint``.

Run as ``python -m qwen_pipeline_tests.checkpoint.trainers.save_with_fsdp MODEL OUT``; writes ``OUT/nested``, as
accelerate saves it, and ``OUT/flat``, as torchtitan does.
"""

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM

RANKS = 2


def main(model: str, out: str) -> None:
    Path(out).mkdir(parents=True, exist_ok=True)
    mp.spawn(_save, args=(model, out), nprocs=RANKS)  # pyright: ignore[reportPrivateImportUsage]


def _save(rank: int, root: str, out: str) -> None:
    dist.init_process_group(
        "gloo", init_method=f"file://{Path(out).absolute()}/rendezvous", rank=rank, world_size=RANKS
    )
    model: Any = AutoModelForCausalLM.from_pretrained(root, dtype=torch.bfloat16)
    mesh = init_device_mesh("cpu", (RANKS,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    state = model.state_dict()
    save({"model": state, "optimizer": {"lr": torch.ones(3)}, "step": 3}, checkpoint_id=f"{out}/nested")
    save(state, checkpoint_id=f"{out}/flat")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
