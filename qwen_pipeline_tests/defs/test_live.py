"""A real server and daemon on the loopback: a fine-tune is launched over GraphQL and is published."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Generator
from contextlib import contextmanager, suppress
from typing import Any

import pytest

from qwen_pipeline.checkpoint.store.destinations import CheckpointStore
from qwen_pipeline.definitions import code_location
from qwen_pipeline.defs.arrivals.sensors import ARRIVAL_TAG
from qwen_pipeline.defs.stage_assets import FINE_TUNE_GROUP as GROUP
from qwen_pipeline_tests.site import FINE_TUNE, Site

pytestmark = pytest.mark.slow

WHERE = {"repositoryLocationName": "qwen_pipeline", "repositoryName": "__repository__"}

ADD_PARTITION = """mutation ($repository: RepositorySelector!, $key: String!) {
  addDynamicPartition(repositorySelector: $repository, partitionsDefName: "fine_tunes", partitionKey: $key) {
    __typename } }"""
LAUNCH = """mutation ($parameters: ExecutionParams!) { launchRun(executionParams: $parameters) {
  __typename ... on LaunchRunSuccess { run { runId } } ... on PythonError { message } } }"""
BACKFILL = """mutation ($parameters: LaunchBackfillParams!) { launchPartitionBackfill(backfillParams: $parameters) {
  __typename ... on LaunchBackfillSuccess { backfillId } ... on PythonError { message } } }"""
RUNS = "query { runsOrError { ... on Runs { results { runId jobName } } } }"
CHECKS = """query { assetNodes { groupName assetKey { path } assetChecksOrError { ... on AssetChecks {
  checks { name executionForLatestMaterialization { status evaluation { description severity } } } } } } }"""


class Server:
    """``qwen-pipeline ui`` in a process group of its own. Its stderr is the log of the server and of all runs."""

    def __init__(self, site: Site) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = int(probe.getsockname()[1])
        command = [sys.executable, "-m", "qwen_pipeline", "ui", "--port", str(self.port), "--json"]
        self.log: list[str] = []
        self.process = subprocess.Popen(
            command,
            env={**os.environ, **site.environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def ask(self, query: str, **variables: Any) -> dict[str, Any]:
        body = json.dumps({"query": query, "variables": variables}).encode()
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}/graphql", body, {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=60) as response:
            answer = json.load(response)
        assert "errors" not in answer, answer
        return answer["data"]

    def wait_until_up(self) -> None:
        """Wait for the log's announcement, which Dagster writes shortly before it listens, and then for the port."""
        self._wait_for(r"Serving dagster-webserver on ")
        while True:
            with suppress(ConnectionRefusedError), socket.create_connection(("127.0.0.1", self.port)):
                return
            time.sleep(0.1)

    def wait_for_run(self, run_id: str) -> str:
        return self._wait_for(rf"{run_id} - \d+ - RUN_(SUCCESS|FAILURE|CANCELED) - ")[1]

    def wait_for_backfill(self, backfill_id: str) -> str:
        return self._wait_for(rf"{backfill_id} completed iteration with status \w+\.(COMPLETED_\w+|FAILED)\.")[1]

    def add_fine_tune(self, name: str) -> None:
        added = self.ask(ADD_PARTITION, repository=WHERE, key=name)
        assert added["addDynamicPartition"]["__typename"] == "AddDynamicPartitionSuccess"

    def _wait_for(self, pattern: str) -> re.Match[str]:
        """Read the log up to a line that the pattern matches."""
        assert self.process.stderr
        for line in self.process.stderr:
            self.log.append(line)
            if match := re.search(pattern, line):
                return match
        raise AssertionError("".join(self.log))

    def stop(self) -> None:
        os.killpg(self.process.pid, signal.SIGINT)
        try:
            self.process.communicate(timeout=60)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)


