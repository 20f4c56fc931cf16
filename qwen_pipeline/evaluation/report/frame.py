"""The checks of finished stages as a pandas DataFrame."""

from pathlib import Path
from typing import TYPE_CHECKING

from qwen_pipeline.checkpoint.manifest import find_manifest
from qwen_pipeline.errors import InputRefused
from qwen_pipeline.reports import load_reports

if TYPE_CHECKING:
    import pandas as pd

FRAME_COLUMNS = ("stage", "check", "outcome", "measured", "limit", "detail")


def report_frame(*roots: Path) -> "pd.DataFrame":
    """Return one row for each check of the directories that stages wrote.

    The columns are :data:`FRAME_COLUMNS`; an outcome is passed, failed, warning or skipped.

    Raises:
        InputRefused: A directory has no manifest.
    """
    import pandas as pd

    rows: list[tuple[str, str, str, float | str | None, float | str | None, str]] = []
    for root in roots:
        manifest = find_manifest(root)
        if manifest is None:
            raise InputRefused(f"{root} has no manifest.", remedy="Pass a directory that a stage wrote.")
        rows += [
            (manifest.derivation.stage, each.name, each.outcome, each.measured, each.limit, each.detail)
            for each in load_reports(manifest.result)
        ]
    return pd.DataFrame(rows, columns=list(FRAME_COLUMNS))
