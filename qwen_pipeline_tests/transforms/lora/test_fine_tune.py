"""A full fine-tune is used unchanged if it matches the base, and refused otherwise."""

from pathlib import Path

import pytest

from qwen_pipeline.checkpoint.lazy import open_checkpoint
from qwen_pipeline.errors import CheckpointRefused, QuantizedInputRefused
from qwen_pipeline.transforms.lora.fine_tune import require_fine_tune_of
from qwen_pipeline_tests.tiny import VOCABULARY, load_tiny, tiny_model, tiny_qwen2, tiny_qwen3


def test_a_model_of_another_depth_width_or_family_is_refused_by_name(tmp_path: Path) -> None:
    base = open_checkpoint(tiny_qwen2(tmp_path / "base"))
    deeper = open_checkpoint(tiny_qwen2(tmp_path / "deeper", num_hidden_layers=3))
    wider = open_checkpoint(tiny_qwen2(tmp_path / "wider", intermediate_size=128))
    other = open_checkpoint(tiny_qwen3(tmp_path / "other"))
    with pytest.raises(CheckpointRefused, match=r"model\.layers\.2\.\S+ is not in the base"):
        require_fine_tune_of(base, deeper)
    with pytest.raises(CheckpointRefused, match=r"model\.layers\.2\.\S+ is missing"):
        require_fine_tune_of(deeper, base)
    with pytest.raises(CheckpointRefused, match=r"up_proj\.weight is \[128, 64\], but \[96, 64\] in the base"):
        require_fine_tune_of(base, wider)
    with pytest.raises(CheckpointRefused, match="its model_type is qwen3, but the base's is qwen2"):
        require_fine_tune_of(base, other)


def test_a_tied_head_may_be_stored_in_only_one_of_them(tmp_path: Path) -> None:
    base = open_checkpoint(tiny_qwen2(tmp_path / "base", tie=True))
    both = open_checkpoint(tiny_qwen2(tmp_path / "both"))
    stored = both.replace(config={**both.config, "tie_word_embeddings": True})
    assert require_fine_tune_of(base, stored) is stored
    assert require_fine_tune_of(stored, base) is base
    with pytest.raises(CheckpointRefused, match=r"lm_head\.weight"):
        require_fine_tune_of(base, both)


@pytest.mark.parametrize(("family", "tie"), [("qwen2", True), ("qwen3_vl", False), ("qwen2_5_omni_thinker", True)])
def test_a_vocabulary_may_be_resized_if_embedding_head_and_config_agree(tmp_path: Path, family: str, tie: bool) -> None:
    root = tiny_model(family, tmp_path / "base", tie=tie)
    base, vocabulary = open_checkpoint(root), ("embed_tokens.weight", "lm_head.weight")
    model = load_tiny(root)
    for rows in (VOCABULARY + 10, VOCABULARY - 10):
        model.resize_token_embeddings(rows, mean_resizing=False)
        model.save_pretrained(tmp_path / str(rows))
        resized = open_checkpoint(tmp_path / str(rows))
        assert {resized[name].rows for name in resized if name.endswith(vocabulary)} == {rows}
        assert require_fine_tune_of(base, resized) is resized
        with pytest.raises(CheckpointRefused, match=r"embed_tokens\.weight is \[3"):
            require_fine_tune_of(base, resized.replace(config=base.config))


def test_a_quantized_fine_tune_is_refused(tmp_path: Path) -> None:
    base = open_checkpoint(tiny_qwen2(tmp_path))
    quantized = base.replace(config={**base.config, "quantization_config": {"quant_method": "awq", "bits": 4}})
    with pytest.raises(QuantizedInputRefused, match="awq, 4 bit"):
        require_fine_tune_of(base, quantized)
