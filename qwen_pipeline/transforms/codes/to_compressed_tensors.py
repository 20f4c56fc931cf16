"""Conversion of GPTQ's codes to compressed-tensors' ``pack-quantized``, vLLM's own format: the same codes, transposed.

Both formats fill a word from its lowest bits with consecutive inputs; GPTQ stores [words, outputs],
compressed-tensors [outputs, words] (:mod:`qwen_pipeline.transforms.codes.compressed_tensors`). Tensors are only
transposed, except for the zero points of asymmetric codes, which the older GPTQ format stores minus one.
"""

import re
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from qwen_pipeline.checkpoint.lazy import Checkpoint, LazyTensor
from qwen_pipeline.checkpoint.safetensors_file import TensorSpec
from qwen_pipeline.qwen.fused import EXPERTS, built_kind
from qwen_pipeline.qwen.names import FUSED, parse_name
from qwen_pipeline.transforms.codes.gptq import GptqFormat, gptq_format, pack_rows, unpack_rows
from qwen_pipeline.transforms.codes.module_rules import module_pattern

if TYPE_CHECKING:
    import torch

FORMAT = "pack-quantized"
_EMBEDDINGS = ("embed_tokens", "embedding")


def as_compressed(quantized: Checkpoint) -> Checkpoint:
    """Return a GPTQ checkpoint in the format ``pack-quantized``.

    Raises:
        CheckpointRefused: The checkpoint is not quantized to 4 or 8 bits with GPTQ.
    """
    form = gptq_format(quantized.config)
    tensors: dict[str, LazyTensor] = {}
    shards: dict[str, str] = {}
    for name, tensor in quantized.tensors.items():
        module, _, code = name.rpartition(".")
        if code == "qweight":
            new = dict(_compressed(quantized, module, form))
        elif f"{module}.qweight" in quantized and code in ("qzeros", "scales", "g_idx"):
            continue
        else:
            new = {name: tensor}
        for new_name, new_tensor in new.items():
            tensors[new_name], shards[new_name] = new_tensor, quantized.shards[name]
    config = {**quantized.config, "quantization_config": compressed_config(quantized, form)}
    return replace(quantized, tensors=tensors, shards=shards, config=config, config_bytes=None)


def compressed_config(quantized: Checkpoint, form: GptqFormat) -> dict[str, Any]:
    """Return the ``quantization_config``, which lists every linear layer that is not quantized.

    Experts that are stored in stacks are named by a pattern, as engines ask for the names of single ones.
    """
    names = (name.removesuffix(".weight") for name in quantized if name.endswith(".weight"))
    ignored = [name for name in names if len(quantized[f"{name}.weight"].shape) == 2 and not _is_embedding(name)]
    ignored += [f"re:.*{re.escape(name.rpartition('.')[0])}.*" for name in quantized if name.endswith(FUSED)]
    targets = _targets(quantized, form)
    return {
        "quant_method": "compressed-tensors",
        "format": FORMAT,
        "quantization_status": "compressed",
        "config_groups": {f"group_{n}": _scheme(own, targets[own]) for n, own in enumerate(targets)},
        "ignore": list(dict.fromkeys([*ignored, "lm_head"])),
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


def _targets(quantized: Checkpoint, form: GptqFormat) -> dict[GptqFormat, list[str]]:
    """Return the formats of the codes, each with the modules that have it: all linear layers, or patterns of names.

    Before 0.32 or so, vLLM compared the class of a fused module, such as ``QKVParallelLinear``, with targets before the
    names of its parts (``find_matched_target``), so that ``Linear`` must not be among the targets of several schemes.
    """
    modules = [name.removesuffix(".qweight") for name in quantized if name.endswith(".qweight")]
    forms = {module: form.of(quantized, module) for module in modules}
    if set(forms.values()) <= {form}:
        return {form: ["Linear"]}
    layers: dict[tuple[str, GptqFormat], list[int]] = {}
    for module, own in forms.items():
        parsed = parse_name(f"{module}.qweight", quantized.config)
        kind = EXPERTS if built_kind(parsed.module) == EXPERTS else parsed.module
        layers.setdefault((kind, own), []).append(parsed.layer or 0)
    kinds = [kind for kind, _ in layers]
    kinds += [parse_name(name, quantized.config).module for name in quantized if name.endswith(".weight")]
    targets: dict[GptqFormat, list[str]] = {form: []} if form in forms.values() else {}
    for (kind, own), numbers in layers.items():
        everywhere = kinds.count(kind) == 1
        targets.setdefault(own, []).append(f"re:{module_pattern(kind, None if everywhere else sorted(set(numbers)))}")
    return targets


def _scheme(form: GptqFormat, targets: list[str]) -> dict[str, Any]:
    weights = {
        "num_bits": form.bits,
        "type": "int",
        "symmetric": form.sym,
        "strategy": "group",
        "group_size": form.group_size,
        "actorder": "group" if form.desc_act else None,
        "dynamic": False,
    }
    others = {"input_activations": None, "output_activations": None}
    return {"targets": targets, "weights": weights, **others, "format": FORMAT}  # LMDeploy asks each scheme for it


def _is_embedding(module: str) -> bool:
    return any(part in _EMBEDDINGS for part in module.split("."))


def _compressed(quantized: Checkpoint, module: str, form: GptqFormat) -> Iterator[tuple[str, LazyTensor]]:
    form = form.of(quantized, module)
    words, outputs = quantized[f"{module}.qweight"].shape
    inputs = words * form.codes_per_word
    yield f"{module}.weight_packed", _transposed(quantized.tensors[f"{module}.qweight"])
    yield f"{module}.weight_scale", _transposed(quantized.tensors[f"{module}.scales"])
    yield f"{module}.weight_shape", _shape(outputs, inputs)
    if not form.sym:
        yield f"{module}.weight_zero_point", _zero_points(quantized.tensors[f"{module}.qzeros"], form)
    if form.desc_act:
        yield f"{module}.weight_g_idx", quantized.tensors[f"{module}.g_idx"]


def _transposed(tensor: LazyTensor) -> LazyTensor:
    """Return a matrix transposed; rows of the result are read as columns of the file."""
    rows, columns = tensor.spec.shape

    def read(start: int, stop: int) -> "torch.Tensor":
        if stored := tensor.stored:
            return stored.file.load_columns(stored.name, start, stop).T.contiguous()
        return tensor.read(0, rows)[:, start:stop].T.contiguous()

    return LazyTensor(spec=TensorSpec(dtype=tensor.spec.dtype, shape=(columns, rows)), read=read)


def _zero_points(tensor: LazyTensor, form: GptqFormat) -> LazyTensor:
    groups, words = tensor.spec.shape
    highest = 2**form.bits - 1

    def read(start: int, stop: int) -> "torch.Tensor":
        stored_OG = unpack_rows(tensor.read(0, groups)[:, start:stop].T.contiguous(), form.bits)
        return pack_rows((stored_OG + form.stored_zero_offset) & highest, form.bits)

    return LazyTensor(spec=TensorSpec(dtype="I32", shape=(words, groups)), read=read)


def _shape(outputs: int, inputs: int) -> LazyTensor:
    import torch

    value = torch.tensor([outputs, inputs], dtype=torch.int64)
    return LazyTensor(spec=TensorSpec(dtype="I64", shape=(2,)), read=lambda start, stop: value[start:stop])
