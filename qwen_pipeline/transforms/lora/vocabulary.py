"""The embedding and the output head: one tensor or two, of as many rows as the vocabulary has tokens.

Where they are one tensor, an adapter that changes one of them, or both differently, makes them two: that is what it was
trained as. (PEFT's ``merge_and_unload`` adds an update of either to both.) Where it changes both alike, they stay one.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qwen_pipeline.checkpoint.lazy import Checkpoint, LazyTensor
from qwen_pipeline.errors import CheckpointRefused
from qwen_pipeline.qwen.families import config_paths, is_tied, require_family
from qwen_pipeline.qwen.names import ParsedName, spellings
from qwen_pipeline.qwen.tensor_slices import slices_of
from qwen_pipeline.transforms.lora.adapter import Adapter
from qwen_pipeline.transforms.lora.lazy_ops import are_equal, equal_rows, stored
from qwen_pipeline.transforms.lora.low_rank import Term
from qwen_pipeline.transforms.lora.plan import MergePlan, TensorMerge, TokenRows

TIED = "tie_word_embeddings"


@dataclass(frozen=True, slots=True, kw_only=True)
class Vocabulary:
    """The two tensors of a base, by name; ``tied`` if they are one, whether or not the head is stored as well."""

    embedding: str
    head: str
    tied: bool

    @property
    def names(self) -> tuple[str, str]:
        return self.embedding, self.head


def vocabulary_of(base: Checkpoint) -> Vocabulary:
    """Return what embedding and head of a base are called, the head also if only the embedding is stored.

    Raises:
        CheckpointRefused: There is no embedding.
    """
    family = require_family(base.config)
    embeddings = spellings(ParsedName(part="embedding", module="embed_tokens", parameter="weight"), family)
    embedding = next((name for name in embeddings if name in base), None)
    if embedding is None:
        raise CheckpointRefused(
            f"The base has no embedding: none of {', '.join(embeddings)}.", remedy="Fetch the checkpoint again."
        )
    heads = [f"{head}.weight" for head in family.heads]
    beside = [name for name in heads if embedding.startswith(name.removesuffix("lm_head.weight"))]
    head = next((name for name in (*heads, *beside) if name in base), beside[0])
    return Vocabulary(embedding=embedding, head=head, tied=is_tied(base))


def separated(base: Checkpoint, vocabulary: Vocabulary) -> Checkpoint:
    """Return the base with a head that is a tensor of its own."""
    if not vocabulary.tied:
        return base
    embedding = base.tensors[vocabulary.embedding]
    if vocabulary.head in base:
        return base.replace(tensors={vocabulary.head: embedding})
    return base.with_tensor(vocabulary.head, embedding, beside=vocabulary.embedding)


def start_from_copies(plan: MergePlan, vocabulary: Vocabulary, adapter: Adapter) -> None:
    """Let updates be added to the frozen weights that an adapter brought along: their vocabulary may be another.

    A copy that differs in most of its rows is of another model.
    """
    for module, names in adapter.tensors.copies.items():
        for name in names:
            _start_from_copy(plan, vocabulary, adapter, module, name)


def _start_from_copy(plan: MergePlan, vocabulary: Vocabulary, adapter: Adapter, module: str, name: str) -> None:
    target = next((slot.name for slot in slices_of(f"{module}.weight", plan.base)), "")
    if target not in vocabulary.names:
        plan.obstacles.append(f"{name} (no embedding of the base)")
        return
    copy, base = stored(adapter.weights, name), plan.base.tensors[target]
    if copy.spec.shape[1:] != base.spec.shape[1:]:
        plan.obstacles.append(f"{name} ({list(copy.spec.shape)} where {target} is {list(base.spec.shape)})")
    elif 2 * equal_rows(copy, base) < min(copy.spec.rows, base.spec.rows):
        plan.obstacles.append(f"{name} (most of its rows are not those of {target}: it is of another base)")
    else:
        starts = vocabulary.names if vocabulary.tied else (target,)
        for each in starts:
            if each == target or each not in plan.recipes:
                plan.recipe(each).source = copy
        plan.recipe(target).uses.append((adapter, name))


def finish(plan: MergePlan, base: Checkpoint, vocabulary: Vocabulary, *, must_tie: bool) -> Checkpoint:
    """Return the base with all that the plan changes; embedding and head become two tensors where they no longer agree.

    Args:
        plan: With everything landed, and its base :func:`separated`.
        base: As it was opened.
        vocabulary: Of the base.
        must_tie: Whether the adapters were trained with one tensor for both.
    """
    embedding, head = (plan.recipe(name) for name in vocabulary.names)
    if vocabulary.tied and embedding.tokens and not head.tokens:
        head.tokens = embedding.tokens
    stay_tied = vocabulary.tied and _are_alike(embedding, head)
    if must_tie and vocabulary.tied and not stay_tied:
        plan.obstacles.append(f"{vocabulary.head} (ensure_weight_tying, but not trained as {vocabulary.embedding} was)")
    rows = embedding.source.spec.rows
    if rows != head.source.spec.rows:
        plan.obstacles.append(
            f"{vocabulary.embedding} ({rows} rows where {vocabulary.head} has {head.source.spec.rows}: a resized"
            " vocabulary must come with both)"
        )
    changed = plan.changed()
    config: dict[str, Any] = {}
    if rows != base[vocabulary.embedding].rows:
        config |= dict.fromkeys(config_paths(base.config, "vocab_size"), rows)
    if stay_tied:
        same = changed.pop(vocabulary.head, None)
        if same and vocabulary.head in base:
            changed[vocabulary.head] = same
        return _replaced(base, changed, config)
    if vocabulary.tied:
        config |= dict.fromkeys((TIED, *config_paths(base.config, TIED)), False)
    return _replaced(plan.base, changed, config)


def _replaced(base: Checkpoint, tensors: Mapping[str, LazyTensor], fields: Mapping[str, Any]) -> Checkpoint:
    config = base.config
    for place, value in fields.items():
        config = _with(config, place.split("."), value)
    return base.replace(tensors=tensors, config=config if fields else None)


def _with(config: Mapping[str, Any], path: Sequence[str], value: object) -> dict[str, Any]:
    """Return the config with ``value`` at the end of ``path``."""
    field, *rest = path
    return {**config, field: _with(config[field], rest, value) if rest else value}


def _are_alike(a: TensorMerge, b: TensorMerge) -> bool:
    """Return whether two recipes that started from one tensor end in one."""
    if a.norms or b.norms or len(a.terms) != len(b.terms):
        return False
    same_source = a.source is b.source or are_equal(a.source, b.source)
    return same_source and _same_rows(a.tokens, b.tokens) and all(map(_same_update, a.terms, b.terms))


def _same_rows(a: TokenRows | None, b: TokenRows | None) -> bool:
    return a is b or bool(a and b and a.indices == b.indices and are_equal(a.rows, b.rows))


def _same_update(a: Term, b: Term) -> bool:
    if a.scaling != b.scaling or not a.update.down(0).equal(b.update.down(0)):
        return False
    blocks = range(0, a.rows, 4096)
    return all(a.update.up(0, n, min(n + 4096, a.rows)).equal(b.update.up(0, n, min(n + 4096, a.rows))) for n in blocks)
