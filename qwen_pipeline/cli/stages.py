"""The stages one by one: a directory in, a directory out."""

from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from qwen_pipeline.cli.results import CommandResult, command
from qwen_pipeline.qwen.padding_spec import DEFAULT_LAYOUT, Layout, PaddingSpec

if TYPE_CHECKING:
    from qwen_pipeline.checkpoint.store.destinations import Artifact
    from qwen_pipeline.progress import Observe
    from qwen_pipeline.transforms.lora.adapter_set import AdapterSet

app = typer.Typer()


class EngineChoice(StrEnum):
    layerwise = "layerwise"
    gptqmodel = "gptqmodel"
    autogptq = "autogptq"


ServingChoice = Literal["vllm", "vllm-cpu"]
Source = Annotated[Path, typer.Option("--in", help="Checkpoint to start from.")]
Out = Annotated[Path, typer.Option(help="New or empty directory. The same work a second time is free.")]
GroupSize = Annotated[int, typer.Option(help="Consecutive input channels that share one scale.")]
Towers = Annotated[
    bool, typer.Option("--towers", help="Pad vision and audio towers too, to widths that all ranks can share.")
]
TEXT_HELP = 'Text like what the model will see: JSONL of {"text"} or {"messages"}, Parquet, or a dataset of the hub'
Samples = Annotated[int, typer.Option(help="Windows of calibration tokens.")]
SeqLen = Annotated[int, typer.Option(help="Tokens per window.")]
Seed = Annotated[int, typer.Option(help="Decides which records are drawn.")]
PackingName = Annotated[
    Literal["stream", "documents"], typer.Option(help="Records one after the other, or in windows of their own.")
]
AllExperts = Annotated[bool, typer.Option("--all-experts", help="Give every token to every expert (not autogptq).")]
EngineName = Annotated[
    EngineChoice, typer.Option(help="What quantizes: our layer loop over GPTQModel's solver, or a library's own.")
]
EnginePython = Annotated[Path | None, typer.Option(help="Python of an environment that has the engine.")]


class CombinationChoice(StrEnum):
    cat = "cat"
    linear = "linear"


Adapters = Annotated[
    list[Path], typer.Option(help="PEFT LoRA directory, or a full fine-tuned checkpoint; repeat it for more LoRAs.")
]
Weights = Annotated[list[float] | None, typer.Option(help="Share of the adapter in the same place.")]
Combination = Annotated[
    CombinationChoice, typer.Option(help="Add up updates (cat) or, as a cheap approximation, factors (linear).")
]
BaseNames = Annotated[list[str] | None, typer.Option(help="A name that the adapter may know the base by.")]
BaseRevision = Annotated[str | None, typer.Option(help="The base's commit, if adapters name theirs.")]


@command(
    app,
    "merge",
    examples=[
        "qwen-pipeline merge --base base/ --adapter my-lora/ --out merged/",
        "qwen-pipeline merge --base base/ --adapter style/ --weight 0.7 --adapter facts/ --weight 0.3 --out merged/",
    ],
)
def merge(
    base: Annotated[Path, typer.Option(help="Full-precision base checkpoint.")],
    adapter: Adapters,
    out: Out,
    weight: Weights = None,
    combine: Combination = CombinationChoice.cat,
    base_name: BaseNames = None,
    base_revision: BaseRevision = None,
    trained_on: Annotated[
        Path | None, typer.Option(help="Padded checkpoint of the base that the LoRA was trained on, if it names none.")
    ] = None,
) -> CommandResult:
    """Merge a fine-tune into its base: W + scaling * B @ A, computed in float32, rounded once.

    Every adapter tensor must land on a base tensor; what cannot be merged exactly is refused by name. A LoRA of a
    padded checkpoint merges into the live base, one of the live base into a padded checkpoint.
    """
    from qwen_pipeline.checkpoint.store.destinations import Directory
    from qwen_pipeline.stages import merge as stage

    return made_by(
        lambda observe: stage.merge(
            base=base,
            fine_tune=_fine_tune(adapter, weight, combine),
            destination=Directory(out),
            base_names=base_name or (),
            base_revision=base_revision,
            padded=trained_on,
            observe=observe,
        )
    )


