"""A quantized checkpoint made of two: the engine's codes, and the source's everything else.

What is not quantized (embeddings, norms, biases, config, tokenizer) is the source's, byte for byte, because engines
cast it to the dtype they compute in and rewrite the files beside it. Tensors keep the source's order and shards.
"""

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

from qwen_pipeline.checkpoint.lazy import Checkpoint, LazyTensor
from qwen_pipeline.checkpoint.safetensors_file import TensorSpec
from qwen_pipeline.errors import WorkerFailed
from qwen_pipeline.qwen.linears import Linear
from qwen_pipeline.transforms.codes.gptq import gptq_format


def quantized_checkpoint(
    source: Checkpoint,
    packed: Checkpoint,
    linears: Collection[Linear],
    quantization_config: Mapping[str, Any],
) -> Checkpoint:
    """Replace the weight of each linear layer by its codes from ``packed``; a layer without codes keeps its weight.

    A stack of experts is kept whole if one of them has no codes.

    Raises:
        WorkerFailed: The codes have another dtype or shape than the source's weight gives.
    """
    form = gptq_format({"quantization_config": quantization_config})
    unsolved = {linear.tensor for linear in linears if f"{linear.module}.qweight" not in packed}
    codes: dict[str, dict[str, TensorSpec]] = {}
    for linear in linears:
        if linear.tensor not in unsolved:
            codes.setdefault(linear.tensor, {}).update(
                {
                    f"{linear.module}.{code}": spec
                    for code, spec in form.code_specs(linear.out_features, linear.in_features).items()
                }
            )
    tensors: dict[str, LazyTensor] = {}
    shards: dict[str, str] = {}
    for name, tensor in source.tensors.items():
        replacements = {code: _code(packed, code, spec) for code, spec in codes[name].items()} if name in codes else {}
        for new_name, new_tensor in (replacements or {name: tensor}).items():
            tensors[new_name], shards[new_name] = new_tensor, source.shards[name]
    return replace(
        source,
        tensors=tensors,
        shards=shards,
        config={**source.config, "quantization_config": dict(quantization_config)},
        config_bytes=None,
    )


def _code(packed: Checkpoint, name: str, spec: TensorSpec) -> LazyTensor:
    found = packed.get(name)
    if found != spec:
        shown = f"{found.dtype} {list(found.shape)}" if found else "missing"
        raise WorkerFailed(
            f"The engine's {name} is {shown}, expected {spec.dtype} {list(spec.shape)}.",
            remedy="Report this as a defect: the engine writes another format than this pipeline knows.",
        )
    return packed.tensors[name]
