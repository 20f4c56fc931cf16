"""Planning: what serving engines would do with a model, and which padding and group size cure it."""

from collections.abc import Sequence
from dataclasses import asdict
from math import lcm
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qwen_pipeline.cli.results import CommandResult, command
from qwen_pipeline.qwen.padding_spec import PaddingSpec

if TYPE_CHECKING:
    from rich.table import Table

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
        "qwen-pipeline plan Qwen/Qwen2.5-VL-3B-Instruct --tp 8 --towers",
    ],
)
def plan(
    model: str,
    tp: Annotated[list[int], typer.Option(help="Tensor-parallel degree; repeat it for more.")] = [2, 4, 8],  # noqa: B006
    group_size: Annotated[int, typer.Option(help="Consecutive input channels that share one scale.")] = 128,
    engine: Annotated[
        list[str] | None, typer.Option(help="Engine that will serve; repeat it. Without it, vllm.")
    ] = None,
    max_extra: Annotated[float, typer.Option(help="Most percent of extra weights that padding may add.")] = 100.0,
    rank_memory: Annotated[float | None, typer.Option(help="Most GB of weights on a rank.")] = None,
    towers: Annotated[bool, typer.Option("--towers", help="Plan to pad vision and audio towers, too.")] = False,
    picture: Annotated[Path | None, typer.Option(help="Draw groups over ranks into this .png or .svg, too.")] = None,
    out: Annotated[Path | None, typer.Option(help="Where results would go; without it, the workspace.")] = None,
) -> CommandResult:
    """Say what tensor parallelism would do to a model in each serving engine, and what cures it at least cost.

    MODEL is a model directory, a config.json or a hub id; no weights are needed. What serves on the engines at all of
    the degrees is compared by its cost: padding, smaller groups, fewer ranks. With weights it is also said what merging
    and padding take of disk, memory and open files, what this machine has, and what it would refuse.
    """
    from qwen_pipeline.checkpoint.memory_budget import available_at
    from qwen_pipeline.cli.outlay import resource_data, resource_view
    from qwen_pipeline.cli.rank_picture import rank_picture
    from qwen_pipeline.cli.tables import feasibility_table
    from qwen_pipeline.cli.tower_view import tower_data, tower_refusals, tower_table
    from qwen_pipeline.config import load_settings
    from qwen_pipeline.models.hub import load_config
    from qwen_pipeline.qwen.geometry import require_towers
    from qwen_pipeline.qwen.tensor_parallel.engines import SERVING_ENGINES, kernels_of, predict_serving
    from qwen_pipeline.qwen.tensor_parallel.feasibility import assess_degrees
    from qwen_pipeline.qwen.tensor_parallel.plan import USUAL_ENGINE, fewer_ranks, options
    from qwen_pipeline.qwen.tensor_parallel.towers import assess_towers
    from qwen_pipeline.stages.merge_pad import estimate_resources

    config = load_config(model)
    targets = dict.fromkeys(engine or [USUAL_ENGINE], sorted(set(tp)))
    if towers:
        require_towers(config, ranks=lcm(*tp))
    found, lower = options(config, targets), fewer_ranks(config, targets)
    in_towers = assess_towers(config, targets)
    remarks = {at.name: _remark(at, max_extra, rank_memory) for at in found}
    chosen = next((at for at in found if not remarks[at.name]), None)
    rows = assess_degrees(config, group_size=group_size, degrees=sorted(set(tp)))
    kernels = [kernel for name in engine for kernel in kernels_of(name)] if engine else list(SERVING_ENGINES)
    verdicts = [
        predict_serving(config, name, group_size=group_size, degree=degree)
        for name in kernels
        for degree in sorted(set(tp))
    ]
    drawn = _before_and_after(config, chosen, group_size, max(tp))
    data: dict[str, Any] = {
        "group_size": group_size,
        "targets": targets,
        "chosen": chosen.name if chosen else None,
        "options": [_option_data(at, remarks[at.name]) for at in found],
        "fewer_ranks": [_option_data(at, "") for at in lower],
        "divisions": [
            {"when": when, **asdict(at), "groups_per_rank": at.groups_per_rank, "straddling": sorted(at.straddling)}
            for when, at in drawn
        ],
        "degrees": [asdict(row) for row in rows],
        "engines": [asdict(verdict) for verdict in verdicts],
        "towers": tower_data(in_towers, asked=towers),
    }
    view: list[Any] = [
        _headline(chosen, found, lower, targets, towers=towers),
        *tower_refusals(in_towers, asked=towers),
        rank_picture(drawn),
        _option_table(found, lower, remarks, chosen),
        *([tower_table(in_towers, asked=towers)] if in_towers else []),
        f"As it is, quantized in groups of {group_size}:",
        _engine_table(verdicts, sorted(set(tp))),
        feasibility_table(rows, group_size),
    ]
    if takes := estimate_resources(
        Path(model), PaddingSpec(group_size=group_size, tensor_parallel=max(tp), towers=towers)
    ):
        place = out or load_settings().store_root
        room = available_at(place)
        data["outlay"] = resource_data(takes, room, place)
        view += resource_view(takes, room, place)
    if picture:
        from qwen_pipeline.evaluation.tensor_parallel.plot import draw_ranks

        draw_ranks(drawn, picture)
        data["picture"] = str(picture)
        view.append(f"Picture: {picture}")
    return CommandResult(data=data, view=view)


