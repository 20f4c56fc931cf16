"""Planning: what serving engines would do with a model, and which padding and group size cure it."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qwen_pipeline.cli.answers import Answer, answering

if TYPE_CHECKING:
    from rich.table import Table

    from qwen_pipeline.qwen.planning import Option
    from qwen_pipeline.qwen.serving import Serving

app = typer.Typer()


@answering(
    app,
    "plan",
    examples=[
        "qwen-pipeline plan Qwen2.5-72B/ --tp 2 --tp 4 --tp 8 --group-size 128",
        "qwen-pipeline plan Qwen/Qwen3-30B-A3B --engine vllm --tp 4 --picture ranks.svg",
    ],
)
def plan(
    model: str,
    tp: Annotated[list[int], typer.Option(help="Tensor-parallel degree; repeat it for more.")] = [2, 4, 8],  # noqa: B006
    group_size: Annotated[int, typer.Option(help="Consecutive input channels that share one scale.")] = 128,
    engine: Annotated[
        list[str] | None, typer.Option(help="Engine that will serve; repeat it, or leave it out.")
    ] = None,
    max_extra: Annotated[float, typer.Option(help="Most percent of extra weights that padding may add.")] = 100.0,
    rank_memory: Annotated[float | None, typer.Option(help="Most GB of weights on a rank.")] = None,
    picture: Annotated[Path | None, typer.Option(help="Draw groups over ranks into this .png or .svg.")] = None,
) -> Answer:
    """Say what tensor parallelism would do to a model in each serving engine, and what cures it at least cost.

    MODEL is a model directory, a config.json or a hub id; no weights are needed. With --engine, the options below the
    first table are ordered for those engines: padding, smaller groups, or a lower degree.
    """
    from qwen_pipeline.cli.tables import outlook_table
    from qwen_pipeline.hub import find_config
    from qwen_pipeline.qwen.geometry import outlook
    from qwen_pipeline.qwen.planning import legal_degree, options
    from qwen_pipeline.qwen.serving import require_engines, serving

    config = _read_config(find_config(model))
    engines = require_engines(engine or [])
    rows = outlook(config, group_size=group_size, degrees=tp)
    verdicts = [serving(config, name, group_size=group_size, degree=degree) for name in engines for degree in tp]
    data: dict[str, Any] = {
        "group_size": group_size,
        "degrees": [{**asdict(row), "extra_percent": row.extra_percent} for row in rows],
        "engines": [asdict(verdict) for verdict in verdicts],
    }
    view: list[Any] = [outlook_table(rows, group_size), _engine_table(verdicts, tp)]
    if engine:
        found = options(config, engines=engines, degrees=tp)
        fitting = [at for at in found if _fits(at, max_extra, rank_memory)]
        lower = legal_degree(config, engines=engines, group_size=group_size, below=max(tp))
        data |= {"options": [_option_data(at, at in fitting) for at in found], "lower_degree": lower}
        view += [_option_table(found, fitting)]
        view += [f"As it is, in groups of {group_size}, all of these engines serve it at TP {lower}."] if lower else []
    if picture:
        from qwen_pipeline.evaluation.rank_plot import draw_ranks
        from qwen_pipeline.qwen.geometry import plan_padding

        widest = max(tp)
        draw_ranks(plan_padding(config, group_size=group_size, tensor_parallel=widest), widest, picture)
        data["picture"] = str(picture)
        view.append(f"Picture: {picture}")
    return Answer(data=data, view=view)


def _fits(option: "Option", max_extra: float, rank_memory: float | None) -> bool:
    return (
        option.verdict in ("ok", "padded at load")
        and 100 * option.weights <= max_extra
        and (rank_memory is None or option.rank_bytes <= rank_memory * 1e9)
    )


def _option_data(option: "Option", fits: bool) -> dict[str, Any]:
    sizes = {size.field: [size.live, size.padded] for size in option.plan.sizes}
    return {
        "name": option.name,
        "group_size": option.group_size,
        "sizes": sizes,
        "verdict": option.verdict,
        "fits": fits,
        "extra_weights": option.weights,
        "extra_flops": option.flops,
        "rank_bytes": option.rank_bytes,
    }


def _engine_table(verdicts: "Sequence[Serving]", degrees: Sequence[int]) -> "Table":
    from rich.table import Table
    from rich.text import Text

    colors = {"ok": "green", "padded at load": "green", "unknown": "yellow", "refused": "red"}
    table = Table("engine", *(f"TP {degree}" for degree in degrees), "because")
    for start in range(0, len(verdicts), len(degrees)):
        row = verdicts[start : start + len(degrees)]
        reasons = dict.fromkeys(reason for at in row for reason in at.reasons[:1])
        cells = [Text(at.verdict, style=colors.get(at.verdict, "bold red")) for at in row]
        table.add_row(row[0].engine, *cells, next(iter(reasons), ""))
    return table


def _option_table(found: "Sequence[Option]", fitting: "Sequence[Option]") -> "Table":
    from rich.table import Table
    from rich.text import Text

    table = Table("option", "sizes", "serves", "extra weights", "extra work", "GB a rank", "")
    for option in found:
        sizes = ", ".join(f"{size.live:,} -> {size.padded:,}" for size in option.plan.sizes if size.zeros)
        chosen = bool(fitting) and option is fitting[0]
        table.add_row(
            option.name,
            sizes or "unchanged",
            option.verdict,
            f"{option.weights:.2%}",
            f"{option.flops:.2%}",
            f"{option.rank_bytes / 1e9:.2f}",
            Text("best", style="bold green") if chosen else "" if option in fitting else "does not fit",
        )
    return table


def _read_config(file: Path) -> dict[str, Any]:
    from qwen_pipeline.errors import CheckpointRefused

    try:
        return json.loads(file.read_bytes())
    except (OSError, ValueError) as error:
        raise CheckpointRefused(f"{file} cannot be read: {error}.", remedy="Name a model directory.") from error
