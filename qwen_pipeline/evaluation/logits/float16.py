"""Whether activations come near the end of float16, on which text, and in which layer."""

from math import inf, isfinite

from qwen_pipeline.evaluation.figures import ModelFigures, Peak
from qwen_pipeline.reports import CheckReport, CheckSpec, shown

FLOAT16 = CheckSpec(
    name="float16_range",
    description="No activation of the quantized model comes near the end of float16, where engines that compute in it"
    " answer '!!!!'.",
    blocking=False,
)


def float16_report(quantized: ModelFigures, *, max_activation: float) -> CheckReport:
    """Report on :data:`FLOAT16`: the largest activation on any text counts, and one that is no number most of all.

    The model must have been measured on one text at least.
    """
    texts = {"held-out text": quantized.peaks, "its calibration tokens": quantized.calibration_peaks}
    loudest = {text: max(peaks, key=_loudness) for text, peaks in texts.items() if peaks}
    text, worst = max(loudest.items(), key=lambda item: _loudness(item[1]))
    others = "".join(f" On {other} it is {shown(peak.magnitude)}." for other, peak in loudest.items() if other != text)
    passed = worst.magnitude <= max_activation
    return FLOAT16.report(
        passed=passed,
        measured=worst.magnitude,
        limit=max_activation,
        detail=f"The largest activation is at {worst.place} of layer {worst.layer} on {text}; float16 ends at 65504."
        + (others or " No calibration tokens were at hand.")
        + ("" if passed else " Serve it in bfloat16, with an engine that computes in it."),
    )


def _loudness(peak: Peak) -> float:
    return peak.magnitude if isfinite(peak.magnitude) else inf
