"""Answer the requests with one model, in the worker."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from qwen_pipeline.evaluation.loading import fault_of
from qwen_pipeline.evaluation.measurement import Measurement
from qwen_pipeline.layerwise.decoding import Decoder, default_budget
from qwen_pipeline.layerwise.greedy_rules import GreedyRules
from qwen_pipeline.progress import Observe
from qwen_pipeline.qwen.families import text_config


def reply(
    decoder: Decoder,
    measurement: Measurement,
    rules: GreedyRules,
    *,
    drafts: Sequence[Sequence[int]],
    proposer: Decoder | None,
    observe: Observe,
) -> dict[str, Any]:
    """Return the fields ``replies`` and ``unreplied`` of a model's figures; an error is a finding.

    Args:
        decoder: The model.
        measurement: The requests, and the limits of their answers.
        rules: The rules of the model's generation config.
        drafts: Another model's replies, none or one for each request.
        proposer: A model in memory that drafts further tokens.
        observe: Called after each token.
    """
    budget = default_budget(decoder.context)
    fits = [prompt_bytes(decoder.weights.checkpoint.config, len(each)) <= budget for each in measurement.requests]
    taken = [number for number, each in enumerate(fits) if each]
    try:
        answers = decoder.answers(
            [measurement.requests[number] for number in taken],
            stops=rules.stops,
            limit=[measurement.request_limits[number] for number in taken],
            drafts=[drafts[number] for number in taken] if drafts else (),
            rules=rules,
            proposer=proposer,
            observe=lambda progress: observe(replace(progress, task="answer requests")),
        )
    except Exception as error:
        return {"unreplied": fault_of(error)}
    found = dict(zip(taken, answers, strict=True))
    return {"replies": tuple(found.get(number, ()) for number in range(len(fits)))}


def prompt_bytes(config: Mapping[str, Any], tokens: int) -> int:
    """Return the bytes that a prompt takes beside the weights, about: mask and scores, states, keys and values."""
    text = text_config(config)
    hidden, heads = int(text["hidden_size"]), int(text["num_attention_heads"])
    widest = max(hidden, *(int(text.get(name) or 0) for name in ("intermediate_size", "moe_intermediate_size")))
    head_dim = int(text.get("head_dim") or hidden // heads)
    kept = 2 * int(text["num_hidden_layers"]) * int(text.get("num_key_value_heads") or heads) * head_dim
    return 4 * (2 * tokens**2 + tokens * (8 * hidden + 4 * widest + kept))
