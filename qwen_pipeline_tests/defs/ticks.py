"""Single evaluations of the sensor and the schedule, as Dagster's daemon does them."""

from datetime import UTC, datetime

import dagster as dg

from qwen_pipeline.definitions import code_location
from qwen_pipeline.defs.arrivals.sensors import fine_tune_inbox
from qwen_pipeline.defs.resources import configured_resources
from qwen_pipeline.defs.schedules import nightly
from qwen_pipeline_tests.site import Site


class Daemon:
    """Evaluates the inbox sensor as the daemon does: keeps the cursor, adds partitions and drops known run keys."""

    def __init__(self, site: Site, instance: dg.DagsterInstance) -> None:
        self.instance = instance
        self.definitions = code_location(site.settings)
        self.resources = configured_resources(site.settings)
        self.cursor: str | None = None
        self.run_keys: set[str] = set()
        self.skip_message = ""

    def evaluate(self) -> dg.SensorResult:
        """Return the result of a tick, without doing what it asks for."""
        context = dg.build_sensor_context(
            self.instance, self.cursor, definitions=self.definitions, resources=self.resources
        )
        result = fine_tune_inbox(context)
        assert isinstance(result, dg.SensorResult)
        return result

    def tick(self) -> list[str]:
        """Return the partitions for which this tick starts a run."""
        result = self.evaluate()
        self.cursor = result.cursor
        self.events = list(result.asset_events)
        self.skip_message = str(result.skip_reason.skip_message) if result.skip_reason else ""
        for request in result.dynamic_partitions_requests or ():
            if isinstance(request, dg.DeleteDynamicPartitionsRequest):
                for key in request.partition_keys:
                    self.instance.delete_dynamic_partition(request.partitions_def_name, key)
            else:
                self.instance.add_dynamic_partitions(request.partitions_def_name, list(request.partition_keys))
        started = [run for run in result.run_requests or () if run.run_key not in self.run_keys]
        self.run_keys |= {str(run.run_key) for run in started}
        return [str(run.partition_key) for run in started]

    def ticks(self, count: int) -> list[list[str]]:
        return [self.tick() for _ in range(count)]


def nightly_requests(site: Site, instance: dg.DagsterInstance) -> list[tuple[str | None, str | None]]:
    """Return (partition, run key) of each run that one tick of the nightly schedule requests."""
    context = dg.build_schedule_context(
        instance,
        datetime(2026, 11, 24, 2, tzinfo=UTC),
        resources=configured_resources(site.settings),
        repository_def=code_location(site.settings).get_repository_def(),
    )
    data = nightly.evaluate_tick(context)
    return [(request.partition_key, request.run_key) for request in data.run_requests or ()]
