"""The table of projected sizes in docs/performance.md, against the formula and the models of Transformers."""

from typing import Any

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from benchmarks.projection import MODELS, table
from qwen_pipeline_tests import REPOSITORY


def test_the_projected_table_in_the_docs_follows_from_the_formula() -> None:
    page = REPOSITORY / "docs" / "performance.md"
    assert page.read_text().endswith(table() + "\n")


def test_sizes_are_those_of_the_models_that_transformers_builds() -> None:
    """Compare on the meta device; all layers have the same size, so models of one and two layers determine it."""
    common: dict[str, Any] = {"tie_word_embeddings": False, "num_attention_heads": 64}
    dense: dict[str, Any] = {
        "hidden_size": 8192,
        "intermediate_size": 29568,
        "num_key_value_heads": 8,
        "vocab_size": 152064,
    }
    sparse: dict[str, Any] = {"hidden_size": 4096, "num_key_value_heads": 4, "head_dim": 128, "vocab_size": 151936}
    experts: dict[str, Any] = {"num_experts": 128, "moe_intermediate_size": 1536}

    def nbytes(layers: int) -> tuple[int, int]:
        with torch.device("meta"):
            models = (
                Qwen2ForCausalLM(Qwen2Config(**common, **dense, num_hidden_layers=layers)),
                Qwen3MoeForCausalLM(Qwen3MoeConfig(**common, **sparse, **experts, num_hidden_layers=layers)),
            )
        first, second = (2 * sum(weight.numel() for weight in model.parameters()) for model in models)
        return first, second

    one, two = nbytes(1), nbytes(2)
    expected = [small + (layers - 1) * (large - small) for small, large, layers in zip(one, two, (80, 94), strict=True)]
    assert [model.nbytes for model in MODELS] == expected
