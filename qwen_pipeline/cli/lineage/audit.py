"""``qwen-pipeline audit``: the chain behind a directory, differences between two, and descendants of a digest."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import click
import typer
from typer.core import TyperGroup

from qwen_pipeline.cli.results import CommandResult, command
from qwen_pipeline.errors import CheckFailed, InputRefused

In = Annotated[
    list[Path] | None,
    typer.Option("--in", help="Further directory to search for outputs, such as another store; repeatable."),
]
Source = Annotated[
    list[Path] | None,
    typer.Option(help="Model, adapter or text that may be an input, besides those in the settings; repeatable."),
]
Keys = Annotated[
    list[Path] | None,
    typer.Option("--key", help="P-256 public key of a signer, or certificate of an authority (PEM); repeatable."),
]
Identity = Annotated[
    str | None, typer.Option(help="Account that signed with Sigstore: e-mail address or URL of a workflow.")
]
Issuer = Annotated[str | None, typer.Option(help="OpenID Connect issuer of the account, such as https://...")]
PolicyFile = Annotated[Path | None, typer.Option(help="policy.toml: who may sign, and what must have passed.")]


class _WithDefault(TyperGroup):
    """A group in which ``audit DIRECTORY`` stands for ``audit show DIRECTORY``."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        first = next((each for each in args if not each.startswith("-")), None)
        is_own = first in self.commands or (args and args[0] == "--help") or not args
        return super().parse_args(ctx, args if is_own else ["show", *args])


app = typer.Typer(
    cls=_WithDefault,
    no_args_is_help=True,
    help="Prove where a checkpoint comes from: audit DIRECTORY, audit diff A B, audit descendants DIGEST.",
)


@command(
    app,
    "show",
    examples=[
        "qwen-pipeline audit my-lora",
        "qwen-pipeline audit my-lora --html audit.html",
        "qwen-pipeline audit show workspace/store/published/my-lora/latest --table --key release.pub",
    ],
)
def show(
    checkpoint: str,
    table: Annotated[bool, typer.Option("--table", help="Show a table with details in place of the tree.")] = False,
    search: In = None,
    source: Source = None,
    keys: Keys = None,
    policy: PolicyFile = None,
    identity: Identity = None,
    issuer: Issuer = None,
    html: Annotated[Path | None, typer.Option(help="Write the audit as one HTML file, too.")] = None,
) -> CommandResult:
    """Walk from CHECKPOINT back to base, fine-tune and texts, and compare every byte that is here with its digest.

    CHECKPOINT is a directory that a stage finished, such as a release, or the name of a fine-tune. What Dagster's
    instance recorded about the outputs of this workspace is compared too.

    proven: bytes that are here give the digest. attested: signed records say so. claimed: records alone say so.
    dropped: the bytes are gone and can be made again. refuted: bytes or records contradict each other.
    """
    from qwen_pipeline.audits import library_of, output_of, sources_of
    from qwen_pipeline.cli.lineage.views import finding_table, node_details, node_table, node_tree
    from qwen_pipeline.cli.progress_bars import progress_bars
    from qwen_pipeline.config import load_settings
    from qwen_pipeline.lineage.audit import audit
    from qwen_pipeline.lineage.html import render_audit
    from qwen_pipeline.lineage.verification.policy import load_policy
    from qwen_pipeline.lineage.verification.trust import given_signers
    from qwen_pipeline.runner.recorded_runs import instance_findings

    settings = load_settings()
    root = output_of(checkpoint, settings)
    with progress_bars() as observe:
        found = audit(
            root,
            library=library_of([root], settings, search),
            sources=sources_of(root, settings, source),
            keys=given_signers(keys or (), identity, issuer),
            policy=load_policy(policy) if policy else None,
            observe=observe,
        )
    found = replace(found, findings=[*found.findings, *instance_findings(found, settings)])
    if html:
        html.write_text(render_audit(found))
    states = [node.state for node in found.nodes.values()]
    counts = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
    return CommandResult(
        data=found.to_json(),
        view=[
            *([node_table(found)] if table else [node_tree(found), *node_details(found)]),
            finding_table(found.findings),
            f"{len(states)} outputs and inputs: {counts}.",
            *([f"Written: {html}"] if html else []),
        ],
        fault=_fault(found.faults, str(root)),
    )


@command(
    app,
    "diff",
    examples=["qwen-pipeline audit diff my-lora other-lora", "qwen-pipeline audit diff old/ new/ --json"],
)
def diff(before: str, after: str, search: In = None) -> CommandResult:
    """Show what differs between two outputs and the stages behind them: inputs, settings, code, figures, tensors.

    BEFORE and AFTER are directories that stages finished, or names of fine-tunes. Manifests are compared; no weights
    are read.
    """
    from qwen_pipeline.audits import library_of, output_of
    from qwen_pipeline.cli.lineage.views import difference_table
    from qwen_pipeline.config import load_settings
    from qwen_pipeline.lineage.diff import differences, summary
    from qwen_pipeline.lineage.verification.records import read_record

    settings = load_settings()
    roots = [output_of(name, settings) for name in (before, after)]
    old, new = map(read_record, roots)
    found = differences(old, new, library_of(roots, settings, search))
    counts = ", ".join(f"{count} {kind}" for kind, count in summary(found).items())
    return CommandResult(
        data={
            "before": old.step.content_digest,
            "after": new.step.content_digest,
            "differences": [each.to_json() for each in found],
        },
        view=[difference_table(found), f"Differences: {counts}."] if found else ["No difference."],
    )


