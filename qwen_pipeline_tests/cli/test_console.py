"""Uploaded names and texts reach a terminal as visible text: no markup, no control of the terminal."""

import io
import json
from typing import Any

import pytest
from rich.table import Table
from rich.text import Text

from qwen_pipeline.cli.console import VisibleConsole, dump_visible, visible
from qwen_pipeline.cli.results import CommandResult, _run_and_print  # pyright: ignore[reportPrivateUsage]
from qwen_pipeline.errors import InputRefused

HOSTILE = "a[red]b[/red] :smile: \x1b[31m\x07\x9b2J\r\x00 \u202eevil\u2066 \ud83d\x08 [link=x]"


def shown(*parts: Any, **options: Any) -> str:
    file = io.StringIO()
    console = VisibleConsole(file=file, force_terminal=True, color_system=None, width=200, **options)
    for part in parts:
        console.print(part)
    return file.getvalue()


def test_text_is_shown_as_it_is_in_every_kind_of_part() -> None:
    table = Table("name", HOSTILE)
    table.add_row(HOSTILE, Text(HOSTILE))
    expected = r"a[red]b[/red] :smile: \x1b[31m\x07\x9b2J\r\x00 \u202eevil\u2066 \ud83d\x08 [link=x]"
    assert visible(HOSTILE) == expected
    for removed in (r"\x07", r"\r", r"\x08"):  # by Rich
        expected = expected.replace(removed, "")
    assert shown(HOSTILE, Text(HOSTILE), Text.assemble((HOSTILE, "red"))) == f"{expected}\n" * 3
    found = shown(table)
    assert found.count("[red]b[/red] :smile: ") == 3
    assert not any(unseen in found for unseen in "\x1b\x07\x9b\r\x00\u202e\u2066\ud83d\x08")


def test_lines_and_other_scripts_are_kept() -> None:
    assert visible("a\nb ü 漢字 😀") == "a\nb ü 漢字 😀"


def test_json_has_the_same_values(capsys: pytest.CaptureFixture[str]) -> None:
    text = dump_visible({"name": HOSTILE, "ü": [1.5, None]})
    assert json.loads(text) == {"name": HOSTILE, "ü": [1.5, None]}
    assert not any(unseen in text for unseen in "\x1b\x07\x9b\r\x00\u202e\u2066\ud83d\x08")


@pytest.mark.parametrize("as_json", [False, True])
def test_an_error_about_a_hostile_name_can_be_printed(as_json: bool, capsys: pytest.CaptureFixture[str]) -> None:
    fault = InputRefused(f"There is no {HOSTILE}.", remedy=f"Rename {HOSTILE}.")
    result = CommandResult(data={"x": HOSTILE}, view=[HOSTILE], fault=fault)
    assert _run_and_print(lambda: result, as_json=as_json, debug=False) == 2
    printed = capsys.readouterr()
    assert "[red]b[/red]" in printed.out + printed.err
    assert "\x1b[31m" not in printed.out + printed.err
