"""The assets from calibration tokens to a published checkpoint."""

# pyright: reportMissingTypeArgument=false, reportUnknownParameterType=false
# Dagster recognizes MaterializeResult in a signature only without its type argument.

from pathlib import Path
from typing import Any

import dagster as dg

from qwen_pipeline.checkpoint.store.products import product
from qwen_pipeline.config import Settings
from qwen_pipeline.config.inputs import (
    base_model_name,
    base_model_path,
    calibration_source,
    held_out_text,
    quantizer_environment,
)
from qwen_pipeline.defs.assets import merged_checkpoint, padded_checkpoint
from qwen_pipeline.defs.metadata import (
    artifact_metadata,
    card_markdown,
    evidence_markdown,
    inline_plot,
    loss_table,
    recipe_metadata,
    significant,
    spent,
)
from qwen_pipeline.defs.partitions import FINE_TUNES
from qwen_pipeline.defs.resources import PipelineSettings, Steps, WorkspaceResource
from qwen_pipeline.defs.stage_assets import FINE_TUNE_GROUP, needless_result, stage_asset, stage_result
from qwen_pipeline.evaluation.regression import NOT_WORSE
from qwen_pipeline.evaluation.report.html import PAGE
from qwen_pipeline.evaluation.report.markdown import report_markdown
from qwen_pipeline.quantization.evidence import EVIDENCE
from qwen_pipeline.releases.promotion import offer
from qwen_pipeline.stages import calibrate, merge, pad, publish, quantize, validate
from qwen_pipeline.status import against_last_release, calibration_of, latest_manifests, other_merge_of, version_before


@stage_asset(calibrate, deps=[padded_checkpoint], kinds={"huggingface", "pytorch"}, of="tokens", pool="gpu")
def calibration_tokens(
    context: dg.AssetExecutionContext,
    workspace: WorkspaceResource,
    settings: PipelineSettings,
    steps: Steps,
) -> dg.MaterializeResult:
    """The tokens that calibrate the quantization: text in the fine-tune's own chat template, drawn with a fixed seed.

    A mixture-of-experts model runs on them once, layer by layer. If an expert receives too few tokens, the check
    `experts_reached` fails before anything is quantized.
    """
    with steps.run(context) as observe:
        config = settings.of_product(workspace, context)
        if not config.quantization.needs_calibration:  # another recipe's quantization does, so the asset exists
            because = "8-bit floats need no calibration."
            return needless_result(context.partition_key, because=because, checks=calibrate.CHECKS)
        artifact = calibrate.calibrate(
            source=workspace.latest(context, pad.STAGE).path,
            text=calibration_source(config),
            destination=workspace.slot(context),
            spec=config.quantization.calibration,
            text_spec=config.calibration.text_spec,
            all_experts=config.quantization.all_experts,
            min_expert_tokens=config.calibration.min_expert_tokens,
            device=config.quantization.device,
            observe=observe,
        )
    statistics = artifact.manifest.result["statistics"]
    return stage_result(
        artifact,
        context.partition_key,
        prices=config.costs,
        statistics=dg.MetadataValue.json(statistics),
        experts=dg.MetadataValue.json(artifact.manifest.result["experts"]),
        tokens=statistics["tokens"],
        plot=dg.MetadataValue.md(inline_plot(artifact.path / calibrate.PLOT)),
    )


def _calibration(context: dg.AssetExecutionContext, workspace: WorkspaceResource, config: Settings) -> Path | None:
    """Return the directory of the calibration tokens; None if the method of the quantization needs none."""
    if not config.quantization.needs_calibration:
        return None
    return workspace.latest(context, calibrate.STAGE).path


