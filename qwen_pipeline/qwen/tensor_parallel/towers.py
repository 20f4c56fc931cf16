"""What serving engines do with vision and audio towers, which are not quantized: rules as data.

A tower is shared by its attention heads and by the channels of its MLPs, or every rank holds all of it. The rules were
read in the sources that they name; what was not found there is ``unknown``. One was run, vLLM for CPUs 0.32.0 with a
Qwen2.5-VL of 97 channels on 2 ranks: it refuses it, and serves it with the option as well as padded to 98.
"""

from collections.abc import Iterable, Iterator, Mapping
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
    """What an engine does with one kind of tower of some families.

    Attributes:
        source: Where the rule was read.
        families: Values of ``model_type``.
        part: Which of their towers.
        sharing: Whether ranks share it; ``shared`` refuses heads and widths that the ranks do not divide.
        option: Arguments of the engine with which every rank holds all of it, if there are any.
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
    """What one engine does with one tower at one degree.

    Attributes:
        reason: Why it is not ``ok``; empty where it is.
        option: Arguments of the engine with which every rank holds the whole tower, if there are any.
        is_narrow: Whether padding would help: the heads divide, the channels do not, and a field states their number.
    """

    engine: str
    degree: int
    verdict: ShardingVerdict
    reason: str = ""
    option: str = ""
    is_narrow: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class TowerFeasibility:
    """One tower on the engines and degrees that are to serve it.

    Attributes:
        tower: Which.
        size: What padding on request makes of its MLPs; None where no field of the config states their width.
        live: Channels of each MLP now; ``padded`` after that.
        extra: How much more weights and multiplications its MLPs would have, as a fraction.
        extra_bytes: Of these weights, in 16 bits.
        servings: What engines do with it as it is.
        padded_servings: What they do after padding.
    """

    tower: Tower
    size: PaddedSize | None
    live: int
    extra: float
    extra_bytes: int
    servings: tuple[TowerPrediction, ...]
    padded_servings: tuple[TowerPrediction, ...]

    @property
    def padded(self) -> int:
        return self.size.padded if self.size else self.live

    def refusals(self, servings: Iterable[TowerPrediction]) -> list[str]:
        """Return a sentence for each refusal, with all that helps."""
        return [self._refusal(serving) for serving in servings if serving.verdict == "refused"]

    def _refusal(self, serving: TowerPrediction) -> str:
        cost = f"+{self.extra:.2%} of their weights, {self.extra_bytes / 1e6:.1f} MB"
        remedies = [f"pad its MLPs too, with --towers, from {self.live:,} to {self.padded:,} ({cost})"]
        remedies = remedies * serving.is_narrow + [
            f"start {serving.engine} with {serving.option}: every rank then holds it whole"
        ] * bool(serving.option)
        return (
            f"{serving.engine} at TP {serving.degree} refuses the {self.tower.part} tower: its {serving.reason}. What"
            f" helps: {', or '.join(remedies) or 'fewer ranks'}."
        )


def assess_towers(config: Config, targets: Targets) -> list[TowerFeasibility]:
    """Return what each tower of a model means for these engines and degrees.

    Raises:
        InputRefused: The config lacks a size of a tower, or no degree or engine is named.
    """
    if not towers_of(config):
        return []
    ranks = lcm(*served_degrees(targets))
    return [_outlook(config, tower, targets, ranks) for tower in towers_of(config)]


def tower_obstacles(config: Config, targets: Targets) -> list[str]:
    """Return a sentence for each tower that an engine refuses as it is, or for one whose sizes are not known."""
    try:
        return [sentence for at in assess_towers(config, targets) for sentence in at.refusals(at.servings)]
    except InputRefused as refusal:
        return [refusal.what]


def predict_tower_serving(config: Config, tower: Tower, engine: str, *, degree: int) -> TowerPrediction:
    """Return what an engine (``vllm`` or one of its kernels, such as ``vllm-marlin``) does with a tower.

    Raises:
        InputRefused: The config lacks a size.
    """
    rule = _rule(config, tower, engine)
    heads, width = tower.size(config, tower.heads), tower.width(config)
    if degree == 1 or (rule and rule.sharing == "whole"):
        return TowerPrediction(engine=engine, degree=degree, verdict="ok")
    if rule is None:
        return TowerPrediction(
            engine=engine, degree=degree, verdict="unknown", reason="nothing was found on this tower"
        )
    if heads % degree and rule.sharing == "shared if heads divide":
        return TowerPrediction(engine=engine, degree=degree, verdict="ok")
    if heads % degree or width % degree:
        shared = f"{heads} heads" if heads % degree else f"MLPs of {width:,} channels"
        return TowerPrediction(
            engine=engine,
            degree=degree,
            verdict="refused",
            reason=f"{shared} do not divide by {degree} ranks",
            option=rule.option,
            is_narrow=not heads % degree and tower.field is not None,
        )
    return TowerPrediction(engine=engine, degree=degree, verdict="ok")


def _outlook(config: Config, tower: Tower, targets: Targets, ranks: int) -> TowerFeasibility:
    live = tower.width(config)
    size = next((size for size in tower_sizes(config, ranks=ranks) if size.field == tower.field), None)
    wide = resized_config(config, size, size.padded) if size else config
    weights = [tower.weights(at, tower.width(at)) for at in (config, wide)]
    return TowerFeasibility(
        tower=tower,
        size=size,
        live=live,
        extra=size.zeros / live if size else 0.0,
        extra_bytes=2 * (weights[1] - weights[0]),
        servings=tuple(_servings(config, tower, targets)),
        padded_servings=tuple(_servings(wide, tower, targets)),
    )


def _servings(config: Config, tower: Tower, targets: Targets) -> Iterator[TowerPrediction]:
    for engine, degrees in targets.items():
        yield from (predict_tower_serving(config, tower, engine, degree=degree) for degree in degrees)


def _rule(config: Config, tower: Tower, engine: str) -> TowerRule | None:
    rules = TOWER_RULES.get(engine.partition("-")[0], ())
    family = str(config.get("model_type"))
    return next((rule for rule in rules if family in rule.families and rule.part == tower.part), None)
