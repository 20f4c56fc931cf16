"""The assets from a base model and a fine-tune to a padded checkpoint.

There is one asset per directory, and each is materialized by one stage. Assets exchange paths through the store, never
tensors. The checks of a stage's output are the checks of its asset.
"""

# pyright: reportMissingTypeArgument=false, reportUnknownParameterType=false
# Dagster recognizes MaterializeResult in a signature only without its type argument.

from collections.abc import Iterator
from dataclasses import replace

import dagster as dg

from qwen_pipeline.checkpoint.digest_cache import checkpoint_digest
from qwen_pipeline.checkpoint.store.canonical import canonical_sha256
from qwen_pipeline.checkpoint.store.destinations import Artifact, Slot
from qwen_pipeline.checkpoint.store.products import product
from qwen_pipeline.config import Settings, settings_of
from qwen_pipeline.config.inputs import base_model_name, base_model_path
from qwen_pipeline.defs.checks import asset_check_specs
from qwen_pipeline.defs.metadata import artifact_metadata, base_table, directory_metadata
from qwen_pipeline.defs.partitions import BASE_TAG, FINE_TUNES, PARTITION_TAG
from qwen_pipeline.defs.resources import PipelineSettings, Steps, WorkspaceResource
from qwen_pipeline.defs.stage_assets import (
    COMPLETE,
    FINE_TUNE_GROUP,
    needless_result,
    stage_asset,
    stage_result,
    upload_result,
)
from qwen_pipeline.intake.bases import known_bases, known_digest
from qwen_pipeline.intake.placement import base_of
from qwen_pipeline.models.base_names import KnownBase
from qwen_pipeline.models.open import fine_tune_digest
from qwen_pipeline.progress import Observe
from qwen_pipeline.stages import merge, pad
from qwen_pipeline.stages.merge_pad import merge_pad
from qwen_pipeline.transforms.codes.base_weights import BaseWeights


@dg.asset(group_name=FINE_TUNE_GROUP, kinds={"huggingface", "qwen"})
def base_model(
    context: dg.AssetExecutionContext,
    workspace: WorkspaceResource,
    settings: PipelineSettings,
    steps: Steps,
) -> dg.MaterializeResult:
    """The full-precision model that was fine-tuned: a directory, or a snapshot from the hub.

    It is read once to compute its digest, which is part of the identity of every downstream asset. If there are several
    bases, a run reads that of its own fine-tune, and the metadata has a row for each. The data version then covers all
    of them, so it also changes when a base is read for the first time; which one a checkpoint was merged into is in the
    metadata of that checkpoint.
    """
    with steps.run(context) as observe:
        config = settings.resolve(workspace)
        if not config.bases:
            return _only_base(config, observe)
        own = base_of(config, product(context.run.tags[PARTITION_TAG]).fine_tune) if _is_of_one(context) else None
        if own:
            context.instance.add_run_tags(context.run_id, {BASE_TAG: own})
        for name in config.bases if own is None else [own]:
            checkpoint_digest(base_model_path(settings_of(config, None, base=name)), observe=observe)
        digests = {name: known_digest(base.root) or "not read yet" for name, base in known_bases(config).items()}
    return dg.MaterializeResult(
        data_version=dg.DataVersion("sha256:" + canonical_sha256(digests)),
        metadata={"bases": base_table(config, digests), **({"base_of_this_run": own} if own else {})},
    )


def _only_base(config: Settings, observe: Observe) -> dg.MaterializeResult:
    base = base_model_path(config)
    digest = checkpoint_digest(base, observe=observe)
    nbytes = sum(file.stat().st_size for file in base.glob("*.safetensors"))
    return dg.MaterializeResult(
        data_version=dg.DataVersion(digest),
        metadata={"name": base_model_name(config), **directory_metadata(base, digest, nbytes)},
    )


