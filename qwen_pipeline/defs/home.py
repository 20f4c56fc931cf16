"""The Dagster instance that the server, the daemon and the command line share."""

import os
import subprocess
import sys
from pathlib import Path

import dagster as dg

from qwen_pipeline.config import Settings
from qwen_pipeline.errors import EnvironmentFault

SHIPPED = Path(__file__).parent


def dagster_home(settings: Settings) -> Path:
    """Return ``DAGSTER_HOME`` if it is set, else the workspace's own, made with its ``dagster.yaml`` when it is new."""
    if home := os.environ.get("DAGSTER_HOME"):
        return Path(home)
    own = settings.dagster_home
    own.mkdir(parents=True, exist_ok=True)
    if not (own / "dagster.yaml").exists():
        (own / "dagster.yaml").write_bytes((SHIPPED / "dagster.yaml").read_bytes())
    return own


def open_instance(settings: Settings) -> dg.DagsterInstance:
    return dg.DagsterInstance.from_config(str(dagster_home(settings)))


def serve(settings: Settings, *, port: int) -> None:
    """Run the web UI and the daemon on this machine's loopback until they end.

    Raises:
        EnvironmentFault: They ended with an error, as when the port is taken.
    """
    command = [sys.executable, "-m", "dagster", "dev", "-w", str(SHIPPED / "workspace.yaml")]
    address = ["--host", "127.0.0.1", "--port", str(port)]
    env = {**os.environ, "DAGSTER_HOME": str(dagster_home(settings).resolve())}
    code = subprocess.run([*command, *address], env=env, stdout=sys.stderr, check=False).returncode
    if code:
        raise EnvironmentFault(
            f"dagster dev ended with exit code {code}.", remedy="Read its last lines above, or try another --port."
        )
