"""Merging low-rank updates into a base, block by block: a block of rows needs only its own rows of ``W`` and ``B``."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from qwen_pipeline.checkpoint.digest import block_ranges
from qwen_pipeline.checkpoint.lazy import Checkpoint, LazyTensor
from qwen_pipeline.errors import AdapterRefused, listed
from qwen_pipeline.qwen.families import is_tied
from qwen_pipeline.qwen.names import stored_names
from qwen_pipeline.qwen.precision import require_full_precision
from qwen_pipeline.transforms.adapter import Adapter, require_finite_factors
from qwen_pipeline.transforms.low_rank import cell_range, merged_rows

if TYPE_CHECKING:
    import torch

_EMBEDDINGS = ("lm_head", "embed_tokens")


def merge_lora(base: Checkpoint, adapter: Adapter) -> Checkpoint:
    """Return the base with every update of the adapter added; config, shards and all other tensors stay.

    Raises:
        QuantizedInputRefused: The base is quantized.
        AdapterRefused: A module has no tensor in the base, or several, or one of another shape, or a factor is not
            finite. Nothing is skipped.
    """
    require_full_precision(
        base,
        because=f"A LoRA is merged into the full-precision weights it belongs to{_named(adapter)}.",
        remedy="Name the full-precision base; quantize after merging (merge, then pad, then quantize).",
    )
    targets = require_targets(base, adapter)
    require_finite_factors(adapter)
    _require_same_copies(base, adapter, targets)
    tensors = {target: _merged(base.tensors[target], adapter, module) for module, target in targets.items()}
    return base.replace(tensors=tensors)


def require_targets(base: Checkpoint, adapter: Adapter) -> dict[str, str]:
    """Return the one base tensor that each module's update lands on: module -> tensor name.

    Raises:
        AdapterRefused: Listing every module for which there is no such tensor.
    """
    targets: dict[str, str] = {}
    wrong: list[str] = []
    for module in adapter.modules:
        names = stored_names(module, base)
        if obstacle := _obstacle(base, adapter, module, names) or _taken(names[0], targets):
            wrong.append(f"{module} ({obstacle})")
        else:
            targets[module] = names[0]
    if wrong:
        raise AdapterRefused(
            f"{len(wrong)} of {len(adapter.modules)} modules of {adapter.root} cannot be merged into this base: "
            f"{listed(wrong)}.",
            remedy=f"Name the base that the adapter was trained on{_named(adapter)}. Where embeddings are tied, train"
            " the adapter without them.",
        )
    return targets


def _obstacle(base: Checkpoint, adapter: Adapter, module: str, names: list[str]) -> str | None:
    if module.rpartition(".")[2] in _EMBEDDINGS and is_tied(base):
        return "embed_tokens and lm_head are one tied tensor, an update of one would change the other"
    if len(names) != 1:
        return f"the base has {len(names)} tensors of that name"
    if base[names[0]].shape != (update := adapter.update_shape(module)):
        return f"an update of {list(update)} where {names[0]} is {list(base[names[0]].shape)}"
    return None


def _taken(target: str, targets: dict[str, str]) -> str | None:
    return f"{target} already gets another update" if target in targets.values() else None


def _require_same_copies(base: Checkpoint, adapter: Adapter, targets: Mapping[str, str]) -> None:
    """Refuse an adapter that carries a base weight with other values, as after training or resizing it."""
    for module, factors in adapter.modules.items():
        if factors.copy is None:
            continue
        weight = base.tensors[targets[module]]
        same_shape = adapter.weights.specs[factors.copy].shape == weight.spec.shape
        if not same_shape or not all(
            adapter.weights.load(factors.copy, start, stop).to(weight.spec.torch_dtype).equal(weight.read(start, stop))
            for start, stop in block_ranges(weight.spec)
        ):
            raise AdapterRefused(
                f"{factors.copy} of {adapter.root} is not the weight {targets[module]} of this base.",
                remedy=f"Name the base that the adapter was trained on{_named(adapter)}.",
            )


def _merged(weight: LazyTensor, adapter: Adapter, module: str) -> LazyTensor:
    scaling = adapter.settings.scaling(module)

    def read(start: int, stop: int) -> "torch.Tensor":
        first, last = cell_range(start, stop, weight.spec.rows)
        b_OR, a_RI = adapter.load_up(module, first, last), adapter.load_down(module)
        return merged_rows(weight.read(start, stop), a_RI, b_OR, scaling=scaling, above=start - first)

    return LazyTensor(spec=weight.spec, read=read)


def _named(adapter: Adapter) -> str:
    return f" ({adapter.base_name})" if adapter.base_name else ""
