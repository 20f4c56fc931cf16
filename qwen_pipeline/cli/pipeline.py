"""Commands for the whole pipeline: run a fine-tune, publish it, show the status, run the demo, open the UI."""

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qwen_pipeline.cli.results import CommandResult, command

if TYPE_CHECKING:
    from qwen_pipeline.runner.headless import Outcome

app = typer.Typer()


RECIPE_HELP = "Section [recipes.NAME] of the settings, or default: the settings at the top level."


@command(
    app,
    "run",
    examples=[
        "qwen-pipeline run my-lora",
        "qwen-pipeline run ~/training/my-lora --json",
        "qwen-pipeline run my-lora --recipe fast",
    ],
)
def run(
    fine_tune: str,
    recipe: Annotated[str | None, typer.Option(help=RECIPE_HELP + " Default: all that apply to the fine-tune.")] = None,
    store_merged: Annotated[
        bool | None,
        typer.Option(help="Store merged weights, or merge and pad in one pass; default: store.merged."),
    ] = None,
    store_padded: Annotated[
        bool | None,
        typer.Option(
            help="Store padded weights, or compute them when they are read (with --no-store-merged); default:"
            " store.padded."
        ),
    ] = None,
) -> CommandResult:
    """Run one fine-tune through all stages: merge, pad, calibrate, quantize, validate, publish.

    FINE_TUNE is the name of a directory in the inbox, NAME@RECIPE, or the path of a directory elsewhere.

    Where several recipes apply to it, each makes a release of its own. It uses the asset graph, store and Dagster
    instance of the UI, in this process and without a daemon. Results that are up to date are reused; an interrupted run
    continues where it stopped.
    """
    from qwen_pipeline.cli.progress_bars import progress_bars
    from qwen_pipeline.config import Settings, load_settings, settings_from_values
    from qwen_pipeline.config.recipes import overlaid
    from qwen_pipeline.models.inbox import Inbox
    from qwen_pipeline.runner.headless import products_to_run, run_product

    settings = load_settings()
    stored = {"merged": store_merged, "padded": store_padded}
    if chosen := {name: choice for name, choice in stored.items() if choice is not None}:
        settings = settings_from_values(overlaid(settings.values, {"store": chosen}, Settings))
    is_path = "/" in fine_tune or fine_tune in (".", "..")
    name, recipe = (fine_tune, recipe) if is_path else _split(fine_tune, recipe)
    arrival = Inbox(settings.inbox).link(Path(name)) if is_path else Inbox(settings.inbox).require(name)
    keys = products_to_run(settings, arrival.name, recipe=recipe)
    with progress_bars() as observe:
        return _outcomes(arrival.name, (run_product(settings, key, observe=observe) for key in keys))


@command(app, "publish", examples=["qwen-pipeline publish my-lora", "qwen-pipeline publish my-lora --recipe fast"])
def publish(
    fine_tune: str, recipe: Annotated[str | None, typer.Option(help=RECIPE_HELP + " Default: default.")] = None
) -> CommandResult:
    """Release the quantized checkpoint of FINE_TUNE, if its validation passed.

    The check reports are read again, so that a failed check cannot be bypassed.
    """
    from qwen_pipeline.cli.progress_bars import progress_bars
    from qwen_pipeline.config import load_settings
    from qwen_pipeline.runner.headless import publish_fine_tune

    with progress_bars() as observe:
        name, recipe = _split(fine_tune, recipe)
        return _outcome(publish_fine_tune(load_settings(), name, recipe=recipe, observe=observe))


@command(app, "status", examples=["qwen-pipeline status", "qwen-pipeline status --json | jq '.fine_tunes[].name'"])
def status() -> CommandResult:
    """Show what every product of a fine-tune and every import needs, and first what needs a person.

    A product is a fine-tune with one recipe. Its stages are done, missing, stale (input, settings or code changed),
    failed (a check) or damaged. What is quarantined is not taken before its files or the settings change.
    """
    from qwen_pipeline.cli.tables import status_data, status_table
    from qwen_pipeline.config import load_settings
    from qwen_pipeline.status import fine_tune_statuses, import_statuses

    settings = load_settings()
    fine_tunes, imports = fine_tune_statuses(settings), import_statuses(settings)
    return CommandResult(
        data={
            "fine_tunes": status_data(fine_tunes, settings.costs),
            "imports": status_data(imports, settings.costs),
        },
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


def _split(name: str, recipe: str | None) -> tuple[str, str | None]:
    """Return fine-tune and recipe of a name as ``status`` shows it; a recipe that is given by itself comes first."""
    fine_tune, _, named = name.partition("@")
    return fine_tune, recipe or named or None


def _outcomes(fine_tune: str, outcomes: "Iterable[Outcome]") -> CommandResult:
    """Return the results of the products of a fine-tune, and the first fault; a fault of one does not stop the others.

    An interrupt does. A single product's result is also at the top level.
    """
    results: list[CommandResult] = []
    for outcome in outcomes:
        results.append(_outcome(outcome))
        if isinstance(outcome.fault, KeyboardInterrupt):
            break
    single = results[0].data if len(results) == 1 else {}
    return CommandResult(
        data={"fine_tune": fine_tune, **single, "products": [result.data for result in results]},
        view=[part for result in results for part in ([str(result.data["product"])] * (not single) + [*result.view])],
        fault=next((result.fault for result in results if result.fault), None),
    )


def _outcome(outcome: "Outcome") -> CommandResult:
    from qwen_pipeline.checkpoint.store.products import product
    from qwen_pipeline.cli.tables import artifact_data, artifact_table, check_table
    from qwen_pipeline.reports import load_reports

    artifacts, named = outcome.artifacts, product(outcome.key)
    release = next((artifact for artifact in artifacts if artifact.manifest.derivation.stage == "published"), None)
    data = {
        "fine_tune": named.fine_tune,
        "recipe": named.recipe,
        "product": outcome.key,
        "run_id": outcome.run_id,
        "stages": [artifact_data(artifact) for artifact in artifacts],
        "release": str(release.path) if release else None,
    }
    view = [artifact_table(artifacts), check_table(artifacts)] if artifacts else []
    if release:
        view += [*(report.detail for report in load_reports(release.manifest.result)[:1]), f"Released: {release.path}"]
    return CommandResult(data=data, view=view, fault=outcome.fault)
