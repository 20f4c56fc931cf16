"""Trees and tables of audits, differences, descendants and verifications."""

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from rich.table import Column, Table
from rich.text import Text
from rich.tree import Tree

from qwen_pipeline.cli.console import size
from qwen_pipeline.lineage.verification.findings import Finding
from qwen_pipeline.lineage.verification.order import short

if TYPE_CHECKING:  # they take long to import, and verify shows none of them
    from qwen_pipeline.lineage.audit import Audit, Node
    from qwen_pipeline.lineage.descendants import Descendant
    from qwen_pipeline.lineage.diff import Difference

_STYLES = {"proven": "green", "attested": "green", "dropped": "yellow", "claimed": "yellow", "refuted": "bold red"}
_ROWS = 12


def verdict(word: str) -> Text:
    """Return a verdict or a state in its colour; a refuted one in capitals."""
    return Text(word.upper() if word == "refuted" else word, style=_STYLES[word])


def node_tree(audit: "Audit") -> Tree:
    """Return the chain as a tree, from the directory down to its inputs. What occurs twice is expanded once."""
    root = next(iter(audit.nodes.values()))
    tree = Tree(_label("", root))
    _grow(tree, root, audit.nodes, {root.digest})
    return tree


def _grow(tree: Tree, node: "Node", nodes: "Mapping[str, Node]", shown: set[str]) -> None:
    for role, digest in node.inputs.items():
        if not (parent := nodes.get(digest)):
            continue
        branch = tree.add(_label(role, parent, again=digest in shown))
        if digest not in shown:
            shown.add(digest)
            _grow(branch, parent, nodes, shown)


def _label(role: str, node: "Node", *, again: bool = False) -> Text:
    name = node.name if role in ("", node.name) else f"{role}: {node.name}"
    if again:
        return Text(f"{name} {short(node.digest)}, as above", style="dim")
    return Text.assemble((name, "bold"), f" {short(node.digest)} ", verdict(node.state), f" {node.path or ''}")


def node_table(audit: "Audit") -> Table:
    """Return a row for each node, with what was compared."""
    table = Table("output or input", Column("digest", no_wrap=True), "state", "size", "made from", "detail")
    for node in audit.nodes.values():
        nbytes = size(node.nbytes) if node.nbytes else ""
        table.add_row(
            node.name, short(node.digest), verdict(node.state), nbytes, ", ".join(node.inputs), Text(node.detail)
        )
    return table


def node_details(audit: "Audit") -> list[Text]:
    """Return a line for each node that is not proven."""
    return [
        Text.assemble(verdict(node.state), f" {node.name} {short(node.digest)}: {node.detail}")
        for node in audit.nodes.values()
        if node.state != "proven"
    ]


def finding_table(findings: Iterable[Finding]) -> Table:
    """Return a row for each finding."""
    table = Table(Column("statement", no_wrap=True), "verdict", "detail")
    for finding in findings:
        table.add_row(finding.name, verdict(finding.verdict), Text(finding.detail))
    return table


def difference_table(found: "Sequence[Difference]") -> Table:
    """Return a row for each difference; of many tensors or files, the first few."""
    table = Table("stage", "kind", "name", "before", "after")
    rows: dict[tuple[str, str], int] = {}
    for each in found:
        count = rows[each.stage, each.kind] = rows.get((each.stage, each.kind), 0) + 1
        if count <= _ROWS:
            table.add_row(each.stage, each.kind, *(Text(str(value)) for value in (each.name, each.before, each.after)))
    for (stage, kind), count in rows.items():
        if count > _ROWS:
            table.add_row(stage, kind, f"and {count - _ROWS} more", "", "")
    return table


def descendant_table(found: "Sequence[Descendant]") -> Table:
    """Return a row for each descendant."""
    table = Table("fine-tune", "stage", "digest", "made from", "directory")
    for each in found:
        table.add_row(
            each.name,
            each.stage,
            short(each.digest),
            f"{each.through} {short(each.parent)}",
            Text(str(each.path or "gone; a later stage records it")),
        )
    return table