@command(
    app,
    "merge-pad",
    examples=["qwen-pipeline merge-pad --base base/ --adapter my-lora/ --recipe merged/ --out padded/ --tp 8"],
)
def merge_pad(
    base: Annotated[Path, typer.Option(help="Full-precision base checkpoint.")],
    adapter: Adapters,
    out: Out,
    recipe: Annotated[Path, typer.Option(help="Directory of the merged checkpoint, without its weights.")],
    weight: Weights = None,
    combine: Combination = CombinationChoice.cat,
    base_name: BaseNames = None,
    base_revision: BaseRevision = None,
    group_size: GroupSize = 128,
    tp: Annotated[int, typer.Option(help="Tensor-parallel ranks, each of which must get whole groups.")] = 8,
    layout: Annotated[Layout, typer.Option(help="Where the new channels go.")] = DEFAULT_LAYOUT,
    towers: Towers = False,
) -> CommandResult:
    """Merge and pad in one pass: the merged weights are never stored, and the padded ones are as from two passes.

    The recipe has the merged checkpoint's digests; `materialize` stores its weights later.
    """
    from qwen_pipeline.checkpoint.store.destinations import Directory
    from qwen_pipeline.stages.merge_pad import merge_pad

    return made_by(
        lambda observe: merge_pad(
            base=base,
            fine_tune=_fine_tune(adapter, weight, combine),
            merged=Directory(recipe),
            padded=Directory(out),
            base_names=base_name or (),
            base_revision=base_revision,
            spec=PaddingSpec(group_size=group_size, tensor_parallel=tp, layout=layout, towers=towers),
            observe=observe,
        )[1]
    )


@command(app, "materialize", examples=["qwen-pipeline materialize workspace/store/merged/my-lora/latest"])
def materialize(recipe: Path) -> CommandResult:
    """Store the weights of a merged checkpoint that is only a recipe, and prove that they are the ones promised."""
    from qwen_pipeline.models.open import materialize as store_weights

    return made_by(lambda observe: store_weights(recipe.resolve(), observe=observe))


@command(app, "pad", examples=["qwen-pipeline pad --in merged/ --out padded/ --group-size 128 --tp 8"])
def pad(
    source: Source,
    out: Out,
    group_size: GroupSize = 128,
    tp: Annotated[int, typer.Option(help="Tensor-parallel ranks, each of which must get whole groups.")] = 8,
    layout: Annotated[
        Layout,
        typer.Option(help="New channels are halves of live ones, or zeros between the live ones or after them."),
    ] = DEFAULT_LAYOUT,
    towers: Towers = False,
) -> CommandResult:
    """Widen the MLP to the next multiple of group size x tensor-parallel degree. This comes before quantize.

    The model computes the same as before, and nothing to pad is a valid outcome. A quantized checkpoint is refused:
    its codes and scales can no longer be widened.
    """
    from qwen_pipeline.checkpoint.store.destinations import Directory
    from qwen_pipeline.stages import pad as stage

    return made_by(
        lambda observe: stage.pad(
            source=source,
            destination=Directory(out),
            spec=PaddingSpec(group_size=group_size, tensor_parallel=tp, layout=layout, towers=towers),
            observe=observe,
        )
    )


@command(app, "unpad", examples=["qwen-pipeline unpad --in padded/ --out merged-again/"])
def unpad(source: Annotated[Path, typer.Option("--in", help="Directory that pad wrote.")], out: Out) -> CommandResult:
    """Undo pad: give back the checkpoint that was padded, bit for bit, config included.

    The manifest says where each channel went. A checkpoint that was changed after padding is refused.
    """
    from qwen_pipeline.checkpoint.store.destinations import Directory
    from qwen_pipeline.stages import unpad as stage

    return made_by(lambda observe: stage.unpad(source=source, destination=Directory(out), observe=observe))


@command(
    app,
    "calibrate",
    examples=[
        "qwen-pipeline calibrate --in padded/ --out calibration/ --text chats.jsonl",
        "qwen-pipeline calibrate --in padded/ --out calibration/ --text HuggingFaceH4/ultrachat_200k#train_sft",
    ],
)
def calibrate(
    source: Source,
    out: Out,
    text: Annotated[str, typer.Option(help=f"{TEXT_HELP}.")],
    samples: Samples = 128,
    seq_len: SeqLen = 2048,
    seed: Seed = 42,
    packing: PackingName = "stream",
    all_experts: AllExperts = False,
    min_expert_tokens: Annotated[
        int | None, typer.Option(help="Tokens that each expert of a mixture needs; default: the settings' (128).")
    ] = None,
) -> CommandResult:
    """Draw the tokens that a model will be quantized with, in its own chat template, and look at what they reach.

    For a mixture of experts every layer's router is asked once: too few tokens for an expert fail the check.
    """
    from qwen_pipeline.checkpoint.store.destinations import Directory
    from qwen_pipeline.config import load_settings
    from qwen_pipeline.quantization.calibration.spec import CalibrationSpec
    from qwen_pipeline.stages import calibrate as stage

    least = load_settings().calibration.min_expert_tokens if min_expert_tokens is None else min_expert_tokens
    return made_by(
        lambda observe: stage.calibrate(
            source=source,
            text=text,
            destination=Directory(out),
            spec=CalibrationSpec(samples=samples, seq_len=seq_len, seed=seed, packing=packing),
            all_experts=all_experts,
            min_expert_tokens=least,
            observe=observe,
        )
    )


