"""The output of a quantization to 8-bit floats: rounded, written and checked in this process, without data or a GPU."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from qwen_pipeline.checkpoint.digest import digest_files
from qwen_pipeline.checkpoint.lazy import Checkpoint, open_checkpoint
from qwen_pipeline.checkpoint.manifest import Derivation
from qwen_pipeline.checkpoint.store.canonical import LOGS
from qwen_pipeline.checkpoint.store.derive import Built, derive
from qwen_pipeline.checkpoint.store.destinations import Artifact, Destination
from qwen_pipeline.checkpoint.store.stage_input import StageInput
from qwen_pipeline.checkpoint.writer import write_checkpoint
from qwen_pipeline.errors import InputRefused
from qwen_pipeline.progress import Observe
from qwen_pipeline.quantization.evidence import EVIDENCE, ModuleEvidence, summarize, write_evidence
from qwen_pipeline.quantization.fp8.checks import check_floats
from qwen_pipeline.quantization.spec import QuantSpec
from qwen_pipeline.qwen.linears import Linear
from qwen_pipeline.qwen.methods import Fp8Layout, layout_of
from qwen_pipeline.reports import dump_reports
from qwen_pipeline.transforms.codes.to_fp8 import SCALE_OF_ZEROS, as_fp8

NOT_FINITE = "Look for NaN or infinite weights in the source: 8-bit floats have no infinity."


@dataclass(frozen=True, slots=True, kw_only=True)
class Rounding:
    """A rounding of a checkpoint to 8-bit floats, ready to be built."""

    source: StageInput
    linears: Sequence[Linear]
    spec: QuantSpec
    observe: Observe

    def write(self, stage: str, code_version: str, destination: Destination | Path) -> Artifact:
        """Write the output, unless it exists.

        Raises:
            InputRefused: A block does not fit a layer.
            CheckFailed: A weight is not finite.
        """
        require_whole_blocks(self.linears, layout_of(self.spec.method))
        derivation = Derivation(
            stage=stage,
            inputs={"source": self.source.digest},
            spec=self.spec.to_json(),
            code_version=code_version,
        )
        return derive(derivation, destination, self.build, fingerprints={"source": self.source.fingerprint})

    def build(self, partial: Path) -> Built:
        rounded = as_fp8(self.source.checkpoint, self.linears, layout_of(self.spec.method))
        contents = write_checkpoint(
            rounded,
            partial,
            task="write 8-bit floats",
            readers=self.source.readers,
            if_not_finite=NOT_FINITE,
            observe=self.observe,
        )
        output = open_checkpoint(partial)
        evidence = [_evidence(output, linear, layout_of(self.spec.method)) for linear in self.linears]
        (partial / LOGS).mkdir(exist_ok=True)
        write_evidence(evidence, partial / EVIDENCE)
        reports = check_floats(output, self.linears, layout_of(self.spec.method))
        return Built(
            contents=replace(contents, files={**contents.files, **digest_files({EVIDENCE: partial / EVIDENCE})}),
            result={
                "losses": [],
                "quantization": rounded.config["quantization_config"],
                "evidence": summarize(evidence),
                "checks": dump_reports(reports),
            },
            inputs={"source": self.source.final_digest()},
        )


def require_whole_blocks(linears: Sequence[Linear], layout: Fp8Layout) -> None:
    """Refuse layers that are not whole blocks: kernels round inputs in whole blocks, and engines join layers.

    Raises:
        InputRefused: The message names the first layer, and the remedy that helps there.
    """
    for linear in linears if layout.block else ():
        for axis, size in (("in", linear.in_features), ("out", linear.out_features)):
            if size % layout.unit:
                is_width = linear.kind.endswith({"in": ("down_proj",), "out": ("gate_proj", "up_proj")}[axis])
                raise InputRefused(
                    f"{linear.module} has {axis}_features {size}, which is not a multiple of {layout.unit}, the side of"
                    " a block.",
                    remedy=f"Pad the checkpoint first: qwen-pipeline pad --group-size {layout.unit}"
                    if is_width
                    else "Padding cannot widen it: use --method fp8-dynamic, which has no blocks.",
                )


def _evidence(output: Checkpoint, linear: Linear, layout: Fp8Layout) -> ModuleEvidence:
    """Return the figures of one layer, which has as many groups as scales, and no loss: nothing was solved."""
    scales = output.load(f"{linear.module}.{layout.scale}")
    return ModuleEvidence(
        module=linear.module,
        layer=linear.layer,
        kind=linear.kind,
        loss=None,
        damp=0.0,
        tokens=0,
        rounded=True,
        groups=scales.numel(),
        zero_groups=int((scales == SCALE_OF_ZEROS).sum()),
        saturated_groups=0,
    )
