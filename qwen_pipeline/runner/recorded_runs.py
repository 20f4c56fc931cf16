"""The records of a chain in Dagster's instance, for commands, which have to open it."""

import os
from pathlib import Path

from qwen_pipeline.config import Settings
from qwen_pipeline.defs.operations.recorded_runs import recorded_findings
from qwen_pipeline.lineage.audit import Audit
from qwen_pipeline.lineage.verification.findings import Finding
from qwen_pipeline.runner.dagster_home import open_instance


def instance_findings(audit: Audit, settings: Settings) -> list[Finding]:
    """Return the findings of Dagster's instance about a chain; nothing if there is no instance."""
    home = Path(os.environ.get("DAGSTER_HOME") or settings.dagster_home)
    if not (home / "dagster.yaml").is_file():
        return []
    with open_instance(settings) as instance:
        return recorded_findings(audit, settings.store_root, instance)
