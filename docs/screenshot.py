"""Take a screenshot of a page of a running UI: ``python docs/screenshot.py URL FILE.png [WIDTHxHEIGHT]``.

Needs Chromium. The asset graph is at ``/asset-groups``, in more detail at
``/locations/qwen_pipeline/asset-groups/fine_tune_to_release/lineage``.
"""

import shutil
import subprocess
import sys
import tempfile

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
OPTIONS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars",
)  # fmt: skip


def take(url: str, file: str, size: str = "1600x1000") -> None:
    """Load a page, wait for its data and layout, and save it as a PNG."""
    browser = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    if browser is None:
        sys.exit(f"None of {', '.join(BROWSERS)} is installed.")
    with tempfile.TemporaryDirectory() as profile:
        page = (f"--window-size={size.replace('x', ',')}", "--virtual-time-budget=30000", f"--screenshot={file}", url)
        subprocess.run(
            [browser, *OPTIONS, f"--user-data-dir={profile}", *page], check=True, timeout=120, stderr=subprocess.DEVNULL
        )


if __name__ == "__main__":
    take(*sys.argv[1:])
