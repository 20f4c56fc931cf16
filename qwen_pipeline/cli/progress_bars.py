"""Progress on standard error: bars in a terminal, plain lines elsewhere."""

import os
from collections.abc import Generator
from contextlib import contextmanager

from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from qwen_pipeline import progress
from qwen_pipeline.cli.console import VisibleConsole
from qwen_pipeline.progress import Observe, logging_observer


@contextmanager
def progress_bars() -> Generator[Observe, None, None]:
    """Show the progress of the stages that run within the ``with`` block.

    Standard error is duplicated first, because Dagster redirects it into its logs.
    """
    with os.fdopen(os.dup(2), "w", buffering=1) as stderr:
        console = VisibleConsole(file=stderr)
        if not console.is_terminal:
            yield logging_observer(lambda line: console.print(line, highlight=False, soft_wrap=True))
            return
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TextColumn("{task.fields[figures]}", markup=False, style="progress.percentage"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[remark]}", markup=False, style="dim"),
        )
        with Progress(*columns, console=console) as bars:
            yield _observer(bars)


def _observer(bars: Progress) -> Observe:
    tasks = {}
    rates = progress.TransferRate()

    def observe(event: progress.Progress) -> None:
        if event.task not in tasks:
            tasks[event.task] = bars.add_task(event.task, figures="", remark="")
        bars.update(
            tasks[event.task],
            completed=event.done,
            total=event.total,
            figures=progress.format_amount(event),
            remark=event.remark or rates.describe(event),
        )

    return observe
