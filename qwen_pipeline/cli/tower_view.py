"""What engines do with vision and audio towers, for a terminal and for machines."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich.table import Table
from rich.text import Text

from qwen_pipeline.qwen.tensor_parallel.towers import TowerFeasibility, TowerPrediction


def tower_data(outlooks: Sequence[TowerFeasibility], *, asked: bool) -> list[dict[str, Any]]:
    """What each tower means, with what padding would cost, for machines."""
    return [
        {
            "part": at.tower.part,
            "field": at.tower.field,
            "live": at.live,
            "padded": at.padded,
            "asked": asked,
            "extra_weights": at.extra,
            "extra_flops": at.extra,
            "extra_bytes": at.extra_bytes,
            "servings": [asdict(serving) for serving in at.servings],
            "padded_servings": [asdict(serving) for serving in at.padded_servings],
            "refusals": at.refusals(at.padded_servings if asked else at.servings),
        }
        for at in outlooks
    ]


def tower_table(outlooks: Sequence[TowerFeasibility], *, asked: bool) -> Table:
    """The same for a reader, a row for each tower and engine: as it is, or as it will be if padding was asked for."""
    degrees = sorted({serving.degree for at in outlooks for serving in at.servings})
    table = Table(
        "tower", "engine", "MLP width", "extra weights", "extra FLOPs", *(f"TP {degree}" for degree in degrees)
    )
    for at in outlooks:
        servings = at.padded_servings if asked else at.servings
        extra = f"{at.extra if asked else 0:.2%}"
        width = f"{at.live:,} -> {at.padded:,}" if asked and at.padded != at.live else f"{at.live:,}"
        for engine in dict.fromkeys(serving.engine for serving in servings):
            cells = {serving.degree: _cell(serving) for serving in servings if serving.engine == engine}
            table.add_row(at.tower.part, engine, width, extra, extra, *(cells.get(degree, "") for degree in degrees))
    return table


def tower_refusals(outlooks: Sequence[TowerFeasibility], *, asked: bool) -> list[Text]:
    """Return a sentence for each tower that an engine refuses at a degree, with all that helps."""
    found = [at.refusals(at.padded_servings if asked else at.servings) for at in outlooks]
    return [Text(sentence, style="red") for sentences in found for sentence in sentences]


def _cell(serving: TowerPrediction) -> Text:
    colors = {"ok": "green", "unknown": "yellow", "refused": "red"}
    return Text(serving.verdict, style=colors[serving.verdict])
