"""Models and fine-tunes by directory, including recipes: models whose weights are computed when they are read.

A recipe is a finished directory with config, tokenizer and manifest but without weights, which can be stored later. Its
manifest has the digest of every tensor; the content digest is that of the stored checkpoint. The recipe of a merged
model names its base and its fine-tune, that of a padded one the merged model.
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
from qwen_pipeline.models.kinds import require_kind
from qwen_pipeline.models.padded import padded_model, trained_on
from qwen_pipeline.progress import Observe, unobserved
from qwen_pipeline.qwen.geometry import load_plan
from qwen_pipeline.qwen.settle import settle
from qwen_pipeline.transforms.codes.base_weights import base_weights
from qwen_pipeline.transforms.fine_tune.adopt import adopt
from qwen_pipeline.transforms.lora.across_padding import Paddings
from qwen_pipeline.transforms.lora.adapter import is_adapter, open_adapter
from qwen_pipeline.transforms.lora.adapter_set import AdapterSet, is_adapter_set, open_set, single, weighted
from qwen_pipeline.transforms.lora.merge import merge_lora
from qwen_pipeline.transforms.lora.saved.weights import weight_files
from qwen_pipeline.transforms.padding.pad import pad


def open_fine_tune(root: Path) -> AdapterSet | Checkpoint:
    """Open the fine-tune in a directory: an adapter, a set of adapters, or a whole model.

    Raises:
        InputRefused: The directory holds none of them in a form that can be merged, or more than one.
    """
    require_kind(root)
    kinds = {
        "an adapter": _is_adapter(root),
        "a set of adapters": is_adapter_set(root),
        "a whole model": has_weights(root),
    }
    if len(found := [kind for kind, is_present in kinds.items() if is_present]) > 1:
        raise InputRefused(
            f"{root} holds {' and '.join(found)}, so it is unclear which one is the fine-tune.",
            remedy="Keep only one of them in the directory.",
        )
    if _is_adapter(root):
        return single(open_adapter(root))
    return open_set(root) if is_adapter_set(root) else open_checkpoint(root)


def _is_adapter(root: Path) -> bool:
    """Return whether a directory holds an adapter; its settings alone may remain beside the merged model."""
    return is_adapter(root) and bool(weight_files(root) or not has_weights(root))


def has_weights(root: Path) -> bool:
    """Return whether a directory has the weights of a model."""
    return (root / SINGLE_SHARD).exists() or (root / INDEX).exists()


def open_model(root: Path) -> Checkpoint:
    """Open a model directory with stored weights, or a recipe, whose manifest names the inputs of its weights.

    Raises:
        CheckpointRefused: See :func:`open_checkpoint`; or the recipe's base or fine-tune is missing or was changed.
    """
    manifest = find_manifest(root)
    if manifest is None or manifest.recipe is None:
        return open_checkpoint(root)
    computed = _padded if "source" in manifest.recipe else _merged
    model = computed(root, manifest, manifest.recipe)
    return Checkpoint(
        config=model.config,
        config_bytes=(root / CONFIG).read_bytes(),
        tensors=model.tensors,
        shards=model.shards,
        sidecars=open_sidecars(root),
    )


def _merged(root: Path, manifest: Manifest, recipe: Mapping[str, str]) -> Checkpoint:
    base = Path(recipe["base"])
    _require_unchanged(root, manifest, "base", base, checkpoint_digest)
    weights = base_weights(manifest.derivation.spec)
    parent = settle(weights.of(open_model(base))).checkpoint
    child = _fine_tune_of(root, manifest, recipe)
    if isinstance(child, AdapterSet):
        merged = merge_lora(parent, child, paddings=paddings_of(base, child)).checkpoint
    else:
        merged = adopt(parent, child).checkpoint
    return weights.kept(merged)


def _padded(root: Path, manifest: Manifest, recipe: Mapping[str, str]) -> Checkpoint:
    source = Path(recipe["source"])
    _require_unchanged(root, manifest, "source", source, checkpoint_digest)
    live = settle(base_weights(manifest.derivation.spec).of(open_model(source))).checkpoint
    return pad(live, load_plan(manifest.result["padding"]))


def paddings_of(base: Path, adapters: AdapterSet, *, padded: Path | None = None) -> Paddings:
    """Return the padding maps of a base and of the model that adapters were trained on, as their manifests state them.

    Args:
        base: The base's directory.
        adapters: The adapters, whose configs may name the directory of the model that they were trained on.
        padded: That directory, if it has moved or the configs do not name it.

    Raises:
        InputRefused: See :func:`trained_on`.
    """
    ours, theirs = padded_model(base), trained_on(adapters, padded)
    return Paddings(base=ours.plan if ours else None, training=theirs.plan if theirs else None)


def materialize(root: Path, *, observe: Observe = unobserved) -> Artifact:
    """Store the weights of a recipe in its directory; a directory with stored weights is returned unchanged.

    Raises:
        CheckpointRefused: The base or the fine-tune is missing or was changed.
        CheckFailed: The computed weights do not have the digests in the manifest.
    """

    def write(root: Path) -> Contents:
        return write_checkpoint(open_model(root), root, task="materialize", observe=observe)

    if (manifest := open_manifest(root)).recipe is None:
        return Artifact(path=root, manifest=manifest, reused=True)
    return store_recipe(root, write)


def with_weights(artifact: Artifact, *, observe: Observe = unobserved) -> Artifact:
    """Return an artifact whose weights are stored: if it is a recipe, store them; see :func:`materialize`."""
    return materialize(artifact.path, observe=observe) if artifact.manifest.recipe else artifact


def fine_tune_digest(root: Path, *, observe: Observe = unobserved) -> str:
    """Return the content digest of the adapter, the set of adapters or the whole model in a directory."""
    require_kind(root)
    if _is_adapter(root):
        return open_adapter(root).digest()
    return open_set(root).digest() if is_adapter_set(root) else checkpoint_digest(root, observe=observe)


def recipe_of(base: Path, fine_tune: Path | AdapterSet) -> dict[str, str]:
    """Return role -> path of the inputs of a merged checkpoint; several adapters have the roles ``adapter.<n>``."""
    if isinstance(fine_tune, AdapterSet):
        inputs = {f"adapter.{number}": adapter.root for number, adapter in enumerate(fine_tune.adapters)}
    else:
        inputs = {"fine_tune": fine_tune}
    return {role: str(path.resolve()) for role, path in {"base": base, **inputs}.items()}


def padded_recipe(merged: Path) -> dict[str, str]:
    """Return role -> path of the input of a padded checkpoint."""
    return {"source": str(merged.resolve())}


def _fine_tune_of(root: Path, manifest: Manifest, recipe: Mapping[str, str]) -> AdapterSet | Checkpoint:
    """Open the fine-tune of a recipe; the weights of several adapters are those in the manifest's result."""
    if path := recipe.get("fine_tune"):
        _require_unchanged(root, manifest, "fine_tune", Path(path), fine_tune_digest)
        return open_fine_tune(Path(path))
    members, combination = manifest.result["adapters"], manifest.result["combination"]
    paths = [Path(recipe[f"adapter.{number}"]) for number in range(len(members))]
    for path in paths:
        if not path.is_dir():
            raise _changed(root, path, manifest.derivation.inputs["fine_tune"], "missing")
    adapters = weighted(paths, [member["weight"] for member in members], combination=combination)
    if (found := adapters.digest()) != (expected := manifest.derivation.inputs["fine_tune"]):
        raise _changed(root, paths[0].parent, expected, found)
    return adapters


def _require_unchanged(root: Path, manifest: Manifest, role: str, path: Path, digest: Callable[[Path], str]) -> None:
    expected = manifest.derivation.inputs[role]
    if (found := digest(path) if path.is_dir() else "missing") != expected:
        raise _changed(root, path, expected, found)


def _changed(root: Path, path: Path, expected: str, found: str) -> CheckpointRefused:
    return CheckpointRefused(
        f"The weights of {root} are computed from {path}, whose digest must be {expected}, but it is {found}.",
        remedy="Restore it, or merge again from the current base and fine-tune.",
    )
