"""OpenLineage events of finished outputs: https://openlineage.io. Datasets have their content digest as version.

The same output gives the same events, with the same run id, whenever and however often they are sent.
"""

import os
import uuid
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen_pipeline.errors import EnvironmentFault
from qwen_pipeline.lineage.provenance import SITE
from qwen_pipeline.lineage.verification.order import short
from qwen_pipeline.lineage.verification.records import Record

if TYPE_CHECKING:
    from openlineage.client.event_v2 import RunEvent

API_KEY_VARIABLE = "QWEN_PIPELINE_OPENLINEAGE_API_KEY"
"""The environment variable of the key that a catalogue may ask for."""
_SECONDS = 10.0


def events_of(record: Record, name: str, inputs: Mapping[str, str], namespace: str) -> "list[RunEvent]":
    """Return START and COMPLETE of the step that made an output.

    Args:
        record: The manifest of the output.
        name: Name of the output's dataset.
        inputs: Content digest -> name of the dataset of each input that a stage made; others are called by their role.
        namespace: Namespace of jobs and datasets.
    """
    from openlineage.client.event_v2 import InputDataset, Job, OutputDataset, Run, RunEvent, RunState
    from openlineage.client.facet_v2 import job_type_job

    step, run = record.step, record.run
    kind = _ours(job_type_job.JobTypeJobFacet, "BATCH", "DAGSTER", "ASSET")
    job = Job(namespace, step.stage, facets={"jobType": kind})
    read = [
        InputDataset(namespace, inputs.get(digest, f"{role}/{short(digest)}"), facets=_version(digest))
        for role, digest in step.inputs.items()
    ]
    made = OutputDataset(namespace, name, facets={**_version(step.content_digest), **_assertions(record)})
    began = datetime.fromisoformat(str(run["started"]))
    ended = began + timedelta(seconds=float(run.get("seconds") or 0))
    this = Run(str(uuid.uuid5(uuid.NAMESPACE_URL, f"{SITE}/{step.key}")))
    return [
        RunEvent(
            eventTime=at.isoformat(), producer=SITE, run=this, job=job, eventType=state, inputs=read, outputs=[made]
        )
        for state, at in ((RunState.START, began), (RunState.COMPLETE, ended))
    ]


@contextmanager
def emitting(*, url: str | None, endpoint: str, file: Path | None) -> "Generator[Callable[[RunEvent], None]]":
    """Yield a function that sends an event to an address, or else appends it to a file.

    Raises:
        EnvironmentFault: ``openlineage-python`` is not installed, or an event was not accepted.
    """
    try:
        from openlineage.client.transport.file import FileConfig, FileTransport
        from openlineage.client.transport.http import ApiKeyTokenProvider, HttpConfig, HttpTransport, TokenProvider
    except ImportError as error:
        raise EnvironmentFault(
            "Events need the package openlineage-python, which is not installed.",
            remedy="Install it: pip install 'qwen-pipeline[openlineage]'.",
        ) from error
    if url:
        key = os.environ.get(API_KEY_VARIABLE)
        auth = ApiKeyTokenProvider({"apiKey": key}) if key else TokenProvider({})
        transport: Any = HttpTransport(
            HttpConfig(url=url, endpoint=endpoint, timeout=_SECONDS, auth=auth, retry={"total": 0})
        )
    else:
        transport = FileTransport(FileConfig(log_file_path=str(file), append=True))
    try:
        yield transport.emit
    except (OSError, RuntimeError) as error:  # those of requests are OSErrors
        raise EnvironmentFault(
            f"{url or file} did not take an OpenLineage event: {error}.",
            remedy=f"Correct [openlineage]; a key is read from {API_KEY_VARIABLE}.",
        ) from error
    finally:
        transport.close()


def _ours(facet: Callable[..., Any], *values: Any) -> Any:
    """Return a facet with this package as its producer, an argument that attrs adds and type checkers do not see."""
    return facet(*values, producer=SITE)


def _version(digest: str) -> dict[str, Any]:
    from openlineage.client.facet_v2 import dataset_version_dataset

    return {"version": _ours(dataset_version_dataset.DatasetVersionDatasetFacet, digest)}


def _assertions(record: Record) -> dict[str, Any]:
    """Return the checks that ran; a check that was skipped asserts nothing."""
    from openlineage.client.facet_v2 import data_quality_assertions_dataset as quality

    checks = [check for check in record.result.get("checks") or () if not check.get("skipped")]
    stated = [quality.Assertion(assertion=str(check["name"]), success=bool(check["passed"])) for check in checks]
    if not stated:
        return {}
    return {"dataQualityAssertions": _ours(quality.DataQualityAssertionsDatasetFacet, stated)}
