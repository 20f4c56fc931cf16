"""``padded + candidates -> allocation``: the precision of each module, chosen by measured divergence."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen_pipeline.checkpoint.lazy import Checkpoint, open_checkpoint
from qwen_pipeline.checkpoint.manifest import find_manifest
from qwen_pipeline.errors import InputRefused
from qwen_pipeline.evaluation.allocation.goals import Goal
from qwen_pipeline.models.open import open_model
from qwen_pipeline.progress import Observe, unobserved
from qwen_pipeline.qwen.config import require_full_precision
from qwen_pipeline.qwen.heads import head_kind
from qwen_pipeline.text.spec import DEFAULT_TEXT_SPEC, TextSpec

SETTINGS, TABLE, CURVE = "modules.toml", "allocation.json", "curve.png"


@dataclass(frozen=True, slots=True, kw_only=True)
class AllocationInputs:
    """The inputs of an allocation.

    Attributes:
        source: The checkpoint in full precision that will be quantized.
        candidates: Quantizations of it, each with one precision for all linear layers.
        text: Held-out text.
        goal: The limit to keep.
        windows: Number of windows of text.
        seq_len: Tokens per window.
        device: ``cpu`` or ``cuda``.
        text_spec: The way in which records become tokens.
    """

    source: Path
    candidates: tuple[Path, ...]
    text: Path
    goal: Goal
    windows: int = 2
    seq_len: int = 128
    device: str = "cpu"
    text_spec: TextSpec = DEFAULT_TEXT_SPEC


def allocate(inputs: AllocationInputs, out: Path, *, observe: Observe = unobserved) -> Mapping[str, Any]:
    """Choose precisions, and write them, the table and the curve into ``out``; return the table as JSON values.

    Raises:
        InputRefused: No choice keeps the limit, a candidate was not quantized from the source with one precision, or
            the model is not a language model.
        CheckpointRefused: A checkpoint cannot be read.
    """
    import torch

    from qwen_pipeline.evaluation.allocation.allocate import allocate as choose
    from qwen_pipeline.evaluation.allocation.plot import draw_curve
    from qwen_pipeline.evaluation.allocation.result import as_json, to_toml
    from qwen_pipeline.layerwise.model import ComputeContext
    from qwen_pipeline.text.bounded_tokenizer import BoundedTokenizer
    from qwen_pipeline.text.windows import read_windows

    source = open_model(inputs.source)
    require_full_precision(
        source, because="Its weights are the choice 'keep'.", remedy="Pass the padded checkpoint: --in padded/"
    )
    if (kind := head_kind(source)) != "language":
        raise InputRefused(
            f"{inputs.source} is a model with another head ({kind}), and KL is that of next tokens.",
            remedy="Choose by hand: quantize with --module, and compare the figures of validate.",
        )
    candidates = [_candidate(inputs.source, root) for root in inputs.candidates]
    tokenizer = BoundedTokenizer(inputs.source, inputs.text_spec.limits)
    tokens, _ = read_windows(
        inputs.text, tokenizer, windows=inputs.windows, seq_len=inputs.seq_len, spec=inputs.text_spec
    )
    context = ComputeContext(device=torch.device(inputs.device), dtype=torch.float32)
    windows = [torch.tensor(window) for window in tokens]
    allocation = choose(source, candidates, windows, inputs.goal, context, observe=observe)
    out.mkdir(parents=True, exist_ok=True)
    data = as_json(allocation)
    (out / SETTINGS).write_text(to_toml(allocation))
    (out / TABLE).write_text(json.dumps(data, indent=1))
    draw_curve(allocation, out / CURVE)
    return data


def _candidate(source: Path, root: Path) -> Checkpoint:
    """Open a candidate.

    Raises:
        InputRefused: Its manifest names another source.
    """
    made, found = find_manifest(source), find_manifest(root)
    quantized_from = found.derivation.inputs.get("source") if found else None
    if made and quantized_from and quantized_from != made.content_digest:
        raise InputRefused(
            f"{root} was quantized from another checkpoint than {source}.",
            remedy="Pass candidates that were quantized from the checkpoint of --in.",
        )
    return open_checkpoint(root)
