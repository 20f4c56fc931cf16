"""The export stage, against the package compressed-tensors where it is installed, and vLLM."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from qwen_pipeline.checkpoint.lazy import Checkpoint, open_checkpoint
from qwen_pipeline.checkpoint.store.verify import require_intact
from qwen_pipeline.evaluation.samples import MAX_NEW_TOKENS
from qwen_pipeline.reports import load_reports
from qwen_pipeline.stages.export import check_weights, export
from qwen_pipeline.transforms.codes.gptq import gptq_format
from qwen_pipeline.transforms.codes.to_compressed_tensors import as_compressed
from qwen_pipeline_tests.chain import Chain
from qwen_pipeline_tests.evaluation.serving.vllm import assert_served_where_there_is_a_kernel, served_by_vllm
from qwen_pipeline_tests.rounding import round_to_codes
from qwen_pipeline_tests.tiny import VOCABULARY, tiny_qwen2


@pytest.fixture
def asymmetric(chain: Chain, tmp_path: Path) -> Path:
    """Return a copy of the chain's codes with random zero points and permuted groups."""
    root = Path(shutil.copytree(chain.quantized, tmp_path / "asymmetric"))
    (root / "manifest.json").unlink()
    tensors = load_file(root / "model.safetensors")
    generator = torch.Generator().manual_seed(1)
    for name, tensor in tensors.items():
        if name.endswith(".qzeros"):
            tensor.random_(-(2**31), 2**31 - 1, generator=generator)
        if name.endswith(".g_idx"):
            tensor.copy_(tensor[torch.randperm(len(tensor), generator=generator)])
    save_file(tensors, root / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((root / "config.json").read_bytes())
    config["quantization_config"] |= {"sym": False, "desc_act": True}
    (root / "config.json").write_text(json.dumps(config))
    return root


def test_a_quantized_checkpoint_is_exported_whole(chain: Chain, tmp_path: Path) -> None:
    artifact = export(source=chain.quantized, destination=tmp_path / "out")
    require_intact(artifact.path)
    assert [(report.name, report.passed) for report in load_reports(artifact.manifest.result)] == [
        ("same_weights", True)
    ]
    before, after = open_checkpoint(chain.quantized), open_checkpoint(artifact.path)
    kept = [name for name in before if not name.endswith((".qweight", ".qzeros", ".scales", ".g_idx"))]
    assert all(torch.equal(before.load(name), after.load(name)) for name in kept)
    settings = after.config["quantization_config"]
    assert settings["ignore"] == ["lm_head"]
    assert not any(name.endswith(("qweight", "g_idx", "zero_point")) for name in after)


def test_asymmetric_codes_out_of_order_are_exported(asymmetric: Path, tmp_path: Path) -> None:
    artifact = export(source=asymmetric, destination=tmp_path / "out")
    assert load_reports(artifact.manifest.result)[0].passed
    assert any(name.endswith("weight_zero_point") for name in open_checkpoint(artifact.path))


def test_a_single_different_code_fails_the_check(chain: Chain) -> None:
    quantized = open_checkpoint(chain.quantized)
    exported = as_compressed(quantized)
    name = "model.layers.1.mlp.up_proj.weight_packed"
    words = exported.load(name).clone()
    words[3, 1] ^= 1
    changed = replace(exported.tensors[name], read=lambda start, stop: words[start:stop], stored=None)
    report = check_weights(quantized, exported.replace(tensors={name: changed}))
    assert not report.passed
    assert "model.layers.1.mlp.up_proj" in report.detail


@pytest.mark.parametrize("kind", ["symmetric", "asymmetric"])
def test_the_package_decompresses_the_same_weights(chain: Chain, asymmetric: Path, kind: str) -> None:
    quantized = open_checkpoint(chain.quantized if kind == "symmetric" else asymmetric)
    form = gptq_format(quantized.config)
    for module, weight_OI in weights_by_compressed_tensors(quantized, as_compressed(quantized)):
        assert torch.equal(weight_OI, form.load(quantized, module).weight_rows(0, len(weight_OI)))


def weights_by_compressed_tensors(quantized: Checkpoint, exported: Checkpoint) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the name of each module and the weight that the package decompresses from its exported codes."""
    pytest.importorskip("compressed_tensors")
    packing: Any = import_module("compressed_tensors.compressors.pack_quantized.helpers")
    form = gptq_format(quantized.config)
    for name in (name for name in exported if name.endswith(".weight_packed")):
        module = name.removesuffix(".weight_packed")
        shape = torch.Size(exported.load(f"{module}.weight_shape").tolist())
        codes_OI = packing.unpack_from_int32(exported.load(name), form.bits, shape).float()
        scales_OG = exported.load(f"{module}.weight_scale").float()
        zeros_OG = torch.zeros_like(scales_OG)
        if not form.sym:
            packed = exported.load(f"{module}.weight_zero_point")
            zeros_OG = packing.unpack_from_int32(packed, form.bits, scales_OG.shape, packed_dim=0).float()
        groups = quantized.load(f"{module}.g_idx").long()
        yield module, (codes_OI - zeros_OG[:, groups]) * scales_OG[:, groups]


@torch.inference_mode()
def test_transformers_computes_the_same_logits(chain: Chain, tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    root = export(source=chain.quantized, destination=tmp_path / "out").path
    loaded: Any = AutoModelForCausalLM.from_pretrained(root, dtype=torch.float32, output_loading_info=True)
    model, info = loaded
    assert not any(info.values()), info
    oracle: Any = AutoModelForCausalLM.from_pretrained(chain.padded, dtype=torch.float32)
    tokens = torch.randint(0, VOCABULARY, (2, 24), generator=torch.Generator().manual_seed(7))
    full = oracle(tokens).logits
    quantized = open_checkpoint(chain.quantized)
    form = gptq_format(quantized.config)
    for name in (name for name in quantized if name.endswith(".qweight")):
        weight = oracle.get_parameter(f"{name.removesuffix('.qweight')}.weight")
        weight.copy_(form.load(quantized, name.removesuffix(".qweight")).weight_rows(0, len(weight)))
    expected, found = oracle(tokens).logits, model(tokens).logits
    assert (found - expected).abs().max() < 1e-5 < (full - expected).abs().max() / 100


@pytest.mark.serve
@pytest.mark.timeout(1800)
def test_vllm_serves_it_or_names_the_kernel_that_it_lacks(tmp_path: Path) -> None:
    """Serve with vLLM for CPUs, whose kernel for codes needs AVX-512 and whose attention needs heads of 32."""
    model = tiny_qwen2(tmp_path / "model", hidden_size=128, intermediate_size=256)
    codes = round_to_codes(model, tmp_path / "codes", group_size=32)
    root = export(source=codes, destination=tmp_path / "out").path
    prompts = [[5, 6, 7], [40, 41, 42, 43] * 8]
    reference: Any = AutoModelForCausalLM.from_pretrained(root, dtype=torch.float32)
    expected = [
        reference.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=MAX_NEW_TOKENS)[0, len(prompt) :]
        for prompt in prompts
    ]
    served = served_by_vllm(root, "quantized", prompts, [tokens.tolist() for tokens in expected], logs=tmp_path)
    assert all(each.ready for each in served), served
    assert_served_where_there_is_a_kernel(served)
