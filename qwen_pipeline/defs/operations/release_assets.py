"""The release in production: the pointer, and the checks that it waits for."""

# pyright: reportMissingTypeArgument=false, reportUnknownParameterType=false
# Dagster recognizes MaterializeResult in a signature only without its type argument.

import dagster as dg

from qwen_pipeline.defs.checks import asset_check_result, asset_check_specs
from qwen_pipeline.defs.partitions import FINE_TUNES
from qwen_pipeline.defs.quantization_assets import published_checkpoint
from qwen_pipeline.defs.resources import PipelineSettings, Steps, WorkspaceResource
from qwen_pipeline.lineage.pointers import link_of
from qwen_pipeline.releases.gates import CHECKS
from qwen_pipeline.releases.promotion import advance

RELEASE_GROUP = "release"
NAME = "production_release"


@dg.asset(
    name=NAME,
    deps=[published_checkpoint],
    partitions_def=FINE_TUNES,
    group_name=RELEASE_GROUP,
    kinds={"qwen"},
    check_specs=asset_check_specs(NAME, CHECKS),
)
def production_release(
    context: dg.AssetExecutionContext,
    workspace: WorkspaceResource,
    settings: PipelineSettings,
    steps: Steps,
) -> dg.MaterializeResult:
    """The release to be served: materializing it leads the pointer `production` to the last release that was made.

    It moves if every byte is the one that was validated, nothing behind the release was recalled, it is not worse than
    the one in production, and a person approved it where the setting `release.approval` requires that. Otherwise the
    pointer stays where it is, and the check that it waits for says how to go on.
    """
    product = context.partition_key
    with steps.run(context) as observe:
        config = settings.resolve(workspace)
        found = advance(config, product, observe=observe)
    served = found.release if found.in_production else found.before
    deliveries = {delivery.place: delivery.to_json() for delivery in found.deliveries}
    return dg.MaterializeResult(
        data_version=dg.DataVersion(served.name if served else "none"),
        metadata={
            "pointer": dg.MetadataValue.path(link_of(config.store_root, product, "production")),
            "moved": found.moved,
            "in_production": served.name if served else "none",
            "candidate": dg.MetadataValue.path(found.release),
            "content_digest": found.digest,
            **({"deliveries": dg.MetadataValue.json(deliveries)} if deliveries else {}),
        },
        check_results=[asset_check_result(report, product) for report in found.reports],
    )
