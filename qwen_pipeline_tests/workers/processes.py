"""Processes of a test: whether they run, and waiting for their end."""

import os
import select
from pathlib import Path


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def wait_until_ended(pid: int, seconds: float = 30) -> None:
    try:
        process = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        ended, _, _ = select.select([process], [], [], seconds)
    finally:
        os.close(process)
    assert ended, f"process {pid} still runs after {seconds} s"
