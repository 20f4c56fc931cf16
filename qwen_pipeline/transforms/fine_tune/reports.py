"""Checks of an adopted fine-tune, and the part of the merge's result that describes it."""

from typing import Any

from qwen_pipeline.reports import CheckReport, CheckSpec
from qwen_pipeline.transforms.fine_tune.adopt import Adopted

CARRIED = CheckSpec(
    name="carried_from_base",
    description="The fine-tune has every part of the model; parts that it lacks come from the base.",
    blocking=False,
)


def carried_report(adopted: Adopted) -> CheckReport:
    """Report on :data:`CARRIED`."""
    parts = ", ".join(f"{part} ({count} tensors)" for part, count in adopted.carried.items())
    return CARRIED.report(
        passed=not parts,
        measured=parts or None,
        detail=f"The fine-tune does not store {parts}: as in the base, and not trained with the rest. A draft head"
        " predicts worse then, which costs speed and no quality."
        if parts
        else "The fine-tune stores every part of the model.",
    )


def adoption_summary(adopted: Adopted) -> dict[str, Any]:
    """Return the manifest's description of an adopted fine-tune."""
    return {
        "kind": "full",
        "tensors": adopted.stored,
        "respelled": adopted.respelled,
        "carried": dict(adopted.carried),
        "left_behind": list(adopted.settled.left_behind),
    }


def used_detail(adopted: Adopted, base_tensors: int) -> str:
    """Return a sentence about the match of all tensors."""
    respelled = f"; {adopted.respelled} are stored under other names or in another layout" if adopted.respelled else ""
    return (
        f"All {adopted.stored} tensors were matched to the {base_tensors} of the base, by meaning and shape{respelled},"
        " before anything was written."
    )
