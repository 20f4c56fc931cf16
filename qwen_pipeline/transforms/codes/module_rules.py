"""Rules of a GPTQ config for single modules: no codes, or codes of another format, as engines look them up.

An engine builds a module from its name, before it has seen a tensor. GPTQModel, vLLM and SGLang look the name up in
``quantization_config.dynamic``, whose keys are regular expressions, matched from the start of the name; the first match
counts. A key that begins with ``-:`` excludes modules, any other (``+:``) overrides the fields of their format. Without
an exclusion vLLM builds the draft head of Qwen3.5 and every ``FusedMoE`` layer quantized (vLLM#36954, vLLM#48816), and
SGLang the fused ``in_proj_ba`` (SGLang#38854). vLLM gives the ``score`` of a classifier its quantization too
(``as_seq_cls_model`` in ``model_executor/models/adapters.py``).

Engines look up the names of modules as they build them, such as ``qkv_proj``, GPTQModel those of the checkpoint: rules
name both.
"""

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, cast

from qwen_pipeline.checkpoint.lazy import Checkpoint
from qwen_pipeline.qwen.fused import EXPERTS, built_kind
from qwen_pipeline.qwen.names import SCORE, ParsedName, parse_name
from qwen_pipeline.transforms.codes.gptq import EXCLUDE, OVERRIDE, GptqFormat, expression_of

OVERRIDDEN = ("bits", "group_size")
"""Fields of a format that may differ between the modules of a checkpoint."""
ROUTER, CONVOLUTION = "mlp.gate", ".conv1d"
"""Modules of decoder layers that have a weight, but are not linear layers in Transformers."""
Rules = dict[str, dict[str, Any]]


def module_rules(checkpoint: Checkpoint, form: GptqFormat) -> Rules:
    """Return the value of ``dynamic`` for a checkpoint with codes, as its tensors require it.

    There is a rule for every linear layer that is stored without codes, then one for every layer whose codes have other
    bits or groups than ``form``. Draft heads and towers are named as a whole; their exclusion comes before the other
    rules, which are not bound to the decoder. A layer of the decoder is named by its kind, such as ``mlp.gate``, or
    with its number where other layers of that kind are stored in another way. Embedding and output head have fields of
    their own.
    """
    plain = list(_without_codes(checkpoint))
    rules: Rules = {rule: {} for parsed in plain for rule in _of_other_parts(parsed)}
    stored = {_stored(parsed, None) for parsed in plain if _is_in_decoder(parsed)}
    for name in checkpoint:
        if name.endswith(".qweight"):
            own = form.of(checkpoint, name.removesuffix(".qweight"))
            stored.add(_stored(parse_name(name, checkpoint.config), own))
    kinds = {kind for each in stored for kind in each.kinds}
    found = {rule: fields for kind in kinds for rule, fields in _of_kind(kind, stored, form)}
    overrides = {rule: fields for rule, fields in found.items() if rule.startswith(OVERRIDE)}
    exclusions = rules | {rule: fields for rule, fields in found.items() if rule.startswith(EXCLUDE)}
    return dict(sorted(exclusions.items())) | dict(sorted(overrides.items()))


def keeps_linears(checkpoint: Checkpoint) -> bool:
    """Return whether the decoder's layers have linear layers without codes; routers are modules of another kind.

    Such layers are ``in_proj_a`` and ``in_proj_b`` of a gated delta net, and the gate of a shared expert.
    """
    return any(
        _is_in_decoder(parsed) and parsed.module != ROUTER and not parsed.module.endswith(CONVOLUTION)
        for parsed in _without_codes(checkpoint)
    )


def excluding_rule(quantization_config: Mapping[str, Any], module: str) -> str | None:
    """Return the rule that excludes a module, or None."""
    rule = _first_match(quantization_config, module)
    return rule if rule and rule.startswith(EXCLUDE) else None


def declared_format(quantization_config: Mapping[str, Any], module: str, form: GptqFormat) -> GptqFormat | None:
    """Return the format in which engines expect a module's codes, or None if they expect its weight.

    Args:
        quantization_config: The settings, with or without rules.
        module: A name, as in the checkpoint or as an engine builds it.
        form: The format of the settings.
    """
    rule = _first_match(quantization_config, module)
    if rule and rule.startswith(EXCLUDE):
        return None
    fields = cast("Mapping[str, Any]", quantization_config["dynamic"][rule]) if rule else {}
    return replace(form, **{name: fields[name] for name in OVERRIDDEN if name in fields})


def _first_match(quantization_config: Mapping[str, Any], module: str) -> str | None:
    rules: Sequence[str] = list(quantization_config.get("dynamic") or {})
    return next((rule for rule in rules if re.match(expression_of(rule), module)), None)


def _without_codes(checkpoint: Checkpoint) -> Iterator[ParsedName]:
    for name, spec in checkpoint.items():
        parsed = parse_name(name, checkpoint.config)
        has_own_field = parsed.part in ("embedding", "head") and parsed.module != SCORE
        if parsed.parameter == "weight" and len(spec.shape) > 1 and not has_own_field:
            yield parsed


def _is_in_decoder(parsed: ParsedName) -> bool:
    return parsed.part != "mtp" and parsed.layer is not None


def _of_other_parts(parsed: ParsedName) -> Iterator[str]:
    """Yield the exclusion of a draft head, a tower, or another module outside of the decoder's layers."""
    if parsed.part == "mtp":
        yield f"{EXCLUDE}.*mtp.*"
    elif parsed.layer is None:
        yield f"{EXCLUDE}.*{re.escape(parsed.module.partition('.')[0])}.*"


class _Stored(NamedTuple):
    """A linear layer of the decoder as stored; all experts of a layer are one.

    Attributes:
        kinds: Its path in the decoder layer, and that of the module that engines build.
        form: The format of its codes; None for a weight.
    """

    layer: int
    kinds: tuple[str, str]
    form: GptqFormat | None


def _stored(parsed: ParsedName, form: GptqFormat | None) -> _Stored:
    assert parsed.layer is not None, f"{parsed} is in no layer"
    built = built_kind(parsed.module)
    return _Stored(parsed.layer, (built if built == EXPERTS else parsed.module, built), form)


def _of_kind(kind: str, stored: Collection[_Stored], form: GptqFormat) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the rules for all modules of one kind; a fused module whose parts differ can have none."""
    of_layer: dict[int, set[GptqFormat | None]] = {}
    for each in stored:
        if kind in each.kinds:
            of_layer.setdefault(each.layer, set()).add(each.form)
    alike = {layer: next(iter(forms)) for layer, forms in sorted(of_layer.items()) if len(forms) == 1}
    for own in dict.fromkeys(alike.values()):
        if own != form:
            layers = [layer for layer, each in alike.items() if each == own]
            yield (
                (OVERRIDE if own else EXCLUDE) + module_pattern(kind, None if len(layers) == len(of_layer) else layers),
                {name: getattr(own, name) for name in OVERRIDDEN if own and getattr(own, name) != getattr(form, name)},
            )


def module_pattern(kind: str, layers: Sequence[int] | None) -> str:
    """Return a regular expression for the names of a kind of module, in some layers or, if None, in all."""
    end = "" if kind == EXPERTS else "$"
    if layers is None:
        return rf".*\.{re.escape(kind)}{end}"
    numbers = str(layers[0]) if len(layers) == 1 else f"(?:{'|'.join(map(str, layers))})"
    return rf".*\.layers\.{numbers}\.{re.escape(kind)}{end}"
