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
from qwen_pipeline.quantization.steps.target_correction import InputError
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

NORMS = {
    "self_attn.o_proj": "input_layernorm",
    "linear_attn.out_proj": "input_layernorm",
    "mlp.down_proj": "post_attention_layernorm",
}
"""Linear layer whose outputs are added to the residual stream -> the norm that takes that stream as its input.

Experts are not among them, as their outputs are weighted, nor are layers that mix several residual streams.
"""

EXPERTS = "mlp.experts"


@dataclass(frozen=True, slots=True, kw_only=True)
class InputGroup:
    """Linear layers of one decoder layer that share their inputs.

    Attributes:
        linears: Linear layers, all with the same number of inputs.
        weights: Their weights [O, I], to be replaced in place by the dequantized codes.
        hessian: Hessian of their inputs.
        error: Error of their inputs; empty if the full-precision layer is not known.
        expert: Number of the expert that they belong to.
    """

    linears: Sequence[Linear]
    weights: Sequence[Tensor]
    hessian: Hessian
    error: InputError
    expert: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerPass:
    """A decoder layer of one model, and the stream whose hidden states are its inputs."""

    stream: LayerStream
    layer: int
    module: nn.Module

    def inputs_on_the_way(
        self, reached: Sequence[str], *, to_the_end: bool = False
    ) -> Iterator[Sequence[tuple[Tensor, ...]]]:
        capture = self.stream.run_noting if to_the_end else self.stream.inputs_on_the_way
        return capture(self.layer, self.module, reached)


def _inputs(
    passes: Sequence[LayerPass], reached: Sequence[str], *, last: bool
) -> list[Iterator[Sequence[tuple[Tensor, ...]]]]:
    """Return the inputs of modules in each model; a full-precision layer need not be run again after its last ones."""
    return [each.inputs_on_the_way(reached, to_the_end=last and each is not passes[0]) for each in passes]


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
    passes: Sequence[LayerPass], masks: Sequence[Tensor], linears: Sequence[Linear], *, all_experts: bool
) -> Iterator[InputGroup]:
    """Yield the input groups of a layer; the weights of each must be replaced before the next is requested.

    Args:
        passes: The layer whose linear layers are quantized one after another; then, to measure the error of inputs, the
            same layer of the full-precision model, whose stream has passed the layer in the end.
        masks: For each batch the tokens that count, bool [B * T].
        linears: The linear layers of the layer that are quantized; others keep their weights.
        all_experts: Whether each expert is calibrated on every token, regardless of the router.
    """
    by_kind = {linear.kind: linear for linear in linears}
    experts = [linear for linear in linears if linear.is_expert]
    last = None if experts or not linears else [step for step in STEPS if not by_kind.keys().isdisjoint(step)][-1]
    for step in STEPS:
        if members := [by_kind[kind] for kind in step if kind in by_kind]:
            captured: list[list[Tensor]] = [[] for _ in passes]
            kept = captured if step in LAST_OF_MIXERS else ()
            hessian, error = _measure(passes, members, masks, kept, last=step == last)
            weights = [passes[0].module.get_parameter(f"{linear.kind}.weight") for linear in members]
            yield InputGroup(linears=members, weights=weights, hessian=hessian, error=error)
            if step in LAST_OF_MIXERS:
                for each, inputs in zip(passes, captured, strict=True):
                    each.stream.cache_outputs(each.layer, each.module, step[0], inputs)
        elif linears and step in LAST_OF_MIXERS and step[0] in dict(passes[0].module.named_modules()):
            for each in passes:
                inputs = _offloaded(each, step[0], copies=len(passes) * len(masks))
                each.stream.cache_outputs(each.layer, each.module, step[0], inputs)
    if experts:
        inputs = ExpertInputs.capture(passes, masks, all_experts=all_experts)
        for number, group in groupby(experts, key=_expert_number):
            yield from _expert_groups(passes, number, list(group), inputs)
    for each in () if linears else passes[1:]:
        each.stream.run(each.layer, each.module)


def _offloaded(each: LayerPass, kind: str, *, copies: int) -> list[Tensor]:
    """Return all inputs of a linear layer that keeps its weight, stored like the hidden states."""
    return [each.stream.context.offload(reaching[-1][0], copies=copies) for reaching in each.inputs_on_the_way([kind])]