def _remark(option: "Option", max_extra: float, rank_memory: float | None) -> str:
    """Return why an option is not to be had; empty if it is."""
    if not option.serves:
        return option.obstacle
    if 100 * option.weights > max_extra:
        return f"adds more than {max_extra:g} % of weights"
    if rank_memory is not None and option.rank_bytes > rank_memory * 1e9:
        return f"takes more than {rank_memory:g} GB a rank"
    return ""


def _headline(
    chosen: "Option | None",
    found: "Sequence[Option]",
    lower: "Sequence[Option]",
    targets: dict[str, list[int]],
    *,
    towers: bool,
) -> str:
    degrees = ", ".join(map(str, found[0].degrees))
    asked = f"{' and '.join(targets)} at TP {degrees}"
    if chosen is None:
        fewer = "".join(f" With fewer ranks: TP {at.degrees[-1]}, {at.name}." for at in lower)
        return f"Nothing serves on {asked} within the budget: {found[0].obstacle or 'too dear'}.{fewer}"
    sizes = ", ".join(f"{at.field} from {at.live:,} to {at.padded:,}" for at in chosen.plan.sizes if at.zeros)
    ranks = lcm(*chosen.degrees) if towers else chosen.plan.tensor_parallel
    pad = f"pad --group-size {chosen.group_size} --tp {ranks}" + (" --towers" if towers else "")
    steps = [pad] if sizes or towers else []
    steps.append(f"quantize --group-size {chosen.group_size}")
    return (
        f"For {asked}: quantize in groups of {chosen.group_size}, "
        + (f"with {sizes} (+{chosen.weights:.2%} weights)" if sizes else "without padding")
        + f"; {chosen.rank_bytes / 1e9:.2f} GB a rank.\n"
        + f"How: qwen-pipeline {', then qwen-pipeline '.join(steps)}."
    )


def _before_and_after(
    config: dict[str, Any], chosen: "Option | None", group_size: int, ranks: int
) -> "list[tuple[str, Division]]":
    """Return the divisions that are worth a picture, with captions: those that a rank's end cuts, or that change."""
    from qwen_pipeline.qwen.tensor_parallel.feasibility import divisions

    before = divisions(config, group_size=group_size, ranks=ranks)
    after = divisions(chosen.config, group_size=chosen.group_size, ranks=ranks) if chosen else before
    pairs = list(zip(before, after, strict=True))
    telling = [(was, becomes) for was, becomes in pairs if was.straddling or was.inputs != becomes.inputs] or pairs
    rows: list[tuple[str, Division]] = []
    for was, becomes in telling:
        rows.append(("as it is", was))
        rows += [("chosen", becomes)] if becomes != was else []
    return rows


def _option_data(option: "Option", remark: str) -> dict[str, Any]:
    return {
        "name": option.name,
        "group_size": option.group_size,
        "degrees": option.degrees,
        "sizes": {size.field: [size.live, size.padded] for size in option.plan.sizes},
        "verdict": option.verdict,
        "fits": not remark,
        "remark": remark or None,
        "extra_weights": option.weights,
        "extra_flops": option.flops,
        "rank_bytes": option.rank_bytes,
        "engines": [asdict(at) for at in option.servings],
    }


def _engine_table(verdicts: "Sequence[ServingPrediction]", degrees: Sequence[int]) -> "Table":
    from rich.table import Table
    from rich.text import Text

    table = Table("engine", *(f"TP {degree}" for degree in degrees), "because")
    for start in range(0, len(verdicts), len(degrees)):
        row = verdicts[start : start + len(degrees)]
        reasons = [reason for at in sorted(row, key=lambda at: at.verdict == "ok") for reason in at.reasons[:1]]
        cells = [Text(at.verdict, style=_COLORS.get(at.verdict, "bold red")) for at in row]
        table.add_row(row[0].engine, *cells, next(iter(reasons), ""))
    return table


_COLORS = {"ok": "green", "padded at load": "green", "unknown": "yellow", "refused": "red"}


def _option_table(
    found: "Sequence[Option]", lower: "Sequence[Option]", remarks: dict[str, str], chosen: "Option | None"
) -> "Table":
    from rich.table import Column, Table
    from rich.text import Text

    table = Table(
        Column("option", no_wrap=True),
        "TP",
        Column("widths", no_wrap=True),
        Column("", no_wrap=True),
        *("extra weights", "extra FLOPs", "GB a rank", "remark"),
    )
    for option in (*found, *lower):
        widths = "\n".join(f"{size.live:,} -> {size.padded:,}" for size in option.plan.sizes if size.zeros)
        remark = "fewer ranks" if option in lower else remarks[option.name] if option.serves else ""
        table.add_row(
            option.name,
            ", ".join(map(str, option.degrees)),
            widths or "unchanged",
            Text(option.verdict, style=_COLORS.get(option.verdict, "bold red")),
            f"{option.weights:.2%}",
            f"{option.flops:.2%}",
            f"{option.rank_bytes / 1e9:.2f}",
            Text("chosen", style="bold green") if option is chosen else remark,
        )
    return table
