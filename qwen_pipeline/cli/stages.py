"""Commands that run one stage: from an input directory to an output directory."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from qwen_pipeline.cli.options import (
    PADDING_OPTIONS,
    TEXT_FORMATS,
    BaseCheckpoint,
    BaseDequantize,
    BaseNf4,
    LeaveBehind,
    MaxSkipped,
    Out,
    Source,
    SpecOptions,
    TemplateArgument,
    TextOnly,
    TrainedOn,
    text_spec,
)
from qwen_pipeline.cli.results import CommandResult, command
from qwen_pipeline.quantization.calibration.spec import MIN_EXPERT_TOKENS, CalibrationSpec
from qwen_pipeline.qwen.padding_spec import PaddingSpec

if TYPE_CHECKING:
    from qwen_pipeline.checkpoint.store.destinations import Artifact
    from qwen_pipeline.progress import Observe
    from qwen_pipeline.transforms.lora.adapter_set import AdapterSet

app = typer.Typer()

CombinationChoice = Literal["cat", "linear"]
Adapters = Annotated[
    list[Path], typer.Option(help="PEFT LoRA directory, or a full fine-tuned checkpoint; repeatable for LoRAs.")
]
Weights = Annotated[list[float] | None, typer.Option(help="Weight of the adapter at the same position.")]
Combination = Annotated[
    CombinationChoice, typer.Option(help="Add up updates (cat) or, as a cheap approximation, factors (linear).")
]
BaseNames = Annotated[
    list[str] | None, typer.Option(help="A name by which the adapter may refer to the base, or a pattern with *.")
]
BaseRevision = Annotated[str | None, typer.Option(help="Commit of the base, compared with the adapter's.")]

CALIBRATION_HELP = {
    "samples": "Number of calibration windows.",
    "seq_len": "Tokens per window.",
    "seed": "Seed for the choice of records.",
    "packing": "Pack records one after the other (stream), or each into windows of its own (documents).",
}
ALL_EXPERTS_HELP = "Give every token to every expert (not supported by autogptq)."


@command(
    app,
    "merge",
    examples=[
        "qwen-pipeline merge --base base/ --adapter my-lora/ --out merged/",
        "qwen-pipeline merge --base base/ --adapter style/ --weight 0.7 --adapter facts/ --weight 0.3 --out merged/",
    ],
)
def merge(
    base: BaseCheckpoint,
    adapter: Adapters,
    out: Out,
    weight: Weights = None,
    combine: Combination = "cat",
    base_name: BaseNames = None,
    base_revision: BaseRevision = None,
    trained_on: TrainedOn = None,
    base_dequantize: BaseDequantize = False,
    base_nf4: BaseNf4 = None,
    text_only: TextOnly = False,
    leave_behind: LeaveBehind = None,
) -> CommandResult:
    """Merge a fine-tune into its base: W + scaling * B @ A, computed in float32, rounded once.

    Every adapter tensor must match a base tensor; a fine-tune that cannot be merged exactly is refused with the reason.
    A LoRA trained on a padded checkpoint merges into the unpadded base, and one trained on the unpadded base merges
    into a padded checkpoint.
    """
    from qwen_pipeline.checkpoint.store.destinations import Directory
    from qwen_pipeline.stages import merge as stage
    from qwen_pipeline.transforms.codes.base_weights import BaseWeights

    return run_stage(
        lambda observe: stage.merge(
            base=base,
            fine_tune=_fine_tune(adapter, weight, combine),
            destination=Directory(out),
            base_names=base_name or (),
            base_revision=base_revision,
            base_weights=BaseWeights(dequantize=base_dequantize, nf4=base_nf4, text_only=text_only),
            padded=trained_on,
            leave_behind=leave_behind or (),
            observe=observe,
        )
    )


@command(
    app,
    "merge-pad",
    examples=["qwen-pipeline merge-pad --base base/ --adapter my-lora/ --recipe merged/ --out padded/ --tp 8"],
)
def merge_pad(
    base: BaseCheckpoint,
    adapter: Adapters,
    out: Out,
    recipe: Annotated[Path, typer.Option(help="Directory for the merged checkpoint, without its weights.")],
    weight: Weights = None,
    combine: Combination = "cat",
    base_name: BaseNames = None,
    base_revision: BaseRevision = None,
    base_dequantize: BaseDequantize = False,
    base_nf4: BaseNf4 = None,
    text_only: TextOnly = False,
    leave_behind: LeaveBehind = None,
    store_padded: Annotated[bool, typer.Option(help="Store padded weights, or only their digests.")] = True,
    *,
    spec: Annotated[PaddingSpec, PADDING_OPTIONS],
) -> CommandResult:
    """Merge and pad in one pass: merged weights are never stored; padded weights equal those of two passes.

    The recipe records the merged checkpoint's digests; `materialize` can store its weights later. With
    --no-store-padded the padded checkpoint is a recipe too: quantize and validate compute its weights as they read.
    """
    from qwen_pipeline.checkpoint.store.destinations import Directory
    from qwen_pipeline.models.base_names import KnownBase
    from qwen_pipeline.stages.merge_pad import merge_pad
    from qwen_pipeline.transforms.codes.base_weights import BaseWeights

    return run_stage(
        lambda observe: merge_pad(
            base=KnownBase(
                root=base,
                names=base_name or (),
                revision=base_revision,
                weights=BaseWeights(dequantize=base_dequantize, nf4=base_nf4, text_only=text_only),
            ),
            fine_tune=_fine_tune(adapter, weight, combine),
            merged=Directory(recipe),
            padded=Directory(out),
            spec=spec,
            stores_padded=store_padded,
            leave_behind=leave_behind or (),
            observe=observe,
        )[1]
    )


@command(app, "materialize", examples=["qwen-pipeline materialize workspace/store/merged/my-lora/latest"])
def materialize(recipe: Path) -> CommandResult:
    """Store the weights of a checkpoint that is only a recipe, and check them against the recorded digests."""
    from qwen_pipeline.models.open import materialize as store_weights

    return run_stage(lambda observe: store_weights(recipe.resolve(), observe=observe))


@command(app, "pad", examples=["qwen-pipeline pad --in merged/ --out padded/ --group-size 128 --tp 8"])
def pad(
    source: Source,
    out: Out,
    spec: Annotated[PaddingSpec, PADDING_OPTIONS],
    base_dequantize: BaseDequantize = False,
) -> CommandResult:
    """Widen the MLP to the next multiple of group size x tensor-parallel degree. Run this before quantize.

    The model computes the same function; one that needs no padding keeps its width. A quantized checkpoint is
    refused: its codes and scales can no longer be widened.
    """
    from qwen_pipeline.checkpoint.store.destinations import Directory
    from qwen_pipeline.stages import pad as stage

    return run_stage(
        lambda observe: stage.pad(
            source=source, destination=Directory(out), spec=spec, dequantize=base_dequantize, observe=observe
        )
    )


@command(app, "unpad", examples=["qwen-pipeline unpad --in padded/ --out merged-again/"])
def unpad(source: Annotated[Path, typer.Option("--in", help="Directory that pad wrote.")], out: Out) -> CommandResult:
    """Undo pad: restore the checkpoint that was padded, bit for bit, config included.

    The manifest records the new position of each channel. A checkpoint that was changed after padding is refused.
    """
    from qwen_pipeline.checkpoint.store.destinations import Directory
    from qwen_pipeline.stages import unpad as stage

    return run_stage(lambda observe: stage.unpad(source=source, destination=Directory(out), observe=observe))


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
    text: Annotated[str, typer.Option(help=f"Text like the inputs that the model will serve: {TEXT_FORMATS}.")],
    spec: Annotated[CalibrationSpec, SpecOptions(CalibrationSpec, CALIBRATION_HELP)],
    all_experts: Annotated[bool, typer.Option("--all-experts", help=ALL_EXPERTS_HELP)] = False,
    min_expert_tokens: Annotated[
        int | None,
        typer.Option(help=f"Tokens that each expert must receive; default: the settings' ({MIN_EXPERT_TOKENS})."),
    ] = None,
    max_skipped: MaxSkipped = None,
    template_argument: TemplateArgument = None,
) -> CommandResult:
    """Draw the tokens that calibrate a quantization, in the model's chat template, and check their coverage of experts.

    For a mixture of experts, every layer's router runs once; an expert that gets too few tokens fails the check.
    """
    from qwen_pipeline.checkpoint.store.destinations import Directory
    from qwen_pipeline.config import load_settings
    from qwen_pipeline.stages import calibrate as stage

    settings = load_settings().calibration
    return run_stage(
        lambda observe: stage.calibrate(
            source=source,
            text=text,
            destination=Directory(out),
            spec=spec,
            text_spec=text_spec(settings.text_spec, max_skipped, template_argument),
            all_experts=all_experts,
            min_expert_tokens=settings.min_expert_tokens if min_expert_tokens is None else min_expert_tokens,
            observe=observe,
        )
    )


def _fine_tune(
    adapters: list[Path], weights: list[float] | None, combination: CombinationChoice
) -> "Path | AdapterSet":
    from qwen_pipeline.transforms.lora.adapter_set import weighted

    several = len(adapters) > 1 or weights
    return weighted(adapters, weights or [], combination=combination) if several else adapters[0]


def run_stage(stage: "Callable[[Observe], Artifact]") -> CommandResult:
    """Run a stage with progress bars, and return its artifact and checks; a blocking failure becomes the fault."""
    from qwen_pipeline.cli.progress_bars import progress_bars
    from qwen_pipeline.cli.tables import artifact_data, artifact_table, blocking_failure, check_table

    with progress_bars() as observe:
        artifact = stage(observe)
    view = [artifact_table([artifact]), check_table([artifact]), str(artifact.path)]
    return CommandResult(data=artifact_data(artifact), view=view, fault=blocking_failure([artifact]))
