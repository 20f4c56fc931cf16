"""Calibration tokens of each expert of a mixture, counted in a forward pass of one layer at a time.

An expert's Hessian is a sum over the tokens that the router sends to it. With too few tokens it does not represent the
expert's later inputs, and without any it contains no information.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qwen_pipeline.checkpoint.lazy import Checkpoint
from qwen_pipeline.checkpoint.safetensors_file import open_safetensors
from qwen_pipeline.errors import WorkerFailed
from qwen_pipeline.layerwise.forward import LayerStream
from qwen_pipeline.layerwise.model import ComputeContext
from qwen_pipeline.models.open import open_model
from qwen_pipeline.progress import Observe, Progress, unobserved
from qwen_pipeline.qwen.linears import decoder_linears

COVERAGE_BATCH_TOKENS = {"cpu": 2048, "cuda": 16384}
"""Tokens in a batch, by device; at least one window."""


def measure_coverage(spec: Mapping[str, Any], observe: Observe) -> Mapping[str, Any]:
    """Count the tokens of each expert; runs in a process of its own.

    Args:
        spec: ``source``, the checkpoint; ``windows``, the safetensors file of a calibration set; ``device``.
        observe: Receives progress for each layer.

    Returns:
        ``layers``: number of a layer with experts, as a string -> tokens of each expert.
    """
    context = ComputeContext(
        device=torch.device(spec["device"]), dtype=torch.float32 if spec["device"] == "cpu" else torch.bfloat16
    )
    file = open_safetensors(Path(spec["windows"]))
    counts = count_expert_tokens(
        open_model(Path(spec["source"])), file.load("input_ids"), file.load("attention_mask"), context, observe
    )
    return {"layers": {str(layer): tokens.tolist() for layer, tokens in counts.items()}}


def has_experts(checkpoint: Checkpoint) -> bool:
    """Return whether a model has experts that a router chooses from."""
    return any(linear.is_expert for linear in decoder_linears(checkpoint))


@torch.inference_mode()
def count_expert_tokens(
    checkpoint: Checkpoint,
    input_ids_ST: Tensor,
    mask_ST: Tensor,
    context: ComputeContext,
    observe: Observe = unobserved,
) -> dict[int, Tensor]:
    """Return layer -> number of tokens that each expert is chosen for, int64 [E]; dense layers are left out."""
    size = max(1, COVERAGE_BATCH_TOKENS[context.device.type] // input_ids_ST.shape[1])
    batches = [batch.long().to(context.device) for batch in input_ids_ST.split(size)]
    masks = [mask.bool().flatten().to(context.device) for mask in mask_ST.split(size)]
    stream = LayerStream(checkpoint, batches, context)
    counts: dict[int, Tensor] = {}
    for layer, module in enumerate(stream.iter_layers()):
        recorder = _RoutingRecorder(module)
        stream.run(layer, module)
        if recorder.batches:
            counts[layer] = recorder.count(masks)
        observe(Progress(task="route calibration tokens", done=layer + 1, total=len(stream.parts), unit="layers"))
    return counts


class _RoutingRecorder:
    """Records the experts chosen by a layer's router; all families pass ``hidden, chosen, weights`` to the experts."""

    def __init__(self, layer: nn.Module) -> None:
        self.batches: list[Tensor] = []
        self._experts: Any = None
        for module in layer.modules():
            if type(module).__name__.endswith("Experts"):
                self._experts = module
                module.register_forward_pre_hook(self._record, with_kwargs=True)

    def count(self, masks: Sequence[Tensor]) -> Tensor:
        tokens = [chosen_NK[mask_N] for chosen_NK, mask_N in zip(self.batches, masks, strict=True)]
        return torch.cat(tokens).flatten().bincount(minlength=self._experts.num_experts).cpu()

    def _record(self, module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        chosen = named.get("top_k_index", arguments[1] if len(arguments) > 1 else None)
        if not torch.is_tensor(chosen) or chosen.is_floating_point():
            raise WorkerFailed(
                f"This version of Transformers does not pass the chosen experts to {type(module).__name__}.",
                remedy="Install the pinned versions, or report this as a bug.",
            )
        self.batches.append(chosen.reshape(-1, chosen.shape[-1]))
