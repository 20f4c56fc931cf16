"""A tiny model taken through the real stages (merged, padded, quantized), made once and read by many tests."""

import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from qwen_pipeline.checkpoint.store.destinations import Artifact
from qwen_pipeline.quantization.spec import QuantSpec
from qwen_pipeline.qwen.padding_spec import PaddingSpec
from qwen_pipeline.stages.pad import pad
from qwen_pipeline.stages.quantize import quantize
from qwen_pipeline.stages.validate import ValidationInputs, ValidationPlan, validate
from qwen_pipeline.workers.environments import WorkerEnvironment, find_environment
from qwen_pipeline_tests.tiny import tiny_qwen2

GROUP_SIZE = 32
WORDS = "the a model reads writes weight layer token group rank scale channel small large quiet loud of in".split()  # noqa: SIM905


@dataclass(frozen=True, slots=True, kw_only=True)
class Chain:
    """A model of 96 MLP channels, padded with zeros to 128 for 2 ranks and quantized to 4 bits in groups of 32."""

    merged: Path
    padded: Path
    quantized: Path
    text: Path
    engine: WorkerEnvironment


def make_chain(root: Path) -> Chain:
    """Make a chain below ``root``, which takes about ten seconds."""
    engine = find_environment("gptqmodel")
    merged = tiny_qwen2(root / "merged")
    padded = pad(
        source=merged,
        destination=root / "padded",
        spec=PaddingSpec(group_size=GROUP_SIZE, tensor_parallel=2, layout="interleave"),
    ).path
    calibration = write_text(root / "calibration.jsonl", documents=24, stride=7)
    quantized = quantize(
        source=padded,
        destination=root / "quantized",
        calibration=calibration,
        spec=QuantSpec(
            engine="gptqmodel", group_size=GROUP_SIZE, samples=16, seq_len=64, batch_size=8, threads=2, device="cpu"
        ),
        engine=engine,
    ).path
    text = write_text(root / "held_out.jsonl", documents=12, stride=5)
    return Chain(merged=merged, padded=padded, quantized=quantized, text=text, engine=engine)


def validate_chain(chain: Chain, out: Path, **changes: Any) -> Artifact:
    """Validate a chain into ``out``; ``changes`` override inputs, fields of the plan or arguments of the stage."""
    inputs: dict[str, Any] = {
        "reference": chain.merged,
        "candidate": chain.quantized,
        "padded": chain.padded,
        "base": chain.merged,
        "text": chain.text,
    }
    plan: dict[str, Any] = {"tensor_parallel": 2, "windows": 2, "seq_len": 64, "prompts": ["Hi", "Yo"]}
    arguments: dict[str, Any] = {"engine": chain.engine, "destination": out}
    of_inputs, of_plan = ({field.name for field in fields(kind)} for kind in (ValidationInputs, ValidationPlan))
    for name, value in changes.items():
        (inputs if name in of_inputs else plan if name in of_plan else arguments)[name] = value
    return validate(ValidationInputs(**inputs), plan=ValidationPlan(**plan), **arguments)


def write_text(file: Path, *, documents: int, stride: int) -> Path:
    """Write a JSONL file of pseudorandom words, the same for the same numbers."""
    texts = (" ".join(WORDS[(i * stride + j * j) % len(WORDS)] for j in range(24)) for i in range(documents))
    file.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    return file
