"""The records of a chain in Dagster's instance, beside what its manifests and the store's log say.

They are claims of another witness: an instance may be lost, and a stage may run without it. But where it recorded an
output, path and digest must be those of the manifest; and what it recorded of the log must still be in it.
"""

from collections.abc import Iterator
from pathlib import Path

import dagster as dg

from qwen_pipeline.checkpoint.store.log import LOG
from qwen_pipeline.defs.partitions import FINE_TUNES
from qwen_pipeline.errors import listed
from qwen_pipeline.lineage.audit import Audit, Node
from qwen_pipeline.lineage.log_proof import open_log
from qwen_pipeline.lineage.verification.findings import Finding
from qwen_pipeline.lineage.verification.order import short
from qwen_pipeline.stages import calibrate

AUDIT, LOG_LINES, LOG_DIGEST = "lineage_audit", "log_lines", "log_digest"
"""The asset that audits all releases, and its metadata with the last line of the store's log at the time."""
_RECORDS = 100
"""Latest materializations of a partition that are read."""


def recorded_findings(audit: Audit, store: Path, instance: dg.DagsterInstance) -> list[Finding]:
    """Return the findings ``dagster_agrees`` and ``log_is_that_of_dagster`` about a chain in a store.

    There is none if none of its outputs is in that store.
    """
    store = store.resolve()
    chain = [node for node in audit.nodes.values() if not node.is_compared]
    outputs = [node for node in chain if node.path and node.path.is_relative_to(store)]
    return [_agreement(outputs, instance), *_log_findings(store, instance)] if outputs else []


def _agreement(outputs: list[Node], instance: dg.DagsterInstance) -> Finding:
    recorded, unrecorded, other = list[str](), list[str](), list[str]()
    for node in outputs:
        digests = dict(_digests(instance, node))
        if node.digest in digests:
            recorded.append(f"{node.name} by run {digests[node.digest][:8]}")
        elif digests:
            other.append(f"{node.name} {short(node.digest)}, recorded as {listed([*map(short, digests)])}")
        else:
            unrecorded.append(node.name)
    if other:
        return Finding(name="dagster_agrees", verdict="refuted", detail=f"{listed(other)}.")
    missing = f" Not recorded there: {listed(unrecorded)}." if unrecorded else ""
    detail = f"{len(recorded)} of {len(outputs)} outputs: {listed(recorded) or 'none'}.{missing}"
    return Finding(name="dagster_agrees", verdict="claimed", detail=detail)


def _log_findings(store: Path, instance: dg.DagsterInstance) -> Iterator[Finding]:
    """Yield whether every last line that earlier audits recorded is still in the log; nothing without an audit."""
    entries, stated = open_log(store).entries, 0
    for record in _materializations(instance, dg.AssetRecordsFilter(dg.AssetKey(AUDIT))):
        if LOG_LINES not in record or Path(record["store"]) != store:
            continue
        number, digest = int(record[LOG_LINES]), record[LOG_DIGEST]
        if number and (number > len(entries) or entries[number - 1].digest != digest):
            detail = f"An audit recorded another line {number} of {LOG}: the log was written anew or cut off."
            yield Finding(name="log_is_that_of_dagster", verdict="refuted", detail=detail)
            return
        stated += 1
    if stated:
        detail = f"The last lines of {LOG} that {stated} earlier audits recorded are still there."
        yield Finding(name="log_is_that_of_dagster", verdict="claimed", detail=detail)


def _digests(instance: dg.DagsterInstance, node: Node) -> Iterator[tuple[str, str]]:
    """Yield the digests that materializations recorded for a node's directory, the latest last, and their runs."""
    assert node.path
    fine_tune = node.path.parent.name
    of = "tokens" if node.name == calibrate.STAGE else "checkpoint"
    products = [
        key for key in instance.get_dynamic_partitions(FINE_TUNES.name or "") if key.partition("@")[0] == fine_tune
    ]
    if not products:
        return
    of_products = dg.AssetRecordsFilter(dg.AssetKey(f"{node.name}_{of}"), asset_partitions=products)
    for metadata in _materializations(instance, of_products):
        if "content_digest" in metadata and Path(metadata["path"]).name == node.path.name:
            yield metadata["content_digest"], metadata["run_id"]


def _materializations(instance: dg.DagsterInstance, which: dg.AssetRecordsFilter) -> Iterator[dict[str, str]]:
    """Yield metadata as text, and ``run_id``, of the latest materializations, the last one last."""
    for record in reversed(instance.fetch_materializations(which, limit=_RECORDS).records):
        metadata = record.asset_materialization.metadata if record.asset_materialization else {}
        yield {**{name: str(value.value) for name, value in metadata.items()}, "run_id": record.run_id}
