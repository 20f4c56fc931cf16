"""Assignment of each adapter tensor to the tensors of the base that it changes.

A tensor that cannot be assigned unambiguously becomes an obstacle of the plan.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from qwen_pipeline.checkpoint.lazy import LazyTensor
from qwen_pipeline.qwen.tensor_slices import TensorSlice, slices_of
from qwen_pipeline.transforms.lora.adapter import Adapter
from qwen_pipeline.transforms.lora.adapter_set import AdapterSet
from qwen_pipeline.transforms.lora.lazy_ops import lazy_tensor
from qwen_pipeline.transforms.lora.low_rank import LowRank, Term, transposed
from qwen_pipeline.transforms.lora.plan import MergePlan, TokenRows
from qwen_pipeline.transforms.lora.updates import Update, combined, updates_of

if TYPE_CHECKING:
    import torch


def assign(plan: MergePlan, adapters: AdapterSet) -> None:
    """Assign every tensor of the adapters in the plan: whole weights first, since updates are added to them."""
    for adapter in adapters.adapters:
        for parameter, name in adapter.tensors.saved.items():
            _assign_saved(plan, adapter, parameter, name)
    groups: dict[tuple[TensorSlice, ...], list[Update]] = {}
    for update in updates_of(adapters):
        slices = tuple(slices_of(update.factors.parameter, plan.base))
        if obstacle := _obstacle(plan, update, slices):
            plan.obstacles.append(f"{update.factors.parameter.removesuffix('.weight')} ({obstacle})")
        else:
            groups.setdefault(slices, []).append(update)
    for slices, updates in groups.items():
        for update in combined(updates, adapters.combination):
            _assign_update(plan, update, slices)
    for adapter in adapters.adapters:
        for module, name in adapter.tensors.tokens.items():
            _assign_tokens(plan, adapter, module, name)


def _assign_saved(plan: MergePlan, adapter: Adapter, parameter: str, name: str) -> None:
    saved, slices = lazy_tensor(adapter.weights, name), slices_of(parameter, plan.base)
    parts = {slice_.name: _part(saved, slice_) for slice_ in slices}
    rows_of_expert = [slice_.rows for slice_ in slices if slice_.rows is not None and slice_.expert == 0]
    if rows_of_expert and saved.spec.shape[:2] != (len(slices) // len(rows_of_expert), sum(rows_of_expert)):
        plan.obstacles.append(
            f"{name} (shape {list(saved.spec.shape)}, but the base has {len(slices)} matrices of experts)"
        )
        return
    if not slices or _whole_tensors(slices) > 1 or _has_stack_rows(slices):
        plan.obstacles.append(f"{name} (the base has {len(parts)} tensors of that name)")
        return
    for target, part in parts.items():
        shape = plan.base[target].shape
        if part.spec.shape != shape and not plan.can_be_resized(target, part.spec.shape):
            plan.obstacles.append(f"{name} (shape {list(part.spec.shape)}, but {target} is {list(shape)})")
        elif plan.merge_of(target).is_replaced:
            plan.obstacles.append(f"{name} (another tensor already replaces {target})")
        else:
            merge = plan.merge_of(target)
            merge.source, merge.is_replaced = part, True
            merge.adapter_tensors.append((adapter, name))


def _part(saved: LazyTensor, slice_: TensorSlice) -> LazyTensor:
    """Return the part of a whole weight that is stored at a slice."""
    if len(saved.spec.shape) != 3 or slice_ == TensorSlice(name=slice_.name):
        return saved
    if slice_.stack_index is not None:
        return transposed(saved) if slice_.transposed else saved
    shape = (saved.spec.shape[1] if slice_.rows is None else slice_.rows, saved.spec.shape[2])

    def read(start: int, stop: int) -> "torch.Tensor":
        return saved.read(slice_.expert, slice_.expert + 1)[0, slice_.first_row + start : slice_.first_row + stop]

    return LazyTensor(spec=replace(saved.spec, shape=shape), read=read)


def _assign_update(plan: MergePlan, update: Update, slices: Sequence[TensorSlice]) -> None:
    for slice_ in slices:
        merge = plan.merge_of(slice_.name)
        merge.is_transposed = slice_.transposed
        merge.terms.append(_term(update, slice_))
        merge.adapter_tensors.extend(used for used in update.adapter_tensors if used not in merge.adapter_tensors)
    if norms := update.factors.magnitude:
        merge = plan.merge_of(slices[0].name)
        merge.norms = lazy_tensor(update.adapter.weights, norms)
        merge.norms_by_column = update.factors.layout == "embedding"
    if update.factors.bias:
        _assign_bias(plan, update, update.factors.bias)


def _term(update: Update, slice_: TensorSlice) -> Term:
    return Term(
        update=update.low_rank,
        scaling=update.scaling,
        expert=slice_.expert,
        source_row=slice_.first_row,
        target_row=slice_.stored_row,
        rows=update.shape[0] if slice_.rows is None else slice_.rows,
        stack_index=slice_.stack_index,
    )


@dataclass(frozen=True, slots=True)
class _Vector(LowRank):
    """A ``lora_B.bias`` as an update of one column."""

    values: LazyTensor

    def up(self, expert: int, start: int, stop: int) -> "torch.Tensor":  # noqa: ARG002
        return self.values.read(start, stop).unsqueeze(1)

    def down(self, expert: int) -> "torch.Tensor":  # noqa: ARG002
        return self.values.read(0, 1).new_ones((1, 1))


def _assign_bias(plan: MergePlan, update: Update, name: str) -> None:
    parameter = f"{update.factors.parameter.removesuffix('.weight')}.bias"
    slices = slices_of(parameter, plan.base)
    if len(slices) != 1 or slices[0] != TensorSlice(name=slices[0].name):
        plan.obstacles.append(f"{name} (the base has {len(slices)} tensors {parameter}, to which it would be added)")
        return
    merge, values = plan.merge_of(slices[0].name), lazy_tensor(update.adapter.weights, name)
    merge.terms.append(Term(update=_Vector(values), scaling=update.scaling, rows=values.spec.rows))
    merge.adapter_tensors.append((update.adapter, name))


def _assign_tokens(plan: MergePlan, adapter: Adapter, module: str, name: str) -> None:
    slices, indices = slices_of(f"{module}.weight", plan.base), adapter.settings.tokens_of(module)
    if len(slices) != 1:
        plan.obstacles.append(f"{name} (the base has {len(slices)} tensors of that name)")
        return
    merge, rows = plan.merge_of(slices[0].name), lazy_tensor(adapter.weights, name)
    count, width = merge.source.spec.shape
    if rows.spec.shape[1] != width or max(indices) >= count:
        plan.obstacles.append(
            f"{name} (shape {list(rows.spec.shape)}, rows up to {max(indices)}, but the vocabulary is {[count, width]})"
        )
        return
    merge.token_rows = TokenRows(indices=indices, rows=rows)
    merge.adapter_tensors.append((adapter, name))


def _obstacle(plan: MergePlan, update: Update, slices: Sequence[TensorSlice]) -> str | None:
    """Return the reason why an update does not cover all rows of each of its matrices exactly once, or None."""
    if not slices or _whole_tensors(slices) > 1:
        return f"the base has {len(slices)} tensors of that name"
    if update.factors.magnitude and slices[0].stack_index is not None:
        return "DoRA of a single expert, but the base stores experts in a stack"
    rows: Counter[int] = Counter()
    for slice_ in slices:
        outputs, *inputs = _matrix_shape(slice_, plan.shape(slice_.name))
        rows[slice_.expert] += outputs
        if tuple(inputs) != update.shape[1:] or rows[slice_.expert] > update.shape[0]:
            return _mismatch(plan, update, slice_)
    if rows != dict.fromkeys(range(update.experts), update.shape[0]):
        return _mismatch(plan, update, slices[0])
    if claimed := [slice_.name for slice_ in slices if not plan.claim(update.adapter, slice_)]:
        return f"another update of this adapter already changes {claimed[0]}"
    return None


def _whole_tensors(slices: Sequence[TensorSlice]) -> int:
    """Return the number of slices that are whole stored tensors."""
    return sum(slice_.stack_index is None and slice_.rows is None for slice_ in slices)


def _has_stack_rows(slices: Sequence[TensorSlice]) -> bool:
    """Return whether a slice is a part of the rows of a stored stack's matrix."""
    return any(slice_.rows and slice_.stack_index is not None for slice_ in slices)


def _matrix_shape(slice_: TensorSlice, shape: tuple[int, ...]) -> tuple[int, ...]:
    if slice_.stack_index is None:
        return shape
    outputs, inputs = reversed(shape[1:]) if slice_.transposed else shape[1:]
    return (outputs if slice_.rows is None else slice_.rows, inputs)


def _mismatch(plan: MergePlan, update: Update, slice_: TensorSlice) -> str:
    experts = f" for each of {update.experts} experts" if update.experts > 1 else ""
    return f"the update is {list(update.shape)}{experts}, but {slice_.name} is {list(plan.shape(slice_.name))}"
