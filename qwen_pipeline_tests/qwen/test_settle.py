"""Configs that contradict the weights are settled as Transformers loads them, or are refused by name."""

import copy
import itertools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from qwen_pipeline.checkpoint.lazy import CONFIG, SINGLE_SHARD, Checkpoint, open_checkpoint
from qwen_pipeline.errors import CheckpointRefused
from qwen_pipeline.qwen.config import with_values
from qwen_pipeline.qwen.families import (
    ARCHITECTURES,
    FAMILIES,
    TIED,
    Config,
    config_items,
    config_paths,
    declares_tied,
    stored_head,
    tie_paths,
)
from qwen_pipeline.qwen.settle import require_settled, settle, settled_config
from qwen_pipeline_tests.tiny import LANGUAGE_FAMILIES, VOCABULARY, load_tiny, model_class, tiny_model, tiny_qwen2

TIEABLE = [family for family in LANGUAGE_FAMILIES if FAMILIES[family].ties]


def edit_config(root: Path, values: Callable[[Config], Mapping[str, Any]]) -> None:
    config = json.loads((root / CONFIG).read_bytes())
    (root / CONFIG).write_text(json.dumps(with_values(config, values(config))))


def tied_everywhere(root: Path, tied: bool) -> None:
    edit_config(root, lambda config: dict.fromkeys(tie_paths(config), tied))


def write_config(checkpoint: Checkpoint, root: Path) -> None:
    (root / CONFIG).write_text(json.dumps(dict(checkpoint.config)))


def head_of(root: Path) -> tuple[torch.Tensor, bool]:
    """Return the head that Transformers computes with, and whether it is the embedding."""
    model: Any = load_tiny(root)
    head = model.get_output_embeddings().weight
    return head.detach().clone(), head is model.get_input_embeddings().weight


@pytest.mark.parametrize("family", TIEABLE)
def test_the_config_declares_a_tied_head_where_transformers_reads_it(family: str) -> None:
    default = AutoConfig.for_model(family).to_dict()
    sections = dict.fromkeys(path.rpartition(".")[0] for path in (TIED, *tie_paths(default)))
    paths = [f"{section}.{TIED}".lstrip(".") for section in sections]
    for values in itertools.product((None, True, False), repeat=len(paths)):
        config = copy.deepcopy(default)
        for path, value in zip(paths, values, strict=True):
            *outer, _ = path.split(".")
            section = config
            for name in outer:
                section = section[name]
            section.pop(TIED, None)
            section |= {} if value is None else {TIED: value}
        fields = {name: value for name, value in copy.deepcopy(config).items() if name != "model_type"}
        theirs = AutoConfig.for_model(family, **fields)
        theirs = theirs.thinker_config if "thinker_config" in theirs.sub_configs else theirs
        assert declares_tied(config) == bool(theirs.tie_word_embeddings), dict(zip(paths, values, strict=True))


@pytest.mark.parametrize("family", TIEABLE)
def test_a_stored_head_that_is_not_the_embedding_is_the_head(family: str, tmp_path: Path) -> None:
    root = tiny_model(family, tmp_path, dtype=torch.float32)
    tied_everywhere(root, True)
    stored = open_checkpoint(root)
    assert stored_head(stored) is None
    head, is_embedding = head_of(root)
    assert not is_embedding

    settled = settle(stored)
    assert set(config_items(settled.checkpoint.config, TIED).values()) == {False}
    name = stored_head(settled.checkpoint)
    assert name
    assert f"the stored {name} is not" in settled.corrections[0]
    assert torch.equal(settled.checkpoint.load(name), head)
    write_config(settled.checkpoint, root)
    assert torch.equal(head_of(root)[0], head)
    assert not settle(open_checkpoint(root)).remarks


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_stored_head_that_equals_the_embedding_stays_tied(dtype: torch.dtype, tmp_path: Path) -> None:
    root = tiny_qwen2(tmp_path, tie=True)
    tensors = load_file(root / SINGLE_SHARD)
    save_file(
        tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].to(dtype, copy=True)}, root / SINGLE_SHARD
    )
    stored = open_checkpoint(root)
    assert settle(stored).checkpoint is stored
    assert head_of(root)[1]


@pytest.mark.parametrize("family", TIEABLE)
def test_a_missing_head_is_refused_unless_something_says_that_it_is_the_embedding(family: str, tmp_path: Path) -> None:
    root = tiny_model(family, tmp_path, tie=True)
    tied_everywhere(root, False)
    stored = open_checkpoint(root)
    with pytest.raises(AssertionError, match="lm_head"):
        load_tiny(root)
    with pytest.raises(CheckpointRefused, match="no output head") as refusal:
        settle(stored)
    assert TIED in refusal.value.remedy
    settled = settle(stored, tied_base=True)
    assert "the base's is the embedding" in settled.corrections[0]
    write_config(settled.checkpoint, root)
    assert head_of(root)[1]
    for path in config_paths(stored.config, TIED):
        edit_config(root, lambda config, path=path: dict.fromkeys(tie_paths(config), False) | {path: True})
        write_config(settle(open_checkpoint(root)).checkpoint, root)
        assert head_of(root)[1]


