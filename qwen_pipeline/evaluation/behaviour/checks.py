"""The checks of behaviour, and the table of both models' answers.

A request counts only if the merged model does what it asks for: what a fine-tune never did, quantization cannot break.
"""

from collections.abc import Mapping, Sequence

from qwen_pipeline.errors import listed
from qwen_pipeline.evaluation.behaviour.findings import Behaviour, Exchange, Kind
from qwen_pipeline.evaluation.figures import DivergenceFigures
from qwen_pipeline.evaluation.findings import MERGED, QUANTIZED
from qwen_pipeline.evaluation.limits import Limits
from qwen_pipeline.evaluation.samples import Sample
from qwen_pipeline.reports import CheckReport, CheckSpec

CALLS = CheckSpec(
    name="tool_calls",
    description="By the model's own chat template, the quantized model makes the merged model's tool calls.",
    blocking=False,
)
THINKING = CheckSpec(
    name="thinking_length",
    description="The quantized model ends its thought where the merged model does, and not much later.",
    blocking=False,
)
OBJECTS = CheckSpec(
    name="json_answers",
    description="Asked for JSON, the quantized model answers with it as the merged model does.",
    blocking=False,
)
STOPS = CheckSpec(
    name="stop_tokens",
    description="The quantized model ends its answers as the merged model does, and the token that ends an answer in"
    " the chat template is a stop token.",
    blocking=False,
)
NEEDLES = CheckSpec(
    name="needles_found",
    description="The quantized model finds a sentence in a long text where the merged model does.",
    blocking=False,
)
ALONG = CheckSpec(
    name="kl_along_context",
    description="KL(merged || quantized) does not grow along the context.",
    blocking=False,
)
BEHAVIOUR_CHECKS = (CALLS, THINKING, OBJECTS, STOPS, NEEDLES, ALONG)
MINIMUM_BEHAVIOUR_CHECKS = (CALLS, OBJECTS, STOPS, NEEDLES)
"""Those whose limit is a minimum."""
COLUMNS = ("request", "of tokens", "merged", "quantized")
ENOUGH_POSITIONS = 128
"""Predicted tokens of a window from which its first and its last quarter are compared."""


def behaviour_reports(
    behaviour: Behaviour, samples: Sequence[Sample], divergence: DivergenceFigures | None, limits: Limits
) -> list[CheckReport]:
    """Return a report for each of :data:`BEHAVIOUR_CHECKS`, in order."""
    return [
        _equal(CALLS, "tool call", behaviour, limits.min_same_calls, "make the same call"),
        _thinking(behaviour, limits.max_thinking_ratio),
        _equal(OBJECTS, "JSON", behaviour, limits.min_json, "answer with such JSON"),
        _stops(behaviour, samples, limits.min_ended),
        _equal(NEEDLES, "needle", behaviour, limits.min_needles, "find the sentence"),
        _along(divergence, limits.max_kl_growth),
    ]


def behaviour_rows(behaviour: Behaviour) -> list[Sequence[str]]:
    """Return a row for each request, under :data:`COLUMNS`."""
    return [
        (
            f"{each.kind}: {each.request}",
            str(each.prompt_tokens),
            each.words(each.merged),
            each.words(each.quantized),
        )
        for each in behaviour.exchanges
    ]


def _equal(check: CheckSpec, kind: Kind, behaviour: Behaviour, limit: float, what: str) -> CheckReport:
    """Report the share of requests for which the quantized answer is worth what the merged one is worth.

    Tool calls have to be equal; of JSON and needles it is enough that they are there.
    """
    judged = [each for each in behaviour.of_kind(kind) if each.value(each.merged) is not None]
    if skipped := _unjudged(check, kind, behaviour, judged):
        return skipped
    kept = [each for each in judged if _is_kept(each)]
    lost = [f"{each.request!r}: {each.words(each.quantized)}, merged: {each.words(each.merged)}"
            for each in judged if each not in kept]  # fmt: skip
    share = len(kept) / len(judged)
    return check.report(
        passed=share >= limit,
        measured=share,
        limit=limit,
        detail=f"Both {what} for {len(kept)} of {len(judged)} requests."
        + (f" {listed(lost)}." if lost else "")
        + _more(kind, behaviour),
    )


def _is_kept(each: Exchange) -> bool:
    value = each.value(each.quantized)
    return value == each.value(each.merged) if each.kind == "tool call" else value is not None


