"""What is made only to be compared with, where the settings ask for it."""

# pyright: reportMissingTypeArgument=false, reportUnknownParameterType=false
# Dagster recognizes MaterializeResult in a signature only without its type argument.

import dagster as dg

from qwen_pipeline.defs.assets import GROUP, calibration_tokens, merged_checkpoint
from qwen_pipeline.defs.metadata import artifact_metadata
from qwen_pipeline.defs.partitions import FINE_TUNES
from qwen_pipeline.defs.resources import Pipeline
from qwen_pipeline.stages import merge, quantize


@dg.asset(
    deps=[merged_checkpoint, calibration_tokens],
    partitions_def=FINE_TUNES,
    group_name=GROUP,
    kinds={"pytorch", "qwen"},
    code_version=quantize.CODE_VERSION,
    pool="gpu",
)
def unpadded_quantized(context: dg.AssetExecutionContext, pipeline: dg.ResourceParam[Pipeline]) -> dg.MaterializeResult:
    """The merged checkpoint, quantized as the padded one is: what quantization would cost without padding.

    It is measured beside the others and never released, so what the solver says of it blocks nothing. The setting
    `validation.unpadded` asks for it.
    """
    with pipeline.step(context) as observe:
        artifact = pipeline.quantized(context, observe, source=merge.STAGE, stage=quantize.UNPADDED_STAGE)
    return dg.MaterializeResult(
        data_version=dg.DataVersion(artifact.manifest.content_digest), metadata=artifact_metadata(artifact)
    )