def test_a_head_that_no_config_can_tie_must_be_stored(tmp_path: Path) -> None:
    root = tiny_model("qwen2_audio", tmp_path)
    stored = open_checkpoint(root).without(["language_model.lm_head.weight"])
    tied = stored.replace(config=with_values(stored.config, dict.fromkeys(tie_paths(stored.config), True)))
    with pytest.raises(CheckpointRefused, match="no output head") as refusal:
        settle(tied, tied_base=True)
    assert TIED not in refusal.value.remedy


@pytest.mark.parametrize(
    "buffer", ["layers.0.self_attn.rotary_emb.inv_freq", "rotary_emb.inv_freq", "layers.1.mlp._extra_state"]
)
def test_buffers_that_are_no_weights_are_left_behind(buffer: str, tmp_path: Path) -> None:
    root = tiny_qwen2(tmp_path)
    tensors = load_file(root / SINGLE_SHARD)
    before = load_tiny(root).state_dict()
    save_file(tensors | {f"model.{buffer}": torch.ones(8)}, root / SINGLE_SHARD, metadata={"format": "pt"})
    theirs = load_tiny(root)
    assert all(torch.equal(tensor, before[name]) for name, tensor in theirs.state_dict().items())
    for name, frequencies in theirs.named_buffers():
        assert not torch.equal(frequencies, torch.ones(8)), name
    settled = settle(open_checkpoint(root))
    assert settled.left_behind == [f"model.{buffer}"]
    assert settled.remarks == [f"buffers that are no weights, left behind: model.{buffer}"]
    assert set(settled.checkpoint) == set(tensors)
    assert settled.checkpoint.config_bytes


@pytest.mark.parametrize("settings", [{"quant_method": "bitsandbytes", "load_in_4bit": True}, {}])
def test_a_leftover_quantization_of_full_precision_weights_is_removed(
    settings: Mapping[str, Any], tmp_path: Path
) -> None:
    root = tiny_model("qwen2_5_vl", tmp_path)
    before = json.loads((root / CONFIG).read_bytes())
    fields = ("quantization_config", "text_config.quantization_config", "compression_config")
    edit_config(root, lambda _: dict.fromkeys(fields, settings))
    settled = settle(open_checkpoint(root))
    assert settled.checkpoint.config == before
    removed = ", ".join(f"{field} removed" for field in fields)
    assert f"{removed}: the weights are stored in full precision" in settled.corrections[0]


@pytest.mark.parametrize(("layers", "message"), [(3, "layers 2 are missing"), (1, "layers 1 are stored too")])
def test_layers_that_the_config_does_not_count_are_refused(layers: int, message: str, tmp_path: Path) -> None:
    root = tiny_qwen2(tmp_path)
    edit_config(root, lambda _: {"num_hidden_layers": layers, "layer_types": ["full_attention"] * layers})
    with pytest.raises(CheckpointRefused, match=f"num_hidden_layers {layers}, but {message}") as refusal:
        settle(open_checkpoint(root))
    assert "set num_hidden_layers to 2" in refusal.value.remedy


def test_layer_types_of_layers_that_were_cut_are_cut(tmp_path: Path) -> None:
    root = tiny_model("qwen2_5_vl", tmp_path, layer_types=["full_attention"] * 2)
    edit_config(root, lambda _: {"text_config.layer_types": ["full_attention"] * 3})
    with pytest.raises(Exception, match="layer_types"):
        load_tiny(root)
    stored = open_checkpoint(root)
    settled = settle(stored)
    assert settled.checkpoint.config["text_config"]["layer_types"] == ["full_attention"] * 2
    assert "it had 3 entries for 2 layers" in settled.corrections[0]
    assert settled_config(stored.config) == settled.checkpoint.config
    write_config(settled.checkpoint, root)
    load_tiny(root)
    hybrid = tiny_model("qwen3_next", tmp_path / "hybrid")
    edit_config(hybrid, lambda config: {"layer_types": [*config["layer_types"], "full_attention"]})
    with pytest.raises(CheckpointRefused, match="layer_types has 3 entries of several types"):
        settle(open_checkpoint(hybrid))


@pytest.mark.parametrize("family", ["qwen2", "qwen2_vl", "qwen3_omni_moe"])
def test_the_vocabulary_has_the_rows_that_are_stored(family: str, tmp_path: Path) -> None:
    root = tiny_model(family, tmp_path)
    before = json.loads((root / CONFIG).read_bytes())
    edit_config(root, lambda config: dict.fromkeys(config_paths(config, "vocab_size"), VOCABULARY + 8))
    with pytest.raises(Exception, match=r"(?i)mismatch"):
        load_tiny(root)
    assert settle(open_checkpoint(root)).checkpoint.config == before


