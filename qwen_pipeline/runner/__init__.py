"""Execution of the asset graph: the Dagster instance, the server, and runs in the current process."""