@command(
    app,
    "quantize",
    examples=[
        "qwen-pipeline quantize --in padded/ --out quantized/ --calibration chats.jsonl --bits 4",
        "qwen-pipeline quantize --in padded/ --out quantized/ --calibration calibration/ --bits 4",
    ],
)
def quantize(
    source: Source,
    out: Out,
    calibration: Annotated[str, typer.Option(help=f"What calibrate wrote, or {TEXT_HELP[0].lower()}{TEXT_HELP[1:]}.")],
    bits: Annotated[int, typer.Option(help="Bits per weight.")] = 4,
    group_size: GroupSize = 128,
    sym: Annotated[bool, typer.Option(help="A grid that is symmetric about zero.")] = True,
    desc_act: Annotated[
        bool, typer.Option("--desc-act", help="Columns by falling activation; slower to serve.")
    ] = False,
    act_group_aware: Annotated[bool, typer.Option(help="Groups by falling activation; free to serve.")] = True,
    damp_percent: Annotated[float, typer.Option(help="Share of the mean Hessian diagonal that is added to it.")] = 0.05,
    mse: Annotated[float, typer.Option(help="Exponent of a search for scales, such as 2.4; 0: no search.")] = 0.0,
    override: Annotated[
        list[str] | None,
        typer.Option(help="REGEX:damp_percent=0.1 (or mse) for modules in whose names REGEX is found; repeatable."),
    ] = None,
    engine: EngineName = EngineChoice.layerwise,
    samples: Samples = 128,
    seq_len: SeqLen = 2048,
    seed: Seed = 42,
    packing: PackingName = "stream",
    all_experts: AllExperts = False,
    batch_size: Annotated[int, typer.Option(help="Windows per forward pass; other sizes give other bytes.")] = 8,
    threads: Annotated[int | None, typer.Option(help="Threads of one CPU operation; default: all cores.")] = None,
    device: Annotated[
        Literal["cpu", "cuda"] | None, typer.Option(help="Default: a GPU where the machine has one.")
    ] = None,
    gpus: Annotated[
        int, typer.Option(help="GPUs that GPTQModel's own loop shares; other numbers give other bytes.")
    ] = 1,
    engine_python: EnginePython = None,
) -> CommandResult:
    """Quantize a checkpoint with GPTQ, in a process of its own. Pad it first.

    The same input, settings and versions give the same bytes. A module that could only be rounded fails the check.
    """
    from qwen_pipeline.checkpoint.store.destinations import Directory
    from qwen_pipeline.quantization.spec import QuantSpec, default_device, parse_overrides, usable_cores
    from qwen_pipeline.stages import quantize as stage
    from qwen_pipeline.workers.environments import find_environment

    spec = QuantSpec(
        engine=engine.value,
        bits=bits,
        group_size=group_size,
        sym=sym,
        desc_act=desc_act,
        act_group_aware=act_group_aware,
        damp_percent=damp_percent,
        mse=mse,
        dynamic=parse_overrides(override or ()),
        samples=samples,
        seq_len=seq_len,
        seed=seed,
        packing=packing,
        all_experts=all_experts,
        batch_size=batch_size,
        threads=threads or usable_cores(),
        device=device or default_device(),
        gpus=gpus,
    )
    return made_by(
        lambda observe: stage.quantize(
            source=source,
            destination=Directory(out),
            calibration=calibration,
            spec=spec,
            engine=find_environment(spec.environment, engine_python),
            observe=observe,
        )
    )


@command(app, "export", examples=["qwen-pipeline export --in quantized/ --out for-vllm/"])
def export(
    source: Annotated[Path, typer.Option("--in", help="Directory that quantize wrote.")], out: Out
) -> CommandResult:
    """Write the same codes as compressed-tensors (pack-quantized), vLLM's own format. Nothing is quantized again."""
    from qwen_pipeline.checkpoint.store.destinations import Directory
    from qwen_pipeline.stages import export as stage

    return made_by(lambda observe: stage.export(source=source, destination=Directory(out), observe=observe))


