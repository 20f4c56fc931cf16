"""Outputs of the vision and audio towers of tiny models, computed by Transformers' modules in float64."""

from pathlib import Path
from typing import Any

import torch

from qwen_pipeline_tests.tiny import VOCABULARY, load_tiny

GRID = torch.tensor([[1, 4, 4]])
"""One image of 4 x 4 patches, which the merger reduces to 4 tokens."""
IMAGE_TOKEN, FRAMES = 300, 32


@torch.inference_mode()
def tower_outputs(root: Path) -> dict[str, torch.Tensor]:
    """Return the output of each tower for one fixed random image or sound: [tokens, width]."""
    model = load_tiny(root, torch.float64)
    towers = {name.rpartition(".")[2]: module for name, module in model.named_modules()}
    calls = {"visual": _vision_inputs, "audio_tower": _audio_inputs}
    found = {name: towers[name](**inputs(towers[name].config)) for name, inputs in calls.items() if name in towers}
    return {name: given.last_hidden_state for name, given in found.items()}


@torch.inference_mode()
def logits_on_an_image(root: Path) -> torch.Tensor:
    """Return the logits [1, T, V] of a vision-language model for one image among random tokens."""
    model: Any = load_tiny(root, torch.float64)
    model.set_experts_implementation("eager")  # the default, a grouped product, does not support float64
    model.config.image_token_id = IMAGE_TOKEN
    ids = torch.randint(0, IMAGE_TOKEN, (1, 20), generator=torch.Generator().manual_seed(7))
    ids[:, 4:8] = IMAGE_TOKEN
    assert IMAGE_TOKEN < VOCABULARY
    image = _vision_inputs(model.config.vision_config)
    kinds = (ids == IMAGE_TOKEN).int()
    return model(
        input_ids=ids, pixel_values=image["hidden_states"], image_grid_thw=GRID, mm_token_type_ids=kinds
    ).logits


def _vision_inputs(config: Any) -> dict[str, torch.Tensor]:
    width = config.in_channels * config.temporal_patch_size * config.patch_size**2
    return {"hidden_states": _noise(16, width), "grid_thw": GRID}


def _audio_inputs(config: Any) -> dict[str, torch.Tensor]:
    if config.model_type == "qwen2_audio_encoder":
        return {"input_features": _noise(1, config.num_mel_bins, FRAMES)}
    if config.model_type == "qwen3_asr_encoder":
        frames = 2 * config.n_window
        return {
            "input_features": _noise(1, config.num_mel_bins, frames),
            "input_features_mask": torch.ones(1, frames, dtype=torch.long),
        }
    return {"input_features": _noise(config.num_mel_bins, FRAMES), "feature_lens": torch.tensor([FRAMES])}


def _noise(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
