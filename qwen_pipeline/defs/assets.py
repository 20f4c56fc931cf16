"""The asset graph, from a base and a fine-tune to a published checkpoint, and from an import to a repaired one.

One asset per directory that comes to be. Assets exchange paths through the store, never tensors. Each is a call of one
stage; what the stage checked about its own output arrives with it as asset checks.
"""

# pyright: reportMissingTypeArgument=false, reportUnknownParameterType=false
# Dagster recognizes MaterializeResult in a signature only without its type argument.

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import dagster as dg

from qwen_pipeline.checkpoint.digest_cache import checkpoint_digest
from qwen_pipeline.checkpoint.store.destinations import Artifact
from qwen_pipeline.defs.checks import asset_check_result, asset_check_specs
from qwen_pipeline.defs.metadata import (
    artifact_metadata,
    directory_metadata,
    evidence_markdown,
    inline_plot,
    loss_table,
)
from qwen_pipeline.defs.partitions import FINE_TUNES, IMPORTS
from qwen_pipeline.defs.resources import Pipeline
from qwen_pipeline.evaluation.regression import NOT_WORSE
from qwen_pipeline.evaluation.report.html import PAGE
from qwen_pipeline.evaluation.report.markdown import report_markdown
from qwen_pipeline.models.inbox import Arrival
from qwen_pipeline.models.open import fine_tune_digest
from qwen_pipeline.quantization.evidence import EVIDENCE
from qwen_pipeline.reports import CheckReport, CheckSpec, load_reports
from qwen_pipeline.stages import calibrate, merge, pad, publish, quantize, repair, validate
from qwen_pipeline.status import against_last_release, calibration_of, version_before

GROUP = "fine_tune_to_release"
IMPORT_GROUP = "import_to_repair"

COMPLETE = CheckSpec(name="complete", description="The upload is whole: nothing partial, no file shorter than it says.")


def _stage_asset(
    stage: ModuleType,
    *,
    deps: Sequence[dg.AssetsDefinition],
    kinds: set[str],
    of: str = "checkpoint",
    pool: str | None = None,
    more_checks: Sequence[CheckSpec] = (),
) -> Callable[[Callable[..., dg.MaterializeResult]], dg.AssetsDefinition]:
    """An asset whose version and checks are those of its stage."""
    name = f"{stage.STAGE}_{of}"
    return dg.asset(
        name=name,
        deps=deps,
        partitions_def=FINE_TUNES,
        group_name=GROUP,
        kinds=kinds,
        code_version=stage.CODE_VERSION,
        check_specs=asset_check_specs(name, [*stage.CHECKS, *more_checks]),
        pool=pool,
    )


def _materialized(
    artifact: Artifact, partition: str, *, more_reports: Sequence[CheckReport] = (), **more: Any
) -> dg.MaterializeResult:
    """Report a stage's output: the content digest is its data version, so that equal bytes leave downstream fresh."""
    manifest = artifact.manifest
    return dg.MaterializeResult(
        data_version=dg.DataVersion(manifest.content_digest),
        metadata={**more, **artifact_metadata(artifact)},
        check_results=[
            asset_check_result(report, partition) for report in [*load_reports(manifest.result), *more_reports]
        ],
    )


@dg.asset(group_name=GROUP, kinds={"huggingface", "qwen"})
def base_model(context: dg.AssetExecutionContext, pipeline: dg.ResourceParam[Pipeline]) -> dg.MaterializeResult:
    """The full-precision model that the fine-tunes were trained from.

    A directory, or a snapshot of a hub's repository. It is read once to be hashed; its digest is part of the identity
    of everything downstream.
    """
    with pipeline.step(context) as observe:
        base = pipeline.base
        digest = checkpoint_digest(base, observe=observe)
    nbytes = sum(file.stat().st_size for file in base.glob("*.safetensors"))
    return dg.MaterializeResult(
        data_version=dg.DataVersion(digest),
        metadata={"name": pipeline.base_name, **directory_metadata(base, digest, nbytes)},
    )


@dg.asset(
    group_name=GROUP,
    kinds={"huggingface", "pytorch"},
    partitions_def=FINE_TUNES,
    check_specs=asset_check_specs("fine_tune", [COMPLETE]),
)
def fine_tune(context: dg.AssetExecutionContext, pipeline: dg.ResourceParam[Pipeline]) -> dg.MaterializeResult:
    """A fine-tune as it arrived in the inbox: a PEFT adapter or a whole checkpoint.

    It is read and never written to. An upload that is not whole fails the check `complete` and goes no further.
    """
    with pipeline.step(context):
        arrival = pipeline.inbox.find(context.partition_key)
        obstacle = arrival.obstacle()
        digest = arrival.digest if obstacle else fine_tune_digest(arrival.path)
    return _arrived(arrival, digest, obstacle)


