"""Weights computed from GPTQ codes equal GPTQModel's, and those of a loop over every code."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from qwen_pipeline.checkpoint.lazy import open_checkpoint
from qwen_pipeline.errors import CheckpointRefused
from qwen_pipeline.transforms.codes.gptq import (
    CheckpointFormat,
    GptqFormat,
    PackedLinear,
    gptq_format,
    pack_rows,
    unpack_rows,
)
from qwen_pipeline_tests import REPOSITORY
from qwen_pipeline_tests.chain import Chain

pytestmark = pytest.mark.lengthy

MODULES = ("model.layers.0.mlp.down_proj", "model.layers.1.self_attn.k_proj")
FORMATS: tuple[CheckpointFormat, ...] = ("gptq", "gptq_v2")


@given(st.data())
@settings(max_examples=60)
def test_unpacking_undoes_packing(data: st.DataObject) -> None:
    bits = data.draw(st.sampled_from([4, 8]))
    words, columns = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 6))
    codes = torch.tensor(
        data.draw(
            st.lists(
                st.lists(st.integers(0, 2**bits - 1), min_size=columns, max_size=columns),
                min_size=words * (32 // bits),
                max_size=words * (32 // bits),
            )
        ),
        dtype=torch.int32,
    )
    packed = pack_rows(codes, bits)
    assert packed.shape == (words, columns)
    assert packed.dtype == torch.int32
    assert torch.equal(unpack_rows(packed, bits), codes)


@given(st.integers(0, 2**31), st.sampled_from([4, 8]), st.sampled_from(FORMATS), st.sampled_from([-1, 16, 32]))
@settings(max_examples=40)
def test_weights_equal_those_of_a_loop_over_every_code(
    seed: int, bits: int, checkpoint_format: CheckpointFormat, group_size: int
) -> None:
    """Random zero points and a shuffled ``g_idx``, as in asymmetric checkpoints with ``desc_act``."""
    generator = torch.Generator().manual_seed(seed)
    inputs, outputs = 64, 32
    form = GptqFormat(bits=bits, group_size=group_size, desc_act=True, sym=False, checkpoint_format=checkpoint_format)
    groups = inputs // form.inputs_per_group(inputs)
    codes = torch.randint(0, 2**bits, (inputs, outputs), generator=generator)
    zeros = torch.randint(0, 2**bits, (groups, outputs), generator=generator)
    scales = (torch.rand(groups, outputs, generator=generator) - 0.5).half()  # signed, as some recipes write them
    g_idx = torch.arange(inputs)[torch.randperm(inputs, generator=generator)] // form.inputs_per_group(inputs)
    stored = (zeros - form.stored_zero_offset) % 2**bits
    packed = PackedLinear(
        format=form,
        qweight=pack_rows(codes, bits),
        qzeros=pack_rows(stored.T.contiguous(), bits).T.contiguous(),
        scales=scales,
        g_idx=g_idx.int(),
    )

    expected = torch.empty(outputs, inputs, dtype=torch.float64)
    for o in range(outputs):
        for i in range(inputs):
            g = int(g_idx[i])
            expected[o, i] = float(scales[g, o]) * (int(codes[i, o]) - int(zeros[g, o]))

    start, stop = sorted(torch.randint(0, outputs + 1, (2,), generator=generator).tolist())
    assert torch.equal(packed.weight_rows(0, outputs).double(), expected)
    assert torch.equal(packed.weight_rows(start, stop).double(), expected[start:stop])


@pytest.mark.slow
def test_weights_equal_those_of_gptqmodel(chain: Chain, tmp_path: Path) -> None:
    script = [chain.engine.python, "-m", "qwen_pipeline_tests.transforms.codes.gptqmodel_weights"]
    arguments = [chain.quantized / "model.safetensors", tmp_path / "weights.safetensors", json.dumps(MODULES), 4, 32]
    subprocess.run([str(part) for part in (*script, *arguments)], cwd=REPOSITORY, check=True, capture_output=True)
    expected = load_file(tmp_path / "weights.safetensors")

    checkpoint = open_checkpoint(chain.quantized)
    form = gptq_format(checkpoint.config)
    for module in MODULES:
        packed = form.load(checkpoint, module)
        assert torch.equal(packed.weight_rows(0, packed.scales.shape[1]), expected[module])


@pytest.mark.parametrize(
    ("quantization", "words"),
    [
        ({}, "quant_method None"),
        ({"quant_method": "awq", "bits": 4}, "quant_method 'awq'"),
        ({"quant_method": "gptq", "bits": 3, "group_size": 64}, "bits 3"),
        ({"quant_method": "gptq", "bits": 4, "group_size": 0}, "group_size 0"),
        ({"quant_method": "gptq", "bits": 4, "group_size": 64, "checkpoint_format": "marlin"}, "'marlin'"),
        ({"quant_method": "gptq", "bits": 4, "group_size": 64, "dynamic": {"-:(": {}}}, r"'-:\(', .*unterminated"),
        ({"quant_method": "gptq", "bits": 4, "group_size": 64, "dynamic": {"a": {"bits": 3}}}, "'a', .*'bits': 3"),
        ({"quant_method": "gptq", "bits": 4, "group_size": 64, "dynamic": ["-:a"]}, "its value is None"),
    ],
)
def test_unsupported_formats_are_refused_by_name(quantization: dict[str, Any], words: str) -> None:
    with pytest.raises(CheckpointRefused, match=words):
        gptq_format({"quantization_config": quantization})
