"""Every tensor of every family in every layout has one parsed name, and its name is one of its spellings."""

from pathlib import Path

import pytest
import torch

from qwen_pipeline.checkpoint.lazy import Checkpoint, open_checkpoint
from qwen_pipeline.errors import CheckpointRefused, InputRefused
from qwen_pipeline.qwen.families import FAMILIES
from qwen_pipeline.qwen.names import ParsedName, decoder_prefix, parse_name, parse_names, spellings
from qwen_pipeline_tests.layouts import Layout, layouts_of
from qwen_pipeline_tests.tiny import LANGUAGE_FAMILIES, load_tiny, tiny_model

ALL: list[tuple[str, Layout]] = [(family, layout) for family in LANGUAGE_FAMILIES for layout in layouts_of(family)]


@pytest.fixture(scope="module")
def roots(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, Layout], Path]:
    root = tmp_path_factory.mktemp("families")
    return {
        (family, layout): tiny_model(family, root / f"{family}-{layout}", layout=layout, dtype=torch.float32)
        for family, layout in ALL
    }


@pytest.mark.parametrize(("family", "layout"), ALL)
def test_every_stored_name_is_parsed_and_is_one_of_its_spellings(
    family: str, layout: Layout, roots: dict[tuple[str, Layout], Path]
) -> None:
    stored = open_checkpoint(roots[family, layout])
    names = parse_names(stored)
    assert len(names) == len(stored)
    for parsed, name in names.items():
        if parsed.part not in ("talker", "vocoder"):
            assert name in spellings(parsed, FAMILIES[family])
    assert {parsed.layer for parsed in names if parsed.part == "decoder"} == {0, 1}
    assert ({parsed.layer for parsed in names if parsed.part == "mtp"} >= {0}) == (layout == "mtp")


@pytest.mark.parametrize(("family", "layout"), ALL)
def test_transformers_reads_the_same_model_from_every_layout(
    family: str, layout: Layout, roots: dict[tuple[str, Layout], Path]
) -> None:
    theirs = load_tiny(roots[family, "saved"]).state_dict()
    model = load_tiny(roots[family, layout]).state_dict()
    assert model.keys() == theirs.keys()
    assert all(torch.equal(model[name], theirs[name]) for name in theirs)


def test_parsed_names() -> None:
    config = {"model_type": "qwen3_next"}
    parsed = parse_name("model.layers.3.mlp.experts.7.gate_proj.weight", config)
    assert parsed == ParsedName(part="decoder", layer=3, module="mlp.experts.7.gate_proj", parameter="weight")
    assert parse_name("mtp.layers.0.mlp.down_proj.weight", config).part == "mtp"
    assert parse_name("model.layers.0.linear_attn.A_log", config).parameter == "A_log"
    assert parse_name("model.layers.0.linear_attn.in_proj_qkvz.qweight", config).parameter == "qweight"
    omni = {"model_type": "qwen3_omni_moe"}
    assert parse_name("thinker.visual.merger.ln_q.weight", omni).module == "visual.merger.ln_q"
    assert parse_name("talker.model.layers.0.mlp.gate.weight", omni).part == "talker"


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("qwen2", "model.layers.0.mlp.experts.0.gate_proj.weight"),
        ("qwen2", "visual.blocks.0.attn.qkv.weight"),
        ("qwen2", "mtp.fc.weight"),
        ("qwen3_moe", "model.layers.0.mlp.shared_expert.up_proj.weight"),
        ("qwen3_next", "model.layers.0.linear_attn.in_proj_z.weight"),
        ("qwen3_5", "model.language_model.layers.0.linear_attn.in_proj_qkvz.weight"),
        ("qwen2_vl", "model.layers.0.mlp.gate_proj.lora_A"),
        ("qwen2", "model.layers.00.mlp.gate_proj.weight"),
        ("qwen2", "model.layers.\u0663.mlp.gate_proj.weight"),
        ("qwen2", f"model.layers.{'9' * 5000}.mlp.gate_proj.weight"),
        ("qwen3_moe", f"model.layers.0.mlp.experts.{'9' * 5000}.gate_proj.weight"),
    ],
)
def test_a_tensor_that_the_family_lacks_is_refused_by_name(family: str, name: str) -> None:
    with pytest.raises(CheckpointRefused, match=name):
        parse_name(name, {"model_type": family})


def test_an_unknown_family_is_refused() -> None:
    with pytest.raises(InputRefused, match="llama"):
        parse_name("model.layers.0.mlp.gate_proj.weight", {"model_type": "llama"})


def test_two_spellings_of_one_tensor_are_refused(roots: dict[tuple[str, Layout], Path]) -> None:
    stored = open_checkpoint(roots["qwen2_vl", "saved"])
    name = "model.layers.0.mlp.gate_proj.weight"
    twice = {**stored.tensors, name.replace("model.", "model.language_model."): stored.tensors[name]}
    with pytest.raises(CheckpointRefused, match="two spellings"):
        parse_names(Checkpoint(config=stored.config, tensors=twice, shards=dict.fromkeys(twice, "model.safetensors")))


def test_decoder_prefixes_are_those_on_disk(roots: dict[tuple[str, Layout], Path]) -> None:
    expected = {
        ("qwen2", "saved"): "model.",
        ("qwen2_vl", "saved"): "model.",
        ("qwen2_vl", "nested"): "model.language_model.",
        ("qwen2_audio", "saved"): "language_model.model.",
        ("qwen3_5", "saved"): "model.language_model.",
        ("qwen3_omni_moe", "saved"): "thinker.model.",
    }
    for key, prefix in expected.items():
        assert decoder_prefix(open_checkpoint(roots[key])) == prefix  # pyright: ignore[reportArgumentType]
