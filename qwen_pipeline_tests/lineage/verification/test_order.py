"""The order of the stages from digests, where padding had nothing to change."""

from qwen_pipeline.lineage.verification.order import by_digest, find_step, prove_order
from qwen_pipeline.lineage.verification.records import RecordedStep

SAME = "sha256:" + "5" * 64


def step(stage: str, digest: str, **inputs: str) -> RecordedStep:
    return RecordedStep(stage=stage, content_digest=digest, inputs=inputs, spec={}, code_version="1", key=stage)


MERGED, PADDED = step("merged", SAME, base="sha256:1", fine_tune="sha256:2"), step("padded", SAME, source=SAME)
QUANTIZED = step("quantized", "sha256:3", source=SAME)


def test_padding_that_changed_nothing_is_in_order() -> None:
    """Merged and padded checkpoint then have one digest; both steps are recorded, in either order."""
    for known in ([MERGED, PADDED, QUANTIZED], [PADDED, QUANTIZED, MERGED]):
        found = prove_order(QUANTIZED, by_digest(known), lambda _: "attested")
        assert {each.name: each.verdict for each in found} == {
            "padding_before_quantization": "attested",
            "merging_before_padding": "attested",
        }
        assert find_step(by_digest(known), SAME) == MERGED


def test_without_padding_the_order_is_refuted() -> None:
    (finding,) = prove_order(QUANTIZED, by_digest([MERGED, QUANTIZED]), lambda _: "attested")
    assert (finding.name, finding.verdict) == ("padding_before_quantization", "refuted")
