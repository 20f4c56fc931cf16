"""Which linear layers of a decoder layer share their inputs, and the Hessians of those inputs.

Linear layers are quantized in the order in which data meets them, and each is calibrated on what it meets when all
before it are quantized already. An expert is calibrated on the tokens that the router, which stays in full precision,
sends to it; its inputs are taken from the layer's forward pass once for all experts.
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
"""Linear layers that share one input, in the order in which data meets them; a decoder layer has some of them."""

LAST_OF_MIXERS = (("self_attn.o_proj",), ("linear_attn.out_proj",))
"""Steps after which attention, whatever its kind, need not be computed again for the layer."""

EXPERTS = "mlp.experts"


@dataclass(frozen=True, slots=True, kw_only=True)
class InputGroup:
    """Linear layers of one decoder layer that share their inputs.

    Attributes:
        linears: All of one width of inputs.
        weights: Their weights [O, I], which are to be replaced by what their codes stand for.
        hessian: Of their inputs.
    """

    linears: Sequence[Linear]
    weights: Sequence[Tensor]
    hessian: Hessian


def require_known(linears: Sequence[Linear]) -> None:
    """Refuse linear layers that are in no step.

    Raises:
        InputRefused: There are some; the message names them.
    """
    known = {kind for step in STEPS for kind in step}
    if other := {linear.kind for linear in linears if linear.kind not in known and not linear.is_expert}:
        raise InputRefused(
            f"The layer loop does not know what enters {listed(sorted(other))}.", remedy="Use the engine gptqmodel."
        )


def input_groups(
    stream: LayerStream, masks: Sequence[Tensor], module: nn.Module, linears: Sequence[Linear], *, all_experts: bool
) -> Iterator[InputGroup]:
    """Yield a layer's linear layers; the weights of each cohort must be replaced before the next is asked for.

    Args:
        stream: At the inputs of the layer.
        masks: Of each batch which tokens count, bool [B * T].
        module: The layer.
        linears: Those of the layer that are quantized.
        all_experts: Whether each expert is calibrated on every token, whatever the router says.
    """
    layer, by_kind = linears[0].layer, {linear.kind: linear for linear in linears}
    for step in STEPS:
        if members := [by_kind[kind] for kind in step if kind in by_kind]:
            hessian, entered = Hessian(members[0].in_features), list[Tensor]()
            for (inputs, *_), mask_N in zip(stream.inputs_within(layer, module, step[0]), masks, strict=True):
                hessian.add(_counted(inputs.flatten(0, -2), mask_N))
                if step in LAST_OF_MIXERS:
                    entered.append(stream.context.shelve(inputs, copies=len(masks)))
            weights = [module.get_parameter(f"{linear.kind}.weight") for linear in members]
            yield InputGroup(linears=members, weights=weights, hessian=hessian)
            if step in LAST_OF_MIXERS:
                stream.keep(layer, module, step[0], entered)
    if experts := [linear for linear in linears if linear.is_expert]:
        routed = Routed.of(stream, masks, layer, module, all_experts=all_experts)
        for number, own in groupby(experts, key=_expert_number):
            yield from _expert(module.get_submodule(EXPERTS), number, list(own), routed)


def _expert_number(linear: Linear) -> int:
    return int(linear.kind.removeprefix(f"{EXPERTS}.").split(".")[0])


def _expert(stack: nn.Module, number: int, linears: Sequence[Linear], routed: "Routed") -> Iterator[InputGroup]:
    """Yield one expert's gate and up, then its down. Transformers keeps all experts in two parameters."""
    gate, up, down = linears
    gate_up_2MH, down_HM = (stack.get_parameter(name)[number] for name in ("gate_up_proj", "down_proj"))
    into, between = Hessian(gate.in_features), Hessian(down.in_features)
    for x_NH in routed.inputs(number):
        into.add(x_NH)
    yield InputGroup(linears=(gate, up), weights=gate_up_2MH.chunk(2), hessian=into)
    for x_NH in routed.inputs(number):
        gated_NM, up_NM = functional.linear(x_NH, gate_up_2MH).chunk(2, dim=-1)
        between.add(stack.get_submodule("act_fn")(gated_NM) * up_NM)
    yield InputGroup(linears=(down,), weights=(down_HM,), hessian=between)


def _counted(rows_N: Tensor, mask_N: Tensor) -> Tensor:
    return rows_N if mask_N.all() else rows_N[mask_N]


@dataclass(frozen=True, slots=True, kw_only=True)
class Routed:
    """What enters a layer's experts: of each batch the tokens [N, H], and the experts chosen for each [N, K]."""

    batches: Sequence[tuple[Tensor, Tensor]]
    context: ComputeContext
    all_experts: bool

    @classmethod
    def of(
        cls, stream: LayerStream, masks: Sequence[Tensor], layer: int, module: nn.Module, *, all_experts: bool
    ) -> "Routed":
        """Take them from a forward pass that ends there; they wait where the hidden states of batches do."""
        context, batches = stream.context, list[tuple[Tensor, Tensor]]()
        for (x_NH, chosen_NK, *_), mask_N in zip(stream.inputs_within(layer, module, EXPERTS), masks, strict=True):
            tokens_NH = context.shelve(_counted(x_NH, mask_N), copies=len(masks))
            batches.append((tokens_NH, _counted(chosen_NK, mask_N)))
        return cls(batches=batches, context=context, all_experts=all_experts)

    def inputs(self, expert: int) -> Iterator[Tensor]:
        """Yield the tokens of each batch that an expert is calibrated on, where any are."""
        for x_NH, chosen_NK in self.batches:
            if self.all_experts:
                yield self.context.fetch(x_NH)
            elif (hit_N := (chosen_NK == expert).any(dim=-1)).any():
                yield self.context.fetch(x_NH[hit_N.to(x_NH.device)])
