"""The requests are written by every chat template of Qwen, and answered by every family."""

from pathlib import Path
from typing import Any

import pytest
import torch

from qwen_pipeline.checkpoint.lazy import open_checkpoint
from qwen_pipeline.evaluation.behaviour.ask import Asking, Request, Requests, behaviour_of
from qwen_pipeline.evaluation.behaviour.checks import behaviour_reports, behaviour_rows
from qwen_pipeline.evaluation.behaviour.plan import NO_REQUESTS, BehaviourPlan
from qwen_pipeline.evaluation.behaviour.reply import prompt_bytes, reply
from qwen_pipeline.evaluation.behaviour.requests import NEEDLE_CODE, NEEDLE_QUESTION
from qwen_pipeline.evaluation.figures import ModelFigures
from qwen_pipeline.evaluation.limits import Limits
from qwen_pipeline.evaluation.measurement import Measurement
from qwen_pipeline.layerwise.decoding import Decoder
from qwen_pipeline.layerwise.greedy_rules import GreedyRules
from qwen_pipeline.layerwise.model import ComputeContext
from qwen_pipeline.progress import unobserved
from qwen_pipeline.text.tokenizer_service import LoadedTokenizer
from qwen_pipeline_tests.text.test_tokenizers import TEMPLATES, with_template
from qwen_pipeline_tests.tiny import CHAT_TEMPLATE, load_tiny, tiny_model

CPU = ComputeContext(device=torch.device("cpu"), dtype=torch.float32)
WORDS = [list(b"a quiet river ran below the old town and nobody looked at it twice. " * 6)]
SHORT = BehaviourPlan(tokens=5, thinking_tokens=6, needles=(256,))
QUICK = ("qwen3", "qwen3_next")
FAMILIES = (*QUICK, "qwen3_5_moe", "qwen3_vl", "qwen3_omni_moe", "qwen4_exp")
"""One of each kind of decoder; answers of all others are compared with Transformers' elsewhere."""
END = 258
"""The token <|im_end|> of the tiny tokenizer."""


def asking(template: str | None, **arguments: Any) -> Asking:
    return Asking(LoadedTokenizer(with_template(template)), arguments)


def requests_of(template: str | None, plan: BehaviourPlan = SHORT, positions: int | None = 4096) -> Requests:
    return asking(template).requests(plan, byte_tokens(), positions=positions)


def byte_tokens() -> list[list[int]]:
    tokenizer = LoadedTokenizer(with_template(None))
    return [tokenizer.encode_text(bytes(window).decode(), add_special_tokens=False) for window in WORDS]


@pytest.mark.parametrize("name", TEMPLATES)
def test_every_template_writes_the_requests_that_its_model_is_made_for(name: str) -> None:
    found = requests_of(TEMPLATES[name])
    has_tools, thinks = not name.startswith("qwen2_5_vl"), name.startswith("qwen3") and "vl" not in name
    thinks &= "instruct" not in name
    left_out = {kind for kind, there in (("tool call", has_tools), ("thinking", thinks)) if not there}
    assert found.left_out.keys() == left_out
    assert {request.kind for request in found.asked} == {"tool call", "thinking", "JSON", "needle"} - left_out
    assert found.turn_end == END


def test_a_prompt_is_what_the_template_writes_and_the_needle_lies_in_the_middle_of_held_out_text() -> None:
    tokenizer = LoadedTokenizer(with_template(TEMPLATES["qwen3"]))
    texts = {request.kind: tokenizer.decode(request.tokens) for request in requests_of(TEMPLATES["qwen3"]).asked}
    assert texts["JSON"].endswith("assistant\n<think>\n\n</think>\n\n")
    assert texts["thinking"].endswith("?\nassistant\n")
    assert '"name": "set_timer"' in texts["tool call"]
    before, _, after = texts["needle"].partition(f"\nThe code of the archive is {NEEDLE_CODE}.\n")
    assert before.startswith("user\na quiet river")
    assert after.rstrip().endswith("</think>")
    assert NEEDLE_QUESTION in after
    (needle,) = (request for request in requests_of(TEMPLATES["qwen3"]).asked if request.kind == "needle")
    assert 200 < len(needle.tokens) <= 256
    again = asking(TEMPLATES["qwen3"], enable_thinking=True).requests(SHORT, byte_tokens(), positions=None)
    assert tokenizer.decode(again.asked[0].tokens).endswith("assistant\n")


