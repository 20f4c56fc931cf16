"""Precisions of modules by patterns, and the modules that engines build as one."""

import re
from pathlib import Path

import pytest

from qwen_pipeline.checkpoint.lazy import open_checkpoint
from qwen_pipeline.errors import InputRefused
from qwen_pipeline.qwen.fused import FUSED_MODULES, built_kind, by_built_module, require_alike
from qwen_pipeline.qwen.layers import layer_matrices
from qwen_pipeline.qwen.linears import decoder_linears
from qwen_pipeline.qwen.precision import KEPT, ModuleRules, Precision, parse_words
from qwen_pipeline_tests.tiny import tiny_model

DEFAULT = Precision(bits=4, group_size=128)


def rules(**words: str) -> ModuleRules:
    return ModuleRules(default=DEFAULT, words=words)


def test_the_first_pattern_that_is_found_counts() -> None:
    found = ModuleRules(default=DEFAULT, words={r"\.1\.mlp": "8", "down_proj": "keep", "mlp": "4g32"})
    assert found.of("model.layers.1.mlp.down_proj") == Precision(bits=8, group_size=128)
    assert found.of("model.layers.0.mlp.down_proj") == KEPT
    assert found.of("model.layers.0.mlp.up_proj") == Precision(bits=4, group_size=32)
    assert found.of("model.layers.0.self_attn.q_proj") == DEFAULT
    assert [str(found.read(word)) for word in ("keep", "8", "4g32")] == ["keep", "8g128", "4g32"]


@pytest.mark.parametrize("word", ["3", "16", "4g", "4g31", "8g256", "fp4", "Keep", "9" * 5000, "4g" + "9" * 5000, ""])
def test_an_unknown_word_is_refused(word: str) -> None:
    with pytest.raises(InputRefused, match=f"precision {word!r}"):
        rules(a=word).require_valid()


@pytest.mark.parametrize("pattern", ["(", "a(?=b)", r"(a)\1"])
def test_a_pattern_that_re2_does_not_have_is_refused(pattern: str) -> None:
    with pytest.raises(InputRefused, match=re.escape(repr(pattern))):
        ModuleRules(default=DEFAULT, words={pattern: "8"}).require_valid()


def test_words_are_parsed_up_to_the_last_equals_sign() -> None:
    assert parse_words(["a=b=8", r"mlp\.down=keep"]) == {"a=b": "8", r"mlp\.down": "keep"}
    for wrong in ("a", "=8"):
        with pytest.raises(InputRefused, match="not of the form"):
            parse_words([wrong])


def test_bytes_of_a_layer() -> None:
    assert Precision(bits=4, group_size=128).nbytes(256, 1024) == 256 * 1024 // 2 + 256 * 8 * 2 + 256 * 8 // 2
    assert Precision(bits=8, group_size=32).nbytes(32, 64) == 32 * 64 + 32 * 2 * 2 + 32 * 2
    assert KEPT.nbytes(32, 64) == 2 * 32 * 64


@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe", "qwen3_5_moe"])
def test_every_fused_module_must_be_alike(family: str, tmp_path: Path) -> None:
    linears = decoder_linears(open_checkpoint(tiny_model(family, tmp_path / "model")))
    require_alike(linears, lambda _: DEFAULT)
    built = {kind: parts for (_, kind), parts in by_built_module(linears).items() if len(parts) > 1}
    assert built
    for kind, parts in built.items():
        odd = parts[-1].module
        with pytest.raises(InputRefused, match=rf"vLLM and SGLang build {re.escape(kind)} as one") as refused:
            require_alike(linears, lambda module, odd=odd: KEPT if module == odd else DEFAULT)
        assert odd in refused.value.what
        assert refused.value.remedy
        (pattern,) = re.findall(r"--module '(.*)=", str(refused.value.remedy))
        named = {linear.kind for linear in linears if re.search(pattern, linear.module)}
        assert named == {linear.kind for linear in linears if built_kind(linear.kind) == kind}, "the remedy's modules"


def test_the_table_of_fused_modules_agrees_with_the_fused_projections_of_layers(tmp_path: Path) -> None:
    """The sharding rules know fused projections too; parts that are never quantized have no entry there."""
    config = open_checkpoint(tiny_model("qwen3_5_moe", tmp_path / "model")).config
    fused = {m.fused for layer in range(2) for m in layer_matrices(config, layer) if m.fused and "*" not in m.kind}
    assert fused <= {module.parts for module in FUSED_MODULES}
