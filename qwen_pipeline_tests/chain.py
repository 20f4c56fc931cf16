"""A tiny model taken through the real stages (merged, padded, quantized), made once and read by many tests."""

import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from qwen_pipeline.checkpoint.store.destinations import Artifact
from qwen_pipeline.evaluation.behaviour.plan import BehaviourPlan
from qwen_pipeline.evaluation.report.load import load_validation
from qwen_pipeline.quantization.spec import QuantizerName, QuantSpec
from qwen_pipeline.qwen.padding_spec import DEFAULT_LAYOUT, Layout, PaddingSpec
from qwen_pipeline.reports import CheckReport
from qwen_pipeline.stages.pad import pad
from qwen_pipeline.stages.quantize import quantize
from qwen_pipeline.stages.validate import ValidationInputs, ValidationPlan, validate
from qwen_pipeline.workers.environments import WorkerEnvironment, find_environment
from qwen_pipeline_tests.tiny import tiny_qwen2

GROUP_SIZE = 32
SHORT = BehaviourPlan(tokens=4, thinking_tokens=0, needles=(256,))
WORDS = "the a model reads writes weight layer token group rank scale channel small large quiet loud of in".split()  # noqa: SIM905


@dataclass(frozen=True, slots=True, kw_only=True)
class Chain:
    """A model, padded for 2 ranks and quantized to 4 bits in groups of 32, with held-out text."""

    merged: Path
    padded: Path
    quantized: Path
    text: Path
    engine: WorkerEnvironment


def make_chain(root: Path) -> Chain:
    """Make a chain below ``root`` that pads 96 channels to 128, or return the one that is there."""
    if (root / "held_out.jsonl").exists():
        return _chain_below(root)
    tiny_qwen2(root / "merged")
    return continue_chain(root, layout="interleave", quantizer="gptqmodel")


def continue_chain(root: Path, *, layout: Layout = DEFAULT_LAYOUT, quantizer: QuantizerName = "layerwise") -> Chain:
    """Pad and quantize the model ``root/merged``, and write calibration and held-out text beside it."""
    chain = _chain_below(root)
    pad(
        source=chain.merged,
        destination=chain.padded,
        spec=PaddingSpec(group_size=GROUP_SIZE, tensor_parallel=2, layout=layout),
    )
    quantize(
        source=chain.padded,
        destination=chain.quantized,
        calibration=write_text(root / "calibration.jsonl", documents=24, stride=7),
        spec=QuantSpec(
            engine=quantizer, group_size=GROUP_SIZE, samples=16, seq_len=64, batch_size=8, threads=1, device="cpu"
        ),
        engine=chain.engine,
    )
    write_text(chain.text, documents=12, stride=5)
    return chain


def _chain_below(root: Path) -> Chain:
    return Chain(
        merged=root / "merged",
        padded=root / "padded",
        quantized=root / "quantized",
        text=root / "held_out.jsonl",
        engine=find_environment("gptqmodel"),
    )


def validate_chain(chain: Chain, out: Path, **changes: Any) -> Artifact:
    """Validate a chain into ``out``; ``changes`` override inputs, fields of the plan or arguments of the stage."""
    inputs: dict[str, Any] = {
        "reference": chain.merged,
        "candidate": chain.quantized,
        "padded": chain.padded,
        "base": chain.merged,
        "text": chain.text,
    }
    plan: dict[str, Any] = {"tensor_parallel": 2, "windows": 2, "seq_len": 64, "behaviour": SHORT}
    plan["prompts"] = ["Hi", "Yo"]
    arguments: dict[str, Any] = {"engine": chain.engine, "destination": out}
    of_inputs, of_plan = ({field.name for field in fields(kind)} for kind in (ValidationInputs, ValidationPlan))
    for name, value in changes.items():
        (inputs if name in of_inputs else plan if name in of_plan else arguments)[name] = value
    return validate(ValidationInputs(**inputs), plan=ValidationPlan(**plan), **arguments)


def checks_of(validated: Artifact) -> dict[str, CheckReport]:
    """Return the outcome of every check of a validation by its name."""
    return {check.name: check for check in load_validation(validated.path, validated.manifest).checks}


def write_text(file: Path, *, documents: int, stride: int) -> Path:
    """Write a JSONL file of pseudorandom words, the same for the same numbers."""
    texts = (" ".join(WORDS[(i * stride + j * j) % len(WORDS)] for j in range(24)) for i in range(documents))
    file.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    return file
