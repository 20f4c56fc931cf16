"""A quantized checkpoint composed of an engine's codes and the source's remaining tensors and files.

Everything that is not quantized (embeddings, norms, biases, config, tokenizer) is the source's, byte for byte, because
engines cast tensors to the dtype that they compute in and rewrite the other files. Tensors keep the source's order and
shards.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

from qwen_pipeline.checkpoint.lazy import Checkpoint, LazyTensor
from qwen_pipeline.checkpoint.safetensors_file import TensorSpec
from qwen_pipeline.errors import WorkerFailed
from qwen_pipeline.qwen.linears import Linear
from qwen_pipeline.transforms.codes.gptq import GptqFormat, gptq_format
from qwen_pipeline.transforms.codes.module_rules import keeps_linears, module_rules

_FORMS: Mapping[str, GptqFormat] = {}
CODED_MODULES = "modules_in_block_to_quantize"
"""The field that lists modules with codes, if linear layers of the decoder have none."""


def quantized_checkpoint(
    source: Checkpoint,
    packed: Checkpoint,
    linears: Collection[Linear],
    quantization_config: Mapping[str, Any],
    forms: Mapping[str, GptqFormat] = _FORMS,
) -> Checkpoint:
    """Return ``source`` with the weight of each linear layer replaced by its codes in ``packed``, if there are any.

    A stack of experts keeps its weights if one expert has no codes. The config names every linear layer that has no
    codes, or codes of another format than the config's own.

    Args:
        source: The checkpoint in full precision.
        packed: The codes.
        linears: The linear layers of the decoder.
        quantization_config: Settings of the output; they have no rules for single modules yet.
        forms: Module -> the format of its codes, if it may be another than that of the settings.

    Raises:
        WorkerFailed: The codes do not have the dtype or shape that follows from the source's weight.
    """
    form = gptq_format({"quantization_config": quantization_config})
    without_codes = {linear.tensor for linear in linears if f"{linear.module}.qweight" not in packed}
    codes: dict[str, dict[str, TensorSpec]] = {}
    for linear in linears:
        if linear.tensor not in without_codes:
            specs = forms.get(linear.module, form).code_specs(linear.out_features, linear.in_features)
            named = {f"{linear.module}.{code}": spec for code, spec in specs.items()}
            codes.setdefault(linear.tensor, {}).update(named)
    tensors: dict[str, LazyTensor] = {}
    shards: dict[str, str] = {}
    for name, tensor in source.tensors.items():
        replacements = {code: _code(packed, code, spec) for code, spec in codes[name].items()} if name in codes else {}
        for new_name, new_tensor in (replacements or {name: tensor}).items():
            tensors[new_name], shards[new_name] = new_tensor, source.shards[name]
    quantized = replace(source, tensors=tensors, shards=shards, config_bytes=None)
    settings = dict(quantization_config)
    if rules := module_rules(quantized, form):
        settings["dynamic"] = rules
    coded = _coded_modules([each for each in linears if not each.is_expert], without_codes)
    if coded and (without_codes or keeps_linears(quantized)):
        settings[CODED_MODULES] = [coded]
    return replace(quantized, config={**source.config, "quantization_config": settings})


def _coded_modules(linears: Sequence[Linear], without_codes: Collection[str]) -> list[str]:
    """Return ends of the names of all layers with codes, which Optimum, and so Transformers, and vLLM look up.

    Optimum does not read ``dynamic``: without this list it expects codes for every linear layer of the decoder.
    """
    kept = {linear.kind for linear in linears if linear.tensor in without_codes}
    coded = [linear for linear in linears if linear.tensor not in without_codes]
    return list(
        dict.fromkeys(each.kind if each.kind not in kept else f"layers.{each.layer}.{each.kind}" for each in coded)
    )


def _code(packed: Checkpoint, name: str, spec: TensorSpec) -> LazyTensor:
    found = packed.get(name)
    if found != spec:
        shown = f"{found.dtype} {list(found.shape)}" if found else "missing"
        raise WorkerFailed(
            f"The engine's {name} is {shown}, expected {spec.dtype} {list(spec.shape)}.",
            remedy="Report this as a defect: the engine writes a format that this pipeline does not support.",
        )
    return packed.tensors[name]
