"""A fine-tune that was saved as a part of its base is completed from the base, in weights and config."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

from qwen_pipeline.checkpoint.lazy import CONFIG, SINGLE_SHARD, open_checkpoint
from qwen_pipeline.checkpoint.writer import write_checkpoint
from qwen_pipeline.errors import CheckpointRefused
from qwen_pipeline.qwen.config import diff_configs, with_values
from qwen_pipeline.transforms.fine_tune.adopt import Adopted, adopt
from qwen_pipeline_tests.oracles import language_logits
from qwen_pipeline_tests.tiny import VOCABULARY, load_tiny, tiny_model, tiny_qwen2

TEXT_CLASSES = {
    "qwen3_5": "Qwen3_5ForCausalLM",
    "qwen3_5_moe": "Qwen3_5MoeForCausalLM",
    "qwen4_exp": "Qwen4ExpForCausalLM",
}
"""Classes that load the language model of a composite checkpoint, and save it under another model_type."""
DECODERS = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_asr", "qwen2_5_omni_thinker")
"""Composite models whose decoder can be saved alone, without its head."""


def train(model: nn.Module) -> None:
    """Change every weight, by the same amounts in each call."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=torch.float32) * 0.05)


def adopted_into(base: Path, tuned: Path, out: Path) -> Adopted:
    adopted = adopt(open_checkpoint(base), open_checkpoint(tuned))
    out.mkdir()
    write_checkpoint(adopted.checkpoint, out, task="test")
    return adopted


def logits(root: Path) -> torch.Tensor:
    return language_logits(load_tiny(root, torch.float64))


@pytest.mark.parametrize("family", TEXT_CLASSES)
def test_the_language_model_of_a_composite_model_is_grafted_into_it(family: str, tmp_path: Path) -> None:
    base = tiny_model(family, tmp_path / "base", layout="mtp" if family != "qwen4_exp" else "saved")
    text: Any = getattr(transformers, TEXT_CLASSES[family])
    model = text.from_pretrained(base, dtype=torch.bfloat16)
    train(model)
    model.save_pretrained(tmp_path / "tuned")
    assert json.loads((tmp_path / "tuned" / CONFIG).read_bytes())["model_type"] == f"{family}_text"

    adopted = adopted_into(base, tmp_path / "tuned", tmp_path / "out")
    parent = open_checkpoint(base)
    assert list(adopted.checkpoint) == list(parent)
    assert adopted.carried.keys() == {"vision"} | ({"mtp"} if family != "qwen4_exp" else set())
    for name in parent:
        if "visual" in name or name.startswith("mtp."):
            assert torch.equal(adopted.checkpoint.load(name), parent.load(name))
    assert adopted.checkpoint.config == parent.config
    assert f"saved as {family}_text" in adopted.remarks[0]
    theirs = text.from_pretrained(tmp_path / "tuned", dtype=torch.float64)
    assert torch.equal(logits(tmp_path / "out"), language_logits(theirs))


