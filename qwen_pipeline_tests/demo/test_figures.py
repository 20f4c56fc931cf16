"""The streamed evaluation of the demo's model, against plain Transformers with whole models in memory."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from qwen_pipeline.checkpoint.lazy import CONFIG, SINGLE_SHARD, open_checkpoint
from qwen_pipeline.demo.base import GROUP_SIZE, TENSOR_PARALLEL, build_base
from qwen_pipeline.demo.texts import write_texts
from qwen_pipeline.evaluation.logits.streamed import evaluate
from qwen_pipeline.layerwise.model import ComputeContext
from qwen_pipeline.qwen.padding_spec import PaddingSpec
from qwen_pipeline.stages.pad import pad
from qwen_pipeline.text.bounded_tokenizer import BoundedTokenizer
from qwen_pipeline.text.windows import token_windows
from qwen_pipeline.transforms.codes.gptq import gptq_format
from qwen_pipeline_tests.in_transformers import in_transformers
from qwen_pipeline_tests.rounding import round_to_codes

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def test_perplexity_and_kl_are_those_of_plain_transformers(tmp_path: Path) -> None:
    """Evaluate the demo's base, padded for its ranks and rounded to codes without calibration.

    Transformers computes with the dequantized weights. Its own kernel for codes rounds each of them to float16, which
    alone makes 2e-4 of the divergence.
    """
    base = build_base(tmp_path / "base").path
    padded = pad(
        source=base,
        destination=tmp_path / "padded",
        spec=PaddingSpec(group_size=GROUP_SIZE, tensor_parallel=TENSOR_PARALLEL),
    ).path
    quantized = round_to_codes(padded, tmp_path / "quantized", group_size=GROUP_SIZE)
    text = write_texts(tmp_path).held_out
    windows = token_windows(text, BoundedTokenizer(base), windows=2, seq_len=256)
    models = str(base), str(dequantized(padded, quantized, tmp_path / "dequantized"))
    plain = in_transformers("qwen_pipeline_tests.demo.figures_in_transformers", json.dumps(windows), *models)

    found = evaluate(
        {"base": open_checkpoint(base), "quantized": open_checkpoint(quantized)},
        list(map(torch.tensor, windows)),
        reference="base",
        compared=["quantized"],
        context=ComputeContext(device=torch.device("cpu"), dtype=torch.float32),
    )
    assert [figures.perplexity for figures in found.values()] == pytest.approx(plain["perplexity"], rel=1e-4)
    divergence = found["quantized"].divergence
    assert divergence
    assert divergence.mean == pytest.approx(plain["kl"], rel=1e-4)
    assert divergence.mean > 0.01


def dequantized(padded: Path, quantized: Path, out: Path) -> Path:
    """Write the padded model with the dequantized weights, in float32."""
    codes, model = open_checkpoint(quantized), open_checkpoint(padded)
    form = gptq_format(codes.config)
    tensors = {name: model.load(name).float() for name in model}
    for name in (name.removesuffix(".qweight") for name in codes if name.endswith(".qweight")):
        weight = tensors[f"{name}.weight"]
        tensors[f"{name}.weight"] = form.load(codes, name).weight_rows(0, len(weight)).contiguous()
    out.mkdir()
    save_file(tensors, out / SINGLE_SHARD, {"format": "pt"})
    (out / CONFIG).write_bytes((padded / CONFIG).read_bytes())
    return out
