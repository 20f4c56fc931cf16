"""Commands for the whole pipeline: run a fine-tune, publish it, show the status, run the demo, open the UI."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qwen_pipeline.cli.results import CommandResult, command

if TYPE_CHECKING:
    from qwen_pipeline.runner.headless import Outcome

app = typer.Typer()


@command(app, "run", examples=["qwen-pipeline run my-lora", "qwen-pipeline run ~/training/my-lora --json"])
def run(
    fine_tune: str,
    store_merged: Annotated[
        bool | None,
        typer.Option(help="Store merged weights, or merge and pad in one pass; default: store.merged."),
    ] = None,
) -> CommandResult:
    """Run one fine-tune through all stages: merge, pad, calibrate, quantize, validate, publish.

    FINE_TUNE is the name of a directory in the inbox, or the path of a directory elsewhere.

    It uses the asset graph, store and Dagster instance of the UI, in this process and without a daemon. Results that
    are up to date are reused; an interrupted run continues where it stopped.
    """
    from qwen_pipeline.cli.progress_bars import progress_bars
    from qwen_pipeline.config import load_settings
    from qwen_pipeline.models.inbox import Inbox
    from qwen_pipeline.runner.headless import run_fine_tune

    settings = load_settings()
    if store_merged is not None:
        settings = settings.model_copy(update={"store": settings.store.model_copy(update={"merged": store_merged})})
    is_path = "/" in fine_tune or fine_tune in (".", "..")
    arrival = Inbox(settings.inbox).link(Path(fine_tune)) if is_path else Inbox(settings.inbox).require(fine_tune)
    with progress_bars() as observe:
        outcome = run_fine_tune(settings, arrival.name, observe=observe)
    return _outcome(outcome)


@command(app, "publish", examples=["qwen-pipeline publish my-lora"])
def publish(fine_tune: str) -> CommandResult:
    """Release the quantized checkpoint of FINE_TUNE, if its validation passed.

    The check reports are read again, so that a failed check cannot be bypassed.
    """
    from qwen_pipeline.cli.progress_bars import progress_bars
    from qwen_pipeline.config import load_settings
    from qwen_pipeline.runner.headless import publish_fine_tune

    with progress_bars() as observe:
        return _outcome(publish_fine_tune(load_settings(), fine_tune, observe=observe))


@command(app, "status", examples=["qwen-pipeline status", "qwen-pipeline status --json | jq '.fine_tunes[].name'"])
def status() -> CommandResult:
    """Show each stage of every fine-tune and import: done, failed, stale (input or code changed), damaged, missing."""
    from qwen_pipeline.cli.tables import status_data, status_table
    from qwen_pipeline.config import load_settings
    from qwen_pipeline.status import fine_tune_statuses, import_statuses

    settings = load_settings()
    fine_tunes, imports = fine_tune_statuses(settings), import_statuses(settings)
    return CommandResult(
        data={"fine_tunes": status_data(fine_tunes), "imports": status_data(imports)},
        view=[
            status_table(fine_tunes) if fine_tunes else f"No fine-tunes yet: copy one into {settings.inbox}.",
            *([status_table(imports, "import")] if imports else []),
        ],
    )


@command(app, "demo", examples=["qwen-pipeline demo", "qwen-pipeline demo --base Qwen/Qwen2.5-0.5B-Instruct"])
def demo(
    base: Annotated[
        str | None, typer.Option(help="Directory or hub id of a base to use instead of the small one.")
    ] = None,
) -> CommandResult:
    """Train a LoRA on a small model and run it through all stages to a published checkpoint, in minutes."""
    from qwen_pipeline.cli.demo import run_demo
    from qwen_pipeline.cli.progress_bars import progress_bars

    with progress_bars() as observe:
        return run_demo(base=base, observe=observe)


@command(app, "ui", examples=["qwen-pipeline ui", "qwen-pipeline ui --port 3001"])
def ui(port: Annotated[int, typer.Option(help="Port on 127.0.0.1.")] = 3000) -> CommandResult:
    """Start Dagster's web UI and its daemon, which watches the inbox. Stop them with Ctrl-C.

    The UI has no login, so it listens on this machine only; reach it from elsewhere through ssh or a proxy with a
    login.
    """
    from qwen_pipeline.config import load_settings
    from qwen_pipeline.runner.dagster_home import exec_server

    settings, url = load_settings(), f"http://127.0.0.1:{port}"
    return CommandResult(data={"url": url}, view=[f"Opening {url}"], then=lambda: exec_server(settings, port=port))


def _outcome(outcome: "Outcome") -> CommandResult:
    from qwen_pipeline.cli.tables import artifact_data, artifact_table, check_table
    from qwen_pipeline.reports import load_reports

    artifacts = outcome.artifacts
    release = next((artifact for artifact in artifacts if artifact.manifest.derivation.stage == "published"), None)
    data = {
        "fine_tune": outcome.fine_tune,
        "run_id": outcome.run_id,
        "stages": [artifact_data(artifact) for artifact in artifacts],
        "release": str(release.path) if release else None,
    }
    view = [artifact_table(artifacts), check_table(artifacts)] if artifacts else []
    if release:
        view += [*(report.detail for report in load_reports(release.manifest.result)[:1]), f"Released: {release.path}"]
    return CommandResult(data=data, view=view, fault=outcome.fault)
