"""Vision and audio towers, as data: the widths of their MLPs, and the tensors with those channels.

The tables were read from Transformers 5.23 (``modeling_*.py`` and ``configuration_*.py`` of each family). Towers stay
in full precision, so groups do not matter: ranks can share an MLP if their number divides its width. A merger is
``spatial_merge_size`` squared times as wide as its tower: if ranks can share the tower's heads, they can share it too.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from qwen_pipeline.qwen.families import Config, TowerField, has_section
from qwen_pipeline.qwen.layers import required


@dataclass(frozen=True, slots=True, kw_only=True)
class Tower:
    """A vision or audio encoder of equal layers.

    Attributes:
        part: Its modality.
        section: The section of its config.
        field: The size field that counts an MLP's channels; None if the width is ``hidden`` times ``mlp_ratio``.
        layers: Path of a layer, up to its number.
        outputs: Linear layers whose outputs are the MLP's channels.
        inputs: The linear layer whose inputs are the MLP's channels.
        depth: Config field with the number of layers; ``heads`` and ``hidden`` likewise.
    """

    part: Literal["vision", "audio"]
    section: Literal["vision_config", "audio_config"]
    field: TowerField | None
    layers: str
    outputs: tuple[str, ...]
    inputs: str
    depth: str = "depth"
    heads: str = "num_heads"
    hidden: str = "hidden_size"

    def size(self, config: Config, name: str) -> int:
        """Return a size of the tower, such as its ``depth``.

        Raises:
            InputRefused: The config lacks the size.
        """
        return required(config, f"{self.section}.{name}")

    def width(self, config: Config) -> int:
        """Return the number of channels of each MLP."""
        if self.field:
            return required(config, self.field)
        return self.size(config, self.hidden) * self.size(config, "mlp_ratio")

    def weights(self, config: Config, width: int) -> int:
        """Return the number of weights of all MLPs, biases included, at ``width`` channels."""
        hidden = self.size(config, self.hidden)
        return self.size(config, self.depth) * (width * (hidden + 1) * len(self.outputs) + width * hidden + hidden)

    def axis(self, module: str) -> int | None:
        """Return the axis of the channels in a linear layer's weight; None if it has none of them."""
        number, _, name = module.removeprefix(self.layers).partition(".")
        if not module.startswith(self.layers) or not number.isdecimal():
            return None
        return 0 if name in self.outputs else 1 if name == self.inputs else None

    def linears(self, config: Config) -> list[str]:
        """Return the path of each linear layer that has the channels."""
        names = (*self.outputs, self.inputs)
        return [f"{self.layers}{layer}.{name}" for layer in range(self.size(config, self.depth)) for name in names]


_BLOCKS = "visual.blocks."
_RATIO = Tower(
    part="vision", section="vision_config", field=None, layers=_BLOCKS, outputs=("mlp.fc1",), inputs="mlp.fc2",
    hidden="embed_dim",
)  # fmt: skip
_GATED = Tower(
    part="vision", section="vision_config", field="vision_config.intermediate_size", layers=_BLOCKS,
    outputs=("mlp.gate_proj", "mlp.up_proj"), inputs="mlp.down_proj",
)  # fmt: skip
_PLAIN = Tower(
    part="vision", section="vision_config", field="vision_config.intermediate_size", layers=_BLOCKS,
    outputs=("mlp.linear_fc1",), inputs="mlp.linear_fc2",
)  # fmt: skip
_AUDIO = Tower(
    part="audio", section="audio_config", field="audio_config.encoder_ffn_dim", layers="audio_tower.layers.",
    outputs=("fc1",), inputs="fc2", depth="encoder_layers", heads="encoder_attention_heads", hidden="d_model",
)  # fmt: skip

TOWERS: Mapping[str, tuple[Tower, ...]] = {
    "qwen2_vl": (_RATIO,),
    "qwen2_5_vl": (_GATED,),
    "qwen2_5_omni": (_GATED, _AUDIO),
    "qwen2_5_omni_thinker": (_GATED, _AUDIO),
    "qwen2_audio": (_AUDIO,),
    "qwen3_vl": (_PLAIN,),
    "qwen3_vl_moe": (_PLAIN,),
    "qwen3_omni_moe": (_PLAIN, _AUDIO),
    "qwen3_omni_moe_thinker": (_PLAIN, _AUDIO),
    "qwen3_asr": (_AUDIO,),
    "qwen3_5": (_PLAIN,),
    "qwen3_5_moe": (_PLAIN,),
    "qwen4_exp": (_PLAIN,),
}


def towers_of(config: Config) -> list[Tower]:
    """Return the towers of a model: those of its family whose section the config has."""
    return [tower for tower in TOWERS.get(str(config.get("model_type")), ()) if has_section(config, tower.section)]
