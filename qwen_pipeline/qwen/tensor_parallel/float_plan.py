"""The ways to serve a model as 8-bit floats: with or without padding, and on fewer ranks."""

from dataclasses import replace
from math import lcm

from qwen_pipeline.qwen.families import Config
from qwen_pipeline.qwen.geometry import PadPlan, plan_padding
from qwen_pipeline.qwen.methods import Fp8Layout, method_of
from qwen_pipeline.qwen.padding_spec import Targets, served_degrees
from qwen_pipeline.qwen.tensor_parallel.engines import VERDICTS
from qwen_pipeline.qwen.tensor_parallel.floats import float_bytes, padded_config, predict_float_serving
from qwen_pipeline.qwen.tensor_parallel.plan import Option, multiplications, weight_count


def float_options(config: Config, targets: Targets, layout: Fp8Layout) -> list[Option]:
    """Return the ways to serve a model on these engines at all of their degrees, the best first.

    Raises:
        InputRefused: The family or an engine is unknown, the config lacks a size, or ``targets`` lacks a degree.
    """
    ranks = lcm(*served_degrees(targets))
    unpadded = plan_padding(config, group_size=1, tensor_parallel=1)
    sizes = tuple(replace(size, group_size=layout.unit) for size in unpadded.sizes)
    plans = {"unpadded": replace(unpadded, group_size=layout.unit, sizes=sizes)}
    padded = plan_padding(config, group_size=layout.unit, tensor_parallel=ranks)
    plans |= {"padded": padded} if padded.changes else {}
    found = [_option(config, targets, layout, name, plan) for name, plan in plans.items()]
    return sorted(found, key=lambda option: (not option.serves and VERDICTS.index(option.verdict), option.rank_bytes))


def fewer_float_ranks(config: Config, targets: Targets, layout: Fp8Layout) -> list[Option]:
    """Return the best option at the highest lower degree that serves; none if there is no such degree."""
    highest = served_degrees(targets)[-1]
    for degree in (degree for degree in range(highest - 1, 0, -1) if highest % degree == 0):
        lower = {engine: sorted({min(degree, each) for each in degrees}) for engine, degrees in targets.items()}
        if (best := float_options(config, lower, layout)[0]).serves:
            return [best]
    return []


def _option(config: Config, targets: Targets, layout: Fp8Layout, name: str, plan: PadPlan) -> Option:
    wide, degrees = padded_config(config, plan), served_degrees(targets)
    return Option(
        name=f"{method_of(layout)}, {name}",
        group_size=layout.unit,
        plan=plan,
        config=wide,
        degrees=tuple(degrees),
        predictions=tuple(
            predict_float_serving(wide, engine, layout, degree=degree)
            for engine, requested in targets.items()
            for degree in requested
        ),
        weights=weight_count(wide) / weight_count(config) - 1,
        rank_bytes=float_bytes(wide, layout) // degrees[-1],
        flops=multiplications(wide) / multiplications(config) - 1,
    )
