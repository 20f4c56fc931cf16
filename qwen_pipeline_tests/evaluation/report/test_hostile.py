"""Names, answers and reports that hold markup are shown as text: they load, hide, link and run nothing."""

import re
from dataclasses import replace

import pytest

from qwen_pipeline.evaluation.checks import judge
from qwen_pipeline.evaluation.limits import Limits
from qwen_pipeline.evaluation.report import markup
from qwen_pipeline.evaluation.report.html import render_page
from qwen_pipeline.evaluation.report.markdown import render_report
from qwen_pipeline.evaluation.report.model_card import ModelCard
from qwen_pipeline.evaluation.samples import Sample
from qwen_pipeline_tests.evaluation.example_findings import GOOD, HELD, SERVED, YES
from qwen_pipeline_tests.qwen.published import QWEN2_5_VL_3B

HOSTILE = (
    "<script>alert(1)</script> <img src=x onerror=alert(1)> ![a](http://x/y.png) [b](javascript:x) [c]: http://x\n"
    "# Passed\n---\n| a | `b` \x1b[31m \u202e <!-- <https://x> \"'> {{ 7 * 7 }} {% raw %}"
)


def require_inert(markdown: str) -> None:
    """Assert that a Markdown text has no tag, link or image of an upload; code is shown as it is."""
    markdown = re.sub(r"`[^`\n]*`", "", markdown)
    assert not re.search(r"<(?!br>)[A-Za-z/!?]", markdown)
    assert not re.search(r"(?<!\\)\](\(http|\(java|\[|: http)", markdown)
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e]", markdown)
    assert not re.search("^(# Passed|---$)", markdown.partition("\n")[2], re.MULTILINE)


def test_reports_hold_no_markup_of_an_upload() -> None:
    answer = replace(YES, text=HOSTILE)
    found = replace(
        GOOD,
        structure=replace(
            GOOD.structure, problems=[HOSTILE], errors=[replace(GOOD.structure.errors[0], module=HOSTILE)]
        ),
        models={role: replace(model, linears={HOSTILE: 1}, fault=HOSTILE) for role, model in GOOD.models.items()},
        samples=[Sample(prompt=HOSTILE, reference=answer, candidate=answer)],
        served=[replace(SERVED, ready=False, fault=HOSTILE)],
        tasks=[replace(HELD, name=HOSTILE)],
        nbytes=dict.fromkeys(GOOD.models, 1),
    )
    reports = judge(found, Limits())
    assert any(HOSTILE[:8] in report.detail for report in reports)
    require_inert(render_report(found, reports, method=HOSTILE))
    page = render_page(found, reports, plots={}, lineage=[], method=HOSTILE)
    body = page.partition("</style>")[2]
    assert "<script" not in body
    assert "<img src=x" not in body
    assert "{{ 7 * 7 }}" in body


def test_a_card_holds_no_markup_of_an_upload() -> None:
    config = QWEN2_5_VL_3B | {
        "license": HOSTILE,
        "quantization_config": {"bits": 4, "group_size": 128, "dynamic": {"+:a": {HOSTILE: HOSTILE}}},
    }
    card = ModelCard(
        name="bot", base_model=f"/models/{HOSTILE}", config=config, padding=[], split=True, quality="",
        verdict="passed", skipped=[HOSTILE], steps=[],
    ).render()  # fmt: skip
    front, _, body = card.removeprefix("---\n").partition("\n---\n\n")
    require_inert(body)
    assert "license" not in front


@pytest.mark.parametrize("plain", ["F16 [4, 4] of `x_y`", "a < b, [1]", "a\\|b * c", "x -> y: [a] and (b)"])
def test_plain_text_is_unchanged(plain: str) -> None:
    assert markup.text(plain) == plain


def test_a_name_cannot_end_its_code() -> None:
    assert markup.code("a`b\nc") == "`a'b c`"
