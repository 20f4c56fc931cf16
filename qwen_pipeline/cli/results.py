"""How every command ends: one answer for a person or a machine, an exit code, never an unasked traceback."""

import inspect
import json
import sys
import tempfile
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Annotated, Any

import click
import typer
from rich.console import Console, RenderableType
from rich.text import Text

from qwen_pipeline.errors import CheckFailed, EnvironmentFault, InputRefused, PipelineError

INTERRUPTED = 130
CRASHED = 70
"""``EX_SOFTWARE``: a mistake in this program, not in what it was given."""

WIDTH_OF_A_FILE = 120

_TITLES = {InputRefused: "Refused", CheckFailed: "Not good enough", EnvironmentFault: "The machine is at fault"}

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output, nothing else there.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error that nobody foresaw.")]


@dataclass(frozen=True, slots=True, kw_only=True)
class CommandResult:
    """What a command found out.

    Attributes:
        data: For machines: the object that ``--json`` prints.
        view: For people: printed one below the other.
        fault: Why the command did not get all the way; ``data`` and ``view`` say how far it came.
        then: What the command goes on to do once its answer is out.
    """

    data: Mapping[str, Any]
    view: Sequence[RenderableType] = ()
    fault: BaseException | None = None
    then: Callable[[], object] | None = None


Command = Callable[..., CommandResult]


def command(app: typer.Typer, name: str, *, examples: Sequence[str]) -> Callable[[Command], Command]:
    """Make a function a command with ``--json`` and ``--debug``, whose answer is printed and whose faults are named."""

    def register(function: Command) -> Command:
        @wraps(function)
        def command(*args: Any, as_json: bool, debug: bool, **kwargs: Any) -> None:
            raise typer.Exit(_deliver(lambda: function(*args, **kwargs), as_json=as_json, debug=debug))

        own = inspect.signature(function)
        added = [
            inspect.Parameter(key, inspect.Parameter.KEYWORD_ONLY, default=False, annotation=annotation)
            for key, annotation in (("as_json", AsJson), ("debug", Debug))
        ]
        command.__signature__ = own.replace(parameters=[*own.parameters.values(), *added])  # pyright: ignore[reportAttributeAccessIssue]
        command.__annotations__ = {**function.__annotations__, "as_json": AsJson, "debug": Debug}
        app.command(name, epilog="\n\n".join(["Examples:", *examples]))(command)
        return function

    return register


def _deliver(command: Callable[[], CommandResult], *, as_json: bool, debug: bool) -> int:
    try:
        answer = command()
    except click.ClickException:
        raise
    except (Exception, KeyboardInterrupt) as error:
        answer = CommandResult(data={}, fault=error)
    if as_json:
        print(json.dumps({**answer.data, **_error_object(answer.fault)}, ensure_ascii=False))
    else:
        console = Console(width=None if sys.stdout.isatty() else WIDTH_OF_A_FILE)
        for part in answer.view:
            console.print(part)
    if answer.then:
        answer.then()
    if answer.fault is None:
        return 0
    _complain(answer.fault, debug=debug)
    return _exit_code(answer.fault)


def _exit_code(fault: BaseException) -> int:
    if isinstance(fault, PipelineError):
        return fault.exit_code
    return INTERRUPTED if isinstance(fault, KeyboardInterrupt) else CRASHED


def _error_object(fault: BaseException | None) -> dict[str, Any]:
    if fault is None:
        return {}
    what, remedy = (fault.what, fault.remedy) if isinstance(fault, PipelineError) else (str(fault), None)
    return {"error": {"kind": type(fault).__name__, "what": what, "remedy": remedy, "exit_code": _exit_code(fault)}}


def _complain(fault: BaseException, *, debug: bool) -> None:
    """Say on standard error what went wrong and what to do."""
    console = Console(stderr=True)
    match fault:
        case PipelineError():
            title = next((text for kind, text in _TITLES.items() if isinstance(fault, kind)), "Failed")
            console.print(Text.assemble((f"{title}: ", "bold red"), fault.what), soft_wrap=True)
            console.print(Text.assemble(("Remedy: ", "bold"), fault.remedy), soft_wrap=True)
        case KeyboardInterrupt():
            console.print("Interrupted. Run the same command again: what is finished is kept.")
        case _:
            story = "".join(traceback.format_exception(fault))
            console.print(Text.assemble((f"{type(fault).__name__}: ", "bold red"), _first_line(fault)), soft_wrap=True)
            console.print(Text(story if debug else f"The whole story: {_kept(story)}"), soft_wrap=True)


def _first_line(fault: BaseException) -> str:
    return (str(fault).splitlines() or [""])[0]


def _kept(story: str) -> Path:
    with tempfile.NamedTemporaryFile("w", prefix="qwen-pipeline-", suffix=".log", delete=False) as file:
        file.write(story)
    return Path(file.name)