@contextmanager
def serving(site: Site) -> Generator[Server]:
    running = Server(site)
    try:
        running.wait_until_up()
        yield running
    finally:
        running.stop()


def test_a_run_with_an_override_is_published_and_every_check_is_stored(site: Site) -> None:
    with serving(site) as server:
        publish_over_graphql(site, server)


def publish_over_graphql(site: Site, server: Server) -> None:
    assert server.process.stdout
    assert json.loads(server.process.stdout.readline())["url"].endswith(f":{server.port}")
    site.drop()
    arrival = site.inbox.require(FINE_TUNE)
    server.add_fine_tune(FINE_TUNE)
    tags = {"dagster/partition": FINE_TUNE, ARRIVAL_TAG: f"{FINE_TUNE}@{arrival.digest}"}
    parameters = {
        "selector": {**WHERE, "jobName": "process_fine_tune"},
        "mode": "default",
        "runConfigData": {
            "resources": {"settings": {"config": {"validation": {"windows": 3}}}},
        },
        "executionMetadata": {"tags": [{"key": key, "value": value} for key, value in tags.items()]},
    }
    launched = server.ask(LAUNCH, parameters=parameters)["launchRun"]
    assert launched["__typename"] == "LaunchRunSuccess", launched
    run_id = launched["run"]["runId"]

    assert server.wait_for_run(run_id) == "SUCCESS", "".join(server.log)

    stored = {
        (node["assetKey"]["path"][-1], check["name"]): status_of_check(check["executionForLatestMaterialization"])
        for node in server.ask(CHECKS)["assetNodes"]
        if node["groupName"] == GROUP
        for check in node["assetChecksOrError"].get("checks", ())
    }
    graph = code_location(site.settings).resolve_asset_graph()
    blocking = {
        (key.asset_key.to_user_string(), key.name): graph.get_check_spec(key).blocking
        for key in graph.asset_check_keys
        if graph.get(key.asset_key).group_name == GROUP
    }
    assert stored.keys() == blocking.keys()
    assert {status for key, status in stored.items() if blocking[key]} <= {"SUCCEEDED", "SKIPPED"}
    assert set(stored.values()) <= {"SUCCEEDED", "FAILED", "SKIPPED"}
    store = CheckpointStore(site.settings.store_root)
    assert (store.require_latest("published", FINE_TUNE).path / "README.md").is_file()
    assert store.require_latest("validated", FINE_TUNE).manifest.derivation.spec["windows"] == 3
    # The sensor has seen the same content meanwhile, and left it to the run by hand.
    assert [run["runId"] for run in server.ask(RUNS)["runsOrError"]["results"]] == [run_id]


def status_of_check(execution: dict[str, Any]) -> str:
    """Return the status of a check, or SKIPPED if its result says that it did not run."""
    evaluation = execution["evaluation"]
    is_skipped = evaluation["severity"] == "WARN" and evaluation["description"].startswith("Skipped: ")
    return "SKIPPED" if is_skipped else execution["status"]


def test_a_backfill_publishes_nothing_that_misses_a_limit(site: Site) -> None:
    site.configure("\n[validation.limits]\nmax_mean_kl = 0\n")
    site.drop()
    with serving(site) as server:
        backfill(server)

    store = CheckpointStore(site.settings.store_root)
    assert store.latest("validated", FINE_TUNE)
    assert not store.latest("published", FINE_TUNE)


def backfill(server: Server) -> None:
    server.add_fine_tune(FINE_TUNE)
    keys = [node["assetKey"] for node in server.ask(CHECKS)["assetNodes"] if node["groupName"] == GROUP]
    parameters = {"assetSelection": keys, "partitionNames": [FINE_TUNE]}
    launched = server.ask(BACKFILL, parameters=parameters)["launchPartitionBackfill"]
    assert launched["__typename"] == "LaunchBackfillSuccess", launched

    assert server.wait_for_backfill(launched["backfillId"]) == "COMPLETED_FAILED", "".join(server.log)
