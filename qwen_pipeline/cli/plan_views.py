"""JSON values, tables and the terminal picture of ``qwen-pipeline plan``."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from math import lcm
from pathlib import Path
from typing import Any

from rich.console import RenderableType
from rich.table import Column, Table
from rich.text import Text

from qwen_pipeline.checkpoint.memory_budget import AvailableResources, shortages
from qwen_pipeline.cli.console import size
from qwen_pipeline.cli.tables import feasibility_table
from qwen_pipeline.quantization.spec import QuantSpec
from qwen_pipeline.quantization.steps.cost import REFERENCES, RecipeCost
from qwen_pipeline.qwen.methods import FP8_LAYOUTS
from qwen_pipeline.qwen.padding_spec import PaddingSpec, Targets
from qwen_pipeline.qwen.tensor_parallel.engines import ServingPrediction
from qwen_pipeline.qwen.tensor_parallel.feasibility import DegreeFeasibility, Division
from qwen_pipeline.qwen.tensor_parallel.plan import Option
from qwen_pipeline.qwen.tensor_parallel.towers import TowerFeasibility
from qwen_pipeline.stages.merge_pad import ResourceEstimate

PICTURE_COLUMNS = 72
"""Width of the bars in the terminal picture; every rank has the same share of it."""
WHOLE, CUT = "green", "bold dark_orange"
END, CUT_END = "\N{BOX DRAWINGS LIGHT VERTICAL}", "\N{BOX DRAWINGS LIGHT DIAGONAL CROSS}"

_VERDICT_STYLES = {"ok": "green", "padded at load": "green", "unknown": "yellow", "refused": "red"}


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanResult:
    """The ways to serve a model, and the predictions for it without padding.

    Attributes:
        request: The requested group size, highest degree and towers.
        targets: Serving engine -> degrees.
        options: Ways to serve all targets, the best first.
        remarks: Option name -> why the option is not acceptable; empty if it is.
        fewer_ranks: Ways to serve on fewer ranks.
        chosen: The best acceptable option.
        towers: Vision and audio towers on the targets.
        degrees: Sizes of the unpadded model at each degree.
        predictions: Each engine at each degree, for the unpadded model; the degrees of an engine are consecutive.
        divisions: Captioned divisions of row-parallel layers over ranks, for the picture.
    """

    request: PaddingSpec
    targets: Targets
    options: Sequence[Option]
    remarks: Mapping[str, str]
    fewer_ranks: Sequence[Option]
    chosen: Option | None
    towers: Sequence[TowerFeasibility]
    degrees: Sequence[DegreeFeasibility]
    predictions: Sequence[ServingPrediction]
    divisions: Sequence[tuple[str, Division]]


def plan_data(plan: PlanResult) -> dict[str, Any]:
    """Return the plan as JSON values."""
    return {
        "group_size": plan.request.group_size,
        "targets": plan.targets,
        "chosen": plan.chosen.name if plan.chosen else None,
        "options": [_option_data(option, plan.remarks[option.name]) for option in plan.options],
        "fewer_ranks": [_option_data(option, "") for option in plan.fewer_ranks],
        "divisions": [
            {
                "when": caption,
                **asdict(division),
                "groups_per_rank": division.groups_per_rank,
                "straddling": sorted(division.straddling),
            }
            for caption, division in plan.divisions
        ],
        "degrees": [asdict(degree) for degree in plan.degrees],
        "engines": [asdict(prediction) for prediction in plan.predictions],
        "towers": _tower_data(plan.towers, padded=plan.request.towers),
    }


def plan_view(plan: PlanResult) -> list[RenderableType]:
    """Return the recommendation, refusals of towers, the picture and the tables."""
    group_size, pad_towers = plan.request.group_size, plan.request.towers
    into = "in" if plan.request.method == "gptq" else "to"
    return [
        _recommendation(plan),
        *_tower_refusals(plan.towers, padded=pad_towers),
        rank_picture(plan.divisions),
        _option_table(plan),
        *([_tower_table(plan.towers, padded=pad_towers)] if plan.towers else []),
        f"Without padding, quantized {into} {_form(plan.request, group_size)}:",
        _engine_table(plan.predictions, [degree.degree for degree in plan.degrees]),
        feasibility_table(plan.degrees, group_size),
    ]


def _recommendation(plan: PlanResult) -> str:
    targets = f"{' and '.join(plan.targets)} at TP {', '.join(map(str, plan.options[0].degrees))}"
    chosen = plan.chosen
    if chosen is None:
        fewer = "".join(f" With fewer ranks: TP {option.degrees[-1]}, {option.name}." for option in plan.fewer_ranks)
        reason = plan.options[0].obstacle or plan.remarks[plan.options[0].name]
        return f"No plan for {targets} fits: {reason}.{fewer}"
    sizes = ", ".join(f"{size.field} from {size.live:,} to {size.padded:,}" for size in chosen.plan.sizes if size.zeros)
    ranks = lcm(*chosen.degrees) if plan.request.towers else chosen.plan.tensor_parallel
    pad = f"pad --group-size {chosen.group_size} --tp {ranks}" + " --towers" * plan.request.towers
    steps = [pad] if sizes or plan.request.towers else []
    is_floats = plan.request.method != "gptq"
    steps.append(
        f"quantize --method {plan.request.method}" if is_floats else f"quantize --group-size {chosen.group_size}"
    )
    return (
        f"For {targets}: {_form(plan.request, chosen.group_size)}, "
        + (f"{sizes} (+{chosen.weights:.2%} weights)" if sizes else "no padding")
        + f"; {chosen.rank_bytes / 1e9:.2f} GB/rank.\n"
        + f"Run: qwen-pipeline {', then qwen-pipeline '.join(steps)}."
    )


def _form(request: PaddingSpec, group_size: int) -> str:
    layout = FP8_LAYOUTS.get(request.method)
    return layout.title if layout else f"groups of {group_size}"


def _option_data(option: Option, remark: str) -> dict[str, Any]:
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
        "engines": [asdict(prediction) for prediction in option.predictions],
    }


def _option_table(plan: PlanResult) -> Table:
    table = Table(
        Column("option", no_wrap=True),
        "TP",
        Column("widths", no_wrap=True),
        Column("serves", no_wrap=True),
        *("weights", "FLOPs", "GB/rank", "remark"),
    )
    for option in (*plan.options, *plan.fewer_ranks):
        widths = "\n".join(f"{size.live:,} -> {size.padded:,}" for size in option.plan.sizes if size.zeros)
        remark = "fewer ranks" if option in plan.fewer_ranks else plan.remarks[option.name] if option.serves else ""
        table.add_row(
            option.name,
            ", ".join(map(str, option.degrees)),
            widths or "unchanged",
            _verdict(option.verdict),
            f"{option.weights:+.2%}",
            f"{option.flops:+.2%}",
            f"{option.rank_bytes / 1e9:.2f}",
            Text("chosen", style="bold green") if option is plan.chosen else remark,
        )
    return table


def _engine_table(predictions: Sequence[ServingPrediction], degrees: Sequence[int]) -> Table:
    table = Table("engine", *(f"TP {degree}" for degree in degrees), "reason")
    for start in range(0, len(predictions), len(degrees)):
        row = predictions[start : start + len(degrees)]
        faults_first = sorted(row, key=lambda prediction: prediction.verdict == "ok")
        reasons = [reason for prediction in faults_first for reason in prediction.reasons[:1]]
        cells = [_verdict(prediction.verdict) for prediction in row]
        table.add_row(row[0].engine, *cells, next(iter(reasons), ""))
    return table


def _verdict(verdict: str) -> Text:
    return Text(verdict, style=_VERDICT_STYLES.get(verdict, "bold red"))


def rank_picture(rows: Sequence[tuple[str, Division]]) -> Text:
    """Draw two lines for each captioned division: its groups, and below them the ranks with their numbers of groups.

    Neighbouring groups have different shades where the width allows it. A group that straddles two ranks is orange, and
    so is the end of the rank that cuts it.
    """
    picture = Text()
    for caption, division in rows:
        columns = division.ranks * max(PICTURE_COLUMNS // division.ranks, 2)
        title = f"{division.kind}: {division.inputs:,} inputs in groups of {division.group_size}, {caption}\n"
        picture.append(title, style="bold")
        picture.append_text(group_line(division, columns)).append_text(_rank_line(division, columns))
    return picture


def group_line(division: Division, columns: int) -> Text:
    """Draw the groups of a division as a bar of ``columns`` characters."""
    line, straddling, groups = Text(" "), division.straddling, len(division.groups())
    for column in range(columns):
        first = column * division.inputs // columns // division.group_size
        last = ((column + 1) * division.inputs - 1) // columns // division.group_size
        cut = any(number in straddling for number in range(first, last + 1))
        shade = "▓" if groups * 2 <= columns and first % 2 else "█"
        line.append(shade, style=CUT if cut else WHOLE)
    return line.append("\n")


def _rank_line(division: Division, columns: int) -> Text:
    width = columns // division.ranks
    groups = f"{division.groups_per_rank:g}"
    line = Text(END, style=WHOLE)
    for cut in [*division.is_cut, False]:
        line.append(groups.center(width - 1) if len(groups) < width else " " * (width - 1), style="dim")
        line.append(CUT_END if cut else END, style=CUT if cut else WHOLE)
    return line.append("\n")


def _tower_data(towers: Sequence[TowerFeasibility], *, padded: bool) -> list[dict[str, Any]]:
    return [
        {
            "part": tower.tower.part,
            "field": tower.tower.field,
            "live": tower.live,
            "padded": tower.padded,
            "asked": padded,
            "extra_weights": tower.extra,
            "extra_flops": tower.extra,
            "extra_bytes": tower.extra_bytes,
            "servings": [asdict(prediction) for prediction in tower.predictions],
            "padded_servings": [asdict(prediction) for prediction in tower.padded_predictions],
            "refusals": tower.refusals(padded=padded),
        }
        for tower in towers
    ]


def _tower_table(towers: Sequence[TowerFeasibility], *, padded: bool) -> Table:
    """Return a table with a row for each tower and engine, with the widths after padding if that was requested."""
    degrees = sorted({prediction.degree for tower in towers for prediction in tower.predictions})
    table = Table(
        "tower", "engine", "MLP width", "extra weights", "extra FLOPs", *(f"TP {degree}" for degree in degrees)
    )
    for tower in towers:
        predictions = tower.padded_predictions if padded else tower.predictions
        extra = f"{tower.extra if padded else 0:.2%}"
        width = f"{tower.live:,} -> {tower.padded:,}" if padded and tower.padded != tower.live else f"{tower.live:,}"
        for engine in dict.fromkeys(prediction.engine for prediction in predictions):
            cells = {found.degree: _verdict(found.verdict) for found in predictions if found.engine == engine}
            row = (cells.get(degree, "") for degree in degrees)
            table.add_row(tower.tower.part, engine, width, extra, extra, *row)
    return table


def _tower_refusals(towers: Sequence[TowerFeasibility], *, padded: bool) -> list[Text]:
    return [Text(sentence, style="red") for tower in towers for sentence in tower.refusals(padded=padded)]


def recipe_data(costs: Sequence[RecipeCost], spec: QuantSpec) -> dict[str, Any]:
    """Return the estimated seconds of each recipe, and what they are scaled from, as JSON values."""
    return {
        "device": spec.device,
        "tokens": spec.samples * spec.seq_len,
        "source": REFERENCES[spec.device].source,
        "estimates": [asdict(cost) for cost in costs],
    }


def recipe_view(costs: Sequence[RecipeCost], spec: QuantSpec) -> Table:
    """Return the same data as a table; the recipe of the settings is marked."""
    where, source = "a GPU" if spec.device == "cuda" else f"{spec.threads} cores", REFERENCES[spec.device].source
    table = Table(
        *("recipe", "minutes", "of gptq", "", ""),
        title=f"Quantizing {spec.samples} x {spec.seq_len} tokens on {where}",
        caption=f"Scaled from {source}.",
        caption_justify="left",
        title_justify="left",
    )
    for cost in costs:
        minutes, ratio = f"{cost.seconds / 60:,.1f}", f"{cost.seconds / costs[0].seconds:.1f}"
        configured = "configured" if cost.recipe == spec.recipe else ""
        table.add_row(cost.recipe, minutes, ratio, "" if cost.measured else "estimated", configured)
    return table


def resource_data(estimate: ResourceEstimate, available: AvailableResources, directory: Path) -> dict[str, Any]:
    """Return the needs of each way to merge and pad, and the shortages that would refuse it, as JSON values."""
    return {
        "place": str(directory),
        "room": asdict(available),
        "ways": [
            {
                "name": way.name,
                "read_bytes": way.read_bytes,
                **asdict(way.needs),
                "refused": [shortage.what for shortage in shortages(way.needs, available, directory)],
            }
            for way in estimate.ways
        ],
    }


def resource_view(
    estimate: ResourceEstimate, available: AvailableResources, directory: Path
) -> tuple[Table, *tuple[Text, ...]]:
    """Return the same data as a table, with the machine's resources in its last row, and the reasons for refusals."""
    table = Table(
        *("", "reads", "disk", "memory", "open files", "here"), title=f"Writing to {directory}", title_justify="left"
    )
    refusals: list[Text] = []
    for way in estimate.ways:
        needs, missing = way.needs, list(shortages(way.needs, available, directory))
        table.add_row(
            way.name,
            size(way.read_bytes),
            size(needs.disk_bytes),
            size(needs.memory_bytes),
            str(needs.open_files),
            Text("refused", style="bold red") if missing else Text("fits", style="green"),
        )
        refusals += [Text(f"{way.name} would be refused: {shortage.what} {shortage.remedy}") for shortage in missing]
    table.add_section()
    free = ("" if count is None else size(count) for count in (available.disk_bytes, available.memory_bytes))
    open_files = "no limit" if available.open_files is None else str(available.open_files)
    table.add_row("available here", "", *free, open_files, "")
    return table, *refusals
