"""Finding the place in the base for everything that adapters bring; what has none, or not exactly one, is named."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from qwen_pipeline.checkpoint.lazy import LazyTensor
from qwen_pipeline.qwen.tensor_slices import TensorSlice, slices_of
from qwen_pipeline.transforms.lora.adapter import Adapter
from qwen_pipeline.transforms.lora.adapter_set import AdapterSet
from qwen_pipeline.transforms.lora.lazy_ops import stored
from qwen_pipeline.transforms.lora.low_rank import LowRank, Term, transposed
from qwen_pipeline.transforms.lora.plan import MergePlan, TokenRows
from qwen_pipeline.transforms.lora.updates import Update, combined, updates_of

if TYPE_CHECKING:
    import torch


def assign(plan: MergePlan, adapters: AdapterSet) -> None:
    """Enter everything that the adapters bring into the plan, whole weights first: updates are added to them."""
    for adapter in adapters.adapters:
        for parameter, name in adapter.tensors.saved.items():
            _land_saved(plan, adapter, parameter, name)
    groups: dict[tuple[TensorSlice, ...], list[Update]] = {}
    for update in updates_of(adapters):
        slots = tuple(slices_of(update.factors.parameter, plan.base))
        if obstacle := _obstacle(plan, update, slots):
            plan.obstacles.append(f"{update.factors.parameter.removesuffix('.weight')} ({obstacle})")
        else:
            groups.setdefault(slots, []).append(update)
    for slots, updates in groups.items():
        for update in combined(updates, adapters.combination):
            _land_update(plan, update, slots)
    for adapter in adapters.adapters:
        for module, name in adapter.tensors.tokens.items():
            _land_tokens(plan, adapter, module, name)


def _land_saved(plan: MergePlan, adapter: Adapter, parameter: str, name: str) -> None:
    brought, slots = stored(adapter.weights, name), slices_of(parameter, plan.base)
    pieces = {slot.name: _piece(brought, slot) for slot in slots}
    cut = [slot.rows for slot in slots if slot.rows is not None and slot.expert == 0]
    if cut and brought.spec.shape[:2] != (len(slots) // len(cut), sum(cut)):
        plan.obstacles.append(
            f"{name} ({list(brought.spec.shape)} where the base has {len(slots)} matrices of experts)"
        )
        return
    if not slots or _alone(slots) > 1 or any(slot.rows and slot.slab is not None for slot in slots):
        plan.obstacles.append(f"{name} (the base has {len(pieces)} tensors of that name)")
        return
    for target, piece in pieces.items():
        shape = plan.base[target].shape
        if piece.spec.shape != shape and not plan.can_be_resized(target, piece.spec.shape):
            plan.obstacles.append(f"{name} ({list(piece.spec.shape)} where {target} is {list(shape)})")
        elif plan.recipe(target).is_replaced:
            plan.obstacles.append(f"{name} ({target} is already replaced by another tensor)")
        else:
            plan.recipe(target).source, plan.recipe(target).is_replaced = piece, True
            plan.recipe(target).uses.append((adapter, name))


def _piece(brought: LazyTensor, slot: TensorSlice) -> LazyTensor:
    """Return the part of a whole weight that belongs into a slot."""
    if len(brought.spec.shape) != 3 or slot == TensorSlice(name=slot.name):
        return brought
    if slot.slab is not None:
        return transposed(brought) if slot.transposed else brought
    rows = (brought.spec.shape[1] if slot.rows is None else slot.rows, brought.spec.shape[2])

    def read(start: int, stop: int) -> "torch.Tensor":
        return brought.read(slot.expert, slot.expert + 1)[0, slot.first + start : slot.first + stop]

    return LazyTensor(spec=replace(brought.spec, shape=rows), read=read)


def _land_update(plan: MergePlan, update: Update, slots: Sequence[TensorSlice]) -> None:
    for slot in slots:
        recipe = plan.recipe(slot.name)
        recipe.is_transposed = slot.transposed
        recipe.terms.append(_term(update, slot))
        recipe.uses.extend(use for use in update.uses if use not in recipe.uses)
    if norms := update.factors.magnitude:
        recipe = plan.recipe(slots[0].name)
        recipe.norms = stored(update.adapter.weights, norms)
        recipe.by_column = update.factors.layout == "embedding"
    if update.factors.bias:
        _land_bias(plan, update, update.factors.bias)


def _term(update: Update, slot: TensorSlice) -> Term:
    return Term(
        update=update.low_rank,
        scaling=update.scaling,
        expert=slot.expert,
        first=slot.first,
        onto=slot.onto,
        rows=update.shape[0] if slot.rows is None else slot.rows,
        slab=slot.slab,
    )


@dataclass(frozen=True, slots=True)
class _Vector(LowRank):
    """A bias of factors as an update of one column."""

    values: LazyTensor

    def up(self, expert: int, start: int, stop: int) -> "torch.Tensor":  # noqa: ARG002
        return self.values.read(start, stop).unsqueeze(1)

    def down(self, expert: int) -> "torch.Tensor":  # noqa: ARG002
        return self.values.read(0, 1).new_ones((1, 1))


def _land_bias(plan: MergePlan, update: Update, name: str) -> None:
    parameter = f"{update.factors.parameter.removesuffix('.weight')}.bias"
    slots = slices_of(parameter, plan.base)
    if len(slots) != 1 or slots[0] != TensorSlice(name=slots[0].name):
        plan.obstacles.append(f"{name} (the base has {len(slots)} tensors {parameter} to add it to)")
        return
    recipe, values = plan.recipe(slots[0].name), stored(update.adapter.weights, name)
    recipe.terms.append(Term(update=_Vector(values), scaling=update.scaling, rows=values.spec.rows))
    recipe.uses.append((update.adapter, name))


def _land_tokens(plan: MergePlan, adapter: Adapter, module: str, name: str) -> None:
    slots, indices = slices_of(f"{module}.weight", plan.base), adapter.settings.tokens_of(module)
    if len(slots) != 1:
        plan.obstacles.append(f"{name} (the base has {len(slots)} tensors of that name)")
        return
    recipe, rows = plan.recipe(slots[0].name), stored(adapter.weights, name)
    count, width = recipe.source.spec.shape
    if rows.spec.shape[1] != width or max(indices) >= count:
        plan.obstacles.append(f"{name} ({list(rows.spec.shape)} for rows up to {max(indices)} of {[count, width]})")
        return
    recipe.tokens = TokenRows(indices=indices, rows=rows)
    recipe.uses.append((adapter, name))


def _obstacle(plan: MergePlan, update: Update, slots: Sequence[TensorSlice]) -> str | None:
    """Return why an update does not fill its slots exactly: all rows of each of its matrices, once."""
    if not slots or _alone(slots) > 1:
        return f"the base has {len(slots)} tensors of that name"
    if update.factors.magnitude and slots[0].slab is not None:
        return "DoRA of one expert, where the base stores a stack of them"
    rows: Counter[int] = Counter()
    for slot in slots:
        outputs, *inputs = _matrix(slot, plan.shape(slot.name))
        rows[slot.expert] += outputs
        if tuple(inputs) != update.shape[1:] or rows[slot.expert] > update.shape[0]:
            return _mismatch(plan, update, slot)
    if rows != dict.fromkeys(range(update.experts), update.shape[0]):
        return _mismatch(plan, update, slots[0])
    if taken := [slot.name for slot in slots if not plan.take(update.adapter, slot)]:
        return f"{taken[0]} already gets another update"
    return None


def _alone(slots: Sequence[TensorSlice]) -> int:
    """Return how many stored tensors are the parameter, each by itself."""
    return sum(slot.slab is None and slot.rows is None for slot in slots)


def _matrix(slot: TensorSlice, shape: tuple[int, ...]) -> tuple[int, ...]:
    if slot.slab is None:
        return shape
    outputs, inputs = reversed(shape[1:]) if slot.transposed else shape[1:]
    return (outputs if slot.rows is None else slot.rows, inputs)


def _mismatch(plan: MergePlan, update: Update, slot: TensorSlice) -> str:
    experts = f" for each of {update.experts} experts" if update.experts > 1 else ""
    return f"an update of {list(update.shape)}{experts} where {slot.name} is {list(plan.shape(slot.name))}"