@command(
    app,
    "descendants",
    examples=[
        "qwen-pipeline audit descendants sha256:3d634234f864",
        "qwen-pipeline audit descendants workspace/store/merged/my-lora/latest",
    ],
)
def descendants(digest: str, search: In = None) -> CommandResult:
    """List everything that was made from DIGEST: who used this adapter, which releases come from this base or text.

    DIGEST is a content digest, its first digits, or a finished directory.
    """
    from qwen_pipeline.audits import library_of
    from qwen_pipeline.cli.lineage.views import descendant_table
    from qwen_pipeline.config import load_settings
    from qwen_pipeline.lineage.descendants import descendants as find_descendants
    from qwen_pipeline.lineage.descendants import resolve

    library = library_of([Path(digest)] if Path(digest).is_dir() else [], load_settings(), search)
    origin = resolve(digest, library)
    found = find_descendants(origin, library)
    releases = sum(each.stage == "published" for each in found)
    return CommandResult(
        data={"digest": origin, "descendants": [each.to_json() for each in found]},
        view=[
            descendant_table(found),
            f"Outputs that descend from {origin}: {len(found)}, of them releases: {releases}.",
        ],
    )


@command(
    app,
    "recall",
    examples=['qwen-pipeline audit recall sha256:48d8dec48d00 --reason "trained on data without a licence"'],
)
def recall(
    digest: str,
    reason: Annotated[str, typer.Option(help="Why; audits show it.")],
    search: In = None,
    by: Annotated[str, typer.Option(help="Name of the person; default: the account.")] = "",
) -> CommandResult:
    """Recall DIGEST, such as an adapter, a base or a text, and list everything that was made from it.

    The recall joins the store's log, which only grows, signed where releases are. Every later audit of a descendant
    fails and names the reason, and none is promoted. The addresses of [notify] get a message.
    """
    from qwen_pipeline.cli.lineage.views import descendant_table
    from qwen_pipeline.config import load_settings
    from qwen_pipeline.releases.announcements import announced
    from qwen_pipeline.releases.recall import recall as recall_digest

    settings = load_settings()
    with announced(settings) as told:
        found = recall_digest(settings, digest, reason=reason, by=by, more=search)
    return CommandResult(
        data={**found.to_json(), "reason": reason, "told": told},
        view=[descendant_table(found.descendants), f"Recalled {found.digest}. {found.sentence}", *told],
    )


@command(app, "emit", examples=["qwen-pipeline audit emit", "qwen-pipeline audit emit --json"])
def emit() -> CommandResult:
    """Send OpenLineage events of outputs finished since the last time (at first, of all) to [openlineage]'s catalogue.

    While Dagster's daemon runs, the sensor openlineage does it.
    """
    from qwen_pipeline.catalogue import emit_new
    from qwen_pipeline.config import load_settings

    settings = load_settings()
    if not settings.openlineage.is_on:
        raise InputRefused(
            "No catalogue is configured.", remedy='Add to the settings: [openlineage] url = "http://host:5000".'
        )
    sent = emit_new(settings)
    return CommandResult(data={"outputs": sent}, view=[*sent, f"Sent the events of {len(sent)} outputs."])


_LOST_LOG = (
    "Restore log.jsonl and log.head of the store from a backup; without one its pointers and approvals prove nothing."
)
_REMEDIES = {
    "recalled": "Do not serve it: promote another release, or go back to one with qwen-pipeline rollback.",
    "signature": "Do not serve it; or pass the key of its signer, or sign it: qwen-pipeline sign.",
    "statements_are_signed": (
        "Ask the people named there. With a key in [signing], qwen-pipeline promote, and for candidate"
        " qwen-pipeline run, state anew where the pointers lead."
    ),
    "pointers_are_logged": (
        "Ask who moved it. The next qwen-pipeline promote or rollback moves it to where the log says."
    ),
    "dagster_agrees": "Compare the store and Dagster's instance with backups: one of them was changed.",
    "manifests_are_logged": "Restore the manifest from a backup, or delete its directory and run its stage again.",
    "log_is_unbroken": _LOST_LOG,
    "log_is_that_of_signing": _LOST_LOG,
    "log_is_that_of_dagster": _LOST_LOG,
}
"""Statement -> the remedy if it is refuted; without one, bytes differ."""


def _fault(faults: list[str], root: str) -> CheckFailed | None:
    if not faults:
        return None
    more = f" And {len(faults) - 1} more." if faults[1:] else ""
    return CheckFailed(
        f"{root} is not what its records say: {faults[0]}{more}",
        remedy=_REMEDIES.get(
            faults[0].partition(":")[0],
            "Do not serve it. Compare with a backup, or delete what differs and run its stage again.",
        ),
    )
