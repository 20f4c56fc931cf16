"""The checks of a quantization, for 8-bit floats: those of a solver do not apply."""

from collections.abc import Sequence

from qwen_pipeline.checkpoint.lazy import Checkpoint
from qwen_pipeline.quantization import checks
from qwen_pipeline.qwen.linears import Linear
from qwen_pipeline.qwen.methods import Fp8Layout
from qwen_pipeline.reports import CheckReport, report_on_modules
from qwen_pipeline.transforms.codes.fp8 import Fp8Format

_NO_SOLVER = "8-bit floats are rounded to nearest: there is no solver."
_NO_TOKENS = "8-bit floats need no calibration tokens."


def check_floats(output: Checkpoint, linears: Sequence[Linear], layout: Fp8Layout) -> list[CheckReport]:
    """Report on :data:`~qwen_pipeline.quantization.checks.CHECKS`, in their order."""
    form = Fp8Format(layout=layout)
    specs = {linear.module: form.code_specs(linear.out_features, linear.in_features) for linear in linears}
    missing = [
        module
        for module, codes in specs.items()
        if any(output.get(f"{module}.{suffix}") != spec for suffix, spec in codes.items())
    ]
    stored = [linear.module for linear in linears if linear.module not in missing]
    return [
        report_on_modules(
            checks.EVERY_MODULE, total=len(linears), bad=missing, remedy="Report this as a defect: layers lack codes."
        ),
        checks.NO_ROUNDING.skipped(_NO_SOLVER),
        checks.LOSSES_FINITE.skipped(_NO_SOLVER),
        report_on_modules(
            checks.SCALES_FINITE,
            total=len(linears),
            bad=[module for module in stored if not _is_valid(output, f"{module}.{layout.scale}")],
            remedy="Look for NaN or infinite weights in the source.",
        ),
        checks.DAMPING_AS_ASKED.skipped(_NO_SOLVER),
        checks.EXPERTS_FED.skipped(_NO_TOKENS),
    ]


def _is_valid(output: Checkpoint, name: str) -> bool:
    import torch

    scales = output.load(name)
    return bool((torch.isfinite(scales) & (scales > 0)).all())
