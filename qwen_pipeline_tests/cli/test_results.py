"""Whatever happens in a command has a message, an exit code and, asked for, one JSON object."""

import json
from pathlib import Path

import click
import pytest
import typer
from typer.testing import CliRunner

from qwen_pipeline.cli.results import CRASHED, INTERRUPTED, CommandResult, command
from qwen_pipeline.errors import CheckFailed, EnvironmentFault, InputRefused

FAULTS: dict[str, BaseException] = {
    "check": CheckFailed("perplexity is 3", remedy="calibrate longer"),
    "input": InputRefused("[red] is no checkpoint", remedy="name one"),
    "machine": EnvironmentFault("disk full", remedy="free space"),
    "interrupt": KeyboardInterrupt(),
    "crash": ZeroDivisionError("division by zero"),
}

app = typer.Typer(pretty_exceptions_enable=False)


@command(app, "ends", examples=["ends with a fault"])
def ends(fault: str, late: bool = False) -> CommandResult:
    if fault == "usage":
        raise click.UsageError("nobody does that")
    if fault == "none":
        return CommandResult(data={"done": True}, view=["all is well"])
    if late:
        return CommandResult(data={"done": False}, view=["came half way"], fault=FAULTS[fault])
    raise FAULTS[fault]


def run(*arguments: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, arguments)
    return result.exit_code, result.stdout, result.stderr


@pytest.mark.parametrize(
    ("fault", "code"),
    [
        ("none", 0),
        ("check", 1),
        ("input", 2),
        ("machine", 3),
        ("usage", 2),
        ("interrupt", INTERRUPTED),
        ("crash", CRASHED),
    ],
)
def test_exit_codes(fault: str, code: int) -> None:
    assert run(fault)[0] == code


def test_the_answer_is_on_standard_output_and_the_fault_on_standard_error() -> None:
    code, out, err = run("check", "--late")
    assert code == 1
    assert out == "came half way\n"
    assert "perplexity is 3" in err
    assert "Remedy: calibrate longer" in err
    assert "Traceback" not in err


def test_markup_in_a_message_is_text() -> None:
    assert "[red] is no checkpoint" in run("input")[2]


@pytest.mark.parametrize("fault", ["check", "input", "machine", "interrupt", "crash"])
def test_one_object_whatever_happens(fault: str) -> None:
    code, out, _ = run(fault, "--json", "--late")
    answer = json.loads(out)
    assert answer["done"] is False
    assert answer["error"]["exit_code"] == code
    assert answer["error"]["kind"] == type(FAULTS[fault]).__name__
    assert json.loads(run("none", "--json")[1]) == {"done": True}


def test_an_unforeseen_error_is_one_line_and_a_place_to_read_on() -> None:
    _, _, err = run("crash")
    first, second = err.splitlines()
    assert first == "ZeroDivisionError: division by zero"
    story = Path(second.removeprefix("Full traceback: "))
    assert "Traceback" in story.read_text()
    story.unlink()
    assert "Traceback" in run("crash", "--debug")[2]
