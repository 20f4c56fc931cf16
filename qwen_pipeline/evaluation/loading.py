"""Check from headers alone that Transformers loads every tensor of a checkpoint.

Transformers' own loader does the check: it renames prefixes, stacks experts and replaces quantized layers. It gets a
model on the meta device and expanded tensors, which have the dtype and shape but the memory of one element, so that
only headers are read. (Qwen4's n-gram tables are the exception: Transformers keeps them in CPU memory.)
"""

import re
from collections.abc import Collection, Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.quantizers.quantizer_finegrained_fp8 import FineGrainedFP8HfQuantizer

from qwen_pipeline.checkpoint.lazy import Checkpoint
from qwen_pipeline.errors import CheckpointRefused
from qwen_pipeline.models.open import open_model
from qwen_pipeline.qwen.heads import class_of
from qwen_pipeline.transforms.codes.fp8 import is_fp8
from qwen_pipeline.transforms.codes.gptq import gptq_format

_OF_EXPERTS = re.compile(r".*\.experts\.(\d+\..*\.(qweight|qzeros|scales|g_idx|weight_scale)|gate_up_proj|down_proj)")
_OF_CODES = (".qweight", ".weight_scale")
KERNEL = "gptq_torch"
"""GPTQModel's kernel that dequantizes the codes and multiplies in the model's dtype.

For 4 bits on a CPU, Transformers would choose ``gptq_torch_aten``, which rounds activations and scales to bfloat16.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """The outcome of loading a checkpoint's tensors.

    Attributes:
        fault: The reason why Transformers does not load it completely.
        unplaced: Instead of a fault, the reason why Transformers cannot load a valid checkpoint. It does not support
            packed experts, initializes them randomly, and only logs that; and it reads one width of codes for all
            layers. Engines that support either can serve it.
        linears: Class name of the linear layers -> their number.
    """

    fault: str | None = None
    unplaced: str | None = None
    linears: dict[str, int] = field(default_factory=dict[str, int])


def loading_options(config: Any, *, device: str) -> dict[str, Any]:
    """Return the arguments with which ``from_pretrained`` loads in float32 and returns its loading info."""
    return {
        "dtype": torch.float32,
        "device_map": device,
        "output_loading_info": True,
        "ignore_mismatched_sizes": True,  # the loading info lists them instead
        **kernel_of(config),
    }


def fault_of(error: Exception) -> str:
    """Return the type and message of an error from Transformers, shortened."""
    return f"{type(error).__name__}: {str(error).strip()[:600]}"


def place_tensors(root: Path) -> Placement:
    """Let Transformers assign every tensor of a checkpoint, stored or a recipe, of any family."""
    import transformers
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(root, local_files_only=True)
        checkpoint = open_model(root)
        name = class_of(checkpoint) or next(iter(config.architectures or ()), None)
        if (architecture := getattr(transformers, str(name), None)) is None:
            return Placement(fault=f"Transformers {transformers.__version__} has no architecture {name!r}.")
        shapes = {
            tensor: torch.zeros((), dtype=spec.torch_dtype).expand(spec.shape) for tensor, spec in checkpoint.items()
        }
        with _cpu_kernels(), _floats_as_stored():
            options = loading_options(config, device="meta")
            model, info = load_with(architecture, None, config=config, state_dict=shapes, **options)
    except MemoryError:
        raise
    except Exception as error:
        return Placement(fault=fault_of(error))
    if not_loaded := unloaded_tensors(info):
        keys = [key if isinstance(key, str) else str(key[0]) for found in info.values() for key in found or ()]
        packed = all(map(_OF_EXPERTS.fullmatch, keys)) and any(key.endswith(_OF_CODES) for key in keys)
        valid = packed or all(_has_own_format(checkpoint, key) for key in keys)
        return Placement(unplaced=not_loaded, linears=linears_of(model)) if valid else Placement(fault=not_loaded)
    return Placement(linears=linears_of(model))


def _has_own_format(checkpoint: Checkpoint, tensor: str) -> bool:
    """Return whether a tensor is of a layer with other codes than the config's own, which Optimum does not read."""
    module = tensor.rpartition(".")[0]
    if f"{module}.qweight" not in checkpoint:
        return False
    try:
        form = gptq_format(checkpoint.config)
    except CheckpointRefused:
        return False
    return form.of(checkpoint, module) != form


def load_with(architecture: Any, root: str | None, **options: Any) -> tuple[Any, dict[str, Any]]:
    """Call the ``from_pretrained`` of the base class.

    Qwen2.5-Omni overrides it: the override also loads speaker files, and returns no loading info.
    """
    from transformers import PreTrainedModel

    inherited: Any = PreTrainedModel.from_pretrained
    return inherited.__func__(architecture, root, **options)


def kernel_of(config: Any) -> dict[str, Any]:
    """Return the arguments that make Transformers load codes with :data:`KERNEL`; none for floats of any precision."""
    from transformers import GPTQConfig

    quantization = getattr(config, "quantization_config", None)
    if not quantization or is_fp8(quantization):
        return {}
    return {"quantization_config": GPTQConfig(bits=quantization["bits"], backend=KERNEL)}


def unloaded_tensors(info: dict[str, Collection[object]]) -> str:
    """Return a sentence that lists the tensors that were not loaded; empty if all were."""
    found = [f"{kind}: {_first(keys)}" for kind, keys in sorted(info.items()) if keys]
    return f"Not every tensor was loaded; {'; '.join(found)}." if found else ""


def linears_of(model: nn.Module) -> dict[str, int]:
    """Count a model's linear layers by class, which identifies the kernels that run."""
    names = [name for module in model.modules() if (name := type(module).__name__).endswith("Linear")]
    return {name: names.count(name) for name in sorted(set(names))}


@contextmanager
def _cpu_kernels() -> Generator[None]:
    """Make Optimum select CPU kernels and skip their initialization: no kernel supports the meta device."""
    try:
        from optimum.gptq import GPTQQuantizer  # pyright: ignore[reportMissingImports]
    except ImportError:
        yield
        return
    quantizer: Any = GPTQQuantizer
    select, initialize = quantizer.select_quant_linear, quantizer.post_init_model

    def select_for_cpu(self: Any, device_map: object, pack: bool = False) -> None:  # noqa: ARG001
        select(self, device_map={"": "cpu"}, pack=pack)

    quantizer.select_quant_linear, quantizer.post_init_model = select_for_cpu, lambda _, model: model
    try:
        yield
    finally:
        quantizer.select_quant_linear, quantizer.post_init_model = select, initialize


@contextmanager
def _floats_as_stored() -> Generator[None]:
    """Make Transformers keep 8-bit floats: without a GPU it would dequantize them all, which computes every weight."""
    quantizer: Any = FineGrainedFP8HfQuantizer
    validate = quantizer.validate_environment
    quantizer.validate_environment = lambda *_, **__: None
    try:
        yield
    finally:
        quantizer.validate_environment = validate


def _first(found: Collection[object], limit: int = 5) -> str:
    names = sorted(map(str, found))
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")