def _thinking(behaviour: Behaviour, limit: float) -> CheckReport:
    judged = [each for each in behaviour.of_kind("thinking") if each.merged and each.merged.thought]
    if skipped := _unjudged(THINKING, "thinking", behaviour, judged):
        return skipped
    ratio = max(_tokens_of_thought(each) / (each.merged.thought or 1) for each in judged if each.merged)
    return THINKING.report(
        passed=ratio <= limit,
        measured=ratio,
        limit=limit,
        detail="Tokens up to the end of the thought, quantized over merged: "
        + listed([f"{each.words(each.quantized)} over {each.words(each.merged)}" for each in judged])
        + ".",
    )


def _tokens_of_thought(each: Exchange) -> int:
    """Return the length of a thought, or the least that it can be."""
    return each.quantized.thought or each.quantized.tokens if each.quantized else 0


def _stops(behaviour: Behaviour, samples: Sequence[Sample], limit: float) -> CheckReport:
    """Report the share of answers that end, among those that the merged model ends.

    One that is cut off before it has twice the length of the merged one counts as ended.
    """
    lengths = [
        *((len(each.reference.tokens), len(each.candidate.tokens), each.candidate.ended)
          for each in samples if each.reference and each.candidate and each.reference.ended),
        *((each.merged.tokens, each.quantized.tokens, each.quantized.ended)
          for each in behaviour.exchanges if each.merged and each.quantized and each.merged.ended),
    ]  # fmt: skip
    end = behaviour.turn_end
    if not lengths and end is None:
        return STOPS.skipped("No answer of the merged model ended, and no chat template says how answers end.")
    ended = sum(has_ended or tokens < 2 * merged for merged, tokens, has_ended in lengths)
    unknown = end is not None and end not in behaviour.stops
    faults = [
        *([f"the chat template ends answers with token {end}, which is none of the stop tokens"
           f" {', '.join(map(str, behaviour.stops)) or '(there are none)'}: add it to eos_token_id in"
           " generation_config.json of the fine-tune"] if unknown else []),
        *([f"{len(lengths) - ended} answers go on for twice the length of the merged model's"]
          if ended < len(lengths) else []),
    ]  # fmt: skip
    share = ended / len(lengths) if lengths else None
    return STOPS.report(
        passed=not unknown and (share is None or share >= limit),
        measured=share,
        limit=None if share is None else limit,
        detail=f"{ended} of {len(lengths)} answers that the merged model ends end too."
        + (f" {listed(faults)}." if faults else ""),
    )


def _along(divergence: DivergenceFigures | None, limit: float) -> CheckReport:
    by_position = divergence.by_position if divergence else ()
    if len(by_position) < ENOUGH_POSITIONS:
        return ALONG.skipped(
            f"KL is known at {len(by_position)} positions of a window; raise seq_len, as {ENOUGH_POSITIONS} are needed."
        )
    quarter = len(by_position) // 4
    first, last = (sum(part) / quarter for part in (by_position[:quarter], by_position[-quarter:]))
    ratio = last / first if first else 1.0 if last == first else float("inf")
    return ALONG.report(
        passed=ratio <= limit,
        measured=ratio,
        limit=limit,
        detail=f"Mean KL of the last quarter of each window over that of the first: {last:.3g} over {first:.3g} nats.",
    )


def _unjudged(check: CheckSpec, kind: Kind, behaviour: Behaviour, judged: Sequence[Exchange]) -> CheckReport | None:
    """Return a report if there is nothing to judge: skipped, or failed if the quantized model did not answer."""
    if fault := behaviour.faults.get(QUANTIZED):
        return check.report(passed=False, detail=f"The quantized model did not answer: {fault}.")
    if fault := behaviour.faults.get(MERGED):
        return check.skipped(f"The merged model did not answer: {fault}.")
    exchanges = behaviour.of_kind(kind)
    if not exchanges:
        return check.skipped(behaviour.left_out.get(kind, "The models were not asked."))
    if not judged:
        said = listed([each.words(each.merged) for each in exchanges])
        return check.skipped(f"The merged model itself does not do what is asked: {said}.{_more(kind, behaviour)}")
    if any(each.quantized is None for each in judged):
        return check.report(passed=False, detail="Not measured: the quantized model has no answers.")
    return None


def _more(kind: Kind, behaviour: Behaviour) -> str:
    left_out: Mapping[str, str] = behaviour.left_out
    return f" {left_out[kind]}" if kind in left_out else ""