@stage_asset(quantize, deps=[padded_checkpoint, calibration_tokens], kinds={"pytorch", "qwen"}, pool="gpu")
def quantized_checkpoint(
    context: dg.AssetExecutionContext,
    workspace: WorkspaceResource,
    settings: PipelineSettings,
    steps: Steps,
) -> dg.MaterializeResult:
    """The padded checkpoint with the weights of its linear layers as GPTQ codes and scales, or as 8-bit floats.

    GPTQ's quantizer runs in a process and a Python environment of its own; 8-bit floats (`quantization.method`) need
    neither it nor calibration tokens. Steps that use the GPU share the pool `gpu`, so that one runs at a time.
    """
    with steps.run(context) as observe:
        config = settings.of_product(workspace, context)
        artifact = quantize.quantize(
            source=workspace.latest(context, pad.STAGE).path,
            destination=workspace.slot(context),
            calibration=_calibration(context, workspace, config),
            spec=config.quantization,
            engine=quantizer_environment(config),
            observe=observe,
        )
    previous = version_before(workspace.store, context.partition_key, artifact)
    return stage_result(
        artifact,
        context.partition_key,
        prices=config.costs,
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

    It exists only with the setting `validation.unpadded = true`. Validation measures it with the other checkpoints. It
    is never published, so its own quality blocks nothing.
    """
    with steps.run(context) as observe:
        config = settings.of_product(workspace, context)
        artifact = quantize.quantize(
            source=workspace.latest(context, merge.STAGE).path,
            destination=workspace.slot(context),
            calibration=_calibration(context, workspace, config),
            spec=config.quantization,
            engine=quantizer_environment(config),
            stage=quantize.UNPADDED_STAGE,
            observe=observe,
        )
    return dg.MaterializeResult(
        data_version=dg.DataVersion(artifact.manifest.content_digest),
        metadata=artifact_metadata(artifact, config.costs),
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
        config = settings.of_product(workspace, context)
        validation, store, name = config.validation, workspace.store, context.partition_key
        merged, quantized = (workspace.latest(context, stage) for stage in (merge.STAGE, quantize.STAGE))
        previous = version_before(store, name, quantized)
        inputs = validate.ValidationInputs(
            reference=merged.path,
            candidate=quantized.path,
            text=held_out_text(config),
            base=base_model_path(config),
            other_merge=other_merge_of(store, name, merged).path if validation.other_merge else None,
            padded=workspace.latest(context, pad.STAGE).path,
            unpadded=workspace.latest(context, quantize.UNPADDED_STAGE).path if validation.unpadded else None,
            calibration=calibration_of(store, name, quantized),
            before=previous.path if previous else None,
        )
        artifact = validate.validate(
            inputs,
            plan=config.validation_plan(product(name).fine_tune, serving=config.serving_plan()),
            destination=workspace.slot(context),
            engine=quantizer_environment(config),
            observe=observe,
        )
    return stage_result(
        artifact,
        name,
        prices=config.costs,
        more_reports=[against_last_release(store, name, artifact)],
        report=dg.MetadataValue.md(report_markdown(artifact.path)),
        page=dg.MetadataValue.path(artifact.path / PAGE),
        **recipe_metadata(store, name),
    )


@stage_asset(publish, deps=[quantized_checkpoint, validated_checkpoint], kinds={"huggingface", "qwen"})
def published_checkpoint(
    context: dg.AssetExecutionContext,
    workspace: WorkspaceResource,
    settings: PipelineSettings,
    steps: Steps,
) -> dg.MaterializeResult:
    """The release: the quantized checkpoint with its model card and validation report, ready to serve.

    Regardless of how it is started, publishing reads the validation reports and requires that all blocking checks
    passed for exactly these bytes. The pointer `candidate` then leads to the release.
    """
    with steps.run(context) as observe:
        config = settings.of_product(workspace, context)
        named = product(context.partition_key)
        artifact = publish.publish(
            quantized=workspace.latest(context, quantize.STAGE).path,
            validated=workspace.store.require_latest(validate.STAGE, context.partition_key).path,
            destination=workspace.slot(context),
            base_model=base_model_name(config),
            fine_tune=named.fine_tune,
            recipe=named.recipe,
            signing_key=config.signing.key,
            signing_certificate=config.signing.certificate,
            observe=observe,
        )
        offer(config, context.partition_key, artifact.path)
    made = list(latest_manifests(workspace.store, context.partition_key))
    totals: dict[str, Any] = {
        "total_seconds": significant(sum(each.run.seconds for each in made)),
        **spent(*made, prices=config.costs, of="total_"),
    }
    return stage_result(
        artifact,
        context.partition_key,
        prices=config.costs,
        card=dg.MetadataValue.md(card_markdown(artifact.path)),
        **totals,
    )
