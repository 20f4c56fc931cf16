"""``qwen-pipeline gc``: outputs that no rule keeps are removed."""

from typing import Annotated

import typer

from qwen_pipeline.cli.results import CommandResult, command

app = typer.Typer()


@command(app, "gc", examples=["qwen-pipeline gc --dry-run", "qwen-pipeline gc --json"])
def gc(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only list what would be removed, and why.")] = False,
) -> CommandResult:
    """Remove the outputs that no rule of [store.keep] keeps, and what interrupted runs left behind.

    What a pointer leads to, an unfinished run uses, or nothing can make again stays. Manifests stay too, so that audits
    know what was removed, and its stage makes it again with the same digest.
    """
    from qwen_pipeline.cli.operations.views import collection_view
    from qwen_pipeline.cli.progress_bars import progress_bars
    from qwen_pipeline.config import load_settings
    from qwen_pipeline.runner.garbage import collect_garbage

    with progress_bars() as observe:
        found = collect_garbage(load_settings(), dry_run=dry_run, observe=observe)
    return CommandResult(data=found.to_json(), view=collection_view(found))