def _is_of_one(context: dg.AssetExecutionContext) -> bool:
    """Return whether the asset is materialized in a run of one fine-tune, and not by itself."""
    return PARTITION_TAG in context.run.tags


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
        upload = workspace.fine_tunes.find(product(context.partition_key).fine_tune)
        obstacle = upload.obstacle()
        digest = upload.digest if obstacle else fine_tune_digest(upload.path)
    return upload_result(upload, context.partition_key, digest, obstacle)


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
        config = settings.of_product(workspace, context)
        artifact = _merged(workspace, workspace.slot(context), config, config.base_weights, observe)
    return stage_result(artifact, context.partition_key, prices=config.costs)


def _merged(
    workspace: WorkspaceResource, slot: Slot, config: Settings, weights: BaseWeights, observe: Observe
) -> Artifact:
    return merge.merge(
        base=base_model_path(config),
        fine_tune=workspace.fine_tunes.require(slot.product.fine_tune).path,
        destination=slot,
        base_names=(base_model_name(config), *config.base_names),
        base_revision=config.base_revision,
        base_weights=weights,
        leave_behind=config.leave_behind,
        hard_links=config.store.hard_links,
        observe=observe,
    )


@dg.asset(
    deps=[base_model, fine_tune],
    partitions_def=FINE_TUNES,
    group_name=FINE_TUNE_GROUP,
    kinds={"pytorch", "qwen"},
    code_version=merge.CODE_VERSION,
)
def otherwise_merged_checkpoint(
    context: dg.AssetExecutionContext,
    workspace: WorkspaceResource,
    settings: PipelineSettings,
    steps: Steps,
) -> dg.MaterializeResult:
    """The fine-tune, merged onto the base as it is stored, where `merged_checkpoint` rounds the base to NF4 first.

    It exists only with the setting `validation.other_merge = true`. The report of the validation compares both merges
    on held-out text. It is never quantized.
    """
    with steps.run(context) as observe:
        config = settings.of_product(workspace, context)
        if not config.validation.other_merge:  # another base is rounded, so the asset exists
            return needless_result(context.partition_key, because="This base is not rounded to NF4.")
        slot = replace(workspace.slot(context), beside=True)
        artifact = _merged(workspace, slot, config, config.other_base_weights, observe)
    return dg.MaterializeResult(
        data_version=dg.DataVersion(artifact.manifest.content_digest),
        metadata=artifact_metadata(artifact, config.costs),
    )


@stage_asset(pad, deps=[merged_checkpoint], kinds={"pytorch", "qwen"})
def padded_checkpoint(
    context: dg.AssetExecutionContext,
    workspace: WorkspaceResource,
    settings: PipelineSettings,
    steps: Steps,
) -> dg.MaterializeResult:
    """The merged checkpoint with wider MLPs, so that every tensor-parallel rank gets whole quantization groups.

    The new channels are halves of existing ones or zeros (`padding.layout`), so the model computes the same function.
    Padding must come **before** quantization: packed codes and scales cannot be widened freely.
    """
    with steps.run(context) as observe:
        config = settings.of_product(workspace, context)
        artifact = pad.pad(
            source=workspace.latest(context, merge.STAGE).path,
            destination=workspace.slot(context),
            spec=config.padding_spec,
            hard_links=config.store.hard_links,
            observe=observe,
        )
    return stage_result(artifact, context.partition_key, prices=config.costs)


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
    """Merge and pad in a single pass: only the padded weights are stored. Used with `store.merged = false`.

    With `store.padded = false` neither are: the pass computes digests, and later stages compute the weights again.
    """
    with steps.run(context) as observe:
        config, slot = settings.of_product(workspace, context), workspace.slot(context)
        merged, padded = merge_pad(
            base=KnownBase(
                root=base_model_path(config),
                names=(base_model_name(config), *config.base_names),
                revision=config.base_revision,
                weights=config.base_weights,
            ),
            fine_tune=workspace.fine_tunes.require(product(context.partition_key).fine_tune).path,
            merged=slot,
            padded=slot,
            leave_behind=config.leave_behind,
            spec=config.padding_spec,
            stores_padded=config.store.padded,
            hard_links=config.store.hard_links,
            observe=observe,
        )
    yield stage_result(merged, context.partition_key, prices=config.costs, asset=merged_checkpoint.key)
    yield stage_result(padded, context.partition_key, prices=config.costs, asset=padded_checkpoint.key)
