"""The assets from a base model and a fine-tune to a published checkpoint.

There is one asset per directory, and each is materialized by one stage. Assets exchange paths through the store, never
tensors. The checks of a stage's output are the checks of its asset.
"""

# pyright: reportMissingTypeArgument=false, reportUnknownParameterType=false
# Dagster recognizes MaterializeResult in a signature only without its type argument.

from collections.abc import Iterator

import dagster as dg

from qwen_pipeline.checkpoint.digest_cache import checkpoint_digest
from qwen_pipeline.config import Settings
from qwen_pipeline.config.inputs import (
    base_model_name,
    base_model_path,
    calibration_source,
    held_out_text,
    quantizer_environment,
)
from qwen_pipeline.defs.checks import asset_check_specs
from qwen_pipeline.defs.metadata import (
    artifact_metadata,
    directory_metadata,
    evidence_markdown,
    inline_plot,
    loss_table,
)
from qwen_pipeline.defs.partitions import FINE_TUNES
from qwen_pipeline.defs.resources import PipelineSettings, Steps, WorkspaceResource
from qwen_pipeline.defs.stage_assets import COMPLETE, FINE_TUNE_GROUP, stage_asset, stage_result, upload_result
from qwen_pipeline.evaluation.regression import NOT_WORSE
from qwen_pipeline.evaluation.report.html import PAGE
from qwen_pipeline.evaluation.report.markdown import report_markdown
from qwen_pipeline.models.open import fine_tune_digest
from qwen_pipeline.quantization.evidence import EVIDENCE
from qwen_pipeline.stages import calibrate, merge, pad, publish, quantize, validate
from qwen_pipeline.stages.merge_pad import merge_pad
from qwen_pipeline.status import against_last_release, calibration_of, version_before


@dg.asset(group_name=FINE_TUNE_GROUP, kinds={"huggingface", "qwen"})
def base_model(
    context: dg.AssetExecutionContext,
    workspace: WorkspaceResource,
    settings: PipelineSettings,
    steps: Steps,
) -> dg.MaterializeResult:
    """The full-precision model that the fine-tunes were trained from: a directory, or a snapshot from the hub.

    It is read once to compute its digest, which is part of the identity of every downstream asset.
    """
    with steps.run(context) as observe:
        config = settings.resolve(workspace)
        base = base_model_path(config)
        digest = checkpoint_digest(base, observe=observe)
    nbytes = sum(file.stat().st_size for file in base.glob("*.safetensors"))
    return dg.MaterializeResult(
        data_version=dg.DataVersion(digest),
        metadata={"name": base_model_name(config), **directory_metadata(base, digest, nbytes)},
    )


@dg.asset(
    group_name=FINE_TUNE_GROUP,
    kinds={"huggingface", "pytorch"},
    partitions_def=FINE_TUNES,
    check_specs=asset_check_specs("fine_tune", [COMPLETE]),
)
def fine_tune(context: dg.AssetExecutionContext, workspace: WorkspaceResource, steps: Steps) -> dg.MaterializeResult:
    """A fine-tune in the inbox, exactly as it was uploaded: a PEFT adapter or a complete checkpoint.

    The upload is only read, never modified. If it is not complete, the check `complete` fails and the run stops here.
    """
    with steps.run(context):
        upload = workspace.fine_tunes.find(context.partition_key)
        obstacle = upload.obstacle()
        digest = upload.digest if obstacle else fine_tune_digest(upload.path)
    return upload_result(upload, digest, obstacle)


@stage_asset(merge, deps=[base_model, fine_tune], kinds={"pytorch", "qwen"})
def merged_checkpoint(
    context: dg.AssetExecutionContext,
    workspace: WorkspaceResource,
    settings: PipelineSettings,
    steps: Steps,
) -> dg.MaterializeResult:
    """The base model and the fine-tune as one full-precision checkpoint.

    Every adapter tensor is applied to exactly one base tensor: `W + scaling * B @ A`, computed in float32 and rounded
    once. The weights of a full fine-tune are unchanged.

    With the setting `store.merged = false`, merging and padding are a single pass. This checkpoint is then stored
    without its weights, as a recipe with their digests.
    """
    with steps.run(context) as observe:
        config = settings.resolve(workspace)
        artifact = merge.merge(
            base=base_model_path(config),
            fine_tune=workspace.fine_tunes.require(context.partition_key).path,
            destination=workspace.slot(context),
            base_names=(base_model_name(config), *config.base_names),
            base_revision=config.base_revision,
            hard_links=config.store.hard_links,
            observe=observe,
        )
    return stage_result(artifact, context.partition_key)


