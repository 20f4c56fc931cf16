"""The assets from a base model and a fine-tune to a padded checkpoint.

There is one asset per directory, and each is materialized by one stage. Assets exchange paths through the store, never
tensors. The checks of a stage's output are the checks of its asset.
"""

# pyright: reportMissingTypeArgument=false, reportUnknownParameterType=false
# Dagster recognizes MaterializeResult in a signature only without its type argument.

from collections.abc import Iterator

import dagster as dg

from qwen_pipeline.checkpoint.digest_cache import checkpoint_digest
from qwen_pipeline.config.inputs import (
    base_model_name,
    base_model_path,
)
from qwen_pipeline.defs.checks import asset_check_specs
from qwen_pipeline.defs.metadata import (
    directory_metadata,
)
from qwen_pipeline.defs.partitions import FINE_TUNES
from qwen_pipeline.defs.resources import PipelineSettings, Steps, WorkspaceResource
from qwen_pipeline.defs.stage_assets import COMPLETE, FINE_TUNE_GROUP, stage_asset, stage_result, upload_result
from qwen_pipeline.models.base_names import KnownBase
from qwen_pipeline.models.open import fine_tune_digest
from qwen_pipeline.stages import merge, pad
from qwen_pipeline.stages.merge_pad import merge_pad


@dg.asset(group_name=FINE_TUNE_GROUP, kinds={"huggingface", "qwen"})
def base_model(
    context: dg.AssetExecutionContext,
    workspace: WorkspaceResource,
    settings: PipelineSettings,
    steps: Steps,
) -> dg.MaterializeResult:
    """The full-precision model that was fine-tuned: a directory, or a snapshot from the hub.

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
            base_weights=config.base_weights,
            leave_behind=config.leave_behind,
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
            base=KnownBase(
                root=base_model_path(config),
                names=(base_model_name(config), *config.base_names),
                revision=config.base_revision,
                weights=config.base_weights,
            ),
            fine_tune=workspace.fine_tunes.require(context.partition_key).path,
            merged=slot,
            padded=slot,
            leave_behind=config.leave_behind,
            spec=config.padding_spec,
            hard_links=config.store.hard_links,
            observe=observe,
        )
    yield stage_result(merged, context.partition_key, asset=merged_checkpoint.key)
    yield stage_result(padded, context.partition_key, asset=padded_checkpoint.key)
