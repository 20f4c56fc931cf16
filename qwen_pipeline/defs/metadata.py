"""Metadata of materializations: path, digest, size, performance, plots and tables."""

from base64 import b64encode
from collections.abc import Mapping, Sequence
from math import inf
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import dagster as dg

from qwen_pipeline.checkpoint.store.destinations import Artifact
from qwen_pipeline.reports import shown

Figure = TypeVar("Figure")


def significant(value: Figure) -> Figure | float:
    """Return a float rounded to four significant digits, and any other value unchanged."""
    return float(f"{value:.4g}") if isinstance(value, float) else value


def directory_metadata(path: Path, digest: str, nbytes: int) -> dict[str, Any]:
    return {
        "path": dg.MetadataValue.path(path),
        "content_digest": digest,
        "size_mb": significant(nbytes / 1e6),
    }


def artifact_metadata(artifact: Artifact) -> dict[str, Any]:
    """Describe a finished directory from its manifest, with the content digests of its inputs."""
    manifest, run = artifact.manifest, artifact.manifest.run
    return {
        **directory_metadata(artifact.path, manifest.content_digest, manifest.contents.nbytes),
        "seconds": significant(run.seconds),
        "gigabytes_per_second": significant(manifest.contents.nbytes / 1e9 / max(run.seconds, 1e-3)),
        "gigabytes_read": significant(run.read_bytes / 1e9),
        "gigabytes_written": significant(run.written_bytes / 1e9),
        "peak_memory_mb": significant(run.peak_memory_bytes / 1e6),
        "added_memory_mb": significant(run.added_memory_bytes / 1e6),
        "reused": artifact.reused,
        "derivation": manifest.derivation.key,
        "inputs": dict(manifest.derivation.inputs),
        "spec": dict(manifest.derivation.spec),
        "environment": dict(run.environment),
    }


def inline_plot(path: Path) -> str:
    """Return Markdown with the plot embedded, for a browser on another machine."""
    return f"![{path.stem}](data:image/png;base64,{b64encode(path.read_bytes()).decode()})"


def evidence_markdown(quantized: Artifact, previous: Artifact | None) -> str:
    """Return Markdown with the quantization evidence of each layer, compared with any previous version."""
    from qwen_pipeline.quantization.evidence import PLOT, compare_evidence, load_evidence
    from qwen_pipeline.quantization.plot import draw_evidence

    if previous is None:
        return f"There is no earlier version to compare with.\n\n{inline_plot(quantized.path / PLOT)}"
    old, new = load_evidence(previous.path), load_evidence(quantized.path)
    comparison = compare_evidence(old, new)
    with TemporaryDirectory() as scratch:
        draw_evidence(new, Path(scratch) / "evidence.png", before=old)
        plot = inline_plot(Path(scratch) / "evidence.png")
    rows = "".join(f"| {module} | {ratio:.3f} |\n" for module, ratio in comparison.worst.items())
    table = f"| module | loss / previous loss |\n| --- | --- |\n{rows}"
    return f"{comparison.sentence(previous.path.name)}\n\n{plot}\n\n{table}"


def loss_table(losses: Sequence[Mapping[str, Any]], *, rows: int = 20) -> dg.TableMetadataValue:
    """Return a table of the modules with the highest loss, in descending order. Non-finite losses come first."""
    worst = sorted(losses, key=lambda entry: -inf if entry["loss"] is None else -entry["loss"])[:rows]
    return dg.MetadataValue.table(
        [dg.TableRecord({"module": entry["module"], "loss": shown(entry["loss"]) or "not finite"}) for entry in worst],
        schema=dg.TableSchema(
            [
                dg.TableColumn("module", "string", description="Name of the linear layer."),
                dg.TableColumn("loss", "string", description="Mean squared error that the quantizer reported."),
            ]
        ),
    )
