"""``base + fine-tune -> merged, padded`` in one pass: merged weights are only hashed, padded ones stored on request."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from qwen_pipeline.checkpoint.hashing_reader import HashingReader
from qwen_pipeline.checkpoint.lazy import open_checkpoint
from qwen_pipeline.checkpoint.manifest import UNREAD
from qwen_pipeline.checkpoint.memory_budget import ResourceNeeds, estimate_needs
from qwen_pipeline.checkpoint.store.derive import Built, derive, find
from qwen_pipeline.checkpoint.store.destinations import Artifact, Destination, as_destination
from qwen_pipeline.checkpoint.store.rewrite import Rewrite
from qwen_pipeline.checkpoint.store.stage_input import StageInput, open_input
from qwen_pipeline.checkpoint.writer import without_weights
from qwen_pipeline.errors import InputRefused
from qwen_pipeline.models.base_names import KnownBase
from qwen_pipeline.models.open import has_weights, open_model, padded_recipe, recipe_of, with_weights
from qwen_pipeline.progress import Observe, unobserved
from qwen_pipeline.qwen.padding_spec import PaddingSpec
from qwen_pipeline.qwen.settle import settle
from qwen_pipeline.qwen.tensor_parallel.plan import plan_for
from qwen_pipeline.stages import merge, pad
from qwen_pipeline.transforms.lora.adapter_set import AdapterSet
from qwen_pipeline.transforms.padding.pad import pad as pad_checkpoint


def merge_pad(
    *,
    base: Path | KnownBase,
    fine_tune: Path | AdapterSet,
    merged: Destination | Path,
    padded: Destination | Path,
    spec: PaddingSpec = pad.DEFAULT_SPEC,
    leave_behind: Collection[str] = (),
    stores_padded: bool = True,
    hard_links: bool = False,
    observe: Observe = unobserved,
) -> tuple[Artifact, Artifact]:
    """Merge a fine-tune and pad the result, and store only the padded weights, or none.

    Both artifacts have the content digests that the two stages would give them. The merged one is a recipe
    (:func:`open_model`), unless its weights are already stored, and so is the padded one if its weights are not to be
    stored: both are then computed once, for their digests, and again by each stage that reads them.

    Args:
        base: The base's directory; or with its names, its revision and the way to read it, as for :func:`merge.merge`.
        fine_tune: See :func:`merge.merge`.
        merged: The output directory of the recipe.
        padded: The output directory of the padded checkpoint.
        spec: See :func:`pad.pad`.
        leave_behind: See :func:`merge.merge`.
        stores_padded: Whether to store the padded weights.
        hard_links: Whether a shard that neither step changes may be a hard link to the base's file.
        observe: Called with the progress.

    Returns:
        The merged and the padded artifact.

    Raises:
        InputRefused: See :func:`merge.merge` and :func:`pad.pad`.
        CheckFailed: See :func:`merge.merge`.
    """
    merged = as_destination(merged)
    known_base = base if isinstance(base, KnownBase) else KnownBase(root=base)
    merging = merge.prepare(
        known_base,
        fine_tune,
        leave_behind=leave_behind,
        read_now=merged.may_hold(merge.STAGE),
        observe=observe,
    )
    stored = find(merging.derivation, merged)
    unstored = _UnstoredMerge(merging, merged, recipe_of(known_base.root, fine_tune))
    source = open_input("source", stored.path, open_root=open_model) if stored else unstored.source
    padding = replace(pad.prepare(source, spec), if_not_finite=merging.if_not_finite)
    if stores_padded:
        artifact = padding.write(padded, task="merge and pad", hard_links=hard_links, observe=observe)
        return stored or unstored.recipe, with_weights(artifact, observe=observe)
    artifact = padding.write_recipe(
        padded,
        lambda: padded_recipe((stored or unstored.recipe).path),
        task="merge and pad, without storing",
        observe=observe,
    )
    return stored or unstored.recipe, artifact


@dataclass(frozen=True, slots=True, kw_only=True)
class PassEstimate:
    """The needs of one way to make a merged or a padded checkpoint: bytes read, disk and memory."""

    name: str
    read_bytes: int
    needs: ResourceNeeds


@dataclass(frozen=True, slots=True, kw_only=True)
class ResourceEstimate:
    """The sizes that determine the cost of merging into a model and padding it.

    Two stages read the base and the merged weights, and store both outputs. One pass reads the base, and stores the
    padded weights or none.
    """

    base_bytes: int
    padded_bytes: int
    longest_row_bytes: int

    @property
    def ways(self) -> list[PassEstimate]:
        base, padded = self.base_bytes, self.padded_bytes
        return [
            self._way("merge", base, base),
            self._way("merge, then pad", 2 * base, base + padded),
            self._way("one pass", base, padded),
            self._way("one pass, nothing stored", base, 0),
        ]

    def _way(self, name: str, read_bytes: int, disk_bytes: int) -> PassEstimate:
        needs = estimate_needs(disk_bytes=disk_bytes, longest_row_bytes=self.longest_row_bytes)
        return PassEstimate(name=name, read_bytes=read_bytes, needs=needs)


def estimate_resources(root: Path, spec: PaddingSpec) -> ResourceEstimate | None:
    """Estimate the cost of merging into a model and padding it; None if it has no weights here or cannot be padded.

    The estimate is for a fine-tune that changes every tensor; others cost no more.
    """
    if not has_weights(root):
        return None
    try:
        base = settle(open_checkpoint(root), reads_values=False).checkpoint
        padded = pad_checkpoint(base, plan_for(base.config, replace(spec, layout="append")))
    except InputRefused:
        return None
    return ResourceEstimate(
        base_bytes=base.nbytes,
        padded_bytes=padded.nbytes,
        longest_row_bytes=max(spec.row_bytes for spec in padded.values()),
    )


class _UnstoredMerge:
    """A merged checkpoint whose weights are not stored: the source of the padded one, and then a recipe."""

    def __init__(self, merging: Rewrite, destination: Destination, recipe: Mapping[str, str]) -> None:
        self._merging, self._destination, self._recipe = merging, destination, recipe
        self._reader = HashingReader("merged", merging.output, check_finite=False)
        self.source = StageInput(
            checkpoint=self._reader.checkpoint,
            digest=UNREAD,
            fingerprint=merging.fingerprint,
            readers=(self._reader, *merging.readers),
            final_digest=lambda: self.recipe.manifest.content_digest,
        )

    @cached_property
    def recipe(self) -> Artifact:
        """The finished directory without weights; to create it, the readers must have read every tensor."""
        derivation = replace(self._merging.derivation, inputs={**self._merging.final_digests(), **self._merging.others})
        return derive(derivation, self._destination, self._write)

    def _write(self, partial: Path) -> Built:
        contents = without_weights(self._merging.output, partial, self._reader.results)
        return Built(contents=contents, result=self._merging.result(), recipe=self._recipe)
