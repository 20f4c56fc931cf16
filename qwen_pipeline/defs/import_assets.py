"""The assets from a checkpoint quantized elsewhere to the repaired one."""

# pyright: reportMissingTypeArgument=false, reportUnknownParameterType=false
# Dagster recognizes MaterializeResult in a signature only without its type argument.

import dagster as dg

from qwen_pipeline.defs.checks import asset_check_specs
from qwen_pipeline.defs.partitions import IMPORTS
from qwen_pipeline.defs.resources import PipelineSettings, Steps, WorkspaceResource
from qwen_pipeline.defs.stage_assets import COMPLETE, IMPORT_GROUP, stage_asset, stage_result, upload_result
from qwen_pipeline.stages import repair


@dg.asset(
    group_name=IMPORT_GROUP,
    kinds={"huggingface", "qwen"},
    partitions_def=IMPORTS,
    check_specs=asset_check_specs("imported_checkpoint", [COMPLETE], IMPORTS),
)
def imported_checkpoint(
    context: dg.AssetExecutionContext, workspace: WorkspaceResource, steps: Steps
) -> dg.MaterializeResult:
    """A checkpoint that was quantized elsewhere (GPTQ, AWQ or compressed-tensors), exactly as it was uploaded."""
    with steps.run(context) as observe:
        upload = workspace.quantized_imports.find(context.partition_key)
        obstacle = upload.obstacle()
        digest = upload.digest if obstacle else repair.quantized_digest(upload.path, observe=observe)
    return upload_result(upload, context.partition_key, digest, obstacle)


@stage_asset(repair, deps=[imported_checkpoint], kinds={"pytorch", "qwen"}, group=IMPORT_GROUP, partitions=IMPORTS)
def repaired_checkpoint(
    context: dg.AssetExecutionContext,
    workspace: WorkspaceResource,
    settings: PipelineSettings,
    steps: Steps,
) -> dg.MaterializeResult:
    """The imported checkpoint with whole groups of zero codes added to its MLPs, so that all ranks can share it.

    Nothing is quantized again. The checks verify that every rank reads exactly the bits of the original weights.
    """
    with steps.run(context) as observe:
        config = settings.resolve(workspace)
        artifact = repair.repair(
            source=workspace.quantized_imports.require(context.partition_key).path,
            destination=workspace.slot(context),
            tensor_parallel=config.padding_spec.ranks,
            observe=observe,
        )
    return stage_result(artifact, context.partition_key, prices=config.costs)
