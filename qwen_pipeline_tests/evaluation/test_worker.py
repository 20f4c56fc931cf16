"""The worker's figures of checkpoints, including those that do not load completely."""

import json
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from qwen_pipeline.errors import EnvironmentFault
from qwen_pipeline.evaluation.figures import ModelFigures
from qwen_pipeline.evaluation.measured import Measured
from qwen_pipeline.evaluation.measurement import MEASURE, MEASURING_ENVIRONMENT, Measurement
from qwen_pipeline.transforms.codes.gptq import gptq_format
from qwen_pipeline.workers.parent import run_worker
from qwen_pipeline_tests.chain import Chain
from qwen_pipeline_tests.tiny import VOCABULARY, tiny_qwen2
from qwen_pipeline_tests.whole import NotLoaded, load_model

PROMPT = [5, 6, 315]


def windows(count: int = 3, length: int = 20) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, PROMPT[-1], (length,), generator=generator) for _ in range(count)]


def test_a_model_with_missing_weights_is_not_loaded(tmp_path: Path) -> None:
    root = tiny_qwen2(tmp_path / "model")
    file = root / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.0.extra.weight"] = tensors.pop("model.layers.1.mlp.up_proj.weight")
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(NotLoaded) as fault:
        load_model(str(root))
    assert "missing_keys: model.layers.1.mlp.up_proj.weight" in str(fault.value)
    assert "unexpected_keys: model.layers.0.extra.weight" in str(fault.value)


@pytest.mark.slow
def test_the_worker_loads_real_codes_and_reports_the_faults_of_broken_ones(chain: Chain, tmp_path: Path) -> None:
    """Measure in one process: a quantized model, a missing tensor, other sizes, packed experts, a small vocabulary.

    Transformers only logs that it initializes packed experts randomly.
    """
    missing = copy_without(chain.quantized, tmp_path / "missing", "model.layers.0.mlp.gate_proj.qweight")
    resized = Path(shutil.copytree(chain.quantized, tmp_path / "resized"))
    config = json.loads((resized / "config.json").read_text())
    (resized / "config.json").write_text(json.dumps(config | {"intermediate_size": 256}))
    experts = packed_experts(tmp_path / "experts")
    small = tiny_qwen2(tmp_path / "small", vocab_size=PROMPT[-1])
    broken = {"missing": missing, "resized": resized}
    found = measure(chain, tmp_path, quantized=chain.quantized, experts=experts, small=small, **broken)

    assert found["quantized"].linears == {"Linear": 1, "TorchLinear": 14}
    assert found["quantized"].divergence
    assert 0 < found["quantized"].divergence.mean < 0.1
    assert len(found["quantized"].answers[0]) == 4
    assert [peak.layer for peak in found["quantized"].calibration_peaks] == [0, 1]
    assert len(found["experts"].answers[0]) == 4
    assert found["small"].perplexity
    assert "token 315" in (found["small"].unanswered or "")
    assert not found["small"].answers
    assert "model.layers.0.mlp.gate_proj.qweight" in (found["missing"].fault or "")
    assert "mlp.down_proj" in (found["resized"].fault or "")
    assert "missing_keys: model.layers.0.mlp.experts.down_proj" in (found["experts"].unplaced or "")
    assert found["experts"].fault is None


@pytest.mark.slow
def test_an_environment_without_the_engine_is_a_fault(chain: Chain, tmp_path: Path) -> None:
    with pytest.raises(EnvironmentFault, match="cannot load GPTQ checkpoints: No module named"):
        measure(chain, tmp_path, python=Path(sys.executable), quantized=chain.quantized)


def measure(chain: Chain, logs: Path, *, python: Path | None = None, **others: Path) -> Mapping[str, ModelFigures]:
    measurement = Measurement(
        models={"merged": str(chain.merged)} | {role: str(root) for role, root in others.items()},
        reference="merged",
        compared=[role for role in others if role != "small"],
        answering=["merged", *others],
        windows=[window.tolist() for window in windows(2)],
        prompts=[PROMPT],
        max_new_tokens=4,
        device="cpu",
        calibration=[list(range(8))],
    )
    python = python or chain.engine.python
    worker = run_worker(python, MEASURE, measurement.to_json(), log=logs / "log", env=MEASURING_ENVIRONMENT)
    return Measured.from_json(worker.value).figures


def packed_experts(root: Path) -> Path:
    """Save a mixture of experts whose linear layers, including experts, have codes (all zero)."""
    config = Qwen3MoeConfig(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=64, moe_intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, num_experts=2, num_experts_per_tok=1,
    )  # fmt: skip
    Qwen3MoeForCausalLM(config).save_pretrained(root)
    settings = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "desc_act": False}
    form = gptq_format({"quantization_config": settings})
    tensors: dict[str, torch.Tensor] = {}
    for name, weight in load_file(root / "model.safetensors").items():
        if name.endswith("_proj.weight"):
            for code, spec in form.code_specs(*weight.shape).items():
                tensors[f"{name.removesuffix('.weight')}.{code}"] = torch.zeros(spec.shape, dtype=spec.torch_dtype)
        else:
            tensors[name] = weight
    save_file(tensors, root / "model.safetensors", metadata={"format": "pt"})
    written = json.loads((root / "config.json").read_text())
    (root / "config.json").write_text(json.dumps(written | {"quantization_config": settings}))
    return root


def copy_without(root: Path, out: Path, name: str) -> Path:
    shutil.copytree(root, out)
    tensors = load_file(out / "model.safetensors")
    del tensors[name]
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return out
