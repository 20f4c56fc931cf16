"""Models that plain Transformers loads completely, with which streamed figures are compared."""

from pathlib import Path
from typing import Any

import transformers
from torch import nn
from transformers import AutoConfig, GenerationConfig

from qwen_pipeline.checkpoint.manifest import find_manifest
from qwen_pipeline.evaluation.loading import fault_of, load_with, loading_options, unloaded_tensors
from qwen_pipeline.models.open import open_model


class NotLoaded(Exception):
    """A checkpoint that Transformers cannot load completely."""


def load_model(root: str) -> nn.Module:
    """Load a checkpoint with Transformers, on the CPU in float32, and check that every tensor was loaded.

    The weights of a recipe are computed and passed in memory.

    Raises:
        NotLoaded: Transformers raised an error, initialized missing weights randomly, or dropped unexpected ones, which
            it only logs.
    """
    try:
        config = AutoConfig.from_pretrained(root, local_files_only=True)
        manifest = find_manifest(Path(root))
        load = _from_recipe if manifest and manifest.recipe else _from_files
        model, info = load(root, config, **loading_options(config, device="cpu"))
    except Exception as error:
        raise NotLoaded(fault_of(error)) from error
    if not_loaded := unloaded_tensors(info):
        raise NotLoaded(not_loaded)
    return model.eval()


def _from_files(root: str, config: Any, **options: Any) -> tuple[Any, dict[str, Any]]:
    return load_with(_architecture(config), root, local_files_only=True, use_safetensors=True, **options)


def _from_recipe(root: str, config: Any, **options: Any) -> tuple[Any, dict[str, Any]]:
    merged = open_model(Path(root))
    weights = {name: merged.load(name) for name in merged}
    model, info = load_with(_architecture(config), None, config=config, state_dict=weights, **options)
    if "generation_config.json" in merged.sidecars:
        model.generation_config = GenerationConfig.from_pretrained(root, local_files_only=True)
    return model, info


def _architecture(config: Any) -> Any:
    return getattr(transformers, config.architectures[0])