@_stage_asset(merge, deps=[base_model, fine_tune], kinds={"pytorch", "qwen"})
def merged_checkpoint(context: dg.AssetExecutionContext, pipeline: dg.ResourceParam[Pipeline]) -> dg.MaterializeResult:
    """Base and fine-tune as one full-precision checkpoint.

    Every adapter tensor lands on exactly one base tensor: `W + scaling * B @ A`, computed in float32 and rounded once.
    A full fine-tune passes through. With the setting `store.merged = false` the weights are padded in the same pass;
    what is kept here is a recipe with their digests.
    """
    with pipeline.step(context) as observe:
        artifact = pipeline.merged(context, observe)
    return _materialized(artifact, context.partition_key)


@_stage_asset(pad, deps=[merged_checkpoint], kinds={"pytorch", "qwen"})
def padded_checkpoint(context: dg.AssetExecutionContext, pipeline: dg.ResourceParam[Pipeline]) -> dg.MaterializeResult:
    """The merged checkpoint with its MLP widened, so that every tensor-parallel rank gets whole quantization groups.

    The function that the model computes is unchanged: the new channels are zero. This must come **before**
    quantization, because packed codes and scales can no longer be widened freely.
    """
    settings = pipeline.settings
    with pipeline.step(context) as observe:
        artifact = pad.pad(
            source=pipeline.latest(context, merge.STAGE).path,
            destination=pipeline.slot(context),
            spec=settings.padding_spec,
            hard_links=settings.store.hard_links,
            observe=observe,
        )
    return _materialized(artifact, context.partition_key)


@_stage_asset(calibrate, deps=[padded_checkpoint], kinds={"huggingface", "pytorch"}, of="tokens", pool="gpu")
def calibration_tokens(context: dg.AssetExecutionContext, pipeline: dg.ResourceParam[Pipeline]) -> dg.MaterializeResult:
    """The tokens that the fine-tune is quantized with: text in its own chat template, drawn by seed.

    A mixture of experts is run over them once, a layer at a time: an expert that too few of them reach fails the check
    `experts_reached` before anything is quantized.
    """
    quantization, settings = pipeline.settings.quantization, pipeline.settings.calibration
    with pipeline.step(context) as observe:
        artifact = calibrate.calibrate(
            source=pipeline.latest(context, pad.STAGE).path,
            text=pipeline.calibration_text,
            destination=pipeline.slot(context),
            spec=quantization.calibration,
            all_experts=quantization.all_experts,
            min_expert_tokens=settings.min_expert_tokens,
            device=quantization.device,
            observe=observe,
        )
    statistics = artifact.manifest.result["statistics"]
    return _materialized(
        artifact,
        context.partition_key,
        statistics=dg.MetadataValue.json(statistics),
        experts=dg.MetadataValue.json(artifact.manifest.result["experts"]),
        tokens=statistics["tokens"],
        plot=dg.MetadataValue.md(inline_plot(artifact.path / calibrate.PLOT)),
    )


@_stage_asset(quantize, deps=[padded_checkpoint, calibration_tokens], kinds={"pytorch", "qwen"}, pool="gpu")
def quantized_checkpoint(
    context: dg.AssetExecutionContext, pipeline: dg.ResourceParam[Pipeline]
) -> dg.MaterializeResult:
    """The padded checkpoint with its linear layers as integers of few bits and one scale per group (GPTQ).

    The engine runs in a process and a Python environment of its own. One step at a time holds the pool `gpu`.
    """
    with pipeline.step(context) as observe:
        artifact = pipeline.quantized(context, observe, source=pad.STAGE)
    earlier = version_before(pipeline.store, context.partition_key, artifact)
    return _materialized(
        artifact,
        context.partition_key,
        worst_modules=loss_table(artifact.manifest.result["losses"]),
        evidence=dg.MetadataValue.path(artifact.path / EVIDENCE),
        evidence_summary=dg.MetadataValue.json(artifact.manifest.result["evidence"]),
        evidence_plot=dg.MetadataValue.md(evidence_markdown(artifact, earlier)),
    )


