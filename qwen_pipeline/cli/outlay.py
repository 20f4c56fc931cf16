"""What merging and padding take beside what this machine has: refused before the first byte is refused here as well."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from qwen_pipeline.checkpoint.memory_budget import AvailableResources, shortages
from qwen_pipeline.cli.tables import size
from qwen_pipeline.stages.merge_pad import ResourceEstimate


def resource_data(takes: ResourceEstimate, room: AvailableResources, place: Path) -> dict[str, Any]:
    """What each way takes and what would be refused, for machines."""
    return {
        "place": str(place),
        "room": asdict(room),
        "ways": [
            {
                "name": way.name,
                "read_bytes": way.read_bytes,
                **asdict(way.needs),
                "refused": [shortage.what for shortage in shortages(way.needs, room, place)],
            }
            for way in takes.ways
        ],
    }


def resource_view(takes: ResourceEstimate, room: AvailableResources, place: Path) -> tuple[Table, *tuple[Text, ...]]:
    """The same as a table, with what the machine has in its last row, and below it what would be refused and why."""
    table = Table(
        "", "reads", "disk", "memory", "open files", "here", title=f"Writing to {place}", title_justify="left"
    )
    refusals: list[Text] = []
    for way in takes.ways:
        needs, refused = way.needs, list(shortages(way.needs, room, place))
        table.add_row(
            way.name,
            size(way.read_bytes),
            size(needs.disk_bytes),
            size(needs.memory_bytes),
            str(needs.open_files),
            Text("refused", style="bold red") if refused else Text("fits", style="green"),
        )
        refusals += [Text(f"{way.name} would be refused: {fault.what} {fault.remedy}") for fault in refused]
    table.add_section()
    has = ("" if count is None else size(count) for count in (room.disk_bytes, room.memory_bytes))
    table.add_row("this machine has", "", *has, "no limit" if room.open_files is None else str(room.open_files), "")
    return table, *refusals
