"""Rules of serving engines, as data, for vision and audio towers, which are not quantized.

A tower is either split by attention heads and MLP channels, or replicated on every rank. The rules were read in the
sources that they name; a case that the sources do not settle is ``unknown``. One rule was run: vLLM for CPUs 0.32.0
refuses a Qwen2.5-VL of 97 channels on 2 ranks, and serves it with the option as well as padded to 98.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import lcm
from typing import Literal

from qwen_pipeline.errors import InputRefused
from qwen_pipeline.qwen.families import Config
from qwen_pipeline.qwen.geometry import PaddedSize, resized_config, tower_sizes
from qwen_pipeline.qwen.padding_spec import Targets, served_degrees
from qwen_pipeline.qwen.tensor_parallel.engines import ShardingVerdict
from qwen_pipeline.qwen.towers import Tower, towers_of

Sharing = Literal["shared", "shared if heads divide", "whole"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TowerRule:
    """The rule of an engine for one kind of tower of some families.

    Attributes:
        source: Where the rule was read.
        families: Values of ``model_type``.
        part: The kind of tower.
        sharing: Whether ranks share the tower; ``shared`` refuses heads and widths that the degree does not divide.
        option: Arguments of the engine that replicate the tower on every rank; empty if there are none.
    """

    source: str
    families: tuple[str, ...]
    part: Literal["vision", "audio"]
    sharing: Sharing
    option: str = ""


_VL = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe")
_OMNI_2_5 = ("qwen2_5_omni", "qwen2_5_omni_thinker")
_OMNI_3 = ("qwen3_omni_moe", "qwen3_omni_moe_thinker")
TOWER_RULES: Mapping[str, tuple[TowerRule, ...]] = {
    "vllm": (
        TowerRule(
            source="vLLM 0.32.0, qwen2_vl.py, qwen2_5_vl.py, qwen3_vl.py; distributed/utils.py (divide)",
            families=_VL, part="vision", sharing="shared", option="--mm-encoder-tp-mode data",
        ),
        TowerRule(
            source="vLLM 0.32.0, qwen2_5_omni_thinker.py, qwen3_omni_moe_thinker.py (no supports_encoder_tp_data)",
            families=(*_OMNI_2_5, *_OMNI_3), part="vision", sharing="shared",
        ),
        TowerRule(
            source="vLLM 0.32.0, qwen3_omni_moe_thinker.py and qwen3_asr.py, pull request 50858",
            families=(*_OMNI_3, "qwen3_asr"), part="audio", sharing="shared if heads divide",
        ),
        TowerRule(
            source="vLLM 0.32.0, qwen2_audio.py and qwen2_5_omni_thinker.py (Transformers' own module)",
            families=("qwen2_audio", *_OMNI_2_5), part="audio", sharing="whole",
        ),
    ),
    "sglang": (
        TowerRule(
            source="SGLang qwen2_5_vl.py, qwen3_vl.py, layers/attention/vision.py; docs, DP for multi-modal encoders",
            families=("qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe"), part="vision", sharing="shared",
            option="--mm-enable-dp-encoder",
        ),
    ),
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class TowerPrediction:
    """The prediction for one engine and one tower at one degree.

    Attributes:
        reason: Why the verdict is not ``ok``; empty if it is.
        option: Arguments of the engine that replicate the tower on every rank; empty if there are none.
        padding_helps: Whether padding avoids the refusal: heads are divisible, channels are not, and a config field
            states their number.
    """

    engine: str
    degree: int
    verdict: ShardingVerdict
    reason: str = ""
    option: str = ""
    padding_helps: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class TowerFeasibility:
    """One tower on the engines and degrees that are to serve it.

    Attributes:
        tower: The tower.
        size: The padding of its MLPs; None if no config field states their width.
        live: Channels of each MLP before padding; ``padded`` after it.
        extra: Extra weights and multiplications of its MLPs after padding, as a fraction.
        extra_bytes: Bytes of these extra weights, in 16 bits.
        predictions: One for each engine and degree, before padding.
        padded_predictions: The same after padding.
    """

    tower: Tower
    size: PaddedSize | None
    live: int
    extra: float
    extra_bytes: int
    predictions: tuple[TowerPrediction, ...]
    padded_predictions: tuple[TowerPrediction, ...]

    @property
    def padded(self) -> int:
        """Channels of each MLP after padding."""
        return self.size.padded if self.size else self.live

    def refusals(self, *, padded: bool = False) -> list[str]:
        """Return a sentence for each refusal before (or after) padding, with the remedies."""
        predictions = self.padded_predictions if padded else self.predictions
        return [self._refusal(prediction) for prediction in predictions if prediction.verdict == "refused"]

    def _refusal(self, prediction: TowerPrediction) -> str:
        remedies: list[str] = []
        if prediction.padding_helps:
            cost = f"+{self.extra:.2%} of their weights, {self.extra_bytes / 1e6:.1f} MB"
            remedies.append(f"pad its MLPs with --towers, from {self.live:,} to {self.padded:,} ({cost})")
        if prediction.option:
            remedies.append(f"start {prediction.engine} with {prediction.option}, which replicates it on every rank")
        return (
            f"{prediction.engine} at TP {prediction.degree} refuses the {self.tower.part} tower: its"
            f" {prediction.reason}. Remedy: {', or '.join(remedies) or 'use fewer ranks'}."
        )


def assess_towers(config: Config, targets: Targets) -> list[TowerFeasibility]:
    """Return the feasibility of each tower of a model on these engines and degrees.

    Raises:
        InputRefused: The config lacks a size of a tower, or ``targets`` lacks a degree.
    """
    if not towers_of(config):
        return []
    ranks = lcm(*served_degrees(targets))
    return [_assess_tower(config, tower, targets, ranks) for tower in towers_of(config)]


def tower_obstacles(config: Config, targets: Targets) -> list[str]:
    """Return a sentence for each refusal of an unpadded tower; if the config lacks a size, a sentence that says so."""
    try:
        return [sentence for tower in assess_towers(config, targets) for sentence in tower.refusals()]
    except InputRefused as refusal:
        return [refusal.what]


def predict_tower_serving(config: Config, tower: Tower, engine: str, *, degree: int) -> TowerPrediction:
    """Return the prediction for a tower on an engine: ``vllm`` or one of its kernels, such as ``vllm-marlin``.

    Raises:
        InputRefused: The config lacks a size.
    """
    rule = _rule(config, tower, engine)
    heads, width = tower.size(config, tower.heads), tower.width(config)
    if degree == 1 or (rule and rule.sharing == "whole"):
        return TowerPrediction(engine=engine, degree=degree, verdict="ok")
    if rule is None:
        return TowerPrediction(
            engine=engine, degree=degree, verdict="unknown", reason="no rule for this tower was found"
        )
    if heads % degree and rule.sharing == "shared if heads divide":
        return TowerPrediction(engine=engine, degree=degree, verdict="ok")
    if heads % degree or width % degree:
        shared = f"{heads} heads" if heads % degree else f"MLPs of {width:,} channels"
        return TowerPrediction(
            engine=engine,
            degree=degree,
            verdict="refused",
            reason=f"{shared} are not divisible by {degree} ranks",
            option=rule.option,
            padding_helps=not heads % degree and tower.field is not None,
        )
    return TowerPrediction(engine=engine, degree=degree, verdict="ok")


def _assess_tower(config: Config, tower: Tower, targets: Targets, ranks: int) -> TowerFeasibility:
    live = tower.width(config)
    size = next((size for size in tower_sizes(config, ranks=ranks) if size.field == tower.field), None)
    wide = resized_config(config, size, size.padded) if size else config
    live_weights, padded_weights = (tower.weights(state, tower.width(state)) for state in (config, wide))
    return TowerFeasibility(
        tower=tower,
        size=size,
        live=live,
        extra=size.zeros / live if size else 0.0,
        extra_bytes=2 * (padded_weights - live_weights),
        predictions=tuple(_predictions(config, tower, targets)),
        padded_predictions=tuple(_predictions(wide, tower, targets)),
    )


def _predictions(config: Config, tower: Tower, targets: Targets) -> Iterator[TowerPrediction]:
    for engine, degrees in targets.items():
        yield from (predict_tower_serving(config, tower, engine, degree=degree) for degree in degrees)


def _rule(config: Config, tower: Tower, engine: str) -> TowerRule | None:
    rules = TOWER_RULES.get(engine.partition("-")[0], ())
    family = str(config.get("model_type"))
    return next((rule for rule in rules if family in rule.families and rule.part == tower.part), None)
