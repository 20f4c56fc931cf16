"""An audit as one HTML file, which works offline and in light and dark mode."""

from functools import cache
from pathlib import Path

import jinja2

from qwen_pipeline.lineage.audit import Audit, Node
from qwen_pipeline.lineage.verification.order import short


def render_audit(audit: Audit) -> str:
    """Return the page: the chain as nested lists, each output and input with its state, and every finding."""
    root = next(iter(audit.nodes.values()))
    return _template().render(
        audit=audit, root=root, parents=lambda node: _parents(audit, node), short=short, nodes=audit.nodes.values()
    )


def _parents(audit: Audit, node: Node) -> list[tuple[str, Node]]:
    return [(role, audit.nodes[digest]) for role, digest in node.inputs.items() if digest in audit.nodes]


@cache
def _template() -> jinja2.Template:
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, undefined=jinja2.StrictUndefined)
    return environment.get_template("audit.html.jinja")
