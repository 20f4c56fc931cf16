"""Serving with a real engine: the plan, the engine's answers or outputs, and their check.

The engine computes in 16 bits with its own kernels, so its greedy answers may diverge from those of Transformers where
two tokens are about equally likely. At the first divergence, the difference between the log-probabilities that the
engine gives to the two tokens is decisive: it is small at a tie, and large if the engine computes something else.

Of a model with another head the engine computes outputs, which are compared with the merged model's by the limits of
the quantized one's (:mod:`qwen_pipeline.evaluation.head_checks`).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter

from qwen_pipeline.evaluation.figures import HeadFigures
from qwen_pipeline.evaluation.samples import agreed_length, degeneration
from qwen_pipeline.reports import CheckReport, CheckSpec

ServerEngine = Literal["vllm", "vllm-cpu"]
ServedRole = Literal["merged", "padded", "quantized"]
PoolingTask = Literal["embed", "classify", "token_classify"]
"""The outputs that vLLM's pooling runner computes, by its names."""
SERVE = "qwen_pipeline.evaluation.serving.worker:serve"
MODULE = "vllm.entrypoints.openai.api_server"
"""``vllm serve`` is its successor, but requires a package named vllm; the CPU build has another name."""

SERVED = CheckSpec(
    name="serves",
    description="The real serving engine, if one is configured, starts at every requested tensor-parallel degree and"
    " answers like Transformers, except at ties; of a model with another head, its outputs are within the limits.",
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
        prompts: Token ids of each prompt, or text.
        log: The file for the server's output.
        pooling: The outputs that are asked for; None for the answers of a language model.
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
    pooling: PoolingTask | None = None

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
    """The outcome of one server: whether it became ready, and its answers or the reason why there are none.

    Attributes:
        outputs: Instead of answers, the logits or the embedding of each text, or the logits of each of its tokens.
    """

    ready: bool
    fault: str | None = None
    answers: tuple[ServedCompletion, ...] = ()
    outputs: tuple[tuple[float, ...], ...] = ()


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
        uncompared: The reason why the engine's outputs cannot be compared, so that it was not asked.
        ready: Whether all ranks loaded the checkpoint and the server reported that it is ready.
        texts: The answers.
        expected: The reference answers, without the rules of the generation config.
        tokens: Number of tokens in each reference answer.
        partings: The first divergence of each answer; None if it equals the reference answer.
        head: Of a model with another head, the distance of its outputs from those of the merged model.
    """

    role: str
    degree: int
    engine: str
    ready: bool = False
    fault: str | None = None
    lacking: str | None = None
    uncompared: str | None = None
    texts: tuple[str, ...] = ()
    expected: tuple[str, ...] = ()
    tokens: tuple[int, ...] = ()
    partings: tuple[FirstDivergence | None, ...] = field(default_factory=tuple)
    head: HeadFigures | None = None

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


def serving_report(served: Sequence[ServingFindings], *, max_gap: float) -> CheckReport:
    """Report on :data:`SERVED` for all servers of a language model together; skipped if there are none."""
    gaps = [part.gap for each in served for part in each.partings if part]
    equal = sum(part is None for each in served for part in each.partings)
    compared = sum(len(each.partings) for each in served)
    agreement = f"{equal} of {compared} answers equal those of Transformers"
    if gaps:
        agreement += f", the others diverge at ties (largest gap {max(gaps):.2g} nats)"
    return report_on_servers(
        served,
        wrong=lambda each: _wrong_answers(each, max_gap),
        agreement=agreement if compared else "",
        measured=max(gaps, default=0.0),
        limit=max_gap,
    )


def report_on_servers(
    served: Sequence[ServingFindings],
    *,
    wrong: Callable[[ServingFindings], list[str]],
    agreement: str,
    measured: float,
    limit: float,
) -> CheckReport:
    """Report on :data:`SERVED`.

    Args:
        served: The findings of all servers.
        wrong: Returns the faults of what a server answered.
        agreement: A clause about what was compared; empty if nothing was, so that nothing can pass.
        measured: The worst measured value.
        limit: Its limit.
    """
    if not served:
        return SERVED.skipped("No serving engine is configured (validation.serve.engine).")
    engine, worst, bound = served[0].engine, *((measured, limit) if agreement else (None, None))
    if faults := [f"{each.name}: {fault}" for each in served for fault in _faults(each, wrong)]:
        return SERVED.report(passed=False, detail=f"{engine}: {'; '.join(faults)}.", measured=worst, limit=bound)
    names = [each.name for each in served if not _lack(each)]
    outcome = f"{engine} serves {', '.join(names)}: {agreement}" if names else engine
    if lacking := [f"{each.name} {lack}" for each in served if (lack := _lack(each))]:
        detail = f"{outcome}. Not served: {'; '.join(lacking)}."
        if not agreement:
            return SERVED.skipped(detail)
        return SERVED.report(passed=False, severity="WARN", detail=detail, measured=worst, limit=bound)
    return SERVED.report(passed=True, detail=f"{outcome}.", measured=worst, limit=bound)


def _lack(served: ServingFindings) -> str:
    """Return the reason why a checkpoint was not served without being at fault; empty if there is none."""
    if not served.lacking:
        return f"was not asked: {served.uncompared}" if served.uncompared else ""
    loaded = "is loaded by every rank, but cannot" if served.ready else "cannot"
    return f"{loaded} be computed on this machine: {served.lacking}"


def _faults(served: ServingFindings, wrong: Callable[[ServingFindings], list[str]]) -> list[str]:
    if _lack(served):
        return []
    if served.fault:
        return [f"{'died' if served.ready else 'did not start'}: {served.fault.rstrip('.')}"]
    return wrong(served)


def _wrong_answers(served: ServingFindings, max_gap: float) -> list[str]:
    wrong = [(number, part) for number, part in enumerate(served.partings, 1) if part and not part.gap <= max_gap]
    faults = [f"answer {number} differs from token {part.position + 1} on" for number, part in wrong]
    return [*faults, *(f"an answer {fault}" for text in served.texts if (fault := degeneration(text)) and wrong)]


_SERVER_RUN = TypeAdapter(ServerRun)


def dump_server_run(run: ServerRun) -> dict[str, Any]:
    return _SERVER_RUN.dump_python(run, mode="json")


def load_server_run(value: Mapping[str, Any]) -> ServerRun:
    return _SERVER_RUN.validate_python(value)
