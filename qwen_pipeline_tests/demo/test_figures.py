"""What the streamed evaluation says of the demo's model, against plain Transformers with whole models in memory."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from qwen_pipeline.checkpoint.lazy import CONFIG, SINGLE_SHARD, open_checkpoint
from qwen_pipeline.checkpoint.store.destinations import Directory
from qwen_pipeline.demo.base import GROUP_SIZE, TENSOR_PARALLEL, build_base
from qwen_pipeline.demo.texts import write_texts
from qwen_pipeline.evaluation.logits.streamed import evaluate
from qwen_pipeline.layerwise.model import ComputeContext
from qwen_pipeline.qwen.padding_spec import PaddingSpec
from qwen_pipeline.stages.pad import pad
from qwen_pipeline.text.records import load_tokenizer
from qwen_pipeline.text.windows import token_windows
from qwen_pipeline.transforms.codes.gptq import gptq_format
from qwen_pipeline_tests.in_transformers import in_transformers
from qwen_pipeline_tests.rounding import round_to_codes

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

FIGURES = """
import json, sys, torch
from torch.nn.functional import cross_entropy, kl_div
from transformers import AutoModelForCausalLM
windows, logits = torch.tensor(json.loads(sys.argv[1])), []
for root in sys.argv[2:]:
    model = AutoModelForCausalLM.from_pretrained(root, dtype=torch.float32)
    with torch.no_grad():
        logits.append(model(input_ids=windows).logits[:, :-1].flatten(0, 1).double())
p, q = (rows.log_softmax(-1) for rows in logits)
print(json.dumps({
    "perplexity": [cross_entropy(rows, windows[:, 1:].flatten()).exp().item() for rows in logits],
    "kl": kl_div(q, p, log_target=True, reduction="none").sum(-1).mean().item(),
}))
"""


def test_perplexity_and_kl_are_those_of_plain_transformers(tmp_path: Path) -> None:
    """The demo's base, padded for its ranks and rounded to codes, which need not be good ones here.

    Transformers computes with the weights that the codes stand for. Its own kernel for codes rounds each of them to
    float16 on the way, which alone makes 2e-4 of the divergence.
    """
    base = build_base(tmp_path / "base").path
    padded = pad(
        source=base,
        destination=Directory(tmp_path / "padded"),
        spec=PaddingSpec(group_size=GROUP_SIZE, tensor_parallel=TENSOR_PARALLEL),
    ).path
    quantized = round_to_codes(padded, tmp_path / "quantized", group_size=GROUP_SIZE)
    text = write_texts(tmp_path).held_out
    windows = token_windows(text, load_tokenizer(base), windows=2, seq_len=256)
    meant = dequantized(padded, quantized, tmp_path / "meant")
    plain = in_transformers(FIGURES, json.dumps(windows), str(base), str(meant))

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
    """Write the padded model with the weights that the codes stand for, in float32."""
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
