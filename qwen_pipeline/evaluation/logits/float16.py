"""The check that activations stay within the range of float16."""

from math import inf, isfinite

from qwen_pipeline.evaluation.figures import ModelFigures, Peak
from qwen_pipeline.reports import CheckReport, CheckSpec, shown

FLOAT16 = CheckSpec(
    name="float16_range",
    description="No activation of the quantized model comes near the maximum of float16, beyond which engines that"
    " compute in it answer '!!!!'.",
    blocking=False,
)


def float16_report(quantized: ModelFigures, *, max_activation: float) -> CheckReport:
    """Report on :data:`FLOAT16` by the largest activation on any text; NaN counts as the largest.

    At least one text must have been measured.
    """
    texts = {"held-out text": quantized.peaks, "its calibration tokens": quantized.calibration_peaks}
    largest = {text: max(peaks, key=_magnitude) for text, peaks in texts.items() if peaks}
    text, worst = max(largest.items(), key=lambda item: _magnitude(item[1]))
    others = "".join(f" On {other} it is {shown(peak.magnitude)}." for other, peak in largest.items() if other != text)
    passed = worst.magnitude <= max_activation
    return FLOAT16.report(
        passed=passed,
        measured=worst.magnitude,
        limit=max_activation,
        detail=f"The largest activation is at {worst.place} of layer {worst.layer} on {text}; float16 ends at 65504."
        + (others or " No calibration tokens were given.")
        + ("" if passed else " Serve the model in bfloat16, with an engine that computes in it."),
    )


def _magnitude(peak: Peak) -> float:
    return peak.magnitude if isfinite(peak.magnitude) else inf
