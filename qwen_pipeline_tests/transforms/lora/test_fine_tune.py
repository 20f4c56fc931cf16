"""The tokenizer of a fine-tune replaces the base's."""

from pathlib import Path

from qwen_pipeline.transforms.lora.fine_tune import merged_sidecars


def test_the_tokenizer_of_a_fine_tune_replaces_all_files_of_the_base_tokenizer() -> None:
    base = _files("base", "tokenizer.json", "vocab.json", "chat_template.jinja", "generation_config.json", "LICENSE")
    assert merged_sidecars(base, {}) == base
    assert merged_sidecars(base, _files("ours", "tokenizer.json", "tokenizer_config.json", "LICENSE")) == {
        **_files("base", "generation_config.json", "LICENSE"),
        **_files("ours", "tokenizer.json", "tokenizer_config.json"),
    }
    template = _files("ours", "chat_template.jinja", "generation_config.json", "NOTICE")
    assert merged_sidecars(base, template) == base | template


def _files(root: str, *names: str) -> dict[str, Path]:
    return {name: Path(root) / name for name in names}
