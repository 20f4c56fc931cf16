"""Layer-streamed greedy answers against Transformers' own ``generate``, for every kind of family."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from qwen_pipeline.checkpoint.lazy import Checkpoint, LazyTensor, open_checkpoint
from qwen_pipeline.layerwise.decoding import Decoder
from qwen_pipeline.layerwise.greedy_rules import GreedyRules
from qwen_pipeline.layerwise.model import ComputeContext
from qwen_pipeline.progress import Progress
from qwen_pipeline.qwen.config import GENERATION_CONFIG, stop_tokens
from qwen_pipeline_tests.layerwise.memory import require_a_layer_and_a_half
from qwen_pipeline_tests.rounding import round_to_codes
from qwen_pipeline_tests.tiny import LANGUAGE_FAMILIES, load_tiny, tiny_model, tiny_qwen2

CPU = ComputeContext(device=torch.device("cpu"), dtype=torch.float32)
DRAW = torch.Generator().manual_seed(0)
PROMPTS = [torch.randint(3, 250, (length,), generator=DRAW).tolist() for length in (3, 20, 70)]
LIMIT = 12
KINDS = ("qwen2", "qwen3_moe", "qwen3_next", "qwen3_vl", "qwen2_5_omni", "qwen4_exp")


def plain_answers(root: Path, prompts: Sequence[Sequence[int]] = PROMPTS) -> list[tuple[int, ...]]:
    """Return the answers of Transformers, one prompt after another, with the whole model in memory."""
    model: Any = load_tiny(root)
    answers: list[tuple[int, ...]] = []
    for prompt in prompts:
        tokens = torch.tensor([prompt])
        output = model.generate(
            input_ids=tokens, attention_mask=torch.ones_like(tokens), do_sample=False, max_new_tokens=LIMIT
        )
        answers.append(tuple(output[0, len(prompt) :].tolist()))
    return answers


def streamed_answers(checkpoint: Checkpoint, *, budget: int | None = None, **options: Any) -> list[tuple[int, ...]]:
    decoder = Decoder(checkpoint, CPU, budget=budget)
    return decoder.answers(PROMPTS, stops=stop_tokens(checkpoint), limit=LIMIT, **options)


@pytest.mark.parametrize(
    "family",
    [family if family in KINDS else pytest.param(family, marks=pytest.mark.slow) for family in LANGUAGE_FAMILIES],
)
def test_answers_equal_those_of_transformers(family: str, tmp_path: Path) -> None:
    root = tiny_model(family, tmp_path / "model")
    expected = plain_answers(root)
    checkpoint = open_checkpoint(root)
    assert streamed_answers(checkpoint) == expected
    half_right = [answer[:5] + (7,) * 7 for answer in expected]
    assert streamed_answers(checkpoint, drafts=half_right) == expected


def test_packed_experts_stored_one_by_one_are_decoded(tmp_path: Path) -> None:
    """Transformers cannot load such experts, so it gets the dequantized weights."""
    root = tiny_model("qwen3_moe", tmp_path / "model")
    packed = open_checkpoint(round_to_codes(root, tmp_path / "packed", group_size=32))
    whole = Decoder(packed, CPU)
    model: Any = load_tiny(root)
    layers = [dict(module.named_parameters()) for module in whole.iter_layers()]
    state = model.state_dict()
    for number, layer in enumerate(layers):
        for name, weight in layer.items():
            state[f"model.layers.{number}.{name}"].copy_(weight)
    model.save_pretrained(root)
    assert streamed_answers(packed) == plain_answers(root)


@pytest.fixture(scope="module")
def qwen2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_qwen2(tmp_path_factory.mktemp("qwen2"))


def test_each_of_several_stop_tokens_ends_an_answer(qwen2: Path, tmp_path: Path) -> None:
    free = plain_answers(qwen2)
    stops = [free[0][3], free[1][6]]
    model: Any = load_tiny(qwen2)
    model.generation_config.eos_token_id = stops
    model.save_pretrained(tmp_path)
    answers = streamed_answers(open_checkpoint(tmp_path))
    assert answers == plain_answers(tmp_path)
    assert [answer[-1] for answer in answers[:2]] == stops


RULES: dict[str, dict[str, Any]] = {
    "penalty": {"repetition_penalty": 1.3, "temperature": 0.7, "top_k": 20},
    "ngrams": {"no_repeat_ngram_size": 2, "repetition_penalty": 0.8},
    "banned": {"bad_words_ids": [[5], [7, 9]], "suppress_tokens": list(range(40, 90)), "begin_suppress_tokens": [3]},
    "lengths": {"min_new_tokens": 6, "forced_eos_token_id": 11, "eos_token_id": list(range(3, 200))},
    "minimum": {"min_length": 24, "eos_token_id": list(range(3, 240))},
    "prompt": {"encoder_repetition_penalty": 1.5, "encoder_no_repeat_ngram_size": 1},
    "bias": {"sequence_bias": [[[9], 3.0], [[9, 9], -30.0]], "exponential_decay_length_penalty": [2, 1.5]},
}


@pytest.mark.parametrize("settings", RULES.values(), ids=RULES)
def test_rules_of_the_generation_config_are_those_of_generate(qwen2: Path, settings: dict[str, Any]) -> None:
    file = qwen2 / GENERATION_CONFIG
    plain = file.read_text()
    try:
        file.write_text(json.dumps(json.loads(plain) | settings))
        checkpoint = open_checkpoint(qwen2)
        expected, rules = plain_answers(qwen2), GreedyRules.of(checkpoint)
    finally:
        file.write_text(plain)
    assert rules
    assert rules.unapplied == ()
    assert expected != plain_answers(qwen2)
    streamed = Decoder(checkpoint, CPU).answers(PROMPTS, stops=rules.stops, limit=LIMIT, rules=rules)
    assert streamed == expected
    for drafts in (expected, [(*answer[:4], 7, 7, 7) for answer in expected]):
        again = Decoder(checkpoint, CPU).answers(PROMPTS, stops=rules.stops, limit=LIMIT, rules=rules, drafts=drafts)
        assert again == expected


def test_settings_that_change_nothing_are_no_rules_and_others_are_named(qwen2: Path, tmp_path: Path) -> None:
    file = tmp_path / GENERATION_CONFIG
    file.write_text(json.dumps({"repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "top_p": 0.8, "num_beams": 1}))
    checkpoint = replace(open_checkpoint(qwen2), sidecars={GENERATION_CONFIG: file})
    assert not GreedyRules.of(checkpoint)
    file.write_text(json.dumps({"num_beams": 4, "stop_strings": ["."], "min_new_tokens": 3}))
    assert GreedyRules.of(checkpoint).unapplied == ("num_beams", "stop_strings")
    assert not GreedyRules.of(checkpoint), "without a stop token, no answer is too short"


def test_an_answer_ends_when_the_callback_says_so(qwen2: Path) -> None:
    free = plain_answers(qwen2)
    cut = streamed_answers(open_checkpoint(qwen2), is_complete=lambda tokens: len(tokens) == 2)
    assert cut == [answer[:2] for answer in free]


def test_stop_tokens_come_from_the_generation_config_or_else_the_config(qwen2: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(qwen2)
    assert stop_tokens(checkpoint) == {load_tiny(qwen2).generation_config.eos_token_id}  # pyright: ignore[reportOptionalMemberAccess]
    without_stops = tmp_path / GENERATION_CONFIG
    without_stops.write_text(json.dumps({"do_sample": False}))
    assert stop_tokens(replace(checkpoint, sidecars={GENERATION_CONFIG: without_stops})) == set()
    nested = replace(checkpoint, sidecars={}, config={"text_config": {"eos_token_id": [2, 5]}})
    assert stop_tokens(nested) == {2, 5}


def test_a_correct_draft_takes_one_step_and_a_wrong_one_costs_one(qwen2: Path) -> None:
    checkpoint, steps = open_checkpoint(qwen2), list[Progress]()
    expected = streamed_answers(checkpoint, observe=steps.append)
    assert len(steps) == LIMIT
    steps.clear()
    assert streamed_answers(checkpoint, drafts=expected, observe=steps.append) == expected
    assert len(steps) == 1
    steps.clear()
    unknown = [(10**6,), *expected[1:]]
    assert streamed_answers(checkpoint, drafts=unknown, observe=steps.append) == expected
    assert len(steps) == LIMIT
    late = [(*answer[:-2], expected[0][0] + 1, 3) for answer in expected]
    steps.clear()
    assert streamed_answers(checkpoint, drafts=late, observe=steps.append) == expected
    assert len(steps) == 2


def test_layers_within_the_budget_are_read_once_and_others_once_per_step(qwen2: Path) -> None:
    checkpoint = open_checkpoint(qwen2)
    reads: list[str] = []

    def counted(name: str, tensor: LazyTensor) -> LazyTensor:
        def read(start: int, stop: int) -> torch.Tensor:
            reads.append(name)
            return tensor.read(start, stop)

        return replace(tensor, read=read, stored=None)

    watched = replace(checkpoint, tensors={name: counted(name, tensor) for name, tensor in checkpoint.tensors.items()})
    first, second, head = "model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight", "lm_head.weight"
    layer = sum(checkpoint[name].nbytes for name in Decoder(checkpoint, CPU).parts[0].stored)
    expected = streamed_answers(checkpoint)
    for budget, times in ((None, (1, 1, 1)), (layer, (1, LIMIT, LIMIT)), (0, (LIMIT, LIMIT, LIMIT))):
        reads.clear()
        assert streamed_answers(watched, budget=budget) == expected
        assert tuple(map(reads.count, (first, second, head))) == times


def test_codes_that_fit_stay_as_codes_and_propose_the_answers_of_a_model_that_does_not(
    qwen2: Path, tmp_path: Path
) -> None:
    """Answers stay those of ``generate``; a proposer that is always right saves all but two steps of twelve."""
    checkpoint, expected = open_checkpoint(qwen2), plain_answers(qwen2)
    packed = open_checkpoint(round_to_codes(qwen2, tmp_path / "packed", group_size=32))
    codes, whole = (Decoder(packed, CPU, budget=budget) for budget in (packed.nbytes, None))
    arguments: dict[str, Any] = {"stops": stop_tokens(checkpoint), "limit": LIMIT}
    answers = codes.answers(PROMPTS, **arguments)
    assert answers == whole.answers(PROMPTS, **arguments)
    assert codes.is_compact
    assert codes.answers(PROMPTS, **arguments) == answers  # from memory alone
    assert whole.is_resident
    assert not whole.is_compact

    steps: list[Progress] = []
    drafts = [answer[:3] for answer in answers]
    for proposer, at_most in ((codes, LIMIT), (Decoder(checkpoint, CPU), 3)):
        steps.clear()
        found = streamed_answers(checkpoint, budget=0, proposer=proposer, drafts=drafts, observe=steps.append)
        assert found == expected
        assert len(steps) <= at_most


def test_nan_logits_choose_the_first_token_as_argmax_does(qwen2: Path, tmp_path: Path) -> None:
    model: Any = load_tiny(qwen2)
    model.model.norm.weight.data.fill_(torch.nan)
    model.save_pretrained(tmp_path)
    assert streamed_answers(open_checkpoint(tmp_path)) == [(0,) * LIMIT] * 3 == plain_answers(tmp_path)


@pytest.mark.slow
def test_without_a_budget_memory_is_at_most_a_layer_and_a_half(tmp_path: Path) -> None:
    require_a_layer_and_a_half(tmp_path, "qwen_pipeline_tests.layerwise.peak_of_decoding")
