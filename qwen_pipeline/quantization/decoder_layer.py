"""Quantization of one decoder layer of the layer loop: its input groups in turn, then the layer as a whole."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from qwen_pipeline.checkpoint.measure import Stopwatch, resident_peak
from qwen_pipeline.layerwise.model import ComputeContext
from qwen_pipeline.quantization.evidence import ModuleEvidence
from qwen_pipeline.quantization.input_groups import EXPERTS, InputGroup, LayerPass, input_groups
from qwen_pipeline.quantization.losses import NOT_SOLVED
from qwen_pipeline.quantization.recipes import LearnedRounding, Recipe
from qwen_pipeline.quantization.solver import Solved, solve
from qwen_pipeline.quantization.spec import QuantSpec
from qwen_pipeline.quantization.steps.learned_rounding import (
    LayerBatch,
    Offsets,
    Place,
    learn_rounding,
    repeatable_gradients,
)
from qwen_pipeline.quantization.steps.solve import repacked, solve_by_recipe
from qwen_pipeline.qwen.linears import Linear
from qwen_pipeline.transforms.codes.gptq import CODES

MEASURED_LAYERS, EXPERTS_A_SAMPLE = 16, 16
"""Errors after each step are measured in this many layers, evenly spaced, and there for one in this many experts."""

Report = Callable[[Linear, float], None]
"""Reports the loss of a linear layer once it is solved."""


class LayerQuantization:
    """Quantizes the linear layers of one decoder layer.

    Args:
        passes: The layer to quantize and, for a recipe that compares models, the same layer of the full-precision one.
        masks: For each batch the calibration tokens that count, bool [B * T].
        linears: The linear layers of the layer that get codes.
        spec: Settings of the quantization.
        clock: Measures the parts.

    Attributes:
        rows: Figures of the linear layers that are quantized.
        errors: Errors of the layer's outputs: see :class:`~qwen_pipeline.quantization.output.layer_shards.LayerRecord`.
    """

    def __init__(
        self,
        passes: Sequence[LayerPass],
        masks: Sequence[Tensor],
        linears: Sequence[Linear],
        spec: QuantSpec,
        clock: "LayerClock",
    ) -> None:
        self._quantized, self._full = passes[0], passes[1] if len(passes) > 1 else None
        self._masks, self._linears, self._spec, self._clock = masks, linears, spec, clock
        self._solved: dict[str, Solved] = {}
        self.rows: list[ModuleEvidence] = []
        self.errors: dict[str, float] = {}

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The codes by their names in the checkpoint."""
        return {f"{name}.{code}": getattr(each.packed, code) for name, each in self._solved.items() for code in CODES}

    def run(self, report: Report) -> None:
        """Quantize the layer, and run all batches through it, so that the streams hold the inputs of the next one."""
        module, learning = self._quantized.module, self._spec.steps.learned_rounding
        children = dict(module.named_children())
        self._solve(report)
        if learning and self._linears:
            for name, child in children.items():
                setattr(module, name, child)  # instead of the cached outputs of attention
            self._learn(learning)
            self._clock.lap("learn")
        self._quantized.stream.run(self._quantized.layer, module)
        if self._full:
            self.errors["output"] = _relative_error(self._quantized, self._full, self._masks)
        self._clock.lap("forward")

    def _solve(self, report: Report) -> None:
        """Replace the weights of the layer, input group by input group, with the dequantized codes."""
        passes = [self._quantized, *([self._full] if self._full else [])]
        for group in input_groups(passes, self._masks, self._linears, all_experts=self._spec.all_experts):
            self._clock.lap("capture")
            tokens, solutions = group.hessian.tokens, _solutions(group, self._spec, measured=self._is_measured(group))
            for linear, weight, solved in zip(group.linears, group.weights, solutions, strict=True):
                solved.packed.write_weight(weight)
                self._solved[linear.module] = solved
                self.rows.append(self._row(linear, solved, tokens))
                report(linear, solved.loss)

    def _is_measured(self, group: InputGroup) -> bool:
        layers = len(self._quantized.stream.parts)
        is_sampled = self._quantized.layer % -(-layers // MEASURED_LAYERS) == 0
        return is_sampled and (group.expert or 0) % EXPERTS_A_SAMPLE == 0

    def _row(self, linear: Linear, solved: Solved, tokens: int) -> ModuleEvidence:
        return ModuleEvidence(
            module=linear.module,
            layer=linear.layer,
            kind=linear.kind,
            loss=solved.loss,
            tokens=tokens,
            damp=solved.damp,
            rounded=solved.loss >= NOT_SOLVED,
            seconds=round(self._clock.lap("solve"), 3),
            gpu_peak_bytes=self._clock.gpu_peak_bytes,
            host_peak_bytes=resident_peak(),
            groups=solved.packed.scales.numel(),
            zero_groups=solved.zero_groups,
            saturated_groups=solved.saturated_groups,
            **solved.errors,
        )

    def _learn(self, settings: LearnedRounding) -> None:
        """Learn the rounding of the layer, and replace its weights and codes."""
        random = torch.Generator().manual_seed(self._spec.seed * 2**16 + self._quantized.layer)
        with repeatable_gradients():
            offsets = {
                linear: Offsets(
                    _place(linear), *_before_rounding(self._solved[linear.module]), self._spec.of(linear.module).bits
                )
                for linear in self._linears
            }
            error = learn_rounding(
                self._quantized.module,
                self._batches(),
                list(offsets.values()),
                settings,
                lambda count: torch.randperm(count, generator=random).tolist(),
            )
        self.errors["before_learning"] = error.before
        if error.travel is not None:
            self.errors["travel"] = error.travel
        rows = {row.module: row for row in self.rows}
        for linear, learned in offsets.items():
            own = self._spec.of(linear.module)
            solved = repacked(learned.weight(), learned.scales, self._solved[linear.module], own)
            self._solved[linear.module] = solved
            counts = {"zero_groups": solved.zero_groups, "saturated_groups": solved.saturated_groups}
            rows[linear.module] = replace(rows[linear.module], **counts)
            place = learned.place
            solved.packed.write_weight(self._quantized.module.get_parameter(place.parameter)[place.index])
        self.rows = list(rows.values())

    def _batches(self) -> list[LayerBatch]:
        assert self._full, "a recipe that learns compares models"
        stream, targets = self._quantized.stream, self._full.stream.hidden
        arguments = stream.arguments(self._quantized.layer)
        return [
            LayerBatch(hidden=hidden, arguments=own, target=target, mask=mask)
            for hidden, own, target, mask in zip(stream.hidden, arguments, targets, self._masks, strict=True)
        ]


class LayerClock(Stopwatch):
    """Measures the seconds of a layer's parts and its peak GPU memory; a lap waits for the GPU."""

    def __init__(self, context: ComputeContext) -> None:
        self._on_gpu = context.device.type == "cuda"
        if self._on_gpu:
            torch.cuda.reset_peak_memory_stats()
        super().__init__()

    def lap(self, part: str) -> float:
        if self._on_gpu:
            torch.cuda.synchronize()
        return super().lap(part)

    @property
    def gpu_peak_bytes(self) -> int:
        return torch.cuda.max_memory_allocated() if self._on_gpu else 0


def _solutions(group: InputGroup, spec: QuantSpec, *, measured: bool) -> Iterable[Solved]:
    weights = {each.module: weight for each, weight in zip(group.linears, group.weights, strict=True)}
    precisions = set(map(spec.precision_of, weights))
    assert len(precisions) == 1, "linear layers that share their inputs are built as one, and so have one precision"
    own = spec.of(next(iter(weights)))
    if spec.steps == Recipe():
        return solve(weights, group.hessian, own)
    return solve_by_recipe(weights, group.hessian, group.error, own, measured=measured).values()


def _before_rounding(solved: Solved) -> tuple[Tensor, Tensor]:
    """Return the weight that was about to be rounded, [O, I], and the scales, [O, G]."""
    assert solved.target is not None, "the solver keeps targets for a recipe that learns"
    return solved.target, solved.packed.scales.T.float()


def _place(linear: Linear) -> Place:
    """Return the place of a linear layer's weight among the parameters of its decoder layer."""
    if not linear.is_expert:
        return Place(parameter=f"{linear.kind}.weight")
    number, name = linear.kind.removeprefix(f"{EXPERTS}.").split(".")
    if name == "down_proj":
        return Place(parameter=f"{EXPERTS}.down_proj", index=(int(number),))
    half = linear.out_features
    rows = slice(0, half) if name == "gate_proj" else slice(half, 2 * half)
    return Place(parameter=f"{EXPERTS}.gate_up_proj", index=(int(number), rows))


def _relative_error(one: LayerPass, other: LayerPass, masks: Sequence[Tensor]) -> float:
    """Return the squared distance of two streams as a share of the square of the second, over the tokens that count."""
    context, sums = one.stream.context, torch.zeros(2, dtype=torch.float64, device=one.stream.context.device)
    for hidden, expected, mask_N in zip(one.stream.hidden, other.stream.hidden, masks, strict=True):
        own, full = (context.fetch(each).flatten(0, -2)[mask_N].float() for each in (hidden, expected))
        sums += torch.stack([(own - full).square().sum(), full.square().sum()])
    distance, square = sums.tolist()
    return distance / square if square else 0.0
