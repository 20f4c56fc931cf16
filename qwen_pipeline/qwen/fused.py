"""Modules that serving engines build as one, as data: all of their parts have codes of one format, or none has.

An engine builds a fused module from its own name before it has seen a tensor, with one format for all parts. vLLM
stops if some parts have codes and others do not, and loads parts of other widths into the wrong shapes; SGLang looks
only at the name of the fused module.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from qwen_pipeline.errors import InputRefused
from qwen_pipeline.qwen.linears import Linear
from qwen_pipeline.qwen.precision import Precision

EXPERTS = "mlp.experts"
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True, kw_only=True)
class FusedModule:
    """A module of serving engines that holds several linear layers of a decoder layer.

    Attributes:
        name: Its path in the decoder layer.
        parts: The paths of its parts; none for the experts, whose number depends on the model.
        engines: The engines that build it, as they are called in messages.
        source: The place where the rule was read.
    """

    name: str
    parts: tuple[str, ...]
    engines: str
    source: str

    def holds(self, kind: str) -> bool:
        """Return whether a linear layer, by its path in the decoder layer, is a part."""
        return kind in self.parts or (not self.parts and kind.startswith(f"{self.name}."))


_VLLM = "is_layer_gptq_quantized in vllm/model_executor/layers/quantization/utils/gptq_utils.py"
_SGLANG = "packed modules and get_linear_quant_method in python/sglang/srt/layers/quantization"

FUSED_MODULES = (
    FusedModule(
        name="self_attn.qkv_proj",
        parts=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        engines="vLLM and SGLang",
        source=f"{_VLLM}; {_SGLANG}",
    ),
    FusedModule(
        name="linear_attn.in_proj_qkvz",
        parts=("linear_attn.in_proj_qkv", "linear_attn.in_proj_z"),
        engines="vLLM and SGLang",
        source="stacked_params_mapping in vllm/model_executor/models/qwen3_5.py; sglang#38854",
    ),
    FusedModule(
        name="linear_attn.in_proj_ba",
        parts=("linear_attn.in_proj_b", "linear_attn.in_proj_a"),
        engines="vLLM and SGLang",
        source="stacked_params_mapping in vllm/model_executor/models/qwen3_5.py; sglang#38854",
    ),
    FusedModule(
        name="mlp.gate_up_proj",
        parts=("mlp.gate_proj", "mlp.up_proj"),
        engines="vLLM and SGLang",
        source=f"{_VLLM}; {_SGLANG}",
    ),
    FusedModule(
        name="mlp.shared_expert.gate_up_proj",
        parts=("mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj"),
        engines="vLLM and SGLang",
        source=f"{_VLLM}; {_SGLANG}",
    ),
    FusedModule(
        name=EXPERTS,
        parts=(),
        engines="vLLM and SGLang",
        source="get_moe_quant_method in vllm/model_executor/layers/quantization/auto_gptq.py; compressed-tensors:"
        " get_moe_method in compressed_tensors_moe, which names projections of different schemes",
    ),
)


def fused_module(kind: str) -> FusedModule | None:
    """Return the module that engines build a linear layer into; None if they build it alone."""
    return next((module for module in FUSED_MODULES if module.holds(kind)), None)


def built_kind(kind: str) -> str:
    """Return the path in the decoder layer of the module that engines build for a linear layer."""
    module = fused_module(kind)
    return module.name if module else kind


def by_built_module(linears: Sequence[Linear]) -> dict[tuple[int, str], list[Linear]]:
    """Return (layer, path of the module that engines build) -> its linear layers, in their order."""
    built: dict[tuple[int, str], list[Linear]] = {}
    for linear in linears:
        built.setdefault((linear.layer, built_kind(linear.kind)), []).append(linear)
    return built


def require_alike(linears: Sequence[Linear], precision_of: Callable[[str], Precision]) -> None:
    """Require that the parts of every fused module have one precision.

    Raises:
        InputRefused: They differ; the message names the engines and the parts.
    """
    for (_, kind), parts in by_built_module(linears).items():
        precisions = {linear.module: precision_of(linear.module) for linear in parts}
        if len(set(precisions.values())) > 1:
            raise InputRefused(
                f"{_engines(kind)} build {kind} as one module, but its parts differ: {_named(precisions)}.",
                remedy=f"Give them one precision, as with --module '{_pattern(kind)}={next(iter(precisions.values()))}'"
                " before the others.",
            )


def _engines(kind: str) -> str:
    return next(module.engines for module in FUSED_MODULES if module.name == kind)


def _pattern(kind: str) -> str:
    parts = next(module.parts for module in FUSED_MODULES if module.name == kind)
    if not parts:
        return kind.replace(".", r"\.")
    owner = parts[0].rpartition(".")[0].replace(".", r"\.")
    return rf"{owner}\.({'|'.join(part.rpartition('.')[2] for part in parts)})$"


def _named(precisions: Mapping[str, Precision]) -> str:
    firsts = dict(_first_of_each(precisions))
    return ", ".join(f"{module} {'is kept' if not each.coded else each}" for module, each in firsts.items())


def _first_of_each(named: Mapping[str, _T]) -> Iterator[tuple[str, _T]]:
    seen: set[_T] = set()
    for name, value in named.items():
        if value not in seen:
            seen.add(value)
            yield name, value
