"""Lookups of SGLang's own parsers of configs, from its sources alone: no kernel and no dependency is imported.

A worker function: it returns, for each module as SGLang builds it, the bits and the group size that SGLang gives it.
"""

import sys
from collections.abc import Mapping
from copy import deepcopy
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import MagicMock

from qwen_pipeline.progress import Observe

QUANTIZATION = "sglang.srt.layers.quantization"
PACKAGES = (
    "sglang", "sglang.srt", "sglang.srt.layers", "sglang.srt.utils", QUANTIZATION, f"{QUANTIZATION}.gptq",
    f"{QUANTIZATION}.compressed_tensors",
)  # fmt: skip
"""Packages whose ``__init__`` is not run."""
KERNELS = (
    "sglang.kernels", "sglang.kernels.ops", "sglang.kernels.ops.quantization",
    "sglang.kernels.ops.quantization.fp8_kernel", "sglang.srt.layers.moe", "sglang.srt.utils.patch_torch",
    f"{QUANTIZATION}.marlin_utils", f"{QUANTIZATION}.gptq.schemes",
)  # fmt: skip
"""Modules that need a GPU's libraries, and that no lookup calls."""
Format = tuple[int, int] | None


def lookups(job: Mapping[str, Any], _: Observe) -> dict[str, Any]:
    """Look up ``modules`` in ``settings``, a ``quantization_config``, for each of ``job["configs"]``.

    A weight is None. ``job["fused"]`` is SGLang's ``packed_modules_mapping``.
    """
    _stand_in(Path(job["sources"]))
    found = [
        {module: _LOOKUPS[each["settings"]["quant_method"]](each["settings"], module, job["fused"])
         for module in each["modules"]}
        for each in job["configs"]
    ]  # fmt: skip
    return {"found": found}


def _stand_in(sources: Path) -> None:
    for name in PACKAGES:
        package = ModuleType(name)
        package.__path__ = [str(sources.joinpath(*name.split(".")))]
        sys.modules[name] = package
    sys.modules.update({name: MagicMock() for name in KERNELS})


def _of_gptq(settings: Mapping[str, Any], module: str, _: Any) -> Format:
    """Follow ``GPTQMarlinConfig.get_quant_method``: experts have the config's own format, whatever the rules say."""
    utils: Any = import_module(f"{QUANTIZATION}.utils")
    config: Any = import_module(f"{QUANTIZATION}.gptq.gptq").GPTQMarlinConfig.from_config(dict(settings))
    if not module.endswith(".experts"):
        config = deepcopy(config)
        if utils.get_dynamic_override(config, layer_name=module) is False:
            return None
        utils.override_config(config, prefix=module)
    return config.weight_bits, config.group_size


def _of_compressed_tensors(settings: Mapping[str, Any], module: str, fused: Mapping[str, list[str]]) -> Format:
    """Follow ``get_scheme_dict`` of ``CompressedTensorsConfig``; of experts, ``get_moe_scheme`` asks for the first."""
    import torch

    utils: Any = import_module(f"{QUANTIZATION}.compressed_tensors.utils")
    schemes = {target: scheme["weights"] for scheme in settings["config_groups"].values()
               for target in scheme["targets"]}  # fmt: skip
    name = f"{module}.0.gate_proj" if module.endswith(".experts") else module
    if utils.should_ignore_layer(name, ignore=settings["ignore"], fused_mapping=fused):
        return None
    target = utils.find_matched_target(
        layer_name=name, module=torch.nn.Linear(1, 1), targets=schemes.keys(), fused_mapping=fused
    )
    weights = schemes[target]
    return weights["num_bits"], weights.get("group_size") or (weights.get("block_structure") or [-1])[-1]


def _of_fp8(settings: Mapping[str, Any], module: str, fused: Mapping[str, list[str]]) -> Format:
    """Follow ``Fp8Config``: names are compared part by part."""
    utils: Any = import_module(f"{QUANTIZATION}.utils")
    is_skipped = utils.is_layer_skipped(module, settings["modules_to_not_convert"], fused_mapping=fused)
    return None if is_skipped else (8, settings["weight_block_size"][1])


_LOOKUPS = {"gptq": _of_gptq, "compressed-tensors": _of_compressed_tensors, "fp8": _of_fp8}
