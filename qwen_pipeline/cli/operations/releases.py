"""``qwen-pipeline releases``, ``approve``, ``promote`` and ``rollback``: what is to be served, and who said so."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qwen_pipeline.cli.results import CommandResult, command
from qwen_pipeline.errors import InputRefused

if TYPE_CHECKING:
    from qwen_pipeline.releases.promotion import Promotion

app = typer.Typer()

Reason = Annotated[str, typer.Option(help="Why; it joins the store's log, and audits show it.")]
By = Annotated[str, typer.Option(help="Name of the person; default: the account.")]
Key = Annotated[
    Path | None, typer.Option(help="The person's P-256 private key (PEM); default: signing.key in the settings.")
]
Release = Annotated[str | None, typer.Option(help="First digits of its key or content digest; default: the candidate.")]


@command(
    app,
    "releases",
    examples=[
        "qwen-pipeline releases",
        "qwen-pipeline releases my-lora --json",
        "qwen-pipeline releases my-lora --serve",
    ],
)
def releases(
    product: Annotated[str | None, typer.Argument(metavar="[KEY]")] = None,
    serve: Annotated[bool, typer.Option("--serve", help="Print vLLM's command for the one in production.")] = False,
) -> CommandResult:
    """List releases with their state, and the pointers candidate and production.

    KEY is a fine-tune, or FINE_TUNE@RECIPE; by default all are listed.

    ready: it may be promoted. waiting: for approval. approved, revoked: by a person. recalled: something that it is
    made of was recalled. damaged: its manifest cannot be read. gone: retention removed it.
    """
    from qwen_pipeline.cli.operations.views import version_table
    from qwen_pipeline.config import load_settings
    from qwen_pipeline.releases.versions import serve as serve_production
    from qwen_pipeline.releases.versions import versions

    settings = load_settings()
    if serve:
        if product is None:
            raise InputRefused("No fine-tune was given.", remedy="Name one: qwen-pipeline releases KEY --serve")
        line = serve_production(settings, product)
        return CommandResult(data={"product": product, "command": line}, view=[line])
    found = versions(settings, product)
    return CommandResult(
        data={"products": {name: [each.to_json() for each in listed] for name, listed in found.items()}},
        view=[version_table(found) if any(found.values()) else "No releases yet: qwen-pipeline run makes one."],
    )


@command(
    app,
    "approve",
    examples=[
        'qwen-pipeline approve my-lora --reason "read the report, tried 20 prompts"',
        'qwen-pipeline approve my-lora --revoke --reason "wrong licence"',
    ],
)
def approve(
    product: Annotated[str, typer.Argument(metavar="KEY")],
    reason: Reason,
    release: Release = None,
    by: By = "",
    key: Key = None,
    revoke: Annotated[bool, typer.Option("--revoke", help="Revoke it instead: it is not promoted.")] = False,
) -> CommandResult:
    """Approve a release of KEY for production: who, why and which bytes join the store's log, signed if possible.

    With release.promote = "automatic" it is promoted at once, if its other checks pass.
    """
    from qwen_pipeline.cli.progress_bars import progress_bars
    from qwen_pipeline.config import load_settings
    from qwen_pipeline.releases.announcements import announced
    from qwen_pipeline.releases.promotion import advance
    from qwen_pipeline.releases.promotion import approve as approve_release
    from qwen_pipeline.releases.versions import product_history

    settings = load_settings()
    with announced(settings) as told:
        path = approve_release(settings, product, reason=reason, release=release, by=by, key=key, revoke=revoke)
    view = [f"{'Revoked' if revoke else 'Approved'}: {path}"]
    data = {"product": product, "release": str(path), "event": "revoked" if revoke else "approved", "reason": reason}
    stated = product_history(settings, product)
    if revoke and stated.target("production") == path:
        view.append(f'It is in production. To leave it: qwen-pipeline rollback {product} --reason "..."')
    if revoke or settings.release.promote == "manual" or stated.target("candidate") != path:
        return CommandResult(data=data, view=[*view, *told])
    with announced(settings) as told_later, progress_bars() as observe:
        found = advance(settings, product, observe=observe)
    return CommandResult(data={**data, "promotion": found.to_json()}, view=[*view, *_view(found), *told, *told_later])


@command(
    app,
    "promote",
    examples=[
        "qwen-pipeline promote my-lora",
        'qwen-pipeline promote my-lora --accept-regression --reason "better at code, which is what it is for"',
    ],
)
def promote(
    product: Annotated[str, typer.Argument(metavar="KEY")],
    release: Release = None,
    reason: Reason = "",
    by: By = "",
    key: Key = None,
    accept_regression: Annotated[
        bool, typer.Option("--accept-regression", help="Promote it although it is worse; needs a reason.")
    ] = False,
) -> CommandResult:
    """Point production of KEY at a release, after every byte of it was compared and its targets have it."""
    from qwen_pipeline.cli.progress_bars import progress_bars
    from qwen_pipeline.config import load_settings
    from qwen_pipeline.releases.announcements import announced
    from qwen_pipeline.releases.promotion import promote as promote_release

    settings = load_settings()
    with announced(settings) as told, progress_bars() as observe:
        found = promote_release(
            settings,
            product,
            release=release,
            reason=reason,
            by=by,
            key=key,
            accept_regression=accept_regression,
            observe=observe,
        )
    return CommandResult(data=found.to_json(), view=[*_view(found), *told])


@command(
    app,
    "rollback",
    examples=['qwen-pipeline rollback my-lora --reason "answers in the wrong language"'],
)
def rollback(
    product: Annotated[str, typer.Argument(metavar="KEY")],
    reason: Reason,
    to: Annotated[
        str | None, typer.Option(help="First digits of a key or digest; default: the last earlier one that stands.")
    ] = None,
    by: By = "",
    key: Key = None,
) -> CommandResult:
    """Move production of KEY back to the last earlier release whose verdict stands, and revoke the present one.

    The release that is left is not promoted again, automatically or by hand, until it is approved again.
    """
    from qwen_pipeline.cli.progress_bars import progress_bars
    from qwen_pipeline.config import load_settings
    from qwen_pipeline.releases.announcements import announced
    from qwen_pipeline.releases.promotion import rollback as roll_back

    settings = load_settings()
    with announced(settings) as told, progress_bars() as observe:
        found = roll_back(settings, product, reason=reason, to=to, by=by, key=key, observe=observe)
    return CommandResult(data=found.to_json(), view=[*_view(found), *told])


def _view(found: "Promotion") -> list[str]:
    before = f" (before: {found.before.name})" if found.before else ""
    lines = [f"{report.name} {report.outcome}: {report.detail}" for report in found.reports if not report.passed]
    lines += [
        f"{'Would deliver' if each.dry_run else 'Delivered'} to {each.place}: {len(each.files)} files."
        for each in found.deliveries
    ]
    if found.moved:
        return [*lines, f"In production: {found.release}{before}"]
    stays = "In production already" if found.in_production else "Not promoted"
    return [*lines, f"{stays}: {found.release}"]
