"""What the engines that a checkpoint is declared for make of it: their rules, and what their ranks compute with."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import isfinite

from qwen_pipeline.checkpoint.lazy import Checkpoint
from qwen_pipeline.errors import InputRefused, PipelineError
from qwen_pipeline.evaluation.figures import DivergenceFigures
from qwen_pipeline.progress import Observe, unobserved
from qwen_pipeline.qwen.families import Config
from qwen_pipeline.qwen.geometry import head_obstacles
from qwen_pipeline.qwen.outlook import DegreeOutlook, outlook
from qwen_pipeline.qwen.planning import obstacle_of
from qwen_pipeline.qwen.serving import ENGINES, Verdict, kernels_of, serving, worst_of
from qwen_pipeline.qwen.tower_serving import tower_obstacles
from qwen_pipeline.transforms.gptq_codes import GptqFormat, gptq_format

ANY_ENGINE = "any engine"
"""Stands for a loader that cuts evenly and does nothing else, where no engine is declared."""

COLUMNS = ("engine", "ranks", "its rules say", "weights on ranks", "KL(whole ‖ ranks)")

Sliced = tuple[int, Sequence[str]]
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
class Cut:
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
class CutFindings:
    """What ranks compute with.

    Attributes:
        cut: How they share it.
        compared: Layers that were compared.
        errors: Module -> ``||W - W'|| / ||W||`` on the slices, for those where ranks compute with other weights;
            infinite where codes are missing or end within a word, so that they cannot be cut.
        divergence: KL(whole || cut) in nats a token and top-1 agreement of the model that the ranks are together; None
            where all weights are the same bits, or where ranks hold less than the whole.
    """

    cut: Cut
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
    verdict: Verdict
    reasons: Sequence[str]
    found: CutFindings | None

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


def find_targets(
    source: Checkpoint, candidate: Checkpoint, targets: Sequence[Target], *, observe: Observe = unobserved
) -> list[TargetFindings]:
    """Hold a quantized checkpoint against each target; each way of cutting is simulated once.

    Args:
        source: What was quantized: it names the layers.
        candidate: Its codes, whose shapes must be those of ``source``.
        targets: What it has to serve at.
        observe: Told about each layer.

    Raises:
        CheckpointRefused: The candidate is not GPTQ with 4 or 8 bits.
        InputRefused: A target's engine is unknown.
    """
    from qwen_pipeline.evaluation.cuts import compare_cuts

    form = gptq_format(candidate.config)
    rows: list[tuple[TargetFindings, Cut | None]] = []
    for target in targets:
        for kernel in _kernels(target.engine):
            verdict, reasons = _rules(candidate.config, form, kernel, target.degree)
            row = TargetFindings(target=target, kernel=kernel, verdict=verdict, reasons=reasons, found=None)
            rows.append((row, None if row.refuses else _cut_of(kernel, target.degree)))
    cuts = list(dict.fromkeys(cut for _, cut in rows if cut))
    found = dict(zip(cuts, compare_cuts(source, candidate, form, cuts, observe=observe), strict=True))
    return [replace(row, found=found[cut] if cut else None) for row, cut in rows]


def audible_cuts(candidate: Checkpoint, found: Sequence[TargetFindings]) -> dict[Cut, Sliced]:
    """Return what to run to hear each cut that changes weights, unless its ranks lack inputs or scales."""
    size = gptq_format(candidate.config).group_size if found else 0
    cuts = {row.found.cut: row.found.errors for row in found if row.found and row.found.errors}
    return {
        cut: (cut.ranks, sorted(errors))
        for cut, errors in cuts.items()
        if all(map(isfinite, errors.values()))
        and all(not i % cut.ranks and i // cut.ranks >= size for i in (candidate[f"{m}.g_idx"].rows for m in errors))
    }


def with_divergences(
    found: Sequence[TargetFindings], divergences: Mapping[Cut, DivergenceFigures | None]
) -> list[TargetFindings]:
    """Return the findings with what was heard of each cut."""
    return [
        replace(row, found=replace(row.found, divergence=divergences.get(row.found.cut))) if row.found else row
        for row in found
    ]


def outlook_on(config: Config, degree: int, targets: Sequence[Target]) -> DegreeOutlook | None:
    """Return what most ranks of the targets mean, or else ``degree``; None if the config describes no codes.

    Some engines can do with groups that others cannot share, so where targets are known they decide.
    """
    try:
        group_size = max(gptq_format(config).group_size, 1)
        (found,) = outlook(config, group_size=group_size, degrees=[max([at.degree for at in targets] or [degree])])
        obstacles = [obstacle_of(config, {at.engine: [at.degree]}, group_size=group_size) for at in targets]
        of_towers = [said for at in targets for said in tower_obstacles(config, {at.engine: [at.degree]})]
    except PipelineError:
        return None
    if not targets:
        return found
    if named := "; ".join(filter(None, obstacles)):
        return replace(found, legal=False, sentence=" ".join([f"Does not serve on {named}.", *of_towers]))
    if of_towers:
        return replace(found, sizes=(), legal=False, sentence=" ".join(of_towers))
    return replace(found, sizes=(), legal=True, sentence="Every engine serves at every degree that was asked for.")


def _kernels(engine: str) -> list[str]:
    return [engine] if engine == ANY_ENGINE else kernels_of(engine)


def _rules(config: Config, form: GptqFormat, kernel: str, degree: int) -> tuple[Verdict, tuple[str, ...]]:
    if kernel == ANY_ENGINE:
        obstacles = tuple(head_obstacles(config, degree))
        return ("refused", obstacles) if obstacles else ("ok", ())
    read = serving(config, kernel, group_size=form.group_size, degree=degree)
    if form.bits == 4 and form.sym and not form.desc_act:
        return read.verdict, read.reasons
    unread = "its rules were read for 4 bits, symmetric, without act-order"
    return worst_of([read.verdict, "unknown"]), (*read.reasons, unread)


def _cut_of(kernel: str, degree: int) -> Cut | None:
    rules = ENGINES.get(kernel)
    if rules is None:
        return Cut(ranks=degree)
    if degree == 1 and not rules.parallel:
        return None
    return Cut(ranks=degree, pads_mlps=rules.pads_mlps and degree > 1, halves_groups=rules.halves_groups)
