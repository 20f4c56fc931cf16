"""What the engines that a checkpoint is declared for make of it: their rules, and what their ranks compute with."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite

from qwen_pipeline.errors import InputRefused
from qwen_pipeline.evaluation.figures import DivergenceFigures
from qwen_pipeline.qwen.tensor_parallel.engines import ShardingVerdict, kernels_of

ANY_ENGINE = "any engine"
"""Stands for a loader that cuts evenly and does nothing else, where no engine is declared."""

COLUMNS = ("engine", "ranks", "its rules say", "weights on ranks", "KL(whole ‖ ranks)")

ShardedModules = tuple[int, Sequence[str]]
"""Ranks, and the modules whose inputs meet other scales when so many share them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """Where a checkpoint has to serve: an engine, or a family of kernels such as ``vllm``, and how many ranks."""

    engine: str
    degree: int

    @classmethod
    def parse(cls, text: str) -> "Target":
        """Read ``vllm-marlin:8``.

        Raises:
            InputRefused: It is not an engine, a colon and a positive number.
        """
        engine, _, degree = text.partition(":")
        kernels_of(engine)
        if not degree.isdecimal() or not int(degree):
            raise InputRefused(f"{text!r} names no number of ranks.", remedy="Write engine:ranks, as in vllm-marlin:8.")
        return cls(engine=engine, degree=int(degree))

    def __str__(self) -> str:
        return f"{self.engine} at {self.degree}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Sharding:
    """How a loader shares a checkpoint's packed layers among ranks.

    Attributes:
        ranks: How many there are.
        pads_mlps: Whether whole groups of zeros are appended to MLPs until all ranks hold as many.
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
    """What ranks compute with.

    Attributes:
        cut: How they share it.
        compared: Layers that were compared.
        errors: Module -> ``||W - W'|| / ||W||`` on the slices, for those where ranks compute with other weights;
            infinite where codes are missing or end within a word, so that they cannot be cut.
        divergence: KL(whole || cut) in nats a token and top-1 agreement of the model that the ranks are together; None
            where all weights are the same bits, or where ranks hold less than the whole.
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
    """One kernel at one degree.

    Attributes:
        target: What was declared; its engine may be a family that the kernel is of.
        kernel: The engine whose rules were read.
        verdict: What the rules say, and ``reasons`` why.
        found: What its ranks compute with; None where it refuses the checkpoint or shares no layers.
    """

    target: Target
    kernel: str
    verdict: ShardingVerdict
    reasons: Sequence[str]
    found: ShardingFindings | None

    @property
    def refuses(self) -> bool:
        return self.verdict == "refused"

    @property
    def answers_wrongly(self) -> bool:
        return self.verdict == "silently wrong" or bool(self.found and self.found.errors)

    @property
    def cells(self) -> tuple[str, str, str, str, str]:
        """The row of a table under :data:`COLUMNS`."""
        found = self.found
        weights = f"{found.compared - len(found.errors)} of {found.compared} as the whole" if found else ""
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
        """What would happen, for a reader."""
        if self.refuses:
            return f"{self.kernel} at {self.target.degree} refuses it: {'; '.join(self.reasons)}"
        if not self.answers_wrongly:
            return f"{self.kernel} at {self.target.degree} serves it"
        words = f"{self.kernel} at {self.target.degree} answers wrongly without an error"
        if not (self.found and self.found.errors):
            return f"{words}: {'; '.join(self.reasons)}"
        module, error = self.found.worst
        distance = f"by {error:.0%}" if isfinite(error) else "and cannot be cut"
        words += f": {len(self.found.errors)} of {self.found.compared} weights differ, {module} {distance}"
        if kl := self.found.divergence:
            words += f" (KL {kl.mean:.3g} nats a token, {kl.top1_agreement:.0%} same next token)"
        return words
