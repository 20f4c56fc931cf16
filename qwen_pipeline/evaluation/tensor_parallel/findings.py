"""Targets, shardings, and the findings about them: engine rules, and the weights that ranks compute with."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite

from qwen_pipeline.errors import InputRefused
from qwen_pipeline.evaluation.figures import DivergenceFigures
from qwen_pipeline.qwen.padding_spec import require_ranks
from qwen_pipeline.qwen.tensor_parallel.engines import ShardingVerdict, kernels_of

ANY_ENGINE = "any engine"
"""A loader that only shards evenly: the target if no engine is declared."""

OF_FLOATS = "8-bit floats"
"""Follows the name of an engine whose rules for 8-bit floats apply."""

COLUMNS = ("engine", "ranks", "engine rules", "weights on ranks", "KL(unsharded ‖ sharded)")

ShardedModules = tuple[int, Sequence[str]]
"""Number of ranks, and the modules whose inputs get other scales when sharded among them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """An engine, or a family of kernels such as ``vllm``, and the number of ranks that will serve a checkpoint."""

    engine: str
    degree: int

    @classmethod
    def parse(cls, text: str) -> "Target":
        """Read ``vllm-marlin:8``.

        Raises:
            InputRefused: The text is not an engine, a colon and a positive number.
        """
        engine, _, degree = text.partition(":")
        kernels_of(engine)
        if not degree.isdecimal() or not int(degree):
            raise InputRefused(f"{text!r} has no number of ranks.", remedy="Write engine:ranks, as in vllm-marlin:8.")
        return cls(engine=engine, degree=require_ranks(int(degree[:9])))

    def __str__(self) -> str:
        return f"{self.engine} at {self.degree}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Sharding:
    """The way in which a loader shards a checkpoint's packed layers.

    Attributes:
        ranks: Number of ranks.
        pads_mlps: Whether whole groups of zeros are appended to MLPs until all ranks hold the same number.
        halves_groups: Whether experts' groups are halved, with their scales repeated, until they fit a rank.
    """

    ranks: int
    pads_mlps: bool = False
    halves_groups: bool = False

    def __str__(self) -> str:
        extras = [" with padded MLPs"] * self.pads_mlps + [" with halved groups"] * self.halves_groups
        return f"{self.ranks} ranks{''.join(extras)}"


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardingFindings:
    """The weights that ranks compute with.

    Attributes:
        cut: The sharding.
        compared: Number of compared layers.
        errors: Module -> ``||W - W'|| / ||W||`` on the slices, for modules whose weights differ on the ranks; infinite
            if codes are missing or a shard would end within a word.
        divergence: KL(unsharded || sharded) in nats per token and top-1 agreement of the sharded model; None if all
            weights are equal bit for bit, or if the ranks do not hold all weights.
    """

    cut: Sharding
    compared: int
    errors: Mapping[str, float]
    divergence: DivergenceFigures | None = None

    @property
    def worst(self) -> tuple[str, float]:
        return max(self.errors.items(), key=lambda item: item[1])


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetFindings:
    """The findings for one kernel at one degree.

    Attributes:
        target: The declared target; its engine may be the family of the kernel.
        kernel: The engine whose rules apply.
        verdict: The verdict of the rules.
        reasons: The reasons for the verdict.
        found: The weights on the ranks; None if the kernel refuses the checkpoint or shards no layers.
    """

    target: Target
    kernel: str
    verdict: ShardingVerdict
    reasons: Sequence[str]
    found: ShardingFindings | None

    @property
    def is_of_floats(self) -> bool:
        return self.kernel.endswith(OF_FLOATS)

    @property
    def refuses(self) -> bool:
        return self.verdict == "refused"

    @property
    def answers_wrongly(self) -> bool:
        return self.verdict == "silently wrong" or bool(self.found and self.found.errors)

    @property
    def cells(self) -> tuple[str, str, str, str, str]:
        """The table row under :data:`COLUMNS`."""
        found = self.found
        weights = f"{found.compared - len(found.errors)} of {found.compared} equal" if found else ""
        kl = found.divergence if found else None
        return (
            self.kernel,
            str(self.target.degree),
            self.verdict,
            weights,
            f"{kl.mean:.3g} nats, {kl.top1_agreement:.0%} same token" if kl else "",
        )

    @property
    def sentence(self) -> str:
        """A description of the outcome."""
        if self.refuses:
            return f"{self.kernel} at {self.target.degree} refuses it: {'; '.join(self.reasons)}"
        if not self.answers_wrongly:
            return f"{self.kernel} at {self.target.degree} serves it"
        sentence = f"{self.kernel} at {self.target.degree} gives wrong answers without an error"
        if not (self.found and self.found.errors):
            return f"{sentence}: {'; '.join(self.reasons)}"
        module, error = self.found.worst
        distance = f"by {error:.0%}" if isfinite(error) else "and cannot be sharded"
        sentence += f": {len(self.found.errors)} of {self.found.compared} weights differ, {module} {distance}"
        if kl := self.found.divergence:
            sentence += f" (KL {kl.mean:.3g} nats per token, {kl.top1_agreement:.0%} same next token)"
        return sentence
