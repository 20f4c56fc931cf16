"""Checks of a quantizer's output, module by module: its codes, and the figures of the solver's log."""

from collections.abc import Sequence

from qwen_pipeline.checkpoint.lazy import Checkpoint
from qwen_pipeline.quantization.calibration.spec import MIN_EXPERT_TOKENS
from qwen_pipeline.quantization.evidence import ModuleEvidence
from qwen_pipeline.quantization.spec import QuantSpec
from qwen_pipeline.qwen.linears import Linear
from qwen_pipeline.reports import CheckReport, CheckSpec, report_on_modules

EVERY_MODULE = CheckSpec(
    name="every_module_quantized",
    description="Each linear layer of each decoder layer, unless it is kept, has codes and a row in the solver's log.",
)
NO_ROUNDING = CheckSpec(
    name="no_rounding_fallback",
    description="The solver solved each module; none was merely rounded to nearest.",
)
LOSSES_FINITE = CheckSpec(name="losses_finite", description="The solver's loss of each module is a finite number.")
SCALES_FINITE = CheckSpec(
    name="scales_finite", description="Every scale, read back from the output, is finite and not zero."
)
DAMPING_AS_ASKED = CheckSpec(
    name="damping_as_asked",
    description="No Hessian needed more damping than the spec's to be positive definite.",
    blocking=False,
)
EXPERTS_FED = CheckSpec(
    name="experts_fed",
    description=f"Each expert received at least {MIN_EXPERT_TOKENS} calibration tokens.",
    blocking=False,
)
CHECKS = (EVERY_MODULE, NO_ROUNDING, LOSSES_FINITE, SCALES_FINITE, DAMPING_AS_ASKED, EXPERTS_FED)


def check_output(
    output: Checkpoint, linears: Sequence[Linear], losses: Sequence[ModuleEvidence], spec: QuantSpec
) -> list[CheckReport]:
    """Report on :data:`CHECKS`, in their order."""
    logged = {row.module for row in losses}
    coded = {each.module for each in linears if spec.precision_of(each.module).coded}
    return [
        report_on_modules(
            EVERY_MODULE,
            total=len(linears),
            bad=[
                each.module
                for each in linears
                if {f"{each.module}.qweight" in output, each.module in logged} != {each.module in coded}
            ],
            remedy="Read logs/quantize.log for the modules that the quantizer skipped.",
        ),
        report_on_modules(
            NO_ROUNDING,
            total=len(losses),
            bad=[row.module for row in losses if row.rounded],
            remedy="Look for NaN or infinite weights in the source, or use more and longer calibration text.",
        ),
        report_on_modules(
            LOSSES_FINITE,
            total=len(losses),
            bad=[row.module for row in losses if row.loss is None],
            remedy="Look for NaN or infinite weights in the source.",
        ),
        report_on_modules(
            SCALES_FINITE,
            total=len(coded),
            bad=[each.module for each in linears if not _scales_are_valid(output, each)],
            remedy="Look for weights outside the range of float16 in the source.",
        ),
        report_on_modules(
            DAMPING_AS_ASKED,
            total=len(losses),
            bad=[row.module for row in losses if row.damp > _damp_of(row.module, spec) + 1e-5],
            remedy="Use more calibration text, or raise damp_percent for all modules.",
        ),
        _check_experts(losses),
    ]


def _check_experts(losses: Sequence[ModuleEvidence]) -> CheckReport:
    experts = [row for row in losses if ".experts." in row.module]
    if not experts:
        return EXPERTS_FED.skipped("The model has no experts.")
    return report_on_modules(
        EXPERTS_FED,
        total=len(experts),
        bad=[row.module for row in experts if row.tokens < MIN_EXPERT_TOKENS],
        remedy="Use more calibration samples, text that needs these experts, or all_experts.",
    )


def _damp_of(module: str, spec: QuantSpec) -> float:
    return spec.override(module).get("damp_percent", spec.damp_percent)


def _scales_are_valid(output: Checkpoint, linear: Linear) -> bool:
    import torch

    name = f"{linear.module}.scales"
    if name not in output:
        return True  # missing codes are reported by every_module_quantized
    scales = output.load(name)
    return bool((torch.isfinite(scales) & (scales != 0)).all())