def test_what_is_left_out_is_named_with_the_reason() -> None:
    few = requests_of(TEMPLATES["qwen3"], BehaviourPlan(needles=(256, 1024)), positions=600)
    assert [request.kind for request in few.asked] == ["thinking", "JSON", "needle"]
    assert "has 600 positions" in few.left_out["tool call"]
    assert "may have 1,048 tokens" in few.left_out["needle"]
    none = requests_of(TEMPLATES["qwen3"], NO_REQUESTS)
    assert (none.asked, set(none.left_out.values())) == ([], {"No such request is configured."})
    assert "has no chat template" in requests_of(None).left_out["JSON"]
    assert "refuses" in requests_of("{{ raise_exception('no') }}").left_out["JSON"]
    ours = TEMPLATES["qwen3"].replace("<tool_call>", "<call>")
    assert "in a way that is not known" in requests_of(ours).left_out["tool call"]


@pytest.mark.parametrize(
    "family",
    [each if each in QUICK else pytest.param(each, marks=pytest.mark.slow) for each in FAMILIES],
)
def test_answers_of_each_family_are_those_of_transformers(family: str, tmp_path: Path) -> None:
    root = tiny_model(family, tmp_path / "model")
    tokenizer, checkpoint = LoadedTokenizer(with_template(CHAT_TEMPLATE)), open_checkpoint(root)
    requests = requests_of(CHAT_TEMPLATE, positions=512)
    measurement = measurement_of(requests.asked)
    rules = GreedyRules.of(checkpoint)
    found = reply(Decoder(checkpoint, CPU), measurement, rules, drafts=(), proposer=None, observe=unobserved)
    model: Any = load_tiny(root)
    for request, answer in zip(requests.asked, found["replies"], strict=True):
        tokens = torch.tensor([request.tokens])
        expected = model.generate(
            input_ids=tokens, attention_mask=torch.ones_like(tokens), do_sample=False, max_new_tokens=request.limit
        )
        assert list(answer) == expected[0, len(request.tokens) :].tolist()
    figures = ModelFigures(replies=found["replies"])
    behaviour = behaviour_of(
        requests, {"merged": figures, "quantized": figures}, {"merged": rules.stops, "quantized": {END}}, tokenizer
    )
    assert [(each.kind, each.merged == each.quantized) for each in behaviour.exchanges] == [
        ("JSON", True), ("needle", True)
    ]  # fmt: skip
    assert [row[3] for row in behaviour_rows(behaviour)] == ["no such object", "not found"]
    reports = {report.name: report for report in behaviour_reports(behaviour, [], None, Limits())}
    assert {name for name, report in reports.items() if not report.skipped} <= {"stop_tokens"}
    assert "does not offer tools" in reports["tool_calls"].detail


def test_a_request_that_does_not_fit_into_memory_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = open_checkpoint(tiny_model("qwen3", tmp_path / "model"))
    requests = requests_of(CHAT_TEMPLATE)
    sizes = [prompt_bytes(checkpoint.config, len(request.tokens)) for request in requests.asked]
    monkeypatch.setattr("qwen_pipeline.evaluation.behaviour.reply.default_budget", lambda _: min(sizes))
    decoder = Decoder(checkpoint, CPU, budget=0)
    measurement = measurement_of(requests.asked)
    found = reply(decoder, measurement, GreedyRules(), drafts=(), proposer=None, observe=unobserved)
    assert [len(answer) for answer in found["replies"]] == [5, 0]
    figures = ModelFigures(replies=found["replies"])
    behaviour = behaviour_of(
        requests, {"quantized": figures}, {"quantized": {END}}, LoadedTokenizer(with_template(CHAT_TEMPLATE))
    )
    assert "do not fit into memory" in behaviour.left_out["needle"]
    assert [each.merged for each in behaviour.exchanges] == [None]


def measurement_of(asked: Any) -> Measurement:
    requests: list[Request] = list(asked)
    return Measurement(
        models={}, reference="", compared=[], answering=[], windows=[], prompts=[], max_new_tokens=1, device="cpu",
        requests=[request.tokens for request in requests], request_limits=[request.limit for request in requests],
    )  # fmt: skip
