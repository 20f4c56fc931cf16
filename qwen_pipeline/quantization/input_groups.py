"""Linear layers of a decoder layer that share their inputs, and the Hessians of those inputs.

Linear layers are quantized in the order in which data passes through them; each is calibrated on the outputs of the
layers before it that are quantized already. An expert is calibrated on the tokens that the router, which stays in full
precision, sends to it; its inputs are captured once for all experts, in a forward pass of the layer.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

from torch import Tensor, nn
from torch.nn import functional

from qwen_pipeline.errors import InputRefused, listed
from qwen_pipeline.layerwise.forward import LayerStream
from qwen_pipeline.layerwise.model import ComputeContext
from qwen_pipeline.quantization.solver import Hessian
from qwen_pipeline.qwen.linears import Linear

STEPS = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("linear_attn.in_proj_qkvz",),
    ("linear_attn.in_proj_qkv", "linear_attn.in_proj_z"),
    ("linear_attn.out_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
    ("mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj"),
    ("mlp.shared_expert.down_proj",),
)
"""Linear layers that share one input, in the order in which data passes through them; no decoder layer has them all."""

LAST_OF_MIXERS = (("self_attn.o_proj",), ("linear_attn.out_proj",))
"""The last step of each kind of attention; after it, attention need not be computed again for the layer."""

EXPERTS = "mlp.experts"


@dataclass(frozen=True, slots=True, kw_only=True)
class InputGroup:
    """Linear layers of one decoder layer that share their inputs.

    Attributes:
        linears: Linear layers, all with the same number of inputs.
        weights: Their weights [O, I], to be replaced in place by the dequantized codes.
        hessian: Hessian of their inputs.
    """

    linears: Sequence[Linear]
    weights: Sequence[Tensor]
    hessian: Hessian


def require_known(linears: Sequence[Linear]) -> None:
    """Require that each linear layer is an expert or belongs to one of :data:`STEPS`.

    Raises:
        InputRefused: A linear layer is neither; the message names it.
    """
    known = {kind for step in STEPS for kind in step}
    if other := {linear.kind for linear in linears if linear.kind not in known and not linear.is_expert}:
        raise InputRefused(
            f"The quantizer layerwise does not know the inputs of {listed(sorted(other))}.",
            remedy="Set engine to 'gptqmodel'.",
        )


def input_groups(
    stream: LayerStream, masks: Sequence[Tensor], module: nn.Module, linears: Sequence[Linear], *, all_experts: bool
) -> Iterator[InputGroup]:
    """Yield the input groups of a layer; the weights of each must be replaced before the next is requested.

    Args:
        stream: A stream whose hidden states are the inputs of the layer.
        masks: For each batch the tokens that count, bool [B * T].
        module: The layer.
        linears: The linear layers of the layer that are quantized.
        all_experts: Whether each expert is calibrated on every token, regardless of the router.
    """
    layer, by_kind = linears[0].layer, {linear.kind: linear for linear in linears}
    for step in STEPS:
        if members := [by_kind[kind] for kind in step if kind in by_kind]:
            hessian, captured = Hessian(members[0].in_features), list[Tensor]()
            for (inputs, *_), mask_N in zip(stream.inputs_within(layer, module, step[0]), masks, strict=True):
                hessian.add(_masked(inputs.flatten(0, -2), mask_N))
                if step in LAST_OF_MIXERS:
                    captured.append(stream.context.offload(inputs, copies=len(masks)))
            weights = [module.get_parameter(f"{linear.kind}.weight") for linear in members]
            yield InputGroup(linears=members, weights=weights, hessian=hessian)
            if step in LAST_OF_MIXERS:
                stream.cache_outputs(layer, module, step[0], captured)
    if experts := [linear for linear in linears if linear.is_expert]:
        inputs = ExpertInputs.capture(stream, masks, layer, module, all_experts=all_experts)
        for number, group in groupby(experts, key=_expert_number):
            yield from _expert_groups(module.get_submodule(EXPERTS), number, list(group), inputs)


def _expert_number(linear: Linear) -> int:
    return int(linear.kind.removeprefix(f"{EXPERTS}.").split(".")[0])


def _expert_groups(
    stack: nn.Module, number: int, linears: Sequence[Linear], inputs: "ExpertInputs"
) -> Iterator[InputGroup]:
    """Yield the gate and up projections of an expert, then its down projection.

    Transformers stores all experts of a layer in two parameters.
    """
    gate, up, down = linears
    gate_up_2MH, down_HM = (stack.get_parameter(name)[number] for name in ("gate_up_proj", "down_proj"))
    into_expert, into_down = Hessian(gate.in_features), Hessian(down.in_features)
    for x_NH in inputs.of(number):
        into_expert.add(x_NH)
    yield InputGroup(linears=(gate, up), weights=gate_up_2MH.chunk(2), hessian=into_expert)
    for x_NH in inputs.of(number):
        gated_NM, up_NM = functional.linear(x_NH, gate_up_2MH).chunk(2, dim=-1)
        into_down.add(stack.get_submodule("act_fn")(gated_NM) * up_NM)
    yield InputGroup(linears=(down,), weights=(down_HM,), hessian=into_down)


def _masked(rows_N: Tensor, mask_N: Tensor) -> Tensor:
    return rows_N if mask_N.all() else rows_N[mask_N]


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertInputs:
    """Inputs of a layer's experts: for each batch the tokens [N, H], and the experts chosen for each token [N, K]."""

    batches: Sequence[tuple[Tensor, Tensor]]
    context: ComputeContext
    all_experts: bool

    @classmethod
    def capture(
        cls, stream: LayerStream, masks: Sequence[Tensor], layer: int, module: nn.Module, *, all_experts: bool
    ) -> "ExpertInputs":
        """Capture the inputs in a forward pass that ends at the experts; they are stored like the hidden states."""
        context, batches = stream.context, list[tuple[Tensor, Tensor]]()
        for (x_NH, chosen_NK, *_), mask_N in zip(stream.inputs_within(layer, module, EXPERTS), masks, strict=True):
            tokens_NH = context.offload(_masked(x_NH, mask_N), copies=len(masks))
            batches.append((tokens_NH, _masked(chosen_NK, mask_N)))
        return cls(batches=batches, context=context, all_experts=all_experts)

    def of(self, expert: int) -> Iterator[Tensor]:
        """Yield the tokens [N, H] of each batch that an expert is calibrated on; batches without any are left out."""
        for x_NH, chosen_NK in self.batches:
            if self.all_experts:
                yield self.context.fetch(x_NH)
            elif (hit_N := (chosen_NK == expert).any(dim=-1)).any():
                yield self.context.fetch(x_NH[hit_N.to(x_NH.device)])