@pytest.mark.parametrize("family", DECODERS)
def test_a_decoder_without_its_head_is_adopted_where_the_head_is_the_embedding(family: str, tmp_path: Path) -> None:
    base = tiny_model(family, tmp_path / "base", tie=True)
    whole: Any = load_tiny(base, torch.bfloat16)
    decoder = whole.get_decoder()
    train(decoder)
    decoder.save_pretrained(tmp_path / "tuned")
    whole.save_pretrained(tmp_path / "expected")
    assert "visual" not in str(list(load_file(tmp_path / "tuned" / SINGLE_SHARD)))

    adopted = adopted_into(base, tmp_path / "tuned", tmp_path / "out")
    ours, theirs = (load_tiny(tmp_path / name, torch.float64).state_dict() for name in ("out", "expected"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert set(adopted.carried) <= {"vision", "audio"}
    assert adopted.carried
    untied, config = tiny_model(family, tmp_path / "untied"), tmp_path / "tuned" / CONFIG
    config.write_text(json.dumps(json.loads(config.read_bytes()) | {"tie_word_embeddings": False}))
    with pytest.raises(CheckpointRefused, match="no output head"):
        adopt(open_checkpoint(untied), open_checkpoint(tmp_path / "tuned"))


@pytest.mark.parametrize("family", ["qwen2_5_omni", "qwen3_omni_moe"])
def test_a_thinker_is_grafted_into_its_omni_model(family: str, tmp_path: Path) -> None:
    base = tiny_model(family, tmp_path / "base")
    thinker = load_tiny(base, torch.bfloat16)
    train(thinker)
    thinker.save_pretrained(tmp_path / "tuned")
    adopted = adopted_into(base, tmp_path / "tuned", tmp_path / "out")
    assert adopted.carried.keys() == {"talker", "vocoder"}
    assert adopted.checkpoint.config == open_checkpoint(base).config
    assert torch.equal(logits(tmp_path / "out"), logits(tmp_path / "tuned"))


def test_the_language_model_of_qwen2_audio_is_a_qwen2(tmp_path: Path) -> None:
    base = tiny_model("qwen2_audio", tmp_path / "base")
    tuned = tiny_qwen2(tmp_path / "tuned", seed=5)
    adopted = adopted_into(base, tuned, tmp_path / "out")
    assert adopted.carried.keys() == {"audio"}
    assert torch.equal(logits(tmp_path / "out"), logits(tuned))


def test_values_that_the_fine_tune_changed_are_taken_over(tmp_path: Path) -> None:
    base = tiny_model("qwen3_5", tmp_path / "base")
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model.resize_token_embeddings(VOCABULARY + 6, mean_resizing=False)
    model.config.eos_token_id = 1
    model.config.rope_parameters["rope_theta"] = 5e6
    model.save_pretrained(tmp_path / "tuned")
    parent = open_checkpoint(base)
    adopted = adopted_into(base, tmp_path / "tuned", tmp_path / "out")
    changed = diff_configs(parent.config, adopted.checkpoint.config)
    assert changed.pop("dtype", "float32") == "float32"
    assert changed.pop("text_config.dtype", "float32") == "float32"
    assert changed == {
        "text_config.eos_token_id": 1,
        "text_config.vocab_size": VOCABULARY + 6,
        "text_config.rope_parameters.rope_theta": 5e6,
    } | ({"eos_token_id": 1} if "eos_token_id" in parent.config else {})
    assert all(path.rpartition(".")[2] in adopted.remarks[0] for path in ("eos_token_id", "vocab_size"))
    theirs: Any = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "tuned", dtype=torch.float64)
    assert torch.equal(logits(tmp_path / "out"), language_logits(theirs))


@pytest.mark.parametrize(
    ("spelling", "is_same"),
    [
        ({"rope_theta": 1e4, "rope_scaling": {"type": "yarn", "factor": 4.0}}, True),
        ({"rope_theta": 1e4, "rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, True),
        ({"rope_theta": 1e4, "rope_scaling": {"type": "yarn", "factor": 2.0}}, False),
        ({"rope_theta": 1e4}, False),
    ],
)
def test_rotary_settings_are_compared_in_every_spelling(
    spelling: dict[str, Any], is_same: bool, tmp_path: Path
) -> None:
    base, tuned = (open_checkpoint(tiny_model("qwen3_5", tmp_path / str(seed), seed=seed)) for seed in (0, 5))
    text = {name: value for name, value in base.config["text_config"].items() if name != "rope_parameters"}
    old = base.replace(config={**base.config, "text_config": text | spelling})
    settings = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}
    own = tuned.config["text_config"] | {"rope_parameters": settings, "architectures": ["Qwen3_5ForCausalLM"]}
    part = tuned.replace(config=own).without([name for name in tuned if "visual" in name])
    config = adopt(old, part).checkpoint.config["text_config"]
    if is_same:
        assert config == old.config["text_config"]
    else:
        assert (config["rope_parameters"], config.get("rope_scaling"), config.get("rope_theta")) == (
            settings,
            None,
            None,
        )


@pytest.mark.parametrize(
    ("family", "part", "prefix", "section"),
    [
        ("qwen3_vl", "vision", "model.visual.", "vision_config"),
        ("qwen2_5_omni", "vocoder", "token2wav.", "token2wav_config"),
        ("qwen2_5_omni", "talker", "talker.", "talker_config"),
        ("qwen3_5", "mtp", "mtp.", "text_config.mtp_num_hidden_layers"),
    ],
)
def test_a_carried_part_brings_its_section_of_the_config(
    family: str, part: str, prefix: str, section: str, tmp_path: Path
) -> None:
    layout = "mtp" if part == "mtp" else "saved"
    base = open_checkpoint(tiny_model(family, tmp_path / "base", layout=layout))
    base = base.replace(config=with_values(base.config, {section: 1} if part == "mtp" else {}))
    tuned = open_checkpoint(tiny_model(family, tmp_path / "tuned", seed=5))
    stale = tuned.replace(config=with_values(tuned.config, {section: {"hidden_size": 1}}))
    adopted = adopt(base, stale.without([name for name in tuned if name.startswith(prefix)]))
    assert adopted.carried == {part: sum(name.startswith(prefix) for name in base)}
    assert adopted.checkpoint.config == base.config
    assert section in adopted.remarks[0]


def test_a_part_that_is_stored_must_be_complete(tmp_path: Path) -> None:
    base = tiny_model("qwen2_5_vl", tmp_path / "base")
    tuned = open_checkpoint(tiny_model("qwen2_5_vl", tmp_path / "tuned", seed=5))
    lost = next(name for name in tuned if "visual.merger" in name)
    with pytest.raises(CheckpointRefused, match=f"{lost} is missing"):
        adopt(open_checkpoint(base), tuned.without([lost]))


@pytest.mark.parametrize("stored", [True, False])
def test_what_a_fine_tune_stores_decides_about_its_head(stored: bool, tmp_path: Path) -> None:
    """An untied base, and a fine-tune that was saved as a part of it, with its embedding as the head."""
    base = tiny_model("qwen3_5", tmp_path / "base")
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    train(model)
    model.save_pretrained(tmp_path / "tuned")
    config = json.loads((tmp_path / "tuned" / CONFIG).read_bytes()) | {"tie_word_embeddings": True}
    (tmp_path / "tuned" / CONFIG).write_text(json.dumps(config))
    tensors = load_file(tmp_path / "tuned" / SINGLE_SHARD)
    if not stored:
        del tensors["lm_head.weight"]
        save_file(tensors, tmp_path / "tuned" / SINGLE_SHARD)
    adopted = adopted_into(base, tmp_path / "tuned", tmp_path / "out")
    assert ("lm_head.weight" in adopted.checkpoint) == stored
    assert adopted.checkpoint.config["tie_word_embeddings"] is not stored
    theirs: Any = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "tuned", dtype=torch.float64)
    assert torch.equal(logits(tmp_path / "out"), language_logits(theirs))
