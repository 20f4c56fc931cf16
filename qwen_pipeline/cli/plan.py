"""``qwen-pipeline plan``: predict how serving engines shard a model, and choose its padding and group size."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qwen_pipeline.cli.options import GROUP_SIZE_HELP
from qwen_pipeline.cli.results import CommandResult, command
from qwen_pipeline.errors import InputRefused
from qwen_pipeline.qwen.methods import FP8_LAYOUTS, Method
from qwen_pipeline.qwen.padding_spec import PaddingSpec
from qwen_pipeline.qwen.precision import parse_words

if TYPE_CHECKING:
    from qwen_pipeline.cli.plan_views import PlanResult
    from qwen_pipeline.qwen.tensor_parallel.engines import ServingPrediction
    from qwen_pipeline.qwen.tensor_parallel.feasibility import Division
    from qwen_pipeline.qwen.tensor_parallel.plan import Option

app = typer.Typer()


@command(
    app,
    "plan",
    examples=[
        "qwen-pipeline plan Qwen2.5-72B/ --tp 2 --tp 4 --tp 8 --group-size 128",
        "qwen-pipeline plan Qwen/Qwen3-30B-A3B --engine vllm --tp 4 --picture ranks.svg",
        r"qwen-pipeline plan Qwen/Qwen3-32B --tp 4 --module 'self_attn\.=8'",
        "qwen-pipeline plan Qwen/Qwen2.5-VL-3B-Instruct --tp 8 --towers",
        "qwen-pipeline plan Qwen2.5-72B/ --tp 8 --method fp8",
        "qwen-pipeline plan Qwen2.5-72B/ --recipe fast",
    ],
)
def plan(
    model: str,
    tp: Annotated[list[int], typer.Option(help="Tensor-parallel degree; repeatable.")] = [2, 4, 8],  # noqa: B006
    group_size: Annotated[int, typer.Option(help=GROUP_SIZE_HELP)] = PaddingSpec().group_size,
    method: Annotated[Method, typer.Option(help="Integer codes, or a layout of 8-bit floats.")] = "gptq",
    engine: Annotated[list[str] | None, typer.Option(help="Serving engine; repeatable. Default: vllm.")] = None,
    module: Annotated[
        list[str] | None, typer.Option(help="REGEX=keep, 8 or 4g32 for modules, as in quantize; repeatable.")
    ] = None,
    max_extra: Annotated[float, typer.Option(help="Maximum extra weights from padding, in percent.")] = 100.0,
    rank_memory: Annotated[float | None, typer.Option(help="Maximum GB of weights per rank.")] = None,
    towers: Annotated[bool, typer.Option("--towers", help="Also plan to pad vision and audio towers.")] = False,
    recipe: Annotated[
        str | None,
        typer.Option(help="Take degrees, engines, groups, method, modules and towers from a recipe of the settings."),
    ] = None,
    picture: Annotated[Path | None, typer.Option(help="Also draw groups over ranks into this .png or .svg.")] = None,
    out: Annotated[Path | None, typer.Option(help="Directory for the results; default: the workspace.")] = None,
) -> CommandResult:
    """Predict the effect of tensor parallelism on a model in each serving engine, and choose the cheapest remedy.

    MODEL is a model directory, a config.json or a hub id; no weights are needed. Padding, smaller groups and
    fewer ranks are compared by cost, if they serve at all degrees on all engines. The time of each quantization recipe
    on this machine is estimated. For a model with weights, the disk space, memory and open files that merging and
    padding need are compared with those of this machine.
    """
    from qwen_pipeline.checkpoint.memory_budget import available_at
    from qwen_pipeline.checkpoint.store.products import product
    from qwen_pipeline.cli.plan_views import (
        plan_data,
        plan_view,
        recipe_data,
        recipe_view,
        resource_data,
        resource_view,
    )  # fmt: skip
    from qwen_pipeline.config import load_settings, settings_of
    from qwen_pipeline.quantization.steps.cost import machine_rate, recipe_costs
    from qwen_pipeline.stages.merge_pad import estimate_resources

    settings, words = load_settings(), parse_words(module or ())
    if recipe is not None:
        settings = settings_of(settings, product(f"@{recipe}").recipe)
        tp, engine = settings.padding_spec.degrees, list(settings.padding.targets)
        words = {pattern: str(word) for pattern, word in settings.quantization.modules.items()}
        group_size, method = settings.quantization.group_size, settings.quantization.method
        towers = settings.padding.towers
    unit = FP8_LAYOUTS[method].unit if method in FP8_LAYOUTS else group_size
    request = PaddingSpec(group_size=unit, tensor_parallel=max(tp), towers=towers, method=method)
    config = _config_of(model)
    result = _compare(
        config,
        request,
        sorted(set(tp)),
        engine,
        max_extra=max_extra,
        rank_memory=rank_memory,
        words=words,
    )
    data, view = plan_data(result), plan_view(result)
    quantization = settings.quantization
    costs = recipe_costs(config, quantization, rate=machine_rate(quantization.device), cores=quantization.threads)
    data["recipes"] = recipe_data(costs, quantization)
    view.append(recipe_view(costs, quantization))
    if estimate := estimate_resources(Path(model), request):
        directory = out or settings.store_root
        available = available_at(directory)
        data["outlay"] = resource_data(estimate, available, directory)
        view += resource_view(estimate, available, directory)
    if picture:
        from qwen_pipeline.evaluation.tensor_parallel.plot import draw_ranks

        draw_ranks(result.divisions, picture)
        data["picture"] = str(picture)
        view.append(f"Picture: {picture}")
    return CommandResult(data=data, view=view)


def _config_of(model: str) -> dict[str, Any]:
    """Return a model's config, as its weights require it where they are here.

    Raises:
        InputRefused: The config contradicts itself or the headers of the weights.
    """
    from qwen_pipeline.checkpoint.lazy import open_checkpoint
    from qwen_pipeline.models.hub import load_config
    from qwen_pipeline.models.open import has_weights
    from qwen_pipeline.qwen.settle import require_sizes, settle, settled_config

    if has_weights(Path(model)):
        return dict(require_sizes(settle(open_checkpoint(Path(model)), reads_values=False).checkpoint).config)
    return settled_config(load_config(model))


def _compare(
    config: dict[str, Any],
    request: PaddingSpec,
    degrees: list[int],
    engines: Sequence[str] | None,
    *,
    max_extra: float,
    rank_memory: float | None,
    words: Mapping[str, str],
) -> "PlanResult":
    """Compare the ways to serve a model at all degrees on the engines, by default on the usual one."""
    from math import lcm

    from qwen_pipeline.cli.plan_views import PlanResult
    from qwen_pipeline.qwen.geometry import require_towers
    from qwen_pipeline.qwen.tensor_parallel.feasibility import assess_degrees
    from qwen_pipeline.qwen.tensor_parallel.float_plan import fewer_float_ranks, float_options
    from qwen_pipeline.qwen.tensor_parallel.plan import USUAL_ENGINE, fewer_ranks, options
    from qwen_pipeline.qwen.tensor_parallel.towers import assess_towers

    group_size, targets = request.group_size, dict.fromkeys(engines or [USUAL_ENGINE], degrees)
    if request.towers:
        require_towers(config, ranks=lcm(*degrees))
    layout = FP8_LAYOUTS.get(request.method)
    if layout and words:
        raise InputRefused(
            f"--module is given, but 8-bit floats ({request.method}) have no codes whose precision could differ.",
            remedy="Leave out --module, or plan for --method gptq.",
        )
    found = float_options(config, targets, layout) if layout else options(config, targets, words=words)
    remarks = {option.name: _remark(option, max_extra, rank_memory) for option in found}
    chosen = next((option for option in found if not remarks[option.name]), None)
    return PlanResult(
        request=request,
        targets=targets,
        options=found,
        remarks=remarks,
        fewer_ranks=(
            fewer_float_ranks(config, targets, layout) if layout else fewer_ranks(config, targets, words=words)
        ),
        chosen=chosen,
        towers=assess_towers(config, targets),
        degrees=assess_degrees(config, group_size=group_size, degrees=degrees),
        predictions=_predictions(config, request, degrees, engines, words),
        divisions=_divisions(config, chosen, group_size, request.tensor_parallel),
    )


def _predictions(
    config: dict[str, Any],
    request: PaddingSpec,
    degrees: list[int],
    engines: Sequence[str] | None,
    words: Mapping[str, str],
) -> "list[ServingPrediction]":
    """Predict how each engine, by default every one, serves the unpadded model at each degree."""
    from qwen_pipeline.qwen.tensor_parallel.engines import SERVING_ENGINES, kernels_of, predict_serving
    from qwen_pipeline.qwen.tensor_parallel.floats import FLOAT_ENGINES, predict_float_serving
    from qwen_pipeline.qwen.tensor_parallel.plan import declared_at

    if layout := FP8_LAYOUTS.get(request.method):
        return [
            predict_float_serving(config, name, layout, degree=degree)
            for name in engines or FLOAT_ENGINES
            for degree in degrees
        ]
    kernels = [kernel for name in engines for kernel in kernels_of(name)] if engines else list(SERVING_ENGINES)
    declared = declared_at(config, request.group_size, words)
    return [
        predict_serving(config, kernel, group_size=request.group_size, degree=degree, precision_at=declared)
        for kernel in kernels
        for degree in degrees
    ]


def _remark(option: "Option", max_extra: float, rank_memory: float | None) -> str:
    """Return why an option is not acceptable; empty if it is."""
    if not option.serves:
        return option.obstacle
    if 100 * option.weights > max_extra:
        return f"adds more than {max_extra:g} % of weights"
    if rank_memory is not None and option.rank_bytes > rank_memory * 1e9:
        return f"takes more than {rank_memory:g} GB per rank"
    return ""


def _divisions(
    config: dict[str, Any], chosen: "Option | None", group_size: int, ranks: int
) -> "list[tuple[str, Division]]":
    """Return the captioned divisions in which a rank's end cuts a group, or which change; if there are none, all."""
    from qwen_pipeline.qwen.tensor_parallel.feasibility import divisions

    before = divisions(config, group_size=group_size, ranks=ranks)
    after = divisions(chosen.config, group_size=chosen.group_size, ranks=ranks) if chosen else before
    pairs = list(zip(before, after, strict=True))
    affected = [(old, new) for old, new in pairs if old.straddling or old.inputs != new.inputs] or pairs
    rows: list[tuple[str, Division]] = []
    for old, new in affected:
        rows.append(("unpadded", old))
        rows += [("chosen", new)] if new != old else []
    return rows
