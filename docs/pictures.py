"""Make the pictures of the documentation from the UI of the present settings: ``python docs/pictures.py``.

Run it after ``qwen-pipeline demo``, in the same directory. It starts the UI, takes every picture of :data:`PICTURES`
with Chromium, and ends the UI. With the names of pictures it takes only those; with ``URL FILE.png [WIDTHxHEIGHT]``,
any page of a running UI.
"""

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
OPTIONS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars",
)  # fmt: skip
PICTURES = {
    "asset-graph.png": ("/locations/qwen_pipeline/asset-groups/fine_tune_to_release/lineage", "2560x820"),
}
"""File in this directory -> a page of the UI, and the size of the window."""
UI_SECONDS = 300


def take(url: str, file: str, size: str = "1600x1000") -> None:
    """Load a page, wait for its data and layout, and save it as a PNG."""
    browser = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    if browser is None:
        sys.exit(f"None of {', '.join(BROWSERS)} is installed.")
    with tempfile.TemporaryDirectory() as profile:
        page = (f"--window-size={size.replace('x', ',')}", "--virtual-time-budget=30000", f"--screenshot={file}", url)
        subprocess.run(
            [browser, *OPTIONS, f"--user-data-dir={profile}", *page], check=True, timeout=300, stderr=subprocess.DEVNULL
        )


@contextmanager
def running_ui() -> Generator[str]:
    """Yield the address of a UI that runs during the body."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    command = [sys.executable, "-m", "qwen_pipeline", "ui", "--port", str(port)]
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        try:
            _wait_for(port, process)
            yield f"http://127.0.0.1:{port}"
        finally:
            os.killpg(process.pid, signal.SIGINT)
            process.wait(60)


def _wait_for(port: int, process: "subprocess.Popen[bytes]") -> None:
    end = time.monotonic() + UI_SECONDS
    while time.monotonic() < end and process.poll() is None:
        with suppress(OSError), socket.create_connection(("127.0.0.1", port)):
            return
        time.sleep(0.5)
    sys.exit("The UI did not start.")


if __name__ == "__main__":
    arguments = sys.argv[1:]
    if arguments and arguments[0].startswith("http"):
        take(*arguments)
    else:
        with running_ui() as address:
            for name in arguments or PICTURES:
                page, size = PICTURES[name]
                take(address + page, str(Path(__file__).with_name(name)), size)
