"""Reference results of trusted libraries in any dtype: merges by PEFT, logits by Transformers."""

from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from qwen_pipeline.checkpoint.lazy import Checkpoint, open_checkpoint
from qwen_pipeline.transforms.lora.adapter import open_adapter
from qwen_pipeline.transforms.lora.adapter_set import single
from qwen_pipeline.transforms.lora.merge import merge_lora


def peft_merge(base: Path, adapter: Path, *, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Return the tensors after PEFT's ``merge_and_unload`` with the base loaded in ``dtype``."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    return dict(PeftModel.from_pretrained(model, str(adapter)).merge_and_unload().state_dict())


def merged_with(base: Path, adapter: Path) -> Checkpoint:
    """Return the merge of this package, to compare with :func:`peft_merge`."""
    return merge_lora(open_checkpoint(base), single(open_adapter(adapter))).checkpoint


@torch.inference_mode()
def logits(root: Path, *, dtype: torch.dtype = torch.float64, tokens: int = 24) -> torch.Tensor:
    """Return the logits ``[1, T, V]`` for one fixed random sequence."""
    model = AutoModelForCausalLM.from_pretrained(root, dtype=dtype, attn_implementation="eager")
    ids = torch.randint(0, model.config.vocab_size, (1, tokens), generator=torch.Generator().manual_seed(7))
    return model(ids).logits


@torch.inference_mode()
def language_logits(model: Any, *, tokens: int = 24) -> torch.Tensor:
    """Return the logits ``[1, T, V]`` of a loaded model of any family for one fixed sequence of text."""
    model.set_experts_implementation("eager")  # the default, a grouped product, does not support float64
    ids = torch.arange(tokens)[None] * 7 % model.config.get_text_config().vocab_size
    return model.eval()(input_ids=ids).logits


def assert_no_further(name: str, ours: torch.Tensor, theirs: torch.Tensor, exact: torch.Tensor) -> tuple[float, float]:
    """Assert that ours is no further from the float64 result than theirs; return both largest errors.

    Ours is computed in float32 and rounded once. If the exact result is nearly midway between two values, the float32
    sum may round to the other one, whose error is larger by that of float32: far less than a thousandth of the step.
    """
    our_error, their_error = ((found.double() - exact).abs().max().item() for found in (ours, theirs))
    assert our_error <= their_error * 1.001, name
    return our_error, their_error
