"""Exclusion rules of a GPTQ config: the linear layers that stay in full precision, as engines look them up.

An engine builds a module from its name, before it has seen a tensor. GPTQModel, vLLM and SGLang look the name up in
``quantization_config.dynamic``: a key that begins with ``-:`` is a regular expression, matched from the start of the
name, of modules without codes. Without such a rule vLLM builds the draft head of Qwen3.5 and every ``FusedMoE`` layer
quantized (vLLM#36954, vLLM#48816), and SGLang the fused ``in_proj_ba`` (SGLang#38854). vLLM gives the ``score`` of a
classifier its quantization too (``as_seq_cls_model`` in ``model_executor/models/adapters.py``).
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from qwen_pipeline.checkpoint.lazy import Checkpoint
from qwen_pipeline.qwen.names import SCORE, ParsedName, parse_name

EXCLUDE = "-:"
"""Prefix of a key of ``dynamic`` that excludes modules."""
_FUSED = {"linear_attn.in_proj_a": "linear_attn.in_proj_ba", "linear_attn.in_proj_b": "linear_attn.in_proj_ba"}
"""Layer -> the layer that engines build in its place, together with its siblings."""
_EXPERTS = "mlp.experts"


def exclusion_rules(checkpoint: Checkpoint) -> dict[str, dict[str, Any]]:
    """Return the value of ``dynamic`` for a checkpoint with codes: a rule for every linear layer stored without them.

    Draft heads and towers are named as a whole. A layer of the decoder is named by its kind, such as ``mlp.gate``, or
    with its number where other layers of that kind have codes. Embedding and output head have fields of their own.
    """
    coded = [name.removesuffix(".qweight") for name in checkpoint if name.endswith(".qweight")]
    rules: dict[str, dict[str, Any]] = {}
    for parsed in _without_codes(checkpoint):
        for rule in _rules(parsed, coded):
            rules[rule] = {}
    return dict(sorted(rules.items()))


def excluding_rule(quantization_config: Mapping[str, Any], module: str) -> str | None:
    """Return the first rule that excludes a module, or None."""
    rules = (rule for rule in quantization_config.get("dynamic") or {} if rule.startswith(EXCLUDE))
    return next((rule for rule in rules if re.match(rule.removeprefix(EXCLUDE), module)), None)


def _without_codes(checkpoint: Checkpoint) -> Iterator[ParsedName]:
    for name, spec in checkpoint.items():
        parsed = parse_name(name, checkpoint.config)
        has_own_field = parsed.part in ("embedding", "head") and parsed.module != SCORE
        if parsed.parameter == "weight" and len(spec.shape) > 1 and not has_own_field:
            yield parsed


def _rules(parsed: ParsedName, coded: list[str]) -> Iterator[str]:
    if parsed.part == "mtp":
        yield f"{EXCLUDE}.*mtp.*"
    elif parsed.layer is None:
        yield f"{EXCLUDE}.*{re.escape(parsed.module.partition('.')[0])}.*"
    else:
        kind = _EXPERTS if parsed.module.startswith(f"{_EXPERTS}.") else parsed.module
        for each in dict.fromkeys((kind, _FUSED.get(kind, kind))):
            everywhere = rf"{EXCLUDE}.*\.{re.escape(each)}{'' if kind == _EXPERTS else '$'}"
            is_everywhere = not any(excluding_rule({"dynamic": {everywhere: {}}}, module) for module in coded)
            yield everywhere if is_everywhere else everywhere.replace(r".*\.", rf".*\.layers\.{parsed.layer}\.", 1)
