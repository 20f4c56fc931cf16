"""The whole pipeline: run a fine-tune through it, see where everything stands, open the UI."""

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
        bool | None, typer.Option(help="Store the merged weights, or pad them in the same pass; default: the settings.")
    ] = None,
) -> CommandResult:
    """Take one fine-tune all the way: merge, pad, calibrate, quantize, validate, publish.

    FINE_TUNE is the name of a directory in the inbox, or the path of a directory elsewhere.

    The same graph, store and Dagster instance as the UI's, in this process and without a daemon. What is up to date
    is not done again; an interrupted run continues where it stopped.
    """
    from qwen_pipeline.cli.progress_bars import progress_bars
    from qwen_pipeline.config import load_settings
    from qwen_pipeline.models.inbox import Inbox
    from qwen_pipeline.runner.headless import run_fine_tune

    settings = load_settings()
    if store_merged is not None:
        settings = settings.model_copy(update={"store": settings.store.model_copy(update={"merged": store_merged})})
    is_path = "/" in fine_tune or fine_tune in (".", "..")
    arrival = Inbox(settings.inbox).admit(Path(fine_tune)) if is_path else Inbox(settings.inbox).require(fine_tune)
    with progress_bars() as observe:
        outcome = run_fine_tune(settings, arrival.name, observe=observe)
    return _outcome(outcome)


@command(app, "publish", examples=["qwen-pipeline publish my-lora"])
def publish(fine_tune: str) -> CommandResult:
    """Release the quantized checkpoint of FINE_TUNE, if its validation says that it may go out.

    The reports are read and demanded here as well: there is no way around a failed check.
    """
    from qwen_pipeline.cli.progress_bars import progress_bars
    from qwen_pipeline.config import load_settings
    from qwen_pipeline.runner.headless import publish_fine_tune

    with progress_bars() as observe:
        return _outcome(publish_fine_tune(load_settings(), fine_tune, observe=observe))


@command(app, "status", examples=["qwen-pipeline status", "qwen-pipeline status --json | jq '.fine_tunes[].name'"])
def status() -> CommandResult:
    """Show how far every fine-tune and import is: done, failed, stale (its input or the code changed) or missing."""
    from qwen_pipeline.cli.tables import status_data, status_table
    from qwen_pipeline.config import load_settings
    from qwen_pipeline.status import fine_tune_statuses, import_statuses

    settings = load_settings()
    found, imported = fine_tune_statuses(settings), import_statuses(settings)
    nothing = f"No fine-tune yet: copy one into {settings.inbox}."
    below = [status_table(imported, "import")] if imported else []
    return CommandResult(
        data={"fine_tunes": status_data(found), "imports": status_data(imported)},
        view=[status_table(found) if found else nothing, *below],
    )


@command(app, "demo", examples=["qwen-pipeline demo", "qwen-pipeline demo --base Qwen/Qwen2.5-0.5B-Instruct"])
def demo(
    base: Annotated[str | None, typer.Option(help="Directory or hub id of another base than the small one.")] = None,
) -> CommandResult:
    """Train a small LoRA on a small real model and take it all the way to a published checkpoint, in minutes."""
    from qwen_pipeline.cli.demo import run_demo
    from qwen_pipeline.cli.progress_bars import progress_bars

    with progress_bars() as observe:
        return run_demo(base=base, observe=observe)


@command(app, "ui", examples=["qwen-pipeline ui", "qwen-pipeline ui --port 3001"])
def ui(port: Annotated[int, typer.Option(help="Port on 127.0.0.1.")] = 3000) -> CommandResult:
    """Open Dagster's web UI and its daemon, which watches the inbox. Ends with Ctrl-C.

    The UI has no login, so it listens on this machine only; reach it from elsewhere through ssh or a proxy with a
    login.
    """
    from qwen_pipeline.config import load_settings
    from qwen_pipeline.runner.dagster_home import exec_server

    settings, url = load_settings(), f"http://127.0.0.1:{port}"
    return CommandResult(data={"url": url}, view=[f"Opening {url}"], then=lambda: exec_server(settings, port=port))


def _outcome(outcome: "Outcome") -> CommandResult:
    from qwen_pipeline.cli.tables import artifact_data, artifact_table, check_table

    artifacts = outcome.artifacts
    release = next((a.path for a in artifacts if a.manifest.derivation.stage == "published"), None)
    data = {
        "fine_tune": outcome.fine_tune,
        "run_id": outcome.run_id,
        "stages": [artifact_data(artifact) for artifact in artifacts],
        "release": str(release) if release else None,
    }
    view = [artifact_table(artifacts), check_table(artifacts)] if artifacts else []
    return CommandResult(data=data, view=[*view, f"Released: {release}"] if release else view, fault=outcome.fault)
