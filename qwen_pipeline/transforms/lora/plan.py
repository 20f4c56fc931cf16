"""What becomes of each tensor: where it comes from, what is added, how it is scaled, which rows are replaced."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from qwen_pipeline.checkpoint.lazy import Checkpoint, LazyTensor
from qwen_pipeline.qwen.tensor_slices import TensorSlice
from qwen_pipeline.transforms.lora.adapter import Adapter
from qwen_pipeline.transforms.lora.dora import renormed_columns, renormed_rows
from qwen_pipeline.transforms.lora.lazy_ops import rounded, with_rows
from qwen_pipeline.transforms.lora.low_rank import Term, transposed, updated
from qwen_pipeline.transforms.lora.updates import Use


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenRows:
    indices: Sequence[int]
    rows: LazyTensor


@dataclass(slots=True, kw_only=True)
class TensorMerge:
    """What adapters do to one tensor.

    Attributes:
        source: The base's own tensor, or what an adapter replaces it with.
        dtype: Of the result: the base's.
        terms: Low-rank updates.
        is_transposed: Whether the stored stack has its matrices transposed.
        norms: DoRA's trained norms, of rows, or by column.
        tokens: Rows that are replaced, last of all.
        is_replaced: Whether an adapter brought the whole weight.
        uses: The adapters' tensors that land here.
    """

    source: LazyTensor
    dtype: str
    terms: list[Term] = field(default_factory=list[Term])
    is_transposed: bool = False
    norms: LazyTensor | None = None
    by_column: bool = False
    tokens: TokenRows | None = None
    is_replaced: bool = False
    uses: list[Use] = field(default_factory=list[Use])

    def tensor(self) -> LazyTensor:
        """Return the result; rounding happens once."""
        result = self._weight()
        return with_rows(result, self.tokens.indices, self.tokens.rows) if self.tokens else result

    def _weight(self) -> LazyTensor:
        if self.norms:
            renormed = renormed_columns if self.by_column else renormed_rows
            return renormed(self.source, self.terms, self.norms, self.dtype)
        if not self.terms:
            return rounded(self.source, self.dtype)
        if self.is_transposed:
            return transposed(updated(transposed(self.source), self.terms, self.dtype))
        return updated(self.source, self.terms, self.dtype)


@dataclass(slots=True, kw_only=True)
class MergePlan:
    """The recipes for every tensor that adapters change, and why some of what they bring has no place.

    Attributes:
        base: With embedding and head as tensors of their own, even if they are one.
        resizable: Tensors that may get another number of rows: embedding and head.
        obstacles: One for each tensor or module that cannot be merged, with the reason.
    """

    base: Checkpoint
    resizable: Sequence[str]
    recipes: dict[str, TensorMerge] = field(default_factory=dict[str, TensorMerge])
    obstacles: list[str] = field(default_factory=list[str])
    taken: set[tuple[Adapter, str, int | None, int]] = field(default_factory=set[tuple[Adapter, str, int | None, int]])

    def recipe(self, name: str) -> TensorMerge:
        """Return the recipe of a tensor of the base; at first that tensor itself."""
        if name not in self.recipes:
            self.recipes[name] = TensorMerge(source=self.base.tensors[name], dtype=self.base[name].dtype)
        return self.recipes[name]

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of what updates of a tensor are added to."""
        return (self.recipes[name].source.spec if name in self.recipes else self.base[name]).shape

    def changed(self) -> dict[str, LazyTensor]:
        """Return every tensor that is no longer the base's own."""
        return {
            name: recipe.tensor()
            for name, recipe in self.recipes.items()
            if recipe.uses or recipe.tokens or recipe.source is not self.base.tensors[name]
        }

    def can_be_resized(self, name: str, shape: tuple[int, ...]) -> bool:
        """Whether a tensor may take this shape: another vocabulary."""
        return name in self.resizable and shape[1:] == self.base[name].shape[1:]

    def take(self, adapter: Adapter, slot: TensorSlice) -> bool:
        """Return whether a slot was still free for an adapter's update, and take it."""
        key = (adapter, slot.name, slot.slab, slot.onto)
        free = key not in self.taken
        self.taken.add(key)
        return free

    def unused(self, adapters: Sequence[Adapter]) -> list[str]:
        """Return the tensors that neither land anywhere nor repeat one that does."""
        used = {use for recipe in self.recipes.values() for use in recipe.uses}
        return [
            f"{name} (nothing is made of it)"
            for adapter in adapters
            for name in adapter.weights.specs
            if (adapter, name) not in used and name not in adapter.tensors.twins | adapter.tensors.originals
        ]
