"""What the UI shows of a directory: where it is, what it is, how long it took, and the figures worth comparing."""

from base64 import b64encode
from collections.abc import Mapping, Sequence
from math import inf
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import dagster as dg

from qwen_pipeline.checkpoint.store.destinations import Artifact


def directory_metadata(path: Path, digest: str, nbytes: int) -> dict[str, Any]:
    return {
        "path": dg.MetadataValue.path(path),
        "content_digest": digest,
        "size_mb": round(nbytes / 1e6, 3),
    }


def artifact_metadata(artifact: Artifact) -> dict[str, Any]:
    """Describe a finished directory from its manifest, with the raw digests of its inputs: the lineage in full."""
    manifest = artifact.manifest
    return {
        **directory_metadata(artifact.path, manifest.content_digest, manifest.contents.nbytes),
        "seconds": manifest.run.seconds,
        "gigabytes_per_second": round(manifest.contents.nbytes / 1e9 / max(manifest.run.seconds, 1e-3), 3),
        "gigabytes_read": round(manifest.run.read_bytes / 1e9, 3),
        "gigabytes_written": round(manifest.run.written_bytes / 1e9, 3),
        "peak_memory_mb": round(manifest.run.peak_memory_bytes / 1e6, 1),
        "added_memory_mb": round(manifest.run.added_memory_bytes / 1e6, 1),
        "reused": artifact.reused,
        "derivation": manifest.derivation.key,
        "inputs": dict(manifest.derivation.inputs),
        "spec": dict(manifest.derivation.spec),
        "environment": dict(manifest.run.environment),
    }


def inline_plot(path: Path) -> str:
    """Return a plot as Markdown that holds it, for a viewer that cannot see this machine's files."""
    return f"![{path.stem}](data:image/png;base64,{b64encode(path.read_bytes()).decode()})"


def evidence_markdown(quantized: Artifact, before: Artifact | None) -> str:
    """Show what is known of each layer, beside the version before where there is one."""
    from qwen_pipeline.quantization.evidence import PLOT, compare_evidence, load_evidence
    from qwen_pipeline.quantization.plot import draw_evidence

    if before is None:
        return f"There is no earlier version to compare with.\n\n{inline_plot(quantized.path / PLOT)}"
    old, new = load_evidence(before.path), load_evidence(quantized.path)
    found = compare_evidence(old, new)
    with TemporaryDirectory() as scratch:
        draw_evidence(new, Path(scratch) / "evidence.png", before=old)
        plot = inline_plot(Path(scratch) / "evidence.png")
    rows = "".join(f"| {module} | {ratio:.3f} |\n" for module, ratio in found.worst.items())
    return f"{found.sentence(before.path.name)}\n\n{plot}\n\n| module | loss now / before |\n| --- | --- |\n{rows}"


def loss_table(losses: Sequence[Mapping[str, Any]], *, rows: int = 20) -> dg.TableMetadataValue:
    """Show the modules that lost most, worst first; those without a finite loss lead."""
    worst = sorted(losses, key=lambda entry: -inf if entry["loss"] is None else -entry["loss"])[:rows]
    return dg.MetadataValue.table(
        [dg.TableRecord({"module": entry["module"], "loss": str(entry["loss"])}) for entry in worst],
        schema=dg.TableSchema([dg.TableColumn("module", "string"), dg.TableColumn("loss", "string")]),
    )
