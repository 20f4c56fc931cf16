"""The merge of each tensor: its source, the updates added to it, the norms it is scaled to, the rows replaced."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from qwen_pipeline.checkpoint.lazy import Checkpoint, LazyTensor
from qwen_pipeline.qwen.tensor_slices import TensorSlice
from qwen_pipeline.transforms.lora.adapter import Adapter
from qwen_pipeline.transforms.lora.changes import ChangeMeter
from qwen_pipeline.transforms.lora.dora import renormed_columns, renormed_rows
from qwen_pipeline.transforms.lora.lazy_ops import cast, with_rows
from qwen_pipeline.transforms.lora.low_rank import Term, transposed, updated
from qwen_pipeline.transforms.lora.updates import AdapterTensor


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenRows:
    """Trained rows of an embedding or a head, which replace the rows ``indices``."""

    indices: Sequence[int]
    rows: LazyTensor


@dataclass(slots=True, kw_only=True)
class TensorMerge:
    """The changes that adapters make to one tensor.

    Attributes:
        source: The base's tensor, or the adapter's tensor that replaces it.
        dtype: The result's dtype, which is the base's.
        terms: Low-rank updates.
        is_transposed: Whether the matrices of the stored stack are transposed.
        norms: DoRA's trained norms, one for each row or column.
        norms_by_column: Whether ``norms`` has one for each column.
        token_rows: Rows that are replaced after everything else.
        is_replaced: Whether an adapter holds the whole weight.
        adapter_tensors: The adapters' tensors that are used here.
    """

    source: LazyTensor
    dtype: str
    terms: list[Term] = field(default_factory=list[Term])
    is_transposed: bool = False
    norms: LazyTensor | None = None
    norms_by_column: bool = False
    token_rows: TokenRows | None = None
    is_replaced: bool = False
    adapter_tensors: list[AdapterTensor] = field(default_factory=list[AdapterTensor])

    def result(self) -> LazyTensor:
        """Return the merged tensor, rounded once."""
        weight = self._weight()
        return with_rows(weight, self.token_rows.indices, self.token_rows.rows) if self.token_rows else weight

    def _weight(self) -> LazyTensor:
        if self.norms:
            renormed = renormed_columns if self.norms_by_column else renormed_rows
            return renormed(self.source, self.terms, self.norms, self.dtype)
        if not self.terms:
            return cast(self.source, self.dtype)
        if self.is_transposed:
            return transposed(updated(transposed(self.source), self.terms, self.dtype))
        return updated(self.source, self.terms, self.dtype)


@dataclass(slots=True, kw_only=True)
class MergePlan:
    """The merge of every tensor that adapters change, and the reasons why some adapter tensors cannot be merged.

    Attributes:
        base: The base, with embedding and head as separate tensors even if they are tied.
        resizable: Tensors whose number of rows may change: embedding and head.
        merges: Name of a tensor of the base -> its merge.
        obstacles: One for each tensor or module that cannot be merged, with the reason.
        claimed: The slices that already get an update: adapter, stored tensor, stack index and stored row.
        meter: Measures the changes as they are computed; None if they are not measured.
    """

    base: Checkpoint
    resizable: Sequence[str]
    merges: dict[str, TensorMerge] = field(default_factory=dict[str, TensorMerge])
    obstacles: list[str] = field(default_factory=list[str])
    claimed: set[tuple[Adapter, str, int | None, int]] = field(
        default_factory=set[tuple[Adapter, str, int | None, int]]
    )
    meter: ChangeMeter | None = None

    def merge_of(self, name: str) -> TensorMerge:
        """Return the merge of a tensor of the base; a new one leaves the tensor unchanged."""
        if name not in self.merges:
            self.merges[name] = TensorMerge(source=self.base.tensors[name], dtype=self.base[name].dtype)
        return self.merges[name]

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of the tensor that updates are added to."""
        return (self.merges[name].source.spec if name in self.merges else self.base[name]).shape

    def changed_tensors(self) -> dict[str, LazyTensor]:
        """Return the merged tensors that differ from the base's."""
        return {
            name: self._result(name, merge)
            for name, merge in self.merges.items()
            if merge.adapter_tensors or merge.token_rows or merge.source is not self.base.tensors[name]
        }

    def _result(self, name: str, merge: TensorMerge) -> LazyTensor:
        if self.meter is None:
            return merge.result()
        before = self.base.tensors[name]
        return self.meter.watched(name, before, merge.source, lambda source: replace(merge, source=source).result())

    def can_be_resized(self, name: str, shape: tuple[int, ...]) -> bool:
        """Return whether a tensor may take this shape, which a resized vocabulary gives it."""
        return name in self.resizable and shape[1:] == self.base[name].shape[1:]

    def claim(self, adapter: Adapter, part: TensorSlice) -> bool:
        """Claim a slice for an update of an adapter; return False if the adapter has claimed it before."""
        key = (adapter, part.name, part.stack_index, part.stored_row)
        is_free = key not in self.claimed
        self.claimed.add(key)
        return is_free

    def unused(self, adapters: Sequence[Adapter]) -> list[str]:
        """Return the adapter tensors that are neither merged nor duplicates of one that is."""
        used = {tensor for merge in self.merges.values() for tensor in merge.adapter_tensors}
        return [
            f"{name} (not used by any merge)"
            for adapter in adapters
            for name in adapter.weights.specs
            if (adapter, name) not in used and name not in adapter.tensors.duplicates | adapter.tensors.originals
        ]
