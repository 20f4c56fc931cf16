"""What is checked of an engine's output, module by module: its codes, and what the solver says of them."""

from collections.abc import Sequence

from qwen_pipeline.checkpoint.lazy import Checkpoint
from qwen_pipeline.quantization.losses import ModuleLoss
from qwen_pipeline.quantization.spec import MIN_EXPERT_TOKENS, QuantSpec
from qwen_pipeline.qwen.linears import Linear
from qwen_pipeline.reports import CheckReport, CheckSpec, report_on_modules

EVERY_MODULE = CheckSpec(
    name="every_module_quantized",
    description="Each linear layer of each decoder layer has codes, and a row in the solver's log.",
)
NO_ROUNDING = CheckSpec(
    name="no_rounding_fallback",
    description="The solver solved each module; none was merely rounded to nearest.",
)
LOSSES_FINITE = CheckSpec(name="losses_finite", description="The solver's loss of each module is a finite number.")
SCALES_FINITE = CheckSpec(
    name="scales_finite", description="Every scale, read back from the output, is finite and more than zero."
)
DAMPING_AS_ASKED = CheckSpec(
    name="damping_as_asked",
    description="No Hessian needed more damping than the spec says to be positive definite.",
    blocking=False,
)
EXPERTS_FED = CheckSpec(
    name="experts_fed",
    description=f"Each expert met at least {MIN_EXPERT_TOKENS} calibration tokens.",
    blocking=False,
)
CHECKS = (EVERY_MODULE, NO_ROUNDING, LOSSES_FINITE, SCALES_FINITE, DAMPING_AS_ASKED, EXPERTS_FED)


def check_output(
    output: Checkpoint, linears: Sequence[Linear], losses: Sequence[ModuleLoss], spec: QuantSpec
) -> list[CheckReport]:
    """Report on :data:`CHECKS`, in their order."""
    logged = {loss.module for loss in losses}
    return [
        report_on_modules(
            EVERY_MODULE,
            total=len(linears),
            bad=[at.module for at in linears if f"{at.module}.qweight" not in output or at.module not in logged],
            remedy="Read logs/quantize.log for what the engine skipped.",
        ),
        report_on_modules(
            NO_ROUNDING,
            total=len(losses),
            bad=[loss.module for loss in losses if loss.rounded],
            remedy="Look for NaN or infinite weights in the source, or use more and longer calibration text.",
        ),
        report_on_modules(
            LOSSES_FINITE,
            total=len(losses),
            bad=[loss.module for loss in losses if loss.loss is None],
            remedy="Look for NaN or infinite weights in the source.",
        ),
        report_on_modules(
            SCALES_FINITE,
            total=len(linears),
            bad=[at.module for at in linears if not _scales_are_sound(output, at)],
            remedy="Look for weights beyond the range of float16 in the source.",
        ),
        report_on_modules(
            DAMPING_AS_ASKED,
            total=len(losses),
            bad=[loss.module for loss in losses if loss.damp > _damp_of(loss.module, spec) + 1e-5],
            remedy="Use more calibration text, or raise damp_percent for all.",
        ),
        report_on_modules(
            EXPERTS_FED,
            total=sum(".experts." in loss.module for loss in losses),
            bad=[at.module for at in losses if ".experts." in at.module and at.samples < MIN_EXPERT_TOKENS],
            remedy="Use more calibration samples, text that needs these experts, or all_experts.",
        ),
    ]


def _damp_of(module: str, spec: QuantSpec) -> float:
    return spec.override(module).get("damp_percent", spec.damp_percent)


def _scales_are_sound(output: Checkpoint, linear: Linear) -> bool:
    import torch

    name = f"{linear.module}.scales"
    if name not in output:
        return True  # reported by every_module_quantized
    scales = output.load(name)
    return bool((torch.isfinite(scales) & (scales > 0)).all())
