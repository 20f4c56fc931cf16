"""``quantized -> exported``: the same codes as compressed-tensors (``pack-quantized``), vLLM's native format."""

from collections.abc import Iterator
from pathlib import Path

from qwen_pipeline.checkpoint.digest_cache import checkpoint_digest
from qwen_pipeline.checkpoint.lazy import Checkpoint, open_checkpoint
from qwen_pipeline.checkpoint.manifest import Derivation
from qwen_pipeline.checkpoint.store.derive import Built, derive
from qwen_pipeline.checkpoint.store.destinations import Artifact, Destination
from qwen_pipeline.checkpoint.writer import write_checkpoint
from qwen_pipeline.errors import CheckpointRefused
from qwen_pipeline.progress import Observe, unobserved
from qwen_pipeline.reports import CheckReport, CheckSpec, dump_reports, report_on_modules
from qwen_pipeline.transforms.codes.formats import code_format
from qwen_pipeline.transforms.codes.fp8 import is_fp8
from qwen_pipeline.transforms.codes.to_compressed_tensors import as_compressed

STAGE = "exported"
CODE_VERSION = "3"
SAME_WEIGHTS = CheckSpec(
    name="same_weights", description="Codes, zero points, scales and groups, read back, equal those of the source."
)
CHECKS = (SAME_WEIGHTS,)


def export(*, source: Path, destination: Destination | Path, observe: Observe = unobserved) -> Artifact:
    """Write a GPTQ checkpoint in the format ``pack-quantized`` of compressed-tensors; nothing is quantized again.

    Args:
        source: A GPTQ checkpoint.
        destination: The output directory.
        observe: Called with the progress.

    Raises:
        CheckpointRefused: The source is not a GPTQ checkpoint of 4 or 8 bits.
    """
    quantized = open_checkpoint(source)
    if is_fp8(quantized.config.get("quantization_config") or {}):
        raise CheckpointRefused(
            f"{source} has 8-bit floats, not GPTQ codes.",
            remedy="Quantize the padded checkpoint with --method fp8-block or fp8-dynamic, which are"
            " compressed-tensors.",
        )
    compressed = as_compressed(quantized)
    derivation = Derivation(
        stage=STAGE,
        inputs={"quantized": checkpoint_digest(source, observe=observe)},
        spec={"format": "pack-quantized"},
        code_version=CODE_VERSION,
    )

    def build(partial: Path) -> Built:
        contents = write_checkpoint(compressed, partial, task="export", observe=observe)
        report = check_weights(quantized, open_checkpoint(partial))
        return Built(contents=contents, result={"checks": dump_reports([report])})

    return derive(derivation, destination, build)


def check_weights(quantized: Checkpoint, exported: Checkpoint) -> CheckReport:
    """Report on :data:`SAME_WEIGHTS`, module by module."""
    modules = [name.removesuffix(".qweight") for name in quantized if name.endswith(".qweight")]
    different = list(_different_modules(quantized, exported, modules))
    remedy = "Export again; if the difference persists, report it as a defect."
    return report_on_modules(SAME_WEIGHTS, total=len(modules), bad=different, remedy=remedy)


def _different_modules(quantized: Checkpoint, exported: Checkpoint, modules: list[str]) -> Iterator[str]:
    import torch

    before, after = (code_format(each.config["quantization_config"]) for each in (quantized, exported))
    for module in modules:
        old, new = before.load(quantized, module), after.load(exported, module)
        outputs = old.qweight.shape[1]
        same = torch.equal(old.qweight, new.qweight) and torch.equal(old.scales, new.scales)
        zeros = torch.equal(old.zeros(0, outputs), new.zeros(0, outputs))
        if not (same and zeros and torch.equal(old.g_idx, new.g_idx)):
            yield module