@stage_asset(pad, deps=[merged_checkpoint], kinds={"pytorch", "qwen"})
def padded_checkpoint(
    context: dg.AssetExecutionContext,
    workspace: WorkspaceResource,
    settings: PipelineSettings,
    steps: Steps,
) -> dg.MaterializeResult:
    """The merged checkpoint with wider MLPs, so that every tensor-parallel rank gets whole quantization groups.

    The new channels are zero, so the model computes the same function. Padding must come **before** quantization:
    packed codes and scales cannot be widened freely.
    """
    with steps.run(context) as observe:
        config = settings.resolve(workspace)
        artifact = pad.pad(
            source=workspace.latest(context, merge.STAGE).path,
            destination=workspace.slot(context),
            spec=config.padding_spec,
            hard_links=config.store.hard_links,
            observe=observe,
        )
    return stage_result(artifact, context.partition_key)


@dg.multi_asset(
    specs=[*merged_checkpoint.specs, *padded_checkpoint.specs],
    check_specs=[*merged_checkpoint.check_specs, *padded_checkpoint.check_specs],
)
def merged_and_padded_checkpoints(
    context: dg.AssetExecutionContext,
    workspace: WorkspaceResource,
    settings: PipelineSettings,
    steps: Steps,
) -> Iterator[dg.MaterializeResult]:
    """Merge and pad in a single pass: only the padded weights are stored. Used with `store.merged = false`."""
    with steps.run(context) as observe:
        config, slot = settings.resolve(workspace), workspace.slot(context)
        merged, padded = merge_pad(
            base=base_model_path(config),
            fine_tune=workspace.fine_tunes.require(context.partition_key).path,
            merged=slot,
            padded=slot,
            base_names=(base_model_name(config), *config.base_names),
            base_revision=config.base_revision,
            spec=config.padding_spec,
            hard_links=config.store.hard_links,
            observe=observe,
        )
    yield stage_result(merged, context.partition_key, asset=merged_checkpoint.key)
    yield stage_result(padded, context.partition_key, asset=padded_checkpoint.key)


@stage_asset(calibrate, deps=[padded_checkpoint], kinds={"huggingface", "pytorch"}, of="tokens", pool="gpu")
def calibration_tokens(
    context: dg.AssetExecutionContext,
    workspace: WorkspaceResource,
    settings: PipelineSettings,
    steps: Steps,
) -> dg.MaterializeResult:
    """The tokens that calibrate the quantization: text in the fine-tune's own chat template, drawn with a fixed seed.

    A mixture-of-experts model is run on them once, layer by layer. If an expert receives too few tokens, the check
    `experts_reached` fails before anything is quantized.
    """
    with steps.run(context) as observe:
        config = settings.resolve(workspace)
        artifact = calibrate.calibrate(
            source=workspace.latest(context, pad.STAGE).path,
            text=calibration_source(config),
            destination=workspace.slot(context),
            spec=config.quantization.calibration,
            all_experts=config.quantization.all_experts,
            min_expert_tokens=config.calibration.min_expert_tokens,
            device=config.quantization.device,
            observe=observe,
        )
    statistics = artifact.manifest.result["statistics"]
    return stage_result(
        artifact,
        context.partition_key,
        statistics=dg.MetadataValue.json(statistics),
        experts=dg.MetadataValue.json(artifact.manifest.result["experts"]),
        tokens=statistics["tokens"],
        plot=dg.MetadataValue.md(inline_plot(artifact.path / calibrate.PLOT)),
    )


@stage_asset(quantize, deps=[padded_checkpoint, calibration_tokens], kinds={"pytorch", "qwen"}, pool="gpu")
def quantized_checkpoint(
    context: dg.AssetExecutionContext,
    workspace: WorkspaceResource,
    settings: PipelineSettings,
    steps: Steps,
) -> dg.MaterializeResult:
    """The padded checkpoint with the weights of its linear layers as GPTQ codes and scales.

    The quantizer runs in a process and a Python environment of its own. Steps that use the GPU share the pool `gpu`, so
    that one runs at a time.
    """
    with steps.run(context) as observe:
        config = settings.resolve(workspace)
        artifact = quantize.quantize(
            source=workspace.latest(context, pad.STAGE).path,
            destination=workspace.slot(context),
            calibration=workspace.latest(context, calibrate.STAGE).path,
            spec=config.quantization,
            engine=quantizer_environment(config),
            observe=observe,
        )
    previous = version_before(workspace.store, context.partition_key, artifact)
    return stage_result(
        artifact,
        context.partition_key,
        worst_modules=loss_table(artifact.manifest.result["losses"]),
        evidence=dg.MetadataValue.path(artifact.path / EVIDENCE),
        evidence_summary=dg.MetadataValue.json(artifact.manifest.result["evidence"]),
        evidence_plot=dg.MetadataValue.md(evidence_markdown(artifact, previous)),
    )


