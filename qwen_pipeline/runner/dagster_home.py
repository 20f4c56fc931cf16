"""The Dagster instance that the server, the daemon and the command line share."""

import os
import signal
import sys
from pathlib import Path
from typing import NoReturn

import dagster as dg

from qwen_pipeline.config import Settings
from qwen_pipeline.errors import InputRefused

_DEFAULTS = Path(__file__).parent


def dagster_home(settings: Settings) -> Path:
    """Return ``DAGSTER_HOME`` if it is set, else the workspace's home, which is created if it is missing.

    Raises:
        InputRefused: The variable is not an absolute path.
    """
    if home := os.environ.get("DAGSTER_HOME"):
        if not Path(home).is_absolute():
            raise InputRefused(
                f"DAGSTER_HOME is {home!r}, expected an absolute path.",
                remedy="Set it to one, or unset it: the workspace has a home of its own.",
            )
        return Path(home)
    directory = settings.dagster_home
    directory.mkdir(parents=True, exist_ok=True)
    if not (directory / "dagster.yaml").exists():
        (directory / "dagster.yaml").write_bytes((_DEFAULTS / "dagster.yaml").read_bytes())
    return directory


def open_instance(settings: Settings) -> dg.DagsterInstance:
    return dg.DagsterInstance.from_config(str(dagster_home(settings)))


def exec_server(settings: Settings, *, port: int) -> NoReturn:
    """Replace this process with the web UI, on the loopback interface, and the daemon; both log to stderr."""
    command = [sys.executable, "-m", "dagster", "dev", "-w", str(_DEFAULTS / "workspace.yaml")]
    address = ["--host", "127.0.0.1", "--port", str(port)]
    # a shell's background jobs ignore SIGINT, and Dagster would then ignore SIGTERM too
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    sys.stdout.flush()
    os.dup2(sys.stderr.fileno(), 1)
    os.execve(command[0], [*command, *address], {**os.environ, "DAGSTER_HOME": str(dagster_home(settings).resolve())})