def _measure(
    passes: Sequence[LayerPass],
    linears: Sequence[Linear],
    masks: Sequence[Tensor],
    captured: Sequence[list[Tensor]],
    *,
    last: bool,
) -> tuple[Hessian, InputError]:
    """Return the Hessian of linear layers' inputs, and their error; all inputs are appended to ``captured``."""
    linear, children = linears[0], dict(passes[0].module.named_children())
    norm = NORMS.get(linear.kind) if len(passes) > 1 else None
    reached = [norm, linear.kind] if norm in children else [linear.kind]
    hessian, error = Hessian(linear.in_features), InputError()
    of_outputs = len(linears) == 1 and (len(reached) > 1 or linear.out_features <= linear.in_features)
    weight_OI = passes[0].module.get_parameter(f"{linear.kind}.weight")
    for *found, mask_N in zip(*_inputs(passes, reached, last=last), masks, strict=True):
        inputs = [_masked(reaching[-1][0].flatten(0, -2), mask_N) for reaching in found]
        hessian.add(inputs[0])
        if len(passes) > 1 and of_outputs:
            residuals = [_masked(reaching[0][0].flatten(0, -2), mask_N) for reaching in found if len(reached) > 1]
            error.add_outputs(weight_OI, full=inputs[1], quantized=inputs[0], residuals=residuals[::-1])
        elif len(passes) > 1:
            error.add(full=inputs[1], quantized=inputs[0])
        if captured:
            for each, reaching, kept in zip(passes, found, captured, strict=True):
                kept.append(each.stream.context.offload(reaching[-1][0], copies=len(passes) * len(masks)))
    return hessian, error


def _expert_number(linear: Linear) -> int:
    return int(linear.kind.removeprefix(f"{EXPERTS}.").split(".")[0])


def _expert_groups(
    passes: Sequence[LayerPass], number: int, linears: Sequence[Linear], inputs: "ExpertInputs"
) -> Iterator[InputGroup]:
    """Yield the gate and up projections of an expert, then its down projection.

    Transformers stores all experts of a layer in two parameters.
    """
    gate, up, down = linears
    stacks = [each.module.get_submodule(EXPERTS) for each in passes]
    gate_up_2MH, down_HM = (stacks[0].get_parameter(name)[number] for name in ("gate_up_proj", "down_proj"))
    hessian, error = Hessian(gate.in_features), InputError()
    for x_NH, *full in inputs.of(number):
        hessian.add(x_NH)
        if full:
            error.add(full=full[0], quantized=x_NH)
    yield InputGroup(linears=(gate, up), weights=gate_up_2MH.chunk(2), hessian=hessian, error=error, expert=number)
    hessian, error = Hessian(down.in_features), InputError()
    for found in inputs.of(number):
        x_NM, *full = (_gated(stack, number, x_NH) for stack, x_NH in zip(stacks, found, strict=True))
        hessian.add(x_NM)
        if full:
            error.add(full=full[0], quantized=x_NM)
    yield InputGroup(linears=(down,), weights=(down_HM,), hessian=hessian, error=error, expert=number)


def _gated(stack: nn.Module, number: int, x_NH: Tensor) -> Tensor:
    """Return the inputs [N, M] of an expert's down projection."""
    gate_NM, up_NM = functional.linear(x_NH, stack.get_parameter("gate_up_proj")[number]).chunk(2, dim=-1)
    return stack.get_submodule("act_fn")(gate_NM) * up_NM


def _masked(rows_N: Tensor, mask_N: Tensor) -> Tensor:
    return rows_N if mask_N.all() else rows_N[mask_N]


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertInputs:
    """Inputs of a layer's experts, in each model.

    Attributes:
        batches: For each batch the tokens [N, H] of each model, and the experts chosen for each token [N, K] in the
            first, the quantized one.
    """

    batches: Sequence[tuple[Sequence[Tensor], Tensor]]
    context: ComputeContext
    all_experts: bool

    @classmethod
    def capture(cls, passes: Sequence[LayerPass], masks: Sequence[Tensor], *, all_experts: bool) -> "ExpertInputs":
        """Capture the inputs in forward passes that end at the experts; they are stored like the hidden states."""
        context, batches = passes[0].stream.context, list[tuple[Sequence[Tensor], Tensor]]()
        for *found, mask_N in zip(*_inputs(passes, [EXPERTS], last=True), masks, strict=True):
            copies = len(passes) * len(masks)
            tokens = [context.offload(_masked(reaching[0][0], mask_N), copies=copies) for reaching in found]
            batches.append((tokens, _masked(found[0][0][1], mask_N)))
        return cls(batches=batches, context=context, all_experts=all_experts)

    def of(self, expert: int) -> Iterator[Sequence[Tensor]]:
        """Yield for each batch the tokens [N, H] that an expert is calibrated on, in each model.

        Batches without any are left out.
        """
        for tokens, chosen_NK in self.batches:
            if self.all_experts:
                yield [self.context.fetch(x_NH) for x_NH in tokens]
            elif (hit_N := (chosen_NK == expert).any(dim=-1)).any():
                yield [self.context.fetch(x_NH[hit_N.to(x_NH.device)]) for x_NH in tokens]
