"""The settings ``base_dequantize``, ``base_nf4`` and ``text_only`` in the graph, with merged weights and without."""

import pytest

from qwen_pipeline.runner.headless import materialize
from qwen_pipeline_tests.site import FINE_TUNE, Site
from qwen_pipeline_tests.transforms.codes.test_dequantize import to_fp8

pytestmark = pytest.mark.lengthy
SELECTION = ["base_model", "fine_tune", "merged_checkpoint", "padded_checkpoint"]


@pytest.mark.parametrize("merged", ["true", "false"], ids=["two passes", "one pass"])
def test_a_quantized_base_is_merged_into_and_padded_if_the_settings_say_so(site: Site, merged: str) -> None:
    site.drop()
    to_fp8(site.root / "base")
    settings = (site.root / "qwen_pipeline.toml").read_text() + f"\n[store]\nmerged = {merged}\n"
    (site.root / "qwen_pipeline.toml").write_text(settings)
    assert "base_dequantize" in str(getattr(materialize(site.settings, FINE_TUNE, only=SELECTION).fault, "remedy", ""))
    (site.root / "qwen_pipeline.toml").write_text("base_dequantize = true\n" + settings)
    outcome = materialize(site.settings, FINE_TUNE, only=SELECTION)
    assert outcome.fault is None
    specs = {each.manifest.derivation.stage: each.manifest.derivation.spec for each in outcome.artifacts}
    assert specs["merged"]["base_dequantize"] is True
    assert "base_dequantize" not in specs["padded"]


@pytest.mark.slow
def test_a_merge_onto_nf4_and_the_language_model_alone_are_settings_too(site: Site) -> None:
    site.drop()
    settings = (site.root / "qwen_pipeline.toml").read_text()
    (site.root / "qwen_pipeline.toml").write_text('base_nf4 = "double"\ntext_only = true\n' + settings)
    outcome = materialize(site.settings, FINE_TUNE, only=SELECTION[:3])
    assert outcome.fault is None
    spec = outcome.artifacts[-1].manifest.derivation.spec
    assert (spec["base_nf4"], spec["text_only"]) == ("double", True)
