"""Dagster's log as JSON lines, for collectors: a formatter that ``python_logs`` in ``dagster.yaml`` can name."""

import json
import logging
from datetime import UTC, datetime
from typing import Any


class JsonLines(logging.Formatter):
    """Writes a record as one line of JSON with its run, partition and stage; fields that it lacks are left out."""

    def format(self, record: logging.LogRecord) -> str:
        """Return one line. Records that are not of a run have neither run, job, partition, stage nor event."""
        meta: dict[str, Any] = getattr(record, "dagster_meta", {})
        event = meta.get("dagster_event")
        error = getattr(getattr(event, "event_specific_data", None), "error", None)
        fields = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "run": meta.get("run_id"),
            "job": meta.get("job_name"),
            "partition": (meta.get("job_tags") or {}).get("dagster/partition"),
            "stage": meta.get("step_key"),
            "event": event.event_type_value if event else None,
            "message": meta.get("orig_message") or record.getMessage(),
            "error": error.to_string() if error else self.formatException(record.exc_info) if record.exc_info else None,
        }
        return json.dumps({name: value for name, value in fields.items() if value is not None}, ensure_ascii=False)
