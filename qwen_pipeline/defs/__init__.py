"""Dagster definitions: assets, checks, partitions, jobs, sensors, schedules and resources."""
