"""Learned rounding: its gradients against autograd, and what it may not change."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from qwen_pipeline.quantization.recipes import LearnedRounding
from qwen_pipeline.quantization.steps.learned_rounding import LayerBatch, Offsets, Place, learn_rounding

OUT, IN, GROUP_SIZE, TOKENS = 48, 64, 32, 16


class Gated(nn.Module):
    """A layer of a gated MLP, with the last channels of zeros and two that are parts of one."""

    def __init__(self) -> None:
        super().__init__()
        random = torch.Generator().manual_seed(0)
        self.up = nn.Parameter(torch.randn(OUT, IN, generator=random) * IN**-0.5)
        self.down = nn.Parameter(torch.randn(IN, OUT, generator=random) * OUT**-0.5)
        with torch.no_grad():
            self.up[5] = self.up[4]
            self.up[-8:] = 0
            self.down[:, -8:] = 0

    def forward(self, x: Tensor, *, gain: Tensor) -> Tensor:
        return x + gain * nn.functional.silu(x @ self.up.T) @ self.down.T


def nearest(weight: Tensor, group_size: int) -> Tensor:
    """Return scales [O, G] whose code -8 reaches the outermost weight."""
    largest = weight.view(len(weight), -1, group_size).abs().amax(dim=-1)
    return (torch.where(largest > 0, largest, 1) / 8).half().float() * torch.tensor([1.0, -1.0]).repeat(len(weight), 1)[
        :, : largest.shape[1]
    ]


def over_inputs(scales: Tensor) -> Tensor:
    return scales.repeat_interleave(GROUP_SIZE, dim=1)


def offsets_of(layer: Gated) -> list[Offsets]:
    return [
        Offsets(Place(parameter=name), weight.detach().clone(), nearest(weight.detach(), size), 4)
        for name, weight, size in (("up", layer.up, GROUP_SIZE), ("down", layer.down, OUT // 2))
    ]


def batches_of(layer: Gated, count: int = 4) -> list[LayerBatch]:
    random = torch.Generator().manual_seed(1)
    batches: list[LayerBatch] = []
    for _ in range(count):
        hidden = torch.randn(2, TOKENS, IN, generator=random)
        arguments = {"gain": torch.ones(1)}
        mask = torch.ones(2 * TOKENS, dtype=torch.bool)
        mask[-3:] = False
        with torch.no_grad():
            target = layer(hidden + 0.01, **arguments)
        batches.append(LayerBatch(hidden=hidden, arguments=arguments, target=target, mask=mask))
    return batches


def forwards(count: int) -> list[int]:
    return list(range(count))


def test_at_first_the_codes_are_those_of_rounding_the_target() -> None:
    layer = Gated()
    for each, weight in zip(offsets_of(layer), (layer.up, layer.down), strict=True):
        scale = each.scales.repeat_interleave(weight.shape[1] // each.scales.shape[1], dim=1)
        assert torch.equal(each.weight(), (weight.detach() / scale).round().clamp(-8, 7) * scale)


def test_the_gradients_are_autograds_with_rounding_as_the_identity() -> None:
    target, gradient = torch.randn(OUT, IN), torch.randn(OUT, IN)
    scales = (nearest(target, GROUP_SIZE) * 0.7).half().float()  # some codes are clamped
    offsets = Offsets(Place(parameter="up"), target, scales, 4)
    offsets.learn(gradient, rate=0.3)

    offset = torch.zeros(OUT, IN, requires_grad=True)
    change = torch.zeros_like(scales, requires_grad=True)
    steps = target / over_inputs(scales) + offset
    codes = (steps + (steps.round() - steps).detach()).clamp(-8, 7)
    (codes * over_inputs(scales * (1 + change)) * gradient).sum().backward()
    assert offset.grad is not None
    assert change.grad is not None
    assert offsets.change.grad is not None
    torch.testing.assert_close(offsets.change.grad, change.grad, rtol=1e-4, atol=1e-4)
    expected = (target / over_inputs(scales) - 0.3 * offset.grad.sign()).round().clamp(-8, 7)
    assert torch.equal(offsets.weight(), expected * over_inputs(offsets.scales))


def test_a_change_of_scales_leaves_the_codes_as_they_are() -> None:
    target = torch.randn(OUT, IN)
    offsets = Offsets(Place(parameter="up"), target, nearest(target, GROUP_SIZE), 4)
    codes = (offsets.weight() / over_inputs(offsets.scales)).round()
    offsets.change.uniform_(-0.1, 0.1)
    torch.testing.assert_close(offsets.weight(), codes * over_inputs(offsets.scales))


@pytest.mark.parametrize(("steps", "share"), [(20, 0.9), (60, 0.85)])
def test_the_error_falls_and_padding_is_preserved(steps: int, share: float) -> None:
    layer = Gated()
    offsets, batches = offsets_of(layer), batches_of(layer)
    before = [each.weight() for each in offsets]
    error = learn_rounding(layer, batches, offsets, LearnedRounding(steps=steps, windows=4), forwards)
    assert error.after < share * error.before
    up, down = (each.weight() for each in offsets)
    assert not torch.equal(up, before[0])
    assert torch.equal(up[5], up[4])
    assert not up[-8:].any()
    assert not down[:, -8:].any()
    for each, first in zip(offsets, before, strict=True):
        assert torch.equal(each.scales.half().float(), each.scales)
        limit = 1.6 * each.scales.abs().amax()
        assert (each.weight() - first).abs().max() <= limit


def test_equal_seeds_give_equal_codes() -> None:
    layer = Gated()
    runs = [offsets_of(layer) for _ in range(2)]
    for offsets in runs:
        learn_rounding(layer, batches_of(layer), offsets, LearnedRounding(steps=10), forwards)
    assert all(torch.equal(one.weight(), other.weight()) for one, other in zip(*runs, strict=True))


def test_if_the_error_does_not_fall_scales_are_learned_alone_or_nothing_is() -> None:
    layer = Gated()
    for settings, falls in (
        (LearnedRounding(steps=1, travels=(0.5, 0.0)), True),
        (LearnedRounding(steps=1, travels=(0.0,), scale_rate=0.9), False),
    ):
        offsets = offsets_of(layer)
        scales, codes = zip(*((each.scales, codes_of(each)) for each in offsets), strict=True)
        error = learn_rounding(layer, batches_of(layer), offsets, settings, forwards)
        assert (error.after < error.before) == falls
        assert error.travel == (0.0 if falls else None)
        assert all(torch.equal(codes_of(each), were) for each, were in zip(offsets, codes, strict=True))
        assert all(torch.equal(each.scales, were) != falls for each, were in zip(offsets, scales, strict=True))


def test_what_only_helps_the_windows_that_it_was_learned_from_is_not_kept() -> None:
    """The eighth window, which is held out, is as it should be before anything is learned."""
    layer, settings = Gated(), LearnedRounding(steps=10)
    offsets, batches = offsets_of(layer), batches_of(layer)
    before = [each.weight() for each in offsets]
    rounded = {"up": before[0], "down": before[1]}
    held_out = torch.func.functional_call(layer, rounded, (batches[-1].hidden,), dict(batches[-1].arguments))[-1:]
    changed = replace(batches[-1], target=torch.cat([batches[-1].target[:-1], held_out.detach()]))
    error = learn_rounding(layer, [*batches[:-1], changed], offsets, settings, forwards)
    assert error.travel is None
    assert error.after == error.before
    assert all(torch.equal(each.weight(), were) for each, were in zip(offsets, before, strict=True))
    assert learn_rounding(layer, batches, offsets, settings, forwards).travel


def codes_of(offsets: Offsets) -> Tensor:
    weight, scales = offsets.weight(), offsets.scales
    return (weight / scales.repeat_interleave(weight.shape[1] // scales.shape[1], dim=1)).round()


def test_batches_may_be_tensors_of_inference_mode() -> None:
    """The layer loop makes them in that mode: on a GPU, where they are moved, also the masks."""
    layer = Gated()
    with torch.inference_mode():
        inference = [
            LayerBatch(
                hidden=batch.hidden.clone(),
                arguments={name: value.clone() for name, value in batch.arguments.items()},
                target=batch.target.clone(),
                mask=batch.mask.clone(),
            )
            for batch in batches_of(layer)
        ]
    weights: list[list[Tensor]] = []
    for batches in (batches_of(layer), inference):
        offsets = offsets_of(layer)
        learn_rounding(layer, batches, offsets, LearnedRounding(steps=3), forwards)
        weights.append([each.weight() for each in offsets])
    assert all(map(torch.equal, *weights))
