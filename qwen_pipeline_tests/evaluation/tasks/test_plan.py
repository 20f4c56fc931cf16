"""Scores of benchmark tasks: what is lost, what is demanded, and lm-eval itself on a task of one's own."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from qwen_pipeline.errors import InputRefused
from qwen_pipeline.evaluation.measurement import MEASURING_ENVIRONMENT
from qwen_pipeline.evaluation.tasks.plan import RUN_TASKS, Score, TaskPlan, load_results, scores, tasks_report
from qwen_pipeline.workers.environments import find_environment
from qwen_pipeline.workers.parent import run_worker
from qwen_pipeline_tests.rounding import round_to_codes, save_dequantized
from qwen_pipeline_tests.tiny import tiny_model, tiny_qwen2

PLAN = TaskPlan(python=Path("python"), versions={}, tasks=["arc"], max_drop=0.02)
HELD = Score(name="arc/acc", more_is_better=True, merged=0.5, quantized=0.49)
PERPLEXITY = Score(name="wiki/ppl", more_is_better=False, merged=10.0, quantized=10.5)


def test_a_loss_within_the_bound_passes_and_is_told() -> None:
    report = tasks_report(PLAN, [HELD])
    assert report.passed
    assert report.detail == "arc/acc 0.5 merged, 0.49 quantized."
    assert report.measured == pytest.approx(0.01)


def test_a_larger_loss_blocks_or_warns_whichever_way_is_up() -> None:
    assert tasks_report(PLAN, [HELD, PERPLEXITY]).detail == "wiki/ppl 10 merged, 10.5 quantized, a loss of 0.5."
    assert tasks_report(PLAN, [PERPLEXITY]).blocks
    warning = tasks_report(replace(PLAN, blocking=False), [PERPLEXITY])
    assert (warning.passed, warning.blocks) == (False, False)


def test_a_minimum_is_demanded_and_a_misspelt_one_is_named() -> None:
    assert tasks_report(replace(PLAN, minimum={"arc/acc": 0.49}), [HELD]).passed
    assert tasks_report(replace(PLAN, minimum={"arc/acc": 0.6}), [HELD]).detail == "arc/acc is 0.49, wanted 0.6."
    unknown = tasks_report(replace(PLAN, minimum={"arc/accc": 0.6}), [HELD])
    assert unknown.blocks
    assert unknown.detail == "There is a minimum for arc/accc, but the scores are arc/acc."


def test_tasks_that_are_not_configured_are_skipped_and_tasks_without_scores_fail() -> None:
    report = tasks_report(None, [])
    assert (report.outcome, report.blocks) == ("skipped", False)
    assert "validation.lm_eval.tasks" in report.detail
    assert tasks_report(PLAN, []).blocks
    assert tasks_report(PLAN, [], fault="lm-eval died.").detail == "No scores: lm-eval died."


@pytest.mark.serve
def test_lm_eval_scores_a_task_of_ones_own(tmp_path: Path) -> None:
    root = tiny_qwen2(tmp_path / "model")
    examples = [{"question": f"Call me number {n}, some", "answer": n % 2} for n in range(6)]
    (tmp_path / "parity.jsonl").write_text("\n".join(map(json.dumps, examples)))
    task = {
        "task": "parity",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "parity.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": ["x", "x"],
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    (tmp_path / "parity.yaml").write_text(json.dumps(task))
    spec = {
        "models": {"merged": str(root), "quantized": str(root)},
        "tasks": ["parity"],
        "include": str(tmp_path),
        "limit": None,
        "device": "cpu",
    }
    python = find_environment("lm-eval").python
    worker = run_worker(python, RUN_TASKS, spec, log=tmp_path / "log", env=MEASURING_ENVIRONMENT)
    (score,) = scores(load_results(worker.value))
    assert (score.name, score.more_is_better) == ("parity/acc", True)
    assert score.quantized == score.merged == 0.5, "of two equal choices the first is always taken"
    assert score.stderr == pytest.approx(0.2236, rel=1e-3)

    said = {"output_type": "generate_until", "generation_kwargs": {"do_sample": True, "temperature": 0.7}}
    (tmp_path / "parity.yaml").write_text(json.dumps(task | said))
    with pytest.raises(InputRefused, match="a task asks for answers with do_sample, and answers here are greedy"):
        run_worker(python, RUN_TASKS, spec, log=tmp_path / "log", env=MEASURING_ENVIRONMENT)


@pytest.mark.serve
@pytest.mark.parametrize("family", ["qwen2", "qwen3_moe", "qwen3_next"])
def test_a_streamed_model_answers_lm_eval_as_its_own_does(family: str, tmp_path: Path) -> None:
    """Weights that codes stand for are asked of lm-eval's own class: it cannot load experts that are packed."""
    source = tiny_model(family, tmp_path / "source")
    codes = round_to_codes(source, tmp_path / "codes", group_size=32)
    plain = save_dequantized(source, codes, tmp_path / "plain")
    spec = {"streamed": str(codes), "plain": str(plain)}
    python = find_environment("lm-eval").python
    target = "qwen_pipeline_tests.evaluation.tasks.in_lm_eval:ask_both"
    found = run_worker(python, target, spec, log=tmp_path / "log", env=MEASURING_ENVIRONMENT).value
    streamed, expected = found["streamed"], found["plain"]
    for kind in ("whole", "cut"):
        assert streamed[kind] == expected[kind]
    assert all(len(cut) < len(whole) for cut, whole in zip(streamed["cut"], streamed["whole"], strict=True))
    assert streamed["rolling"] == pytest.approx(expected["rolling"], abs=1e-3), "hundreds of tokens"
    logs, greedy = zip(*streamed["likelihoods"], strict=True)
    assert list(logs) == pytest.approx([log for log, _ in expected["likelihoods"]], abs=1e-4)
    assert list(greedy) == [each for _, each in expected["likelihoods"]]
