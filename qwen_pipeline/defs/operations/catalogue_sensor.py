"""The sensor that sends OpenLineage events of finished outputs to a data catalogue."""

import dagster as dg

from qwen_pipeline.config.openlineage import OpenLineage
from qwen_pipeline.defs.resources import PipelineSettings, WorkspaceResource
from qwen_pipeline.errors import listed


def catalogue_sensor(openlineage: OpenLineage) -> dg.SensorDefinition:
    """Return the sensor for a section of the settings; while the catalogue cannot be reached, its ticks fail."""

    @dg.sensor(
        name="openlineage",
        minimum_interval_seconds=60,
        default_status=dg.DefaultSensorStatus.RUNNING,
        description="Sends OpenLineage events of finished outputs to a data catalogue (`[openlineage]`).",
    )
    def emit(workspace: WorkspaceResource, settings: PipelineSettings) -> dg.SkipReason:
        from qwen_pipeline.catalogue import emit_new

        config = settings.resolve(workspace).model_copy(update={"openlineage": openlineage})
        sent = emit_new(config)
        return dg.SkipReason(f"Sent: {listed(sent)}." if sent else "Nothing new.")

    return emit
