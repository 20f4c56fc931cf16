"""``qwen-pipeline doctor``: what would stop a run, each with its remedy."""

from collections.abc import Mapping
from dataclasses import asdict

import typer
from rich.table import Column, Table
from rich.text import Text

from qwen_pipeline.cli.results import CommandResult, command
from qwen_pipeline.errors import CheckFailed

app = typer.Typer()

_STYLES: Mapping[str, str] = {"ok": "green", "warning": "yellow", "failed": "bold red"}


@command(app, "doctor", examples=["qwen-pipeline doctor", "qwen-pipeline doctor --json | jq '.findings[].remedy'"])
def doctor() -> CommandResult:
    """Look for what would stop a run: machine, settings, base, texts, engines, disk, inbox, Dagster, keys.

    Nothing is downloaded. The exit code is 1 if anything failed; a warning stops nothing.
    """
    from qwen_pipeline.doctor import examine

    findings = list(examine())
    failed = [finding for finding in findings if finding.outcome == "failed"]
    table = Table("subject", "outcome", Column("found", overflow="fold"))
    for finding in findings:
        table.add_row(finding.subject, Text(finding.outcome, style=_STYLES[finding.outcome]), Text(finding.detail))
    remedies = [Text(f"{finding.subject}: {finding.remedy}") for finding in findings if finding.remedy]
    fault = None
    if failed:
        fault = CheckFailed(
            f"{len(failed)} of {len(findings)} would stop a run: {', '.join(finding.subject for finding in failed)}.",
            remedy="Follow the remedies above." if len(failed) > 1 else failed[0].remedy,
        )
    return CommandResult(
        data={"findings": [asdict(finding) for finding in findings]}, view=[table, *remedies], fault=fault
    )
