"""Names of copies of a base are recognized by rules; those of other models are not."""

import json
from pathlib import Path

import pytest

from qwen_pipeline.models.base_names import KnownBase, copy_rule

NAME = "Qwen/Qwen2.5-7B-Instruct"

COPIES = {
    "unsloth/Qwen2.5-7B-Instruct": "a mirror by unsloth",
    "unsloth/Qwen2.5-7B-Instruct-bnb-4bit": "a mirror by unsloth and a copy quantized in 4 bits by bitsandbytes",
    "unsloth/qwen2.5-7b-instruct-unsloth-bnb-4bit": "a mirror by unsloth and a copy quantized in 4 bits by Unsloth",
    "Qwen/Qwen2.5-7B-Instruct-GPTQ-Int4": "a copy quantized in 4 bits by GPTQ",
    "Qwen/Qwen2.5-7B-Instruct-AWQ": "a copy quantized in 4 bits by AWQ",
    "Qwen/Qwen2.5-7B-Instruct-FP8": "a copy quantized in FP8",
    "RedHatAI/Qwen2.5-7B-Instruct-FP8-dynamic": "a mirror by RedHatAI and a copy quantized in FP8",
    "mlx-community/Qwen2.5-7B-Instruct-4bit": "a mirror by mlx-community and a copy quantized in 4 bits by MLX",
    "qwen/Qwen2.5-7B-Instruct": "the model of that name",
    "/root/autodl-tmp/Qwen2.5-7B-Instruct": "a local copy with the base's name",
    "./models/Qwen2.5-7B-Instruct/": "a local copy with the base's name",
    "/data/hub/models--Qwen--Qwen2.5-7B-Instruct/snapshots/a09a354": "a copy in a hub's cache",
    "/data/hub/models--unsloth--Qwen2.5-7B-Instruct-bnb-4bit/snapshots/a0": "a copy in a hub's cache and a mirror by"
    " unsloth and a copy quantized in 4 bits by bitsandbytes",
}
OTHERS = (
    None,
    "Qwen/Qwen2.5-7B",
    "unsloth/Qwen2.5-7B-bnb-4bit",
    "Qwen/Qwen2.5-72B-Instruct",
    "someone/Qwen2.5-7B-Instruct",
    "someone/Qwen2.5-7B-Instruct-GPTQ-Int4",
    "/root/base",
    "/data/hub/models--someone--Qwen2.5-7B-Instruct/snapshots/a09a354",
    "Qwen2.5-7B-Instruct-abliterated",
)


@pytest.mark.parametrize("declared", COPIES)
def test_a_copy_is_the_base_and_the_rule_is_named(tmp_path: Path, declared: str) -> None:
    assert copy_rule(declared, KnownBase(root=tmp_path, names=[NAME])) == f"{declared} is {COPIES[declared]}"


@pytest.mark.parametrize("declared", OTHERS)
def test_another_model_is_not_the_base(tmp_path: Path, declared: str | None) -> None:
    assert copy_rule(declared, KnownBase(root=tmp_path, names=[NAME])) is None


def test_without_names_the_folder_is_compared(tmp_path: Path) -> None:
    base = KnownBase(root=tmp_path / "Qwen2.5-7B-Instruct")
    assert copy_rule("unsloth/Qwen2.5-7B-Instruct-bnb-4bit", base)
    assert copy_rule("Qwen/Qwen2.5-7B-Instruct", base)
    assert copy_rule("someone/Qwen2.5-7B-Instruct", base) is None


def test_a_folder_given_as_a_name_is_compared_by_its_own(tmp_path: Path) -> None:
    base = KnownBase(root=tmp_path, names=["/models/Qwen2.5-7B-Instruct"])
    assert copy_rule("Qwen/Qwen2.5-7B-Instruct", base)
    assert copy_rule("/other/Qwen2.5-7B-Instruct", base)
    assert copy_rule("/models/Qwen2.5-7B", base) is None


def test_patterns_of_users_extend_the_rules(tmp_path: Path) -> None:
    base = KnownBase(root=tmp_path, names=[NAME, "acme/Qwen2.5-7B-Instruct-nf4-*"])
    rule = copy_rule("acme/Qwen2.5-7B-Instruct-nf4-v2", base)
    assert rule == "acme/Qwen2.5-7B-Instruct-nf4-v2 matches acme/Qwen2.5-7B-Instruct-nf4-* in base_names"
    assert copy_rule("acme/Qwen2.5-72B-Instruct-nf4-v2", base) is None


def test_a_local_copy_must_have_the_sizes_of_the_base(tmp_path: Path) -> None:
    copy, root = tmp_path / "Qwen2.5-7B-Instruct", tmp_path / "base"
    for folder, width in ((copy, 3584), (root, 3584)):
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps({"model_type": "qwen2", "hidden_size": width}))
    base = KnownBase(root=root, names=[NAME])
    assert copy_rule(str(copy), base)
    (copy / "config.json").write_text(json.dumps({"model_type": "qwen2", "hidden_size": 8192}))
    assert copy_rule(str(copy), base) is None
    (copy / "config.json").write_text("{")
    assert copy_rule(str(copy), base) is None
