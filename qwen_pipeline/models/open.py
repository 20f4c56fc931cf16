"""A merged model as what it is made of: it reads like a stored one, and can be stored later.

A recipe is a finished directory with config, tokenizer and manifest but no weights. Its manifest has the digest of
every tensor; the content digest is that of the stored checkpoint.
"""

from collections.abc import Callable, Mapping
from pathlib import Path

from qwen_pipeline.checkpoint.digest_cache import checkpoint_digest
from qwen_pipeline.checkpoint.lazy import (
    CONFIG,
    INDEX,
    SINGLE_SHARD,
    Checkpoint,
    open_checkpoint,
    open_sidecars,
)
from qwen_pipeline.checkpoint.manifest import Contents, Manifest, find_manifest, open_manifest
from qwen_pipeline.checkpoint.store.derive import store_recipe
from qwen_pipeline.checkpoint.store.destinations import Artifact
from qwen_pipeline.checkpoint.writer import write_checkpoint
from qwen_pipeline.errors import CheckpointRefused, InputRefused
from qwen_pipeline.models.padded import padded_model, trained_on
from qwen_pipeline.progress import Observe, unobserved
from qwen_pipeline.transforms.lora.across_padding import Paddings
from qwen_pipeline.transforms.lora.adapter import is_adapter, open_adapter
from qwen_pipeline.transforms.lora.adapter_set import AdapterSet, is_adapter_set, open_set, single, weighted
from qwen_pipeline.transforms.lora.fine_tune import adopt
from qwen_pipeline.transforms.lora.merge import merge_lora


def open_fine_tune(root: Path) -> AdapterSet | Checkpoint:
    """Open an adapter, several, or a whole model, whichever the directory holds.

    Raises:
        InputRefused: It holds none of them in a form that can be merged, or more than one.
    """
    whole = (root / SINGLE_SHARD).exists() or (root / INDEX).exists()
    kinds = {"an adapter": is_adapter(root), "a set of adapters": is_adapter_set(root), "a whole model": whole}
    if len(found := [kind for kind, is_there in kinds.items() if is_there]) > 1:
        raise InputRefused(
            f"{root} holds {' and '.join(found)}; it does not say which one is the fine-tune.",
            remedy="Put only one of them into the directory.",
        )
    if is_adapter(root):
        return single(open_adapter(root))
    return open_set(root) if is_adapter_set(root) else open_checkpoint(root)


def open_model(root: Path) -> Checkpoint:
    """Open a model directory whose weights are stored, or whose manifest says what they are computed from.

    Raises:
        CheckpointRefused: See :func:`open_checkpoint`; or the recipe's base or fine-tune is gone or was changed.
    """
    manifest = find_manifest(root)
    if manifest is None or manifest.recipe is None:
        return open_checkpoint(root)
    base = Path(manifest.recipe["base"])
    _require_unchanged(root, manifest, "base", base, checkpoint_digest)
    parent, child = open_model(base), _fine_tune_of(root, manifest, manifest.recipe)
    if isinstance(child, AdapterSet):
        merged = merge_lora(parent, child, paddings=paddings_of(base, child)).checkpoint
    else:
        merged = adopt(parent, child)
    return Checkpoint(
        config=merged.config,
        config_bytes=(root / CONFIG).read_bytes(),
        tensors=merged.tensors,
        shards=merged.shards,
        sidecars=open_sidecars(root),
    )


def paddings_of(base: Path, adapters: AdapterSet, *, padded: Path | None = None) -> Paddings:
    """Return what manifests say about the padding of a base, and of the model that adapters were trained on.

    Args:
        base: The base's directory.
        adapters: They may name the directory of the model that they were trained on.
        padded: That directory, if it is another by now.

    Raises:
        InputRefused: See :func:`trained_on`.
    """
    ours, theirs = padded_model(base), trained_on(adapters, padded)
    return Paddings(base=ours.plan if ours else None, training=theirs.plan if theirs else None)


def materialize(root: Path, *, observe: Observe = unobserved) -> Artifact:
    """Store the weights of a recipe in its directory; what is stored already stays as it is.

    Raises:
        CheckpointRefused: What it is made of is gone or was changed.
        CheckFailed: Other weights come out than were promised.
    """

    def write(root: Path) -> Contents:
        return write_checkpoint(open_model(root), root, task="materialize", observe=observe)

    if (manifest := open_manifest(root)).recipe is None:
        return Artifact(path=root, manifest=manifest, reused=True)
    return store_recipe(root, write)


def fine_tune_digest(root: Path, *, observe: Observe = unobserved) -> str:
    """Return the content digest of adapters or of a whole model."""
    if is_adapter(root):
        return open_adapter(root).digest()
    return open_set(root).digest() if is_adapter_set(root) else checkpoint_digest(root, observe=observe)


def recipe_of(base: Path, fine_tune: Path | AdapterSet) -> dict[str, str]:
    """Return role -> path of what a merged checkpoint is computed from: ``adapter.<n>`` for each of several."""
    if isinstance(fine_tune, AdapterSet):
        parts = {f"adapter.{number}": adapter.root for number, adapter in enumerate(fine_tune.adapters)}
    else:
        parts = {"fine_tune": fine_tune}
    return {role: str(path.resolve()) for role, path in {"base": base, **parts}.items()}


def _fine_tune_of(root: Path, manifest: Manifest, recipe: Mapping[str, str]) -> AdapterSet | Checkpoint:
    """Open what a recipe merges; the weights of several adapters are what the stage noted."""
    if path := recipe.get("fine_tune"):
        _require_unchanged(root, manifest, "fine_tune", Path(path), fine_tune_digest)
        return open_fine_tune(Path(path))
    noted, combination = manifest.result["adapters"], manifest.result["combination"]
    places = [Path(recipe[f"adapter.{number}"]) for number in range(len(noted))]
    for place in places:
        if not place.is_dir():
            raise _changed(root, place, manifest.derivation.inputs["fine_tune"], "gone")
    adapters = weighted(places, [member["weight"] for member in noted], combination=combination)
    if (found := adapters.digest()) != (expected := manifest.derivation.inputs["fine_tune"]):
        raise _changed(root, places[0].parent, expected, found)
    return adapters


def _require_unchanged(root: Path, manifest: Manifest, role: str, path: Path, digest: Callable[[Path], str]) -> None:
    expected = manifest.derivation.inputs[role]
    if (found := digest(path) if path.is_dir() else "gone") != expected:
        raise _changed(root, path, expected, found)


def _changed(root: Path, path: Path, expected: str, found: str) -> CheckpointRefused:
    return CheckpointRefused(
        f"The weights of {root} are computed from {path}, which was {expected} and is {found}.",
        remedy="Put it back, or make the merged checkpoint again from what there is now.",
    )
