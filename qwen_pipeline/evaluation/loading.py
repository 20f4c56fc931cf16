"""Whether Transformers finds a place for every tensor of a checkpoint, asked without its bytes.

Transformers' own loader decides: renamed prefixes, experts that are stacked, quantized layers. It is given tensors that
have a dtype, a shape and one element, for a model that has no memory, so that the answer takes no more than headers.
(Qwen4's tables of n-grams are the exception: Transformers keeps them on the CPU, in its own memory.)
"""

import re
from collections.abc import Collection, Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qwen_pipeline.models.open import open_model

_OF_EXPERTS = re.compile(r".*\.experts\.(\d+\..*\.(qweight|qzeros|scales|g_idx)|gate_up_proj|down_proj)")
KERNEL = "gptq_torch"
"""GPTQModel's kernel that multiplies, in the model's dtype, by the weights that the codes stand for.

For 4 bits on a CPU, Transformers would choose ``gptq_torch_aten``, which rounds activations and scales to bfloat16.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """What became of a checkpoint's tensors.

    Attributes:
        fault: Why Transformers does not load it, or not all of it.
        unplaced: Instead of a fault, why it cannot load a sound checkpoint: it has no packed experts, makes theirs up,
            and only logs that. Engines that know them serve it.
        linears: Class name of the linear layers -> how many.
    """

    fault: str | None = None
    unplaced: str | None = None
    linears: dict[str, int] = field(default_factory=dict[str, int])


def loading_options(config: Any, *, device: str) -> dict[str, Any]:
    """Return how ``from_pretrained`` is asked for a model in float32 and for an account of its tensors."""
    return {
        "dtype": torch.float32,
        "device_map": device,
        "output_loading_info": True,
        "ignore_mismatched_sizes": True,  # to be told which they are
        **kernel_of(config),
    }


def fault_of(error: Exception) -> str:
    """Return what Transformers said when it did not load a checkpoint."""
    return f"{type(error).__name__}: {str(error).strip()[:600]}"


def place_tensors(root: Path) -> Placement:
    """Have Transformers place every tensor of a checkpoint, or of a recipe, of any family."""
    import transformers
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(root, local_files_only=True)
        name = next(iter(config.architectures or ()), None)
        if (architecture := getattr(transformers, str(name), None)) is None:
            return Placement(fault=f"Transformers {transformers.__version__} has no architecture {name!r}.")
        checkpoint = open_model(root)
        shapes = {
            tensor: torch.zeros((), dtype=spec.torch_dtype).expand(spec.shape) for tensor, spec in checkpoint.items()
        }
        with _kernels_of_the_cpu():
            options = loading_options(config, device="meta")
            model, info = load_with(architecture, None, config=config, state_dict=shapes, **options)
    except MemoryError:
        raise
    except Exception as error:
        return Placement(fault=fault_of(error))
    if complaints := complaints_of(info):
        keys = [str(key) for found in info.values() for key in found or ()]
        packed = all(map(_OF_EXPERTS.fullmatch, keys)) and any(key.endswith(".qweight") for key in keys)
        return Placement(unplaced=complaints, linears=linears_of(model)) if packed else Placement(fault=complaints)
    return Placement(linears=linears_of(model))


def load_with(architecture: Any, root: str | None, **options: Any) -> tuple[Any, dict[str, Any]]:
    """Call ``from_pretrained`` as every architecture inherits it.

    Qwen2.5-Omni's own looks for voices beside the weights afterwards, and takes no account of tensors.
    """
    from transformers import PreTrainedModel

    inherited: Any = PreTrainedModel.from_pretrained
    return inherited.__func__(architecture, root, **options)


def kernel_of(config: Any) -> dict[str, Any]:
    """Return the argument that has Transformers load codes with :data:`KERNEL`; nothing for full precision."""
    from transformers import GPTQConfig

    quantization = getattr(config, "quantization_config", None)
    return {"quantization_config": GPTQConfig(bits=quantization["bits"], backend=KERNEL)} if quantization else {}


def complaints_of(info: dict[str, Collection[object]]) -> str:
    """Say which tensors did not find their place; nothing if all did."""
    found = [f"{kind}: {_first(keys)}" for kind, keys in sorted(info.items()) if keys]
    return f"Not every tensor found its place; {'; '.join(found)}." if found else ""


def linears_of(model: nn.Module) -> dict[str, int]:
    """Count a model's linear layers by class, which tells the kernels that run."""
    names = [name for module in model.modules() if (name := type(module).__name__).endswith("Linear")]
    return {name: names.count(name) for name in sorted(set(names))}


@contextmanager
def _kernels_of_the_cpu() -> Generator[None]:
    """Have Optimum choose kernels as for a CPU, and not prepare them: there is no kernel for no memory."""
    try:
        from optimum.gptq import GPTQQuantizer  # pyright: ignore[reportMissingImports]
    except ImportError:
        yield
        return
    library: Any = GPTQQuantizer
    select = library.select_quant_linear

    def on_cpu(self: Any, device_map: object, pack: bool = False) -> None:  # noqa: ARG001
        select(self, device_map={"": "cpu"}, pack=pack)

    prepare = library.post_init_model
    library.select_quant_linear, library.post_init_model = on_cpu, lambda _, model: model
    try:
        yield
    finally:
        library.select_quant_linear, library.post_init_model = select, prepare


def _first(found: Collection[object], limit: int = 5) -> str:
    names = sorted(map(str, found))
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")
