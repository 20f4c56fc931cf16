"""Spec, comparisons and damaged inputs that the tests of quantization share."""

import json
import os
import subprocess
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from qwen_pipeline.checkpoint.lazy import Checkpoint, open_checkpoint
from qwen_pipeline.checkpoint.store.destinations import Artifact
from qwen_pipeline.progress import Progress
from qwen_pipeline.quantization.checks import CHECKS
from qwen_pipeline.quantization.spec import QuantSpec
from qwen_pipeline.qwen.linears import decoder_linears, load_weight
from qwen_pipeline.reports import load_reports
from qwen_pipeline.workers.environments import WorkerEnvironment
from qwen_pipeline_tests import REPOSITORY

SPEC = QuantSpec(engine="gptqmodel", group_size=32, samples=8, seq_len=64, batch_size=4, threads=1, device="cpu")


@dataclass(frozen=True)
class Run:
    source: Path
    calibration: Path
    artifact: Artifact
    progress: list[Progress]

    @property
    def output(self) -> Checkpoint:
        return open_checkpoint(self.artifact.path)


def require_passed(artifact: Artifact, *, skipped: Collection[str] = ("experts_fed",)) -> None:
    """Require that each check of quantization passed, except those that are skipped, by default for a dense model."""
    outcomes = {report.name: report.outcome for report in load_reports(artifact.manifest.result)}
    assert outcomes == {check.name: "skipped" if check.name in skipped else "passed" for check in CHECKS}


def require_faithful(source: Checkpoint, output: Checkpoint) -> None:
    """Require that the dequantized weights are close to the source's."""
    for linear in decoder_linears(source):
        weight_OI = load_weight(source, linear).double()
        error = (dequantized(output, linear.module) - weight_OI).norm() / weight_OI.norm()
        assert error < 0.15, f"{linear.module}: {error}"


def dequantized(output: Checkpoint, module: str) -> torch.Tensor:
    """Compute the oracle: scale * (code - (stored zero + 1)), one nibble at a time, in float64."""
    qweight, qzeros = output.load(f"{module}.qweight"), output.load(f"{module}.qzeros")
    scales_GO, g_idx_I = output.load(f"{module}.scales").double(), output.load(f"{module}.g_idx").long()
    codes_IO = torch.stack([(qweight >> 4 * k) & 15 for k in range(8)], dim=1).flatten(0, 1)
    zeros_GO = torch.stack([(qzeros >> 4 * k) & 15 for k in range(8)], dim=2).flatten(1, 2) + 1
    return (scales_GO[g_idx_I] * (codes_IO - zeros_GO[g_idx_I])).T


def compare_logits(
    engine: WorkerEnvironment, loader: str, source: Path, quantized: Path, **variables: str
) -> dict[str, Any]:
    """Run a loader of this package, such as ``load_with_transformers``, in the quantizer's environment."""
    printed = subprocess.run(
        [engine.python, "-m", f"{__package__}.{loader}", source, quantized],
        cwd=REPOSITORY, capture_output=True, text=True, check=True,
        env=os.environ | {"GPTQMODEL_CPU_WORKERS": "2"} | variables,
    )  # fmt: skip
    return json.loads(printed.stdout.splitlines()[-1])


def with_nan(source: Path, name: str) -> Path:
    """Put one NaN into a tensor."""
    tensors = load_file(source / "model.safetensors")
    tensors[name].view(-1)[3] = float("nan")
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    return source
