"""Learned rounding of a whole decoder layer: AutoRound (arXiv:2309.05516), from where GPTQ ends.

A code is ``clamp(round(w / s + v))`` for the weight ``w`` that GPTQ was about to round and its scale ``s``, and stands
for ``s (1 + d)`` times itself. The offset ``v``, at first 0 and at most half a code, and the change ``d`` of each scale
are learned, so that the outputs of the layer for the inputs of the quantized model come closer to the full-precision
model's: offsets by the sign of the gradient, scales by Adam. The gradient passes through rounding as if it were the
identity. Zeros stay zeros, and equal rows stay equal, so padding is preserved.

Codes do not depend on ``d``: if they were rounded again for each scale, every step would undo some of what GPTQ chose.

What is learned is kept only if the error also falls on windows that nothing was learned from.
"""

from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from qwen_pipeline.quantization.recipes import LearnedRounding
from qwen_pipeline.quantization.steps.scale_search import stored

Index = tuple[int | slice, ...]
HELD_OUT_EVERY = 8
"""One in this many windows is held out; of fewer windows the last one, if there are at least two."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """A weight's place in a layer: a parameter, and the part of it that is the weight."""

    parameter: str
    index: Index = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerBatch:
    """One batch of the calibration tokens.

    Attributes:
        hidden: Inputs of the layer in the quantized model, [B, T, H].
        arguments: Keyword arguments of the layer.
        target: Outputs of the layer in the full-precision model, [B, T, H].
        mask: The tokens that count, bool [B * T].
    """

    hidden: Tensor
    arguments: Mapping[str, Any]
    target: Tensor
    mask: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerError:
    """Squared error of a layer's outputs for all tokens, as a share of their squares, before and after learning.

    Attributes:
        travel: Largest distance, in codes, that an offset could move; None if nothing was learned.
    """

    before: float
    after: float
    travel: float | None = None


