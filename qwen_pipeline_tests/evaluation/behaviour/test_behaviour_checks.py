"""Each check of behaviour judges what the merged model does, and says what it did not judge."""

from collections.abc import Sequence
from dataclasses import replace

import pytest

from qwen_pipeline.errors import InputRefused
from qwen_pipeline.evaluation.behaviour.checks import BEHAVIOUR_CHECKS, behaviour_reports
from qwen_pipeline.evaluation.behaviour.findings import Behaviour, Reply
from qwen_pipeline.evaluation.behaviour.plan import BehaviourPlan
from qwen_pipeline.evaluation.checks import judge
from qwen_pipeline.evaluation.limits import Limits
from qwen_pipeline.evaluation.report.html import render_page
from qwen_pipeline.evaluation.report.markdown import render_report
from qwen_pipeline.reports import CheckReport
from qwen_pipeline_tests.evaluation.example_findings import BEHAVIOUR, CLOSE, GOOD, OBJECT, THOUGHT, reply

NAMES = {"tool call": "tool_calls", "thinking": "thinking_length", "JSON": "json_answers", "needle": "needles_found"}


def reports_of(
    behaviour: Behaviour, limits: Limits | None = None, by_position: Sequence[float] = (0.1,) * 128
) -> dict[str, CheckReport]:
    divergence = replace(CLOSE, by_position=tuple(by_position))
    reports = behaviour_reports(behaviour, [], divergence, limits or Limits())
    assert [report.name for report in reports] == [check.name for check in BEHAVIOUR_CHECKS]
    return {report.name: report for report in reports}


def answering(kind: str, quantized: Reply | None, merged: Reply | None = None) -> Behaviour:
    return replace(
        BEHAVIOUR,
        exchanges=[
            replace(each, quantized=quantized, merged=merged or each.merged) if each.kind == kind else each
            for each in BEHAVIOUR.exchanges
        ],
    )


def test_a_model_that_behaves_passes_all() -> None:
    assert all(report.passed for report in reports_of(BEHAVIOUR).values())


@pytest.mark.parametrize(
    ("kind", "quantized", "words"),
    [
        ("tool call", reply("It rains."), "'Weather?': no call, merged: get_weather(city='Paris', day='tomorrow')"),
        ("tool call", reply("<tool_call>{"), "a call that cannot be read"),
        ("tool call", reply('<tool_call>{"name": "weather", "arguments": {}}</tool_call>'), "there is no tool"),
        ("thinking", reply("Hm, 17 + 17", tokens=256, ended=False), "not closed in 256 tokens over 12 tokens"),
        ("thinking", replace(THOUGHT, thought=25), "25 tokens over 12 tokens"),
        ("JSON", reply("Ada is 36."), "'Ada': no such object"),
        ("JSON", reply('{"name": "Ada"}'), "'Ada': no such object"),
        ("JSON", reply('["name", "age", "city"]'), "'Ada': no such object"),
        ("needle", reply("I do not know."), "'Code?': not found, merged: found"),
    ],
)
def test_what_the_merged_model_does_and_the_quantized_one_does_not_is_a_warning(
    kind: str, quantized: Reply, words: str
) -> None:
    reports = reports_of(answering(kind, quantized))
    report = reports[NAMES[kind]]
    assert (report.outcome, report.blocks) == ("warning", False)
    assert words in report.detail
    bad = answering(kind, THOUGHT if kind == "thinking" else quantized, merged=quantized)
    if kind != "thinking" or quantized.thought is None:
        assert reports_of(bad)[NAMES[kind]].skipped
        assert "The merged model itself does not do" in reports_of(bad)[NAMES[kind]].detail


def test_equal_calls_are_required_but_other_json_is_not() -> None:
    other = reply('<tool_call>{"name": "get_weather", "arguments": {"city": "Rome", "day": "today"}}</tool_call>')
    assert reports_of(answering("tool call", other))["tool_calls"].measured == 0
    assert reports_of(answering("tool call", other), Limits(min_same_calls=0))["tool_calls"].passed
    others = replace(OBJECT, text='{"name": 1, "age": 2, "city": 3}')
    assert reports_of(answering("JSON", others))["json_answers"].passed
    sized = replace(GOOD, nbytes=dict.fromkeys(GOOD.models, 1))
    page = render_page(sized, judge(sized, Limits()), plots={}, lineage=[], method="")
    text = render_report(sized, judge(sized, Limits()), method="")
    for words in ("Behaviour", "tool call: Weather?", "get_weather(city="):
        assert words in page
        assert words in text


@pytest.mark.parametrize("fields", [{"tokens": -1}, {"thinking_tokens": 2**21}, {"needles": (9,)}])
def test_lengths_out_of_range_are_refused(fields: dict[str, int]) -> None:
    with pytest.raises(InputRefused, match="behaviour"):
        BehaviourPlan(**fields)  # pyright: ignore[reportArgumentType]
