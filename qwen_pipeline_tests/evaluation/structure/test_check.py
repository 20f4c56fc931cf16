"""Each wrong byte is found at its place, and no other tensor is reported."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qwen_pipeline.checkpoint.lazy import open_checkpoint
from qwen_pipeline.errors import CheckpointRefused
from qwen_pipeline.evaluation.structure.check import Structure, check_structure
from qwen_pipeline.qwen.linears import decoder_linears
from qwen_pipeline.transforms.codes.gptq import gptq_format, pack_rows, unpack_rows
from qwen_pipeline_tests.chain import Chain

Tensors = dict[str, torch.Tensor]
Config = dict[str, Any]
Mutate = Callable[[Tensors, Config], None]
UP, DOWN = "model.layers.0.mlp.up_proj", "model.layers.1.mlp.down_proj"


def check(chain: Chain, candidate: Path) -> Structure:
    return check_structure(open_checkpoint(chain.padded), open_checkpoint(candidate))


def test_a_real_quantized_checkpoint_has_no_problem(chain: Chain) -> None:
    found = check(chain, chain.quantized)
    assert found.problems == []
    assert found.padding.audible == []
    assert found.padding.channels == 2 * 32


def test_errors_are_frobenius_norms(chain: Chain) -> None:
    source, candidate = load_file(chain.padded / "model.safetensors"), open_checkpoint(chain.quantized)
    errors = check(chain, chain.quantized).errors
    assert [error.module for error in errors] == [at.module for at in decoder_linears(open_checkpoint(chain.padded))]
    for error in errors:
        w = source[f"{error.module}.weight"].double()
        packed = gptq_format(candidate.config).load(candidate, error.module)
        wq = packed.weight_rows(0, len(w)).double()
        assert error.relative == pytest.approx(((w - wq).norm() / w.norm()).item(), rel=1e-6)
        assert 0.02 < error.relative < 0.2


def drop(tensors: Tensors, _: Config) -> None:
    del tensors[f"{UP}.scales"]


def rename(tensors: Tensors, _: Config) -> None:
    tensors["model.layers.0.mlp.gate.qzeros"] = tensors.pop(f"{UP}.qzeros")


def retype(tensors: Tensors, _: Config) -> None:
    tensors[f"{UP}.scales"] = tensors[f"{UP}.scales"].float()


def drop_a_group(tensors: Tensors, _: Config) -> None:
    tensors[f"{DOWN}.scales"] = tensors[f"{DOWN}.scales"][:-1].clone()


def nan(tensors: Tensors, _: Config) -> None:
    tensors[f"{UP}.scales"][1, 4] = float("nan")


def zero(tensors: Tensors, _: Config) -> None:
    tensors[f"{UP}.scales"][1, 4] = 0


def swap_groups(tensors: Tensors, _: Config) -> None:
    tensors[f"{DOWN}.g_idx"] = tensors[f"{DOWN}.g_idx"].flip(0).contiguous()


def flip_a_norm(tensors: Tensors, _: Config) -> None:
    flip_bit(tensors["model.norm.weight"], 5)


def flip_a_bias(tensors: Tensors, _: Config) -> None:
    flip_bit(tensors["model.layers.1.self_attn.k_proj.bias"], 0)


def mix_up_layers(tensors: Tensors, _: Config) -> None:
    other = UP.replace("layers.0", "layers.1")
    for part in ("qweight", "scales"):
        tensors[f"{UP}.{part}"] = tensors[f"{other}.{part}"].clone()


def wrong_width(_: Tensors, config: Config) -> None:
    config["intermediate_size"] = 96


def forgotten_field(_: Tensors, config: Config) -> None:
    del config["rope_parameters"]


def not_quantized(tensors: Tensors, _: Config) -> None:
    for part in ("qweight", "qzeros", "scales", "g_idx"):
        del tensors[f"{UP}.{part}"]
    tensors[f"{UP}.weight"] = torch.zeros(128, 64, dtype=torch.bfloat16)


def exclude(_: Tensors, config: Config) -> None:
    config["quantization_config"]["dynamic"] = {"-:.*layers.0.mlp.up_proj": {}, "+:.*": {"bits": 4}}


@pytest.mark.parametrize(
    ("mutate", "problems"),
    [
        (drop, [f"{UP}.scales is missing."]),
        (rename, [f"{UP}.qzeros is missing.", "model.layers.0.mlp.gate.qzeros is unexpected."]),
        (retype, [f"{UP}.scales is F32 [2, 128], expected F16 [2, 128]."]),
        (drop_a_group, [f"{DOWN}.scales is F16 [3, 64], expected F16 [4, 64]."]),
        (nan, [f"{UP}.scales has 1 values that are not finite."]),
        (zero, [f"{UP}.scales has 1 values that are zero."]),
        (swap_groups, [f"{DOWN}.g_idx is not in order, although desc_act is false."]),
        (flip_a_norm, ["model.norm.weight differs from its value before quantization."]),
        (flip_a_bias, ["model.layers.1.self_attn.k_proj.bias differs from its value before quantization."]),
        (mix_up_layers, [f"{UP} decodes to another weight: the relative error is 143%."]),
        (exclude, [f"quantization_config.dynamic excludes {UP} by '-:.*layers.0.mlp.up_proj', but it has codes."]),
        (wrong_width, ["config.json has intermediate_size 96, expected 128."]),
        (
            not_quantized,
            [
                *(f"{UP}.{part} is missing." for part in ("qweight", "qzeros", "scales", "g_idx")),
                f"{UP}.weight is unexpected.",
            ],
        ),
    ],
)
def test_each_mutation_is_named(chain: Chain, tmp_path: Path, mutate: Mutate, problems: list[str]) -> None:
    found = check(chain, mutated(chain.quantized, tmp_path / "mutated", mutate))
    assert found.problems == problems
    assert found.padding.audible == []


def test_a_missing_field_is_named(chain: Chain, tmp_path: Path) -> None:
    found = check(chain, mutated(chain.quantized, tmp_path / "mutated", forgotten_field))
    assert [problem.partition(",")[0] for problem in found.problems] == ["config.json has no rope_parameters"]


def test_another_chat_template_or_generation_config_is_named(chain: Chain, tmp_path: Path) -> None:
    copy = mutated(chain.quantized, tmp_path / "mutated", lambda _tensors, _config: None)
    (copy / "chat_template.jinja").write_text("{{ messages }}")
    tokenizer = copy / "tokenizer.json"
    tokenizer.write_text(json.dumps(json.loads(tokenizer.read_text()), indent=7))
    (copy / "generation_config.json").write_text('{"temperature": 9.5}')
    (copy / "added_tokens.json").write_text("{}")
    assert check(chain, copy).problems == [
        "added_tokens.json is unexpected.",
        "chat_template.jinja differs from the fine-tune's.",
        "generation_config.json differs from the fine-tune's.",
    ]


def test_a_wrong_group_size_disagrees_with_every_layer(chain: Chain, tmp_path: Path) -> None:
    def regroup(_: Tensors, config: Config) -> None:
        config["quantization_config"]["group_size"] = 64

    found = check(chain, mutated(chain.quantized, tmp_path / "mutated", regroup))
    assert f"{UP}.scales is F16 [2, 128], expected F16 [1, 128]." in found.problems
    assert len(found.problems) == 2 * 14  # scales and zero points of each layer
    assert found.errors == []


def test_another_method_is_one_problem(chain: Chain, tmp_path: Path) -> None:
    def rename_method(_: Tensors, config: Config) -> None:
        config["quantization_config"]["quant_method"] = "awq"

    found = check(chain, mutated(chain.quantized, tmp_path / "mutated", rename_method))
    assert found.problems == ["config.json has quant_method 'awq', expected 'gptq'."]


@pytest.mark.parametrize(
    ("module", "channel"), [(UP, 1), (UP.replace("up", "gate"), 63), (UP.replace("up", "down"), 3)]
)
def test_a_padded_channel_that_is_not_zero_is_reported(chain: Chain, tmp_path: Path, module: str, channel: int) -> None:
    def make_audible(tensors: Tensors, _: Config) -> None:
        name = f"{module}.qweight"
        codes = unpack_rows(tensors[name], 4)
        if module.endswith("down_proj"):
            codes[channel, 7] += 1
        else:
            codes[7, channel] += 1
        tensors[name] = pack_rows(codes, 4)

    found = check(chain, mutated(chain.quantized, tmp_path / "mutated", make_audible))
    assert found.problems == []
    assert found.padding.audible == [f"{module}: 1 of 32 padded channels are not zero, the first is {channel}."]


def test_a_truncated_shard_is_refused_by_name(chain: Chain, tmp_path: Path) -> None:
    cut = Path(shutil.copytree(chain.quantized, tmp_path / "cut"))
    shard = cut / "model.safetensors"
    shard.write_bytes(shard.read_bytes()[:-5])
    with pytest.raises(CheckpointRefused, match=r"cut/model.safetensors .* the file has"):
        check(chain, cut)


def mutated(root: Path, out: Path, mutate: Mutate) -> Path:
    """Return a copy of a checkpoint, without its manifest, that ``mutate`` changed."""
    shutil.copytree(root, out, ignore=shutil.ignore_patterns("manifest.json"))
    tensors, config = load_file(out / "model.safetensors"), json.loads((out / "config.json").read_text())
    mutate(tensors, config)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    (out / "config.json").write_text(json.dumps(config))
    return out


def flip_bit(tensor: torch.Tensor, index: int) -> None:
    """Flip the lowest bit of one 16-bit element in place."""
    tensor.view(torch.int16)[index] ^= 1