class Offsets:
    """The offsets and the changes of scales of one weight, and the codes that they give.

    Args:
        place: Where the layer has the weight.
        target_OI: The weight that GPTQ was about to round.
        scales_OG: GPTQ's scales.
        bits: Bits of a code.
    """

    def __init__(self, place: Place, target_OI: Tensor, scales_OG: Tensor, bits: int) -> None:
        self.place, self._target, self._scales = place, target_OI, scales_OG
        self._low, self._high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
        self._offset, self.change = torch.zeros_like(target_OI), torch.zeros_like(scales_OG)
        self._runs = _runs_of_equal_rows(target_OI)

    @property
    def scales(self) -> Tensor:
        """The scales [O, G] as they are stored."""
        return stored(self._scales * (1 + self.change))

    def weight(self) -> Tensor:
        """Return the weight [O, I] that the codes stand for."""
        codes_OI = self._steps().round_().clamp_(self._low, self._high)
        return codes_OI.mul_(self._of_inputs(self.scales))

    def learn(self, gradient_OI: Tensor, rate: float) -> None:
        """Move the offsets by ``rate`` against the gradient's sign; set the gradient of the changes of scales."""
        codes_OI = self._steps().round_()
        free_OI = (codes_OI >= self._low) & (codes_OI <= self._high) & (self._target != 0)
        gradient_OI = self._tied(gradient_OI.float()) * self._of_inputs(self._scales)
        by_scale_OI = gradient_OI * codes_OI.clamp_(self._low, self._high)
        self.change.grad = by_scale_OI.view(*self.change.shape, -1).sum(dim=-1)
        step_OI = gradient_OI.sign_() * free_OI
        self._offset.sub_(step_OI, alpha=rate).clamp_(-0.5, 0.5)

    def reset(self) -> None:
        """Return to GPTQ's codes."""
        self._offset.zero_()
        self.change.zero_()

    def _steps(self) -> Tensor:
        return self._target / self._of_inputs(self._scales) + self._offset

    def _of_inputs(self, scales_OG: Tensor) -> Tensor:
        return scales_OG.repeat_interleave(self._target.shape[1] // scales_OG.shape[1], dim=1)

    def _tied(self, gradient_OI: Tensor) -> Tensor:
        """Return the gradient with the sum over each run of equal rows in all of its rows."""
        if self._runs is None:
            return gradient_OI
        sums_RI = gradient_OI.new_zeros(int(self._runs[-1]) + 1, gradient_OI.shape[1])
        return sums_RI.index_add_(0, self._runs, gradient_OI)[self._runs]


def learn_rounding(
    module: nn.Module,
    batches: Sequence[LayerBatch],
    offsets: Sequence[Offsets],
    settings: LearnedRounding,
    order: Callable[[int], Sequence[int]],
) -> LayerError:
    """Learn the offsets of a layer's weights, and the changes of their scales.

    If the error does not fall, of all tokens and of the windows that are held out, they are learned again with smaller
    steps, at last the changes of scales alone; if it does not fall then either, GPTQ's codes and scales are kept. Where
    a few activations are far larger than the others, large steps do harm that later ones do not undo.

    Args:
        module: The layer. It is not changed.
        batches: All calibration tokens.
        offsets: One for each quantized weight of the layer.
        settings: Number and size of the steps.
        order: Number of batches -> a permutation of their numbers.
    """
    layer, held_out = _TrainableLayer(module, offsets), _held_out(batches)
    learned = [replace(batch, mask=batch.mask & ~held) for batch, held in zip(batches, held_out, strict=True)]
    squares = sum(_masked(batch.target, batch.mask).double().square().sum().item() for batch in batches)
    before = layer.errors(batches, held_out)
    for travel in settings.travels if before.all else ():
        _descend(layer, learned, settings, order, travel=travel, scale=1 / before.all)
        after = layer.errors(batches, held_out)
        if after.all < before.all and after.held_out <= before.held_out:
            return LayerError(before=before.all / squares, after=after.all / squares, travel=travel)
        layer.reset()
    share = before.all / squares if squares else 0.0
    return LayerError(before=share, after=share)


def _held_out(batches: Sequence[LayerBatch]) -> list[Tensor]:
    """Return for each batch the tokens of windows that are held out, bool [B * T]; of a single window none."""
    sizes = [len(batch.hidden) for batch in batches]
    numbers = torch.arange(sum(sizes))
    held = numbers % HELD_OUT_EVERY == HELD_OUT_EVERY - 1
    if not held.any() and len(held) > 1:
        held[-1] = True
    return [
        part.to(batch.mask.device).repeat_interleave(len(batch.mask) // len(part)) & batch.mask
        for part, batch in zip(held.split(sizes), batches, strict=True)
    ]


def _descend(
    layer: "_TrainableLayer",
    batches: Sequence[LayerBatch],
    settings: LearnedRounding,
    order: Callable[[int], Sequence[int]],
    *,
    travel: float,
    scale: float,
) -> None:
    """Take the steps; the loss is the mean error of a step's batches, times their number and ``scale``."""
    size = max(1, settings.windows // len(batches[0].hidden))
    optimizer = torch.optim.Adam([each.change for each in layer.offsets], lr=settings.scale_rate)
    queue: list[int] = []
    for step in range(settings.steps):
        left = 1 - step / settings.steps
        optimizer.param_groups[0]["lr"] = settings.scale_rate * left
        while len(queue) < size:
            queue += order(len(batches))
        chosen, queue = queue[:size], queue[size:]
        layer.backward([batches[number] for number in chosen], scale=scale * len(batches) / size)
        for each in layer.offsets:
            each.learn(layer.gradient(each), rate=2 * travel / settings.steps * left)
        optimizer.step()
        layer.update()


@contextmanager
def repeatable_gradients() -> Generator[None]:
    """Compute gradients outside inference mode, with deterministic algorithms."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with torch.inference_mode(mode=False), torch.enable_grad():
            yield
    finally:
        torch.use_deterministic_algorithms(before)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Errors:
    """Squared errors of all tokens, and of those that are held out."""

    all: float
    held_out: float


class _TrainableLayer:
    """A layer whose quantized weights have gradients.

    All parameters are copies, as tensors of inference mode cannot be saved for a backward pass.
    """

    def __init__(self, module: nn.Module, offsets: Sequence[Offsets]) -> None:
        self._module, self.offsets = module, offsets
        self._parameters = {name: tensor.detach().clone() for name, tensor in _state(module)}
        for each in offsets:
            self._parameters[each.place.parameter].requires_grad_()
        self.update()

    @torch.no_grad()
    def update(self) -> None:
        """Compute the weights from the offsets."""
        for each in self.offsets:
            self._parameters[each.place.parameter][each.place.index].copy_(each.weight())

    def reset(self) -> None:
        """Return to GPTQ's codes."""
        for each in self.offsets:
            each.reset()
        self.update()

    @torch.no_grad()
    def errors(self, batches: Sequence[LayerBatch], held_out: Sequence[Tensor]) -> _Errors:
        sums = torch.zeros(2, dtype=torch.float64)
        for batch, held in zip(batches, held_out, strict=True):
            squares_N = self._squares(batch)
            of_held_out = squares_N[held[batch.mask]].sum()
            sums += torch.stack([squares_N.sum(), of_held_out]).double().cpu()
        total, of_held_out = sums.tolist()
        return _Errors(all=total, held_out=of_held_out)

    def backward(self, batches: Iterable[LayerBatch], *, scale: float) -> None:
        for tensor in self._parameters.values():
            tensor.grad = None
        for batch in batches:
            (self._squares(batch).sum() * scale).backward()

    def gradient(self, offsets: Offsets) -> Tensor:
        gradient = self._parameters[offsets.place.parameter].grad
        assert gradient is not None, f"{offsets.place.parameter} does not affect the layer's outputs"
        return gradient[offsets.place.index]

    def _squares(self, batch: LayerBatch) -> Tensor:
        """Return the squared error of each token that counts."""
        hidden = batch.hidden.to(batch.mask.device, copy=True)
        arguments = {name: _cloned(value) for name, value in batch.arguments.items()}
        output = functional_call(self._module, self._parameters, (hidden,), arguments)
        return (_masked(output, batch.mask).float() - _masked(batch.target, batch.mask).float()).square().sum(dim=1)


def _state(module: nn.Module) -> Iterable[tuple[str, Tensor]]:
    yield from module.named_parameters()
    yield from module.named_buffers()


def _masked(hidden: Tensor, mask_N: Tensor) -> Tensor:
    """Return the rows of the tokens that count; the mask is copied, as the backward pass keeps an index."""
    return hidden.to(mask_N.device).flatten(0, -2)[mask_N.clone()]


def _cloned(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(map(_cloned, value))
    return value.clone() if isinstance(value, Tensor) else value


def _runs_of_equal_rows(rows_OI: Tensor) -> Tensor | None:
    """Return the number of the run of equal rows that each row belongs to, int64 [O]; None if no two are equal."""
    new_O = torch.ones(len(rows_OI), dtype=torch.bool, device=rows_OI.device)
    new_O[1:] = (rows_OI[1:] != rows_OI[:-1]).any(dim=1)
    return None if new_O.all() else new_O.cumsum(0) - 1