@command(
    app,
    "validate",
    examples=[
        "qwen-pipeline validate --reference merged/ --padded padded/ --candidate quantized/ --text held-out.txt --tp 8"
    ],
)
def validate(
    reference: Annotated[Path, typer.Option(help="The merged, full-precision checkpoint.")],
    candidate: Annotated[Path, typer.Option(help="The quantized checkpoint.")],
    text: Annotated[Path, typer.Option(help="Text that calibration did not see: .txt, or .jsonl as for quantize.")],
    out: Annotated[Path | None, typer.Option(help="Directory of the report; default: <candidate>-validation.")] = None,
    tp: Annotated[int, typer.Option(help="Tensor-parallel degree that the checkpoint must serve at.")] = 1,
    target: Annotated[
        list[str] | None,
        typer.Option(help="Engine and ranks that it must serve at, such as vllm-marlin:8; may be given several times."),
    ] = None,
    base: Annotated[Path | None, typer.Option(help="The base, to compare perplexities with.")] = None,
    padded: Annotated[Path | None, typer.Option(help="The padded checkpoint that the candidate was made of.")] = None,
    unpadded: Annotated[
        Path | None, typer.Option(help="The reference, quantized without padding, to tell what padding cost.")
    ] = None,
    calibration: Annotated[
        Path | None, typer.Option(help="What calibrate wrote: look for activations beyond float16 in it too.")
    ] = None,
    before: Annotated[Path | None, typer.Option(help="The quantized version before, to compare losses with.")] = None,
    engine: EngineName = EngineChoice.layerwise,
    engine_python: EnginePython = None,
    fine_tune: Annotated[str | None, typer.Option(help="Whose limits of [validation.overrides] apply.")] = None,
    serve: Annotated[ServingChoice | None, typer.Option(help="Serve with this engine too, and ask it.")] = None,
    serve_tp: Annotated[list[int] | None, typer.Option(help="Degree to serve at; repeat it. Default: --tp.")] = None,
) -> CommandResult:
    """Hold a quantized checkpoint against the one it came from, and write a report.

    Limits, prompts, the amount of text, what is served and, unless given here, targets come from the section
    [validation] of qwen_pipeline.toml.
    """
    from qwen_pipeline.checkpoint.store.destinations import Directory
    from qwen_pipeline.config import load_settings
    from qwen_pipeline.evaluation.tensor_parallel.findings import Target
    from qwen_pipeline.quantization.spec import QuantSpec
    from qwen_pipeline.stages import validate as stage
    from qwen_pipeline.workers.environments import find_environment

    configured = load_settings()
    settings = configured.validation
    serving = configured.serving_plan(serve, tuple(serve_tp or ()) or settings.serve.tensor_parallel or (tp,))
    inputs = stage.ValidationInputs(
        reference=reference,
        candidate=candidate,
        text=text,
        base=base,
        padded=padded,
        unpadded=unpadded,
        calibration=calibration,
        before=before,
    )
    return made_by(
        lambda observe: stage.validate(
            inputs,
            plan=stage.ValidationPlan(
                tensor_parallel=tp,
                targets=[Target.parse(text) for text in target or ()] or settings.declared,
                limits=settings.limits_of(fine_tune),
                prompts=settings.prompts,
                windows=settings.windows,
                seq_len=settings.seq_len,
                serving=serving,
                tasks=configured.task_plan(),
            ),
            destination=Directory(out or candidate.resolve().with_name(f"{candidate.resolve().name}-validation")),
            engine=find_environment(QuantSpec(engine=engine.value).environment, engine_python),
            observe=observe,
        )
    )


@command(app, "compare", examples=["qwen-pipeline compare released/ validated/"])
def compare(before: Path, now: Path) -> CommandResult:
    """Say how the quantized model changed from one release or validation (BEFORE) to a later one (NOW)."""
    from dataclasses import asdict

    from qwen_pipeline.cli.tables import change_table
    from qwen_pipeline.evaluation.regression import changes, load_verdict
    from qwen_pipeline.evaluation.regression import compare as compare_verdicts

    old, new = load_verdict(before), load_verdict(now)
    report, found = compare_verdicts(old, new), changes(old, new)
    data = {"changes": [asdict(change) for change in found], "report": asdict(report)}
    return CommandResult(data=data, view=[change_table(found), report.detail])


def _fine_tune(adapters: list[Path], weights: list[float] | None, combine: CombinationChoice) -> "Path | AdapterSet":
    from qwen_pipeline.transforms.lora.adapter_set import weighted

    several = len(adapters) > 1 or weights
    return weighted(adapters, weights or [], combination=combine.value) if several else adapters[0]


def made_by(stage: "Callable[[Observe], Artifact]") -> CommandResult:
    """Run a stage under the eyes of the user, and show what it made and what it checked."""
    from qwen_pipeline.cli.progress_bars import progress_bars
    from qwen_pipeline.cli.tables import artifact_data, artifact_table, blocking_failure, check_table

    with progress_bars() as observe:
        artifact = stage(observe)
    view = [artifact_table([artifact]), check_table([artifact]), str(artifact.path)]
    return CommandResult(data=artifact_data(artifact), view=view, fault=blocking_failure([artifact]))
