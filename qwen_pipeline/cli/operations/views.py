"""Tables of releases and of retention."""

from collections.abc import Mapping, Sequence

from rich.console import RenderableType
from rich.table import Column, Table
from rich.text import Text

from qwen_pipeline.cli.console import size
from qwen_pipeline.lineage.verification.order import short
from qwen_pipeline.releases.versions import Version
from qwen_pipeline.retention.collect import Collection

_STYLES = {
    "ready": "green",
    "approved": "green",
    "waiting": "yellow",
    "revoked": "bold red",
    "recalled": "bold red",
    "damaged": "bold red",
    "gone": "dim",
}


def version_table(products: Mapping[str, Sequence[Version]]) -> Table:
    """Return a table with a row for each release, the last one of a product first."""
    table = Table("product", Column("release", no_wrap=True), "digest", "made", "pointers", "state", "")
    for product, versions in products.items():
        for number, version in enumerate(versions):
            table.add_row(
                "" if number else product,
                version.path.name,
                short(version.digest) if version.digest else "",
                version.made[:16].replace("T", " "),
                ", ".join(version.pointers),
                Text(version.state, style=_STYLES[version.state]),
                Text(version.detail),
            )
    return table


def collection_view(found: Collection) -> list[RenderableType]:
    """Return a table of what was removed, one of what is kept although a rule would drop it, and the sum."""
    dropped = Table("stage", "fine-tune", Column("output", no_wrap=True), "size", "rule")
    for each in found.dropped:
        dropped.add_row(each.stage, each.fine_tune, each.path.name, size(each.nbytes), each.rule)
    for path, nbytes in found.abandoned.items():
        dropped.add_row(path.parent.parent.name, path.parent.name, path.name, size(nbytes), "unfinished")
    kept = Table("kept", "fine-tune", Column("output", no_wrap=True), "rule", "because")
    for each in found.kept:
        kept.add_row(each.stage, each.fine_tune, each.path.name, each.rule, Text(each.kept))
    count, verb = len(found.dropped) + len(found.abandoned), "would be removed" if found.dry_run else "removed"
    return [
        *([dropped] if count else []),
        *([kept] if found.kept else []),
        *(f"Interrupted removal finished: {path}" for path in found.resumed),
        *(f"Kept, because its manifest cannot be read: {path}" for path in found.unreadable),
        f"{count} output{'s' * (count > 1)} {verb}: {size(found.nbytes)}. Manifests stay."
        if count
        else "Nothing to remove: every output is kept by the rules of [store.keep].",
    ]