@_stage_asset(
    validate,
    deps=[merged_checkpoint, quantized_checkpoint],
    kinds={"report", "matplotlib"},
    pool="gpu",
    more_checks=[NOT_WORSE],
)
def validated_checkpoint(
    context: dg.AssetExecutionContext, pipeline: dg.ResourceParam[Pipeline]
) -> dg.MaterializeResult:
    """The proof: what the quantized checkpoint was held against, with a report.

    Structure, a load without a missing tensor, perplexity and KL divergence against the merged checkpoint on text that
    calibration did not see, answers side by side, and those of the real serving engine where one is configured. The
    report is in this asset's metadata.
    """
    settings = pipeline.settings.validation
    with pipeline.step(context) as observe:
        quantized = pipeline.latest(context, quantize.STAGE)
        earlier = version_before(pipeline.store, context.partition_key, quantized)
        inputs = validate.ValidationInputs(
            reference=pipeline.latest(context, merge.STAGE).path,
            candidate=quantized.path,
            text=pipeline.text,
            base=pipeline.base,
            padded=pipeline.latest(context, pad.STAGE).path,
            unpadded=pipeline.latest(context, quantize.UNPADDED_STAGE).path if settings.unpadded else None,
            calibration=calibration_of(pipeline.store, context.partition_key, quantized),
            before=earlier.path if earlier else None,
        )
        plan = validate.ValidationPlan(
            tensor_parallel=pipeline.settings.padding.tensor_parallel,
            targets=settings.declared or pipeline.settings.padding.declared,
            limits=settings.limits_of(context.partition_key),
            prompts=settings.prompts,
            windows=settings.windows,
            seq_len=settings.seq_len,
            serving=pipeline.settings.serving_plan(),
            tasks=pipeline.settings.task_plan(),
        )
        artifact = validate.validate(
            inputs, plan=plan, destination=pipeline.slot(context), engine=pipeline.engine, observe=observe
        )
    return _materialized(
        artifact,
        context.partition_key,
        more_reports=[against_last_release(pipeline.store, context.partition_key, artifact)],
        report=dg.MetadataValue.md(report_markdown(artifact.path)),
        page=dg.MetadataValue.path(artifact.path / PAGE),
    )


@_stage_asset(publish, deps=[quantized_checkpoint, validated_checkpoint], kinds={"huggingface", "qwen"})
def published_checkpoint(
    context: dg.AssetExecutionContext, pipeline: dg.ResourceParam[Pipeline]
) -> dg.MaterializeResult:
    """The release: the quantized checkpoint, its model card and its validation report, ready to serve.

    Publishing reads the reports itself and demands that they are about exactly these bytes, however it was started.
    """
    with pipeline.step(context) as observe:
        artifact = publish.publish(
            quantized=pipeline.latest(context, quantize.STAGE).path,
            validated=pipeline.latest(context, validate.STAGE).path,
            destination=pipeline.slot(context),
            base_model=pipeline.base_name,
            fine_tune=context.partition_key,
            observe=observe,
        )
    return _materialized(artifact, context.partition_key)


@dg.asset(
    group_name=IMPORT_GROUP,
    kinds={"huggingface", "qwen"},
    partitions_def=IMPORTS,
    check_specs=asset_check_specs("imported_checkpoint", [COMPLETE], IMPORTS),
)
def imported_checkpoint(
    context: dg.AssetExecutionContext, pipeline: dg.ResourceParam[Pipeline]
) -> dg.MaterializeResult:
    """A checkpoint that somebody else quantized (GPTQ, AWQ or compressed-tensors), as it arrived among the imports."""
    with pipeline.step(context) as observe:
        arrival = pipeline.imports.find(context.partition_key)
        obstacle = arrival.obstacle()
        digest = arrival.digest if obstacle else repair.quantized_digest(arrival.path, observe=observe)
    return _arrived(arrival, digest, obstacle)


@dg.asset(
    name=f"{repair.STAGE}_checkpoint",
    deps=[imported_checkpoint],
    group_name=IMPORT_GROUP,
    kinds={"pytorch", "qwen"},
    partitions_def=IMPORTS,
    code_version=repair.CODE_VERSION,
    check_specs=asset_check_specs(f"{repair.STAGE}_checkpoint", repair.CHECKS, IMPORTS),
)
def repaired_checkpoint(
    context: dg.AssetExecutionContext, pipeline: dg.ResourceParam[Pipeline]
) -> dg.MaterializeResult:
    """The imported checkpoint with whole groups of zero codes in its MLPs, so that the configured ranks can share it.

    Nothing is quantized again: every live weight is proven to keep its bits, as the ranks will hold it.
    """
    with pipeline.step(context) as observe:
        artifact = repair.repair(
            source=pipeline.imports.require(context.partition_key).path,
            destination=pipeline.slot(context),
            tensor_parallel=pipeline.settings.padding_spec.ranks,
            observe=observe,
        )
    return _materialized(artifact, context.partition_key)


def _arrived(arrival: Arrival, digest: str, obstacle: str | None) -> dg.MaterializeResult:
    detail = obstacle or "Every file is there in its full length."
    report = CheckReport(name=COMPLETE.name, passed=obstacle is None, detail=detail)
    return dg.MaterializeResult(
        data_version=dg.DataVersion(digest),
        metadata=directory_metadata(arrival.path, digest, arrival.nbytes),
        check_results=[asset_check_result(report, arrival.name)],
    )