@dg.asset(
    deps=[merged_checkpoint, calibration_tokens],
    partitions_def=FINE_TUNES,
    group_name=FINE_TUNE_GROUP,
    kinds={"pytorch", "qwen"},
    code_version=quantize.CODE_VERSION,
    pool="gpu",
)
def unpadded_quantized_checkpoint(
    context: dg.AssetExecutionContext,
    workspace: WorkspaceResource,
    settings: PipelineSettings,
    steps: Steps,
) -> dg.MaterializeResult:
    """The merged checkpoint, quantized without padding, as a baseline for the cost of padding.

    It exists only with the setting `validation.unpadded = true`. Validation measures it beside the other checkpoints.
    It is never published, so its own quality blocks nothing.
    """
    with steps.run(context) as observe:
        config = settings.resolve(workspace)
        artifact = quantize.quantize(
            source=workspace.latest(context, merge.STAGE).path,
            destination=workspace.slot(context),
            calibration=workspace.latest(context, calibrate.STAGE).path,
            spec=config.quantization,
            engine=quantizer_environment(config),
            stage=quantize.UNPADDED_STAGE,
            observe=observe,
        )
    return dg.MaterializeResult(
        data_version=dg.DataVersion(artifact.manifest.content_digest), metadata=artifact_metadata(artifact)
    )


@stage_asset(
    validate,
    deps=[merged_checkpoint, quantized_checkpoint],
    kinds={"report", "matplotlib"},
    pool="gpu",
    more_checks=[NOT_WORSE],
)
def validated_checkpoint(
    context: dg.AssetExecutionContext,
    workspace: WorkspaceResource,
    settings: PipelineSettings,
    steps: Steps,
) -> dg.MaterializeResult:
    """The validation of the quantized checkpoint, with its report in the metadata.

    It checks the structure and that the checkpoint loads without a missing tensor. It measures perplexity and KL
    divergence against the merged checkpoint on held-out text, and compares answers side by side. If a serving engine is
    configured, it also compares that engine's answers.
    """
    with steps.run(context) as observe:
        config = settings.resolve(workspace)
        validation, store, name = config.validation, workspace.store, context.partition_key
        quantized = workspace.latest(context, quantize.STAGE)
        previous = version_before(store, name, quantized)
        inputs = validate.ValidationInputs(
            reference=workspace.latest(context, merge.STAGE).path,
            candidate=quantized.path,
            text=held_out_text(config),
            base=base_model_path(config),
            padded=workspace.latest(context, pad.STAGE).path,
            unpadded=workspace.latest(context, quantize.UNPADDED_STAGE).path if validation.unpadded else None,
            calibration=calibration_of(store, name, quantized),
            before=previous.path if previous else None,
        )
        plan = validate.ValidationPlan(
            tensor_parallel=config.padding.tensor_parallel,
            targets=validation.declared or config.padding.declared,
            limits=validation.limits_of(name),
            prompts=validation.prompts,
            windows=validation.windows,
            seq_len=validation.seq_len,
            serving=config.serving_plan(),
            tasks=config.task_plan(),
        )
        artifact = validate.validate(
            inputs,
            plan=plan,
            destination=workspace.slot(context),
            engine=quantizer_environment(config),
            observe=observe,
        )
    return stage_result(
        artifact,
        name,
        more_reports=[against_last_release(store, name, artifact)],
        report=dg.MetadataValue.md(report_markdown(artifact.path)),
        page=dg.MetadataValue.path(artifact.path / PAGE),
    )


@stage_asset(publish, deps=[quantized_checkpoint, validated_checkpoint], kinds={"huggingface", "qwen"})
def published_checkpoint(
    context: dg.AssetExecutionContext,
    workspace: WorkspaceResource,
    settings: PipelineSettings,
    steps: Steps,
) -> dg.MaterializeResult:
    """The release: the quantized checkpoint with its model card and validation report, ready to serve.

    However it is started, publishing reads the validation reports and requires that all blocking checks passed for
    exactly these bytes.
    """
    with steps.run(context) as observe:
        artifact = publish.publish(
            quantized=workspace.latest(context, quantize.STAGE).path,
            validated=workspace.latest(context, validate.STAGE).path,
            destination=workspace.slot(context),
            base_model=base_model_name(settings.resolve(workspace)),
            fine_tune=context.partition_key,
            observe=observe,
        )
    return stage_result(artifact, context.partition_key)


def fine_tune_assets(settings: Settings) -> list[dg.AssetsDefinition]:
    """Return the assets that the settings require, from the base model to the release."""
    merging_and_padding = (
        [merged_checkpoint, padded_checkpoint] if settings.store.merged else [merged_and_padded_checkpoints]
    )
    assets = [base_model, fine_tune, *merging_and_padding, calibration_tokens, quantized_checkpoint]
    if not settings.validation.unpadded:
        return [*assets, validated_checkpoint, published_checkpoint]
    baseline = unpadded_quantized_checkpoint
    measured = validated_checkpoint.map_asset_specs(lambda spec: spec.merge_attributes(deps=[baseline]))
    return [*assets, baseline, measured, published_checkpoint]
