"""Streaming in blocks gives the tensors and the digest of writing everything at once."""

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest.mock import patch

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from qwen_pipeline.checkpoint import tree_hash
from qwen_pipeline.checkpoint.lazy import Checkpoint, LazyTensor, open_checkpoint
from qwen_pipeline.checkpoint.store.verify import contents_of_directory
from qwen_pipeline.checkpoint.writer import write_checkpoint
from qwen_pipeline_tests.in_memory import blocks_of, spec_of

DTYPES = st.sampled_from([torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.int32, torch.uint8])
SHAPES = st.lists(st.integers(0, 9), max_size=3).map(tuple)
TENSORS = st.dictionaries(st.text("abz.é", min_size=1, max_size=6), st.tuples(DTYPES, SHAPES), min_size=1, max_size=5)


def computed(tensor: torch.Tensor) -> LazyTensor:
    """Return a tensor whose rows are computed on request, in new memory."""
    spec = spec_of(tensor)
    return LazyTensor(spec=spec, read=lambda start, stop: (tensor[start:stop] if tensor.dim() else tensor).clone())


@settings(max_examples=12, deadline=None)
@given(kinds=TENSORS, block=st.sampled_from([8, 24, 64]), leaf=st.sampled_from([16, 40]), from_file=st.booleans())
def test_blocks_of_any_size_give_what_save_file_gives(
    kinds: dict[str, tuple[torch.dtype, tuple[int, ...]]], block: int, leaf: int, from_file: bool
) -> None:
    eager = {name: torch.randint(0, 99, shape).to(dtype) for name, (dtype, shape) in kinds.items()}
    with TemporaryDirectory() as scratch, patch.multiple(tree_hash, LEAF_BYTES=leaf):
        naive, streamed = Path(scratch) / "naive", Path(scratch) / "streamed"
        for root in (naive, streamed):
            root.mkdir()
        save_file(eager, naive / "model.safetensors")
        (naive / "config.json").write_text(json.dumps({"model_type": "qwen2"}))
        source = open_checkpoint(naive)
        tensors = source.tensors if from_file else {name: computed(eager[name]) for name in source}
        checkpoint = Checkpoint(
            config=source.config, config_bytes=source.config_bytes, tensors=tensors, shards=source.shards
        )
        with blocks_of(block):
            contents = write_checkpoint(checkpoint, streamed, task="")

        found = load_file(streamed / "model.safetensors")
        assert found.keys() == eager.keys()
        assert all(
            torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype for name, tensor in eager.items()
        )
        assert contents.digest == contents_of_directory(naive).digest