def test_a_head_with_other_rows_than_the_embedding_is_refused(tmp_path: Path) -> None:
    root = tiny_qwen2(tmp_path)
    tensors = load_file(root / SINGLE_SHARD)
    save_file(tensors | {"lm_head.weight": tensors["lm_head.weight"][:300].clone()}, root / SINGLE_SHARD)
    with pytest.raises(CheckpointRefused, match=r"embed_tokens\.weight has 320, lm_head\.weight has 300"):
        settle(open_checkpoint(root))


def test_architectures_are_classes_of_transformers() -> None:
    assert ARCHITECTURES.keys() == FAMILIES.keys()
    for family, names in ARCHITECTURES.items():
        assert names[0] == model_class(family).__name__ or family in ("qwen2_5_omni", "qwen3_omni_moe")
        assert all(issubclass(getattr(transformers, name), transformers.PreTrainedModel) for name in names)


@pytest.mark.parametrize("declared", [["FSDPQwen2ForCausalLM"], None, []])
def test_a_class_that_no_loader_knows_is_replaced(declared: list[str] | None, tmp_path: Path) -> None:
    root = tiny_qwen2(tmp_path)
    edit_config(root, lambda _: {"architectures": declared})
    settled = settle(open_checkpoint(root))
    assert settled.checkpoint.config["architectures"] == ["Qwen2ForCausalLM"]
    assert (declared or ["none"])[0] in settled.corrections[0]
    edit_config(root, lambda _: {"architectures": ["Qwen2Model"]})
    assert not settle(open_checkpoint(root)).remarks


@pytest.mark.parametrize("family", ["qwen2", "qwen3_5", "qwen2_5_omni_thinker"])
@pytest.mark.parametrize(("stored", "declared"), [(torch.bfloat16, "float32"), (torch.float32, "bfloat16")])
def test_the_dtype_is_that_of_the_stored_weights(
    family: str, stored: torch.dtype, declared: str, tmp_path: Path
) -> None:
    root = tiny_model(family, tmp_path, dtype=stored)
    before = json.loads((root / CONFIG).read_bytes())
    paths = [path for path, value in config_items(before, "dtype").items() if value]
    assert paths
    edit_config(root, lambda _: dict.fromkeys(paths, declared))
    settled = settle(open_checkpoint(root))
    assert settled.checkpoint.config == before
    values = ", ".join(f"{path} {str(stored).removeprefix('torch.')}" for path in paths)
    assert settled.corrections == [f"{values}: the decoder's weights are stored so"]
    write_config(settled.checkpoint, root)
    theirs: Any = model_class(family).from_pretrained(root, dtype="auto")
    assert theirs.dtype == stored


@pytest.mark.parametrize("spelled", ["torch.float32", "float", None])
def test_a_dtype_may_be_spelled_as_torch_does(spelled: str | None, tmp_path: Path) -> None:
    root = tiny_qwen2(tmp_path, dtype=torch.float32)
    edit_config(root, lambda _: {"torch_dtype": spelled})
    assert not settle(open_checkpoint(root)).remarks


def test_a_dtype_that_no_loader_reads_is_kept(tmp_path: Path) -> None:
    root = tiny_model("qwen3_5", tmp_path)
    edit_config(root, lambda _: {"text_config.dtype": "float32"})
    theirs: Any = model_class("qwen3_5").from_pretrained(root, dtype="auto")
    assert {parameter.dtype for parameter in theirs.parameters()} == {torch.bfloat16}
    assert not settle(open_checkpoint(root)).remarks


def test_the_dtype_of_few_weights_is_not_that_of_the_model(tmp_path: Path) -> None:
    root = tiny_qwen2(tmp_path)
    tensors = load_file(root / SINGLE_SHARD)
    wide = {name: t.float() for name, t in tensors.items() if "norm" in name or "embed" in name or "lm_head" in name}
    save_file(tensors | wide, root / SINGLE_SHARD, metadata={"format": "pt"})
    assert not settle(open_checkpoint(root)).remarks


@pytest.mark.parametrize("family", LANGUAGE_FAMILIES)
def test_nothing_is_settled_in_a_model_that_transformers_saved(family: str, tmp_path: Path) -> None:
    for tie in (False, True):
        stored = open_checkpoint(tiny_model(family, tmp_path / str(tie), tie=tie))
        settled = settle(stored)
        assert settled.checkpoint is stored
        assert not settled.remarks
        require_settled(stored)


def test_a_later_stage_refuses_what_merging_and_padding_settle(tmp_path: Path) -> None:
    root = tiny_qwen2(tmp_path)
    edit_config(root, lambda _: {"quantization_config": {"quant_method": "awq"}})
    with pytest.raises(CheckpointRefused, match="quantization_config removed") as refusal:
        require_settled(open_checkpoint(root))
    assert "qwen-pipeline pad" in refusal.value.remedy


def test_a_config_with_absurd_values_costs_nothing(tmp_path: Path) -> None:
    root = tiny_qwen2(tmp_path)
    edit_config(root, lambda _: {"num_hidden_layers": 2**31 - 1})
    with pytest.raises(CheckpointRefused, match="layers 2 are missing"):
        settle(open_checkpoint(root))
    config = json.loads((root / CONFIG).read_bytes())
    assert settled_config(config) == config
