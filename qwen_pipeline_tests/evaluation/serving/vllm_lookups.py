"""Lookups of vLLM's own parsers of configs, run in its environment without a GPU or a kernel for codes.

A worker function: it returns, for each module as vLLM builds it, the bits and the group size that vLLM gives it.
"""

from collections.abc import Mapping
from importlib import import_module
from typing import Any

from qwen_pipeline.progress import Observe

QUANTIZATION = "vllm.model_executor.layers.quantization"
Format = tuple[int, int] | None


def lookups(job: Mapping[str, Any], _: Observe) -> dict[str, Any]:
    """Look up ``job["modules"]`` in a ``quantization_config``; a weight is None.

    ``job["fused"]`` is vLLM's ``packed_modules_mapping``.
    """
    of = of_gptq if job["settings"]["quant_method"] == "gptq" else of_compressed_tensors
    return {module: of(job["settings"], module, job["fused"]) for module in job["modules"]}


def pooling_requests(job: Mapping[str, Any], _: Observe) -> dict[str, Any]:
    """Return, for each request body of ``job["bodies"]``, what vLLM reads of it, and the fields that it ignores."""
    protocol: Any = import_module("vllm.entrypoints.pooling.pooling.protocol").PoolingCompletionRequest
    pooler: Any = import_module("vllm.config.pooler").PoolerConfig
    found: list[Any] = []
    for body in job["bodies"]:
        request = protocol(**body)
        params = request.to_pooling_params()
        ignored = sorted(body.keys() - protocol.model_fields.keys())
        found.append([request.input, params.task, params.use_activation, pooler(task=params.task).task, ignored])
    return {"found": found}


def of_gptq(settings: Mapping[str, Any], module: str, fused: Mapping[str, list[str]]) -> Format:
    utils: Any = import_module(f"{QUANTIZATION}.utils.gptq_utils")
    config = import_module(f"{QUANTIZATION}.auto_gptq").AutoGPTQConfig.from_config(dict(settings))
    coded = [name for names in settings.get("modules_in_block_to_quantize") or [] for name in names]
    is_routed = module.endswith(".experts")
    if not is_routed and coded and not utils.is_layer_gptq_quantized(module, coded, fused):
        return None
    if utils.get_dynamic_override(config, layer_name=module) is False:
        return None
    utils.override_config(config, prefix=module)
    return config.weight_bits, config.group_size


def of_compressed_tensors(settings: Mapping[str, Any], module: str, fused: Mapping[str, list[str]]) -> Format:
    utils: Any = import_module(f"{QUANTIZATION}.compressed_tensors.utils")
    torch: Any = import_module("torch")
    schemes = {target: scheme["weights"] for scheme in settings["config_groups"].values()
               for target in scheme["targets"]}  # fmt: skip
    name = f"{module}.0.gate_proj" if module.endswith(".experts") else module
    if utils.should_ignore_layer(name, ignore=settings["ignore"], fused_mapping=fused):
        return None
    target = utils.find_matched_target(
        layer_name=name, module=torch.nn.Linear(1, 1), targets=schemes.keys(), fused_mapping=fused
    )
    found = schemes.get(target)
    return (found["num_bits"], found["group_size"]) if found else None
