"""Results of a benchmark as a Markdown page and a JSON file.

This module does not import torch or pandas: a child's peak memory starts from its parent's.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd

RESULTS = Path(__file__).parent / "results"


def keep(out: Path, text: str, found: Mapping[str, Any]) -> None:
    """Write ``text`` and ``found`` to ``out`` with the suffixes ``.md`` and ``.json``."""
    out.parent.mkdir(parents=True, exist_ok=True)
    out.with_suffix(".md").write_text(text)
    out.with_suffix(".json").write_text(json.dumps(found, indent=2) + "\n")


def markdown(frame: "pd.DataFrame") -> str:
    """Return a data frame as a Markdown table."""
    return table(list(map(str, frame.columns)), [list(map(str, row)) for row in frame.to_numpy()])


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return cells as a Markdown table."""
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows])
