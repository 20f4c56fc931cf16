"""The family tables cover all Qwen families of the installed Transformers, with their sizes and matrices."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES  # pyright: ignore[reportPrivateImportUsage]

from qwen_pipeline.errors import InputRefused
from qwen_pipeline.qwen.families import FAMILIES, config_paths, number_of_experts, require_family, text_config
from qwen_pipeline.qwen.layers import head_geometry, layer_matrices, number_of_layers, size_fields
from qwen_pipeline_tests.tiny_sizes import LANGUAGE_FAMILIES, tiny_sizes

OTHERS = sorted(name for name in CONFIG_MAPPING_NAMES if "qwen" in name and name not in LANGUAGE_FAMILIES)


def test_the_table_lists_the_families_of_transformers() -> None:
    assert sorted(FAMILIES) == sorted(LANGUAGE_FAMILIES)


@pytest.mark.parametrize("family", LANGUAGE_FAMILIES)
def test_tied_heads_are_those_of_transformers(family: str) -> None:
    from qwen_pipeline_tests.tiny import model_class

    config = AutoConfig.for_model(family)
    language = config.thinker_config if "thinker_config" in config.sub_configs else config
    kind: Any = model_class(language.model_type)
    assert FAMILIES[family].ties == bool(kind._tied_weights_keys)


@pytest.mark.parametrize("family", OTHERS)
def test_parts_of_models_and_other_models_are_refused_by_name(family: str) -> None:
    with pytest.raises(InputRefused, match=family):
        require_family({"model_type": family})


@pytest.mark.parametrize("family", LANGUAGE_FAMILIES)
def test_sizes_are_where_transformers_reads_them(family: str) -> None:
    default = AutoConfig.for_model(family)
    config = type(default)(**tiny_sizes(default, {"moe_intermediate_size": 80, "intermediate_size": 112}))
    theirs, ours = config.get_text_config(), config.to_dict()
    assert text_config(ours)["hidden_size"] == theirs.hidden_size
    assert number_of_layers(ours) == theirs.num_hidden_layers
    assert number_of_experts(ours) == getattr(theirs, "num_experts", 0)
    assert head_geometry(ours)[:2] == (theirs.num_attention_heads, theirs.num_key_value_heads)
    for field in size_fields(ours):
        (path,) = config_paths(ours, field)
        part: object = config
        for name in path.split("."):
            part = getattr(part, name)
        assert part is getattr(theirs, field)
        assert part == {"moe_intermediate_size": 80, "intermediate_size": 112}.get(field, 160)


@pytest.mark.parametrize("family", LANGUAGE_FAMILIES)
def test_the_matrices_of_a_config_match_the_model(family: str) -> None:
    """The model is built on the meta device, from sizes of which no two are equal."""
    from qwen_pipeline_tests.tiny import model_class

    default = AutoConfig.for_model(family)
    odd = {} if family in ("qwen2_vl", "qwen2_5_vl") else {"head_dim": 24}  # those two always divide hidden_size
    odd |= {"intermediate_size": 112, "moe_intermediate_size": 48, "num_experts": 3, "indexer_head_dim": 24}
    config = type(default)(**tiny_sizes(default, odd))
    with torch.device("meta"):
        model = model_class(family)(config)
    layers = next(
        module for name, module in model.named_modules() if (name.endswith("layers") and "language_model" in f"{name}_")
        or name in ("model.layers", "thinker.model.language_model.layers")
    )  # fmt: skip
    for number, layer in enumerate(layers.children()):
        theirs: Counter[str] = Counter()
        for name, parameter in layer.named_parameters():
            theirs.update(_shapes(name, parameter))
        ours: Counter[str] = Counter()
        for matrix in layer_matrices(config.to_dict(), number):
            ours.update(f"{kind} {matrix.out_features} x {matrix.in_features}" for kind in matrix.kinds())
        assert ours == theirs


def _shapes(name: str, parameter: torch.Tensor) -> list[str]:
    """Return the matrices of a parameter; none for norms, biases, convolutions and embeddings."""
    shape = list(parameter.shape)
    if name.endswith("experts.gate_up_proj"):
        owner = name.removesuffix("gate_up_proj")
        parts = [(f"{owner}{e}.{half}_proj", shape[1] // 2) for e in range(shape[0]) for half in ("gate", "up")]
        return [f"{kind} {rows} x {shape[2]}" for kind, rows in parts]
    if name.endswith("experts.down_proj"):
        return [f"{name[:-9]}{e}.down_proj {shape[1]} x {shape[2]}" for e in range(shape[0])]
    is_matrix = len(shape) == 2 and "embedding" not in name
    return [f"{name.removesuffix('.weight')} {shape[0]} x {shape[1]}"] if is_matrix else []


def test_defaults_that_a_config_omits_are_those_of_transformers(tmp_path: Path) -> None:
    for family in ("qwen2", "qwen3", "qwen3_next", "qwen3_5_text", "qwen3_moe"):
        default = AutoConfig.for_model(family)
        shown = {"model_type": family} | {
            name: value
            for name, value in default.to_dict().items()
            if name not in ("head_dim", "layer_types", "mlp_only_layers", "decoder_sparse_step")
        }
        for layer in range(4):
            assert layer_matrices(shown, layer) == layer_matrices(default.to_dict(), layer), family
