"""A quantized checkpoint composed of an engine's codes and the source's remaining tensors and files.

Everything that is not quantized (embeddings, norms, biases, config, tokenizer) is the source's, byte for byte, because
engines cast tensors to the dtype that they compute in and rewrite the other files. Tensors keep the source's order and
shards.
"""

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

from qwen_pipeline.checkpoint.lazy import Checkpoint, LazyTensor
from qwen_pipeline.checkpoint.safetensors_file import TensorSpec
from qwen_pipeline.errors import WorkerFailed
from qwen_pipeline.qwen.linears import Linear
from qwen_pipeline.transforms.codes.exclusions import exclusion_rules
from qwen_pipeline.transforms.codes.gptq import gptq_format


def quantized_checkpoint(
    source: Checkpoint,
    packed: Checkpoint,
    linears: Collection[Linear],
    quantization_config: Mapping[str, Any],
) -> Checkpoint:
    """Return ``source`` with the weight of each linear layer replaced by its codes in ``packed``, if there are any.

    A stack of experts keeps its weights if one expert has no codes. The config excludes every linear layer without
    codes by name.

    Raises:
        WorkerFailed: The codes do not have the dtype or shape that follows from the source's weight.
    """
    form = gptq_format({"quantization_config": quantization_config})
    without_codes = {linear.tensor for linear in linears if f"{linear.module}.qweight" not in packed}
    codes: dict[str, dict[str, TensorSpec]] = {}
    for linear in linears:
        if linear.tensor not in without_codes:
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
    quantized = replace(source, tensors=tensors, shards=shards, config_bytes=None)
    rules = exclusion_rules(quantized)
    settings = {**quantization_config, **({"dynamic": rules} if rules else {})}
    return replace(quantized, config={**source.config, "quantization_config": settings})


def _code(packed: Checkpoint, name: str, spec: TensorSpec) -> LazyTensor:
    found = packed.get(name)
    if found != spec:
        shown = f"{found.dtype} {list(found.shape)}" if found else "missing"
        raise WorkerFailed(
            f"The engine's {name} is {shown}, expected {spec.dtype} {list(spec.shape)}.",
            remedy="Report this as a defect: the engine writes a format that this pipeline does not support.",
        )
    return packed.tensors[name]
