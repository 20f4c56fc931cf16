"""Tables of ``qwen-pipeline inspect``: what a directory is, its files, an adapter's settings, changed tensors."""

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.table import Table

from qwen_pipeline.cli.console import size
from qwen_pipeline.models.fine_tune_files import FineTuneFiles

_UNSET: tuple[object, ...] = (False, "none", (), {})
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")
_ROWS = 12


def what_table(data: Mapping[str, Any]) -> Table:
    """Return the kind of a directory, and the tools that seem to have saved it, each with its evidence."""
    table = Table("", "", show_header=False)
    table.add_row("is", data["is"])
    for number, tool in enumerate(data["saved_by"]):
        table.add_row("" if number else "saved by", f"{tool['tool']} ({tool['evidence']})")
    return table


def files_table(directories: Sequence[FineTuneFiles]) -> Table:
    """Return a table of the fate of each file; those that share one are counted."""
    table = Table("files", "size", "what happens")
    for directory in directories:
        for paths, fate in _fates(directory):
            total = sum((directory.root / path).stat().st_size for path in paths)
            name = paths[0] if len(paths) == 1 else f"{paths[0]} and {len(paths) - 1} more"
            table.add_row(name, size(total), fate)
    return table


def _fates(files: FineTuneFiles) -> Iterator[tuple[list[str], str]]:
    """Yield files with their fate: those that are refused or read one by one, others together."""
    yield from (([path], "REFUSED: weights that a merge does not read") for path in files.unread)
    read = list(files.read)
    yield from (([path], "read") for path in read) if len(read) <= _ROWS else ((read, "read"),)
    if files.carried:
        yield list(files.carried), "carried over"
    for reason in dict.fromkeys(files.left_behind.values()):
        yield [path for path, why in files.left_behind.items() if why == reason], f"left behind: {reason}"


def settings_table(adapters: list[dict[str, Any]]) -> Table:
    """Return the settings of adapters, and the base of each."""
    table = Table("adapter", "trained on", "PEFT", "tensors", "weight", "settings")
    for adapter in adapters:
        settings = [f"{name} {value}" for name, value in adapter["settings"].items() if value not in _UNSET]
        trained_on = " at ".join(filter(None, (adapter["base"] or "unknown", adapter["revision"])))
        table.add_row(
            adapter["path"],
            trained_on,
            adapter["peft_version"] or "",
            str(adapter["tensors"]),
            f"{adapter['weight']:g}",
            ", ".join([*settings, *(f"names {difference}" for difference in adapter["spelling"])]),
        )
    return table


def merge_table(tensors: dict[str, dict[str, Any]]) -> Table:
    """Return the tensors that change; names that differ only in numbers share a row."""
    lines = Counter(
        (_NUMBER.sub("*", name), ", ".join(merge["what"]), ", ".join(f"{s:g}" for s in merge["scalings"]))
        for name, merge in tensors.items()
    )
    table = Table("tensors of the base", "count", "change", "scaling")
    for (name, what, scaling), count in lines.items():
        table.add_row(name, str(count), what, scaling)
    return table
