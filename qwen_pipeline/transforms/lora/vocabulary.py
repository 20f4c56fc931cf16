"""The embedding and the output head, tied or separate, with one row for each token of the vocabulary.

If they are tied and an adapter changes only one of them, or each differently, the merge unties them, as they were in
training. (PEFT's ``merge_and_unload`` adds an update of either to both.) If it changes both alike, they stay tied.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qwen_pipeline.checkpoint.hashing_reader import are_equal
from qwen_pipeline.checkpoint.lazy import Checkpoint, LazyTensor
from qwen_pipeline.errors import CheckpointRefused
from qwen_pipeline.qwen.config import with_values
from qwen_pipeline.qwen.families import config_paths, is_tied, require_family, tie_paths
from qwen_pipeline.qwen.heads import head_kind
from qwen_pipeline.qwen.names import ParsedName, spellings
from qwen_pipeline.qwen.tensor_slices import slices_of
from qwen_pipeline.transforms.lora.adapter import Adapter
from qwen_pipeline.transforms.lora.lazy_ops import count_equal_rows, lazy_tensor
from qwen_pipeline.transforms.lora.low_rank import Term
from qwen_pipeline.transforms.lora.plan import MergePlan, TensorMerge, TokenRows


@dataclass(frozen=True, slots=True, kw_only=True)
class Vocabulary:
    """The names of a base's embedding and output head, and whether they are tied; a tied head may be stored as well.

    Classifiers and embedding models have no output head.
    """

    embedding: str
    head: str | None
    tied: bool

    @property
    def names(self) -> tuple[str, ...]:
        return (self.embedding, self.head) if self.head else (self.embedding,)


def vocabulary_of(base: Checkpoint) -> Vocabulary:
    """Return the names of a base's embedding and head; a tied head has a name even if only the embedding is stored.

    Raises:
        CheckpointRefused: The base has no embedding.
    """
    embedding = embedding_name(base)
    if head_kind(base) != "language":
        return Vocabulary(embedding=embedding, head=None, tied=False)
    return Vocabulary(embedding=embedding, head=head_name(base), tied=is_tied(base))


def embedding_name(base: Checkpoint) -> str:
    """Return the name of the embedding.

    Raises:
        CheckpointRefused: There is none.
    """
    family = require_family(base.config)
    embeddings = spellings(ParsedName(part="embedding", module="embed_tokens", parameter="weight"), family)
    embedding = next((name for name in embeddings if name in base), None)
    if embedding is None:
        raise CheckpointRefused(
            f"The base has no embedding; expected one of {', '.join(embeddings)}.",
            remedy="Download the checkpoint again.",
        )
    return embedding


def head_name(base: Checkpoint) -> str:
    """Return the name of the output head, or the one that it would have beside the embedding."""
    heads, embedding = [f"{head}.weight" for head in require_family(base.config).heads], embedding_name(base)
    same_prefix = [name for name in heads if embedding.startswith(name.removesuffix("lm_head.weight"))]
    return next((name for name in (*heads, *same_prefix) if name in base), same_prefix[0])


def untied(base: Checkpoint, vocabulary: Vocabulary) -> Checkpoint:
    """Return the base with the head as a separate tensor."""
    if not vocabulary.tied or not vocabulary.head:
        return base
    embedding = base.tensors[vocabulary.embedding]
    if vocabulary.head in base:
        return base.replace(tensors={vocabulary.head: embedding})
    return base.with_tensor(vocabulary.head, embedding, after=vocabulary.embedding)


def start_from_copies(plan: MergePlan, vocabulary: Vocabulary, adapter: Adapter) -> None:
    """Add updates to the copies of frozen weights that an adapter holds, since their vocabulary may be resized.

    A copy that differs from the base in most of its rows is an obstacle: it belongs to another model.
    """
    for module, names in adapter.tensors.copies.items():
        for name in names:
            _start_from_copy(plan, vocabulary, adapter, module, name)


def _start_from_copy(plan: MergePlan, vocabulary: Vocabulary, adapter: Adapter, module: str, name: str) -> None:
    target = next((slice_.name for slice_ in slices_of(f"{module}.weight", plan.base)), "")
    if target not in vocabulary.names:
        plan.obstacles.append(f"{name} (neither the embedding nor the head of the base)")
        return
    copy, base = lazy_tensor(adapter.weights, name), plan.base.tensors[target]
    if copy.spec.shape[1:] != base.spec.shape[1:]:
        plan.obstacles.append(f"{name} (shape {list(copy.spec.shape)}, but {target} is {list(base.spec.shape)})")
    elif 2 * count_equal_rows(copy, base) < min(copy.spec.rows, base.spec.rows):
        plan.obstacles.append(f"{name} (most of its rows differ from {target}: a copy of another base)")
    else:
        targets = vocabulary.names if vocabulary.tied else (target,)
        for tensor in targets:
            if tensor == target or tensor not in plan.merges:
                plan.merge_of(tensor).source = copy
        plan.merge_of(target).adapter_tensors.append((adapter, name))


def apply_plan(plan: MergePlan, base: Checkpoint, vocabulary: Vocabulary, *, must_tie: bool) -> Checkpoint:
    """Return the base with the plan's changes; embedding and head are untied if they are no longer equal.

    Args:
        plan: The complete plan, whose base is :func:`untied`.
        base: The unmodified base.
        vocabulary: The base's embedding and head.
        must_tie: Whether the adapters were trained with embedding and head tied.
    """
    if not vocabulary.head:
        rows = plan.merge_of(vocabulary.embedding).source.spec.rows
        return _replaced(base, plan.changed_tensors(), _resized(base, vocabulary, rows))
    embedding, head = (plan.merge_of(name) for name in vocabulary.names)
    if vocabulary.tied and embedding.token_rows and not head.token_rows:
        head.token_rows = embedding.token_rows
    stay_tied = vocabulary.tied and _are_alike(embedding, head)
    if must_tie and vocabulary.tied and not stay_tied:
        plan.obstacles.append(
            f"{vocabulary.head} (ensure_weight_tying is set, but it was trained differently from"
            f" {vocabulary.embedding})"
        )
    rows = embedding.source.spec.rows
    if rows != head.source.spec.rows:
        plan.obstacles.append(
            f"{vocabulary.embedding} ({rows} rows, but {vocabulary.head} has {head.source.spec.rows}: an adapter with a"
            " resized vocabulary must contain both)"
        )
    changed = plan.changed_tensors()
    config = _resized(base, vocabulary, rows)
    if stay_tied:
        same = changed.pop(vocabulary.head, None)
        if same and vocabulary.head in base:
            changed[vocabulary.head] = same
        return _replaced(base, changed, config)
    if vocabulary.tied:
        config |= dict.fromkeys(tie_paths(base.config), False)
    return _replaced(plan.base, changed, config)


def _resized(base: Checkpoint, vocabulary: Vocabulary, rows: int) -> dict[str, Any]:
    """Return the config values for a vocabulary of this size; none if it is the base's."""
    is_same = rows == base[vocabulary.embedding].rows
    return {} if is_same else dict.fromkeys(config_paths(base.config, "vocab_size"), rows)


def _replaced(base: Checkpoint, tensors: Mapping[str, LazyTensor], fields: Mapping[str, Any]) -> Checkpoint:
    return base.replace(tensors=tensors, config=with_values(base.config, fields) if fields else None)


def _are_alike(a: TensorMerge, b: TensorMerge) -> bool:
    """Return whether two merges give equal tensors; False if DoRA is involved, which is not compared."""
    if a.norms or b.norms or len(a.terms) != len(b.terms):
        return False
    same_source = a.source is b.source or are_equal(a.source, b.source)
    return same_source and _same_rows(a.token_rows, b.token_rows) and all(map(_same_update, a.terms, b.terms))


def _same_rows(a: TokenRows | None, b: TokenRows | None) -> bool:
    return a is b or bool(a and b and a.indices == b.indices and are_equal(a.rows, b.rows))


def _same_update(a: Term, b: Term) -> bool:
    if a.scaling != b.scaling or not a.update.down(0).equal(b.update.down(0)):
        return False
    blocks = range(0, a.rows, 4096)
    return all(a.update.up(0, n, min(n + 4096, a.rows)).equal(b.update.up(0, n, min(n + 4096, a.rows))) for n in blocks)
