"""How many calibration tokens each expert of a mixture gets, by a forward pass of one layer at a time.

An expert's Hessian is a sum over the tokens that its router sends. With too few of them it says little about what the
expert does later, and with none it says nothing.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qwen_pipeline.checkpoint.lazy import Checkpoint, open_checkpoint
from qwen_pipeline.checkpoint.safetensors_file import open_safetensors
from qwen_pipeline.errors import WorkerFailed
from qwen_pipeline.layerwise.forward import LayerStream
from qwen_pipeline.layerwise.model import ComputeContext
from qwen_pipeline.progress import Observe, Progress, unobserved
from qwen_pipeline.qwen.linears import decoder_linears

COVERAGE_BATCH_TOKENS = {"cpu": 2048, "cuda": 16384}
"""Tokens that go through a layer at a time, by device; at least one window."""


def measure_coverage(spec: Mapping[str, Any], observe: Observe) -> Mapping[str, Any]:
    """Count in a process of its own.

    Args:
        spec: ``source``, the checkpoint; ``windows``, the safetensors file of a calibration set; ``device``.
        observe: Told about each layer.

    Returns:
        ``layers``: number of a layer with experts, as a string -> tokens of each expert.
    """
    context = ComputeContext(
        device=torch.device(spec["device"]), dtype=torch.float32 if spec["device"] == "cpu" else torch.bfloat16
    )
    file = open_safetensors(Path(spec["windows"]))
    counts = count_expert_tokens(
        open_checkpoint(Path(spec["source"])), file.load("input_ids"), file.load("attention_mask"), context, observe
    )
    return {"layers": {str(layer): tokens.tolist() for layer, tokens in counts.items()}}


def has_experts(checkpoint: Checkpoint) -> bool:
    """Whether a model has experts that a router chooses from."""
    return any(linear.is_expert for linear in decoder_linears(checkpoint))


@torch.inference_mode()
def count_expert_tokens(
    checkpoint: Checkpoint,
    input_ids_ST: Tensor,
    mask_ST: Tensor,
    context: ComputeContext,
    observe: Observe = unobserved,
) -> dict[int, Tensor]:
    """Return layer -> how many of the tokens each expert is chosen for, int64 [E]; dense layers are left out."""
    size = max(1, COVERAGE_BATCH_TOKENS[context.device.type] // input_ids_ST.shape[1])
    batches = [batch.long().to(context.device) for batch in input_ids_ST.split(size)]
    masks = [mask.bool().flatten().to(context.device) for mask in mask_ST.split(size)]
    stream = LayerStream(checkpoint, batches, context)
    counts: dict[int, Tensor] = {}
    for layer, module in enumerate(stream.coming()):
        chosen = _Chosen(module)
        stream.run(layer, module)
        if chosen.batches:
            counts[layer] = chosen.count(masks)
        observe(Progress(task="route calibration tokens", done=layer + 1, total=len(stream.parts), unit="layers"))
    return counts


class _Chosen:
    """Notes which experts a layer's router chooses: every family hands ``hidden, chosen, weights`` to its experts."""

    def __init__(self, layer: nn.Module) -> None:
        self.batches: list[Tensor] = []
        self._experts: Any = None
        for module in layer.modules():
            if type(module).__name__.endswith("Experts"):
                self._experts = module
                module.register_forward_pre_hook(self._note, with_kwargs=True)

    def count(self, masks: Sequence[Tensor]) -> Tensor:
        tokens = [chosen_NK[mask_N] for chosen_NK, mask_N in zip(self.batches, masks, strict=True)]
        return torch.cat(tokens).flatten().bincount(minlength=self._experts.num_experts).cpu()

    def _note(self, module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        chosen = named.get("top_k_index", arguments[1] if len(arguments) > 1 else None)
        if not torch.is_tensor(chosen) or chosen.is_floating_point():
            raise WorkerFailed(
                f"{type(module).__name__} is not called with the chosen experts by this version of Transformers.",
                remedy="Use the pinned versions, or report this as a defect.",
            )
        self.batches.append(chosen.reshape(-1, chosen.shape[-1]))
