"""Results of commands: tables or JSON, error messages, and exit codes."""

import inspect
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Annotated, Any

import click
import typer
from rich.console import RenderableType
from rich.text import Text

from qwen_pipeline.checkpoint.store.origin import started_through
from qwen_pipeline.cli.console import VisibleConsole, dump_visible
from qwen_pipeline.cli.options import spec_options
from qwen_pipeline.errors import CheckFailed, EnvironmentFault, InputRefused, PipelineError, machine_fault

INTERRUPTED = 130
CRASHED = 70
"""``EX_SOFTWARE``: an error in this program, not in its input."""

FILE_WIDTH = 120
"""Columns of output that does not go to a terminal."""

_TITLES = {InputRefused: "Refused", CheckFailed: "Check failed", EnvironmentFault: "Environment error"}

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output, and nothing else.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an unexpected error.")]


@dataclass(frozen=True, slots=True, kw_only=True)
class CommandResult:
    """The result of a command.

    Attributes:
        data: The object that ``--json`` prints.
        view: Tables and lines for people, printed one below the other.
        fault: The reason why the command did not complete; ``data`` and ``view`` are then its partial result.
        then: Called after the result is printed.
    """

    data: Mapping[str, Any]
    view: Sequence[RenderableType] = ()
    fault: BaseException | None = None
    then: Callable[[], object] | None = None


Command = Callable[..., CommandResult]


def command(app: typer.Typer, name: str, *, examples: Sequence[str]) -> Callable[[Command], Command]:
    """Register a function as a command with ``--json`` and ``--debug``, whose result or error is printed.

    A parameter annotated with :class:`~qwen_pipeline.cli.options.SpecOptions` becomes one option for each of its
    fields; the function gets the spec.
    """

    def register(function: Command) -> Command:
        parameters = inspect.signature(function).parameters
        specs = {key: found for key, parameter in parameters.items() if (found := spec_options(parameter))}

        def run(arguments: dict[str, Any]) -> CommandResult:
            built = {key: options.build(arguments) for key, options in specs.items()}
            expanded = {field for options in specs.values() for field in options.options}
            return function(**{key: value for key, value in arguments.items() if key not in expanded}, **built)

        @wraps(function)
        def command(*, as_json: bool, debug: bool, **arguments: Any) -> None:
            raise typer.Exit(_run_and_print(lambda: run(arguments), as_json=as_json, debug=debug))

        shown = [*_command_line(parameters.values()), _flag("as_json", AsJson), _flag("debug", Debug)]
        command.__signature__ = inspect.Signature(shown)  # pyright: ignore[reportAttributeAccessIssue]
        command.__annotations__ = {parameter.name: parameter.annotation for parameter in shown}
        app.command(name, epilog="\n\n".join(["Examples:", *examples]))(command)
        return function

    return register


def _command_line(parameters: Iterable[inspect.Parameter]) -> Iterator[inspect.Parameter]:
    """Yield the parameters for Typer: all keyword-only, with each spec expanded into its options."""
    for parameter in parameters:
        if options := spec_options(parameter):
            yield from options.parameters()
        else:
            yield parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)


def _flag(name: str, annotation: object) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=False, annotation=annotation)


def _run_and_print(command: Callable[[], CommandResult], *, as_json: bool, debug: bool) -> int:
    """Run a command, print its result and its error, and return the exit code."""
    try:
        with started_through(f"command {Path(sys.argv[0]).name} {' '.join(sys.argv[1:2])}".strip()):
            result = command()
    except click.ClickException:
        raise
    except (Exception, KeyboardInterrupt) as error:
        result = CommandResult(data={}, fault=as_fault(error))
    if as_json:
        print(dump_visible({**result.data, **_error_object(result.fault)}))
    else:
        console = VisibleConsole(width=None if sys.stdout.isatty() else FILE_WIDTH)
        for part in result.view:
            console.print(part)
    if result.then:
        result.then()
    if result.fault is None:
        return 0
    _print_error(result.fault, debug=debug)
    return exit_code(result.fault)


def as_fault(error: BaseException) -> BaseException:
    """Return an error of the operating system as one of this package, and any other unchanged."""
    if isinstance(error, (OSError, MemoryError)):
        fault = machine_fault(error)
        fault.__cause__ = error
        return fault
    return error


def exit_code(fault: BaseException) -> int:
    """Return the exit code of a command that ended with an error."""
    if isinstance(fault, PipelineError):
        return fault.exit_code
    return INTERRUPTED if isinstance(fault, KeyboardInterrupt) else CRASHED


def _error_object(fault: BaseException | None) -> dict[str, Any]:
    if fault is None:
        return {}
    what, remedy = (fault.what, fault.remedy) if isinstance(fault, PipelineError) else (str(fault), None)
    return {"error": {"kind": type(fault).__name__, "what": what, "remedy": remedy, "exit_code": exit_code(fault)}}


def _print_error(fault: BaseException, *, debug: bool) -> None:
    """Print the error and its remedy on standard error."""
    console = VisibleConsole(stderr=True)
    match fault:
        case PipelineError():
            title = next((text for kind, text in _TITLES.items() if isinstance(fault, kind)), "Error")
            console.print(Text.assemble((f"{title}: ", "bold red"), fault.what), soft_wrap=True)
            console.print(Text.assemble(("Remedy: ", "bold"), fault.remedy), soft_wrap=True)
        case KeyboardInterrupt():
            console.print("Interrupted. Run the same command again: finished work is kept.")
        case _:
            report = "".join(traceback.format_exception(fault))
            console.print(Text.assemble((f"{type(fault).__name__}: ", "bold red"), _first_line(fault)), soft_wrap=True)
            console.print(Text(report if debug else f"Full traceback: {_write_log(report)}"), soft_wrap=True)


def _first_line(fault: BaseException) -> str:
    return (str(fault).splitlines() or [""])[0]


def _write_log(report: str) -> Path:
    with tempfile.NamedTemporaryFile("w", prefix="qwen-pipeline-", suffix=".log", delete=False) as file:
        file.write(report)
    return Path(file.name)
