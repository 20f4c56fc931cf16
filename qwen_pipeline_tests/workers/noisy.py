"""A package that prints when it is imported, and tells the test through a pipe."""

import os
from pathlib import Path

print("imported", flush=True)
if pipe := os.environ.get("IMPORTED"):
    Path(pipe).write_text("imported")
