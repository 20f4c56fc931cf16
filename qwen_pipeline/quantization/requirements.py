"""Requirements on a checkpoint that are checked before a quantizer starts."""

import re
from collections.abc import Sequence

from qwen_pipeline.checkpoint.lazy import Checkpoint
from qwen_pipeline.errors import InputRefused
from qwen_pipeline.quantization.spec import QuantSpec
from qwen_pipeline.qwen.fused import require_alike
from qwen_pipeline.qwen.linears import Linear
from qwen_pipeline.qwen.patterns import compile_pattern


def require_quantizable(checkpoint: Checkpoint, linears: Sequence[Linear], spec: QuantSpec) -> None:
    """Require that a quantizer can quantize the checkpoint with this spec, and that engines can load the codes.

    Raises:
        InputRefused: A size, the window length, a layer type, a precision or an override is not supported; the message
            names it.
    """
    _require_matching_precisions(linears, spec)
    require_alike(linears, spec.precision_of)
    _require_whole_words(linears, spec)
    _require_positions(checkpoint, spec)
    _require_maskable(linears, spec)
    _require_no_dense_layers_beside_experts(linears, spec)
    _require_matching_overrides(linears, spec)


def _require_whole_words(linears: Sequence[Linear], spec: QuantSpec) -> None:
    """Refuse partial groups and partial 32-bit words, which quantizers write but kernels cannot load."""
    for linear in linears:
        group_size = spec.precision_of(linear.module).group_size
        units = (("in", linear.in_features, group_size), ("out", linear.out_features, 32)) if group_size else ()
        for axis, size, unit in units:
            if size % unit:
                raise InputRefused(
                    f"{linear.module} has {axis}_features {size}, which is not a multiple of {unit}.",
                    remedy=f"Pad the checkpoint first: qwen-pipeline pad --group-size {group_size}; "
                    "for hidden or head sizes choose a smaller group size.",
                )


def _require_positions(checkpoint: Checkpoint, spec: QuantSpec) -> None:
    positions = checkpoint.config.get("max_position_embeddings", spec.seq_len)
    if spec.seq_len > positions:
        raise InputRefused(
            f"seq_len is {spec.seq_len}, but the model has {positions} positions; the quantizer would truncate every"
            " window.",
            remedy=f"Set seq_len to at most {positions}.",
        )


def _require_maskable(linears: Sequence[Linear], spec: QuantSpec) -> None:
    has_experts = any(linear.is_expert for linear in linears)
    if spec.packing == "documents" and has_experts and spec.engine != "layerwise":
        raise InputRefused(
            "packing is 'documents', but experts receive tokens without their windows, so GPTQModel would calibrate"
            " them with pad tokens too.",
            remedy="Set packing to 'stream', or engine to 'layerwise'.",
        )


def _require_no_dense_layers_beside_experts(linears: Sequence[Linear], spec: QuantSpec) -> None:
    """Refuse mixtures of experts with dense layers for GPTQModel: it fails at them, or does not quantize their MLPs."""
    has_experts = any(linear.is_expert for linear in linears)
    dense = [linear.layer for linear in linears if linear.kind == "mlp.down_proj"]
    if has_experts and dense and spec.engine == "gptqmodel":
        raise InputRefused(
            f"Layer {dense[0]} of this mixture of experts is dense, which GPTQModel's own loop does not support.",
            remedy="Set engine to 'layerwise'.",
        )


def _require_matching_precisions(linears: Sequence[Linear], spec: QuantSpec) -> None:
    for pattern in spec.modules:
        if not any(compile_pattern(pattern).search(linear.module) for linear in linears):
            raise InputRefused(
                f"modules {pattern!r} is found in no name of a linear layer of the decoder, such as"
                f" {linears[0].module}.",
                remedy="Correct the expression. Embedding, heads, routers, towers and draft heads are always kept.",
            )
    if not any(spec.precision_of(linear.module).coded for linear in linears):
        raise InputRefused(
            "modules keeps every linear layer, so there is nothing to quantize.",
            remedy="Give some layers codes, or publish the model in full precision.",
        )


def _require_matching_overrides(linears: Sequence[Linear], spec: QuantSpec) -> None:
    for pattern in spec.dynamic:
        if not any(re.search(pattern, linear.module) for linear in linears):
            raise InputRefused(
                f"dynamic {pattern!r} matches no module name, such as {linears[0].module}.",
                remedy="Correct the expression.",
            )
