"""Example findings, shared by the tests of checks and reports."""

from dataclasses import replace

from qwen_pipeline.evaluation.behaviour.findings import Behaviour, Exchange, Reply
from qwen_pipeline.evaluation.behaviour.requests import NEEDLE_CODE
from qwen_pipeline.evaluation.figures import DivergenceFigures, ModelFigures, Peak
from qwen_pipeline.evaluation.findings import BASE, MERGED, PADDED, QUANTIZED, Findings
from qwen_pipeline.evaluation.samples import Completion, Sample
from qwen_pipeline.evaluation.serving.findings import ServingFindings
from qwen_pipeline.evaluation.structure.check import Structure
from qwen_pipeline.evaluation.structure.weights import PaddingFindings, WeightError
from qwen_pipeline.evaluation.tasks.plan import Score
from qwen_pipeline.evaluation.tensor_parallel.findings import Sharding, ShardingFindings, Target, TargetFindings
from qwen_pipeline.qwen.tensor_parallel.engines import ShardingVerdict
from qwen_pipeline.qwen.tensor_parallel.feasibility import assess_degrees

CONFIG = {
    "model_type": "qwen2",
    "intermediate_size": 96,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
}
YES = Completion(text="Yes.", tokens=(5, 6), ended=True)


def target_findings(
    kernel: str, engine: str = "", *, verdict: ShardingVerdict = "ok", **errors: float
) -> TargetFindings:
    """Return the findings for one kernel at two ranks; ``errors`` are the layers with wrong weights on ranks."""
    cut = None if verdict == "refused" else ShardingFindings(cut=Sharding(ranks=2), compared=7, errors=errors)
    target = Target(engine=engine or kernel, degree=2)
    return TargetFindings(target=target, kernel=kernel, verdict=verdict, reasons=["so"], found=cut)


ROUNDING_ONLY = DivergenceFigures(mean=1e-9, p95=0, p99_9=0, max=0, top1_agreement=1)
SMALL_PEAK = Peak(layer=1, place="mlp.down_proj", magnitude=30.0)
CLOSE = DivergenceFigures(mean=0.1, p95=0.2, p99_9=0.3, max=0.4, top1_agreement=0.9, by_position=(0.1,) * 128)


def reply(text: str, *, tokens: int = 20, ended: bool = True, thought: int | None = None) -> Reply:
    return Reply(text=text, tokens=tokens, ended=ended, thought=thought)


CALL = reply('<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris", "day": "tomorrow"}}\n</tool_call>')
THOUGHT = reply("Three times 17 is 51.\n</think>\n\n51", thought=12)
OBJECT = reply('<think>\n\n</think>\n```json\n{"name": "Ada", "age": 36, "city": "London"}\n```')
FOUND = reply(f"It is {NEEDLE_CODE}.")
BEHAVIOUR = Behaviour(
    exchanges=[
        Exchange(kind="tool call", request="Weather?", prompt_tokens=90, merged=CALL, quantized=CALL),
        Exchange(kind="thinking", request="17 times 3?", prompt_tokens=9, merged=THOUGHT, quantized=THOUGHT),
        Exchange(kind="JSON", request="Ada", prompt_tokens=9, merged=OBJECT, quantized=OBJECT),
        Exchange(
            kind="needle", request="Code?", prompt_tokens=900, merged=FOUND, quantized=FOUND, expected=NEEDLE_CODE
        ),
    ],
    turn_end=258,
    stops=[256, 258],
)
GOOD = Findings(
    structure=Structure(
        problems=[],
        padding=PaddingFindings(channels=64),
        errors=[WeightError(module="layers.0.mlp.up_proj", layer=0, kind="mlp.up_proj", relative=0.1)],
    ),
    models={
        BASE: ModelFigures(perplexity=20.0),
        MERGED: ModelFigures(perplexity=10.0),
        PADDED: ModelFigures(perplexity=10.0, divergence=ROUNDING_ONLY),
        QUANTIZED: ModelFigures(perplexity=11.0, divergence=CLOSE, peaks=(SMALL_PEAK,)),
    },
    nbytes={},
    samples=[Sample(prompt="?", reference=YES, candidate=replace(YES, text="Yes!"))],
    parallel=assess_degrees(CONFIG, group_size=32, degrees=[1])[0],
    targets=[target_findings("vllm-cpu")],
    behaviour=BEHAVIOUR,
)
SERVED = ServingFindings(
    role="padded", degree=3, engine="vllm", ready=True, texts=("yes",), expected=("yes",), tokens=(3,), partings=(None,)
)
HELD = Score(name="arc/acc", more_is_better=True, merged=0.5, quantized=0.49)
