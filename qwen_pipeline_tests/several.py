"""A site with two bases of different families and two recipes, and a fine-tune of each."""

import json
import shutil
from pathlib import Path
from typing import Any

from qwen_pipeline.checkpoint.lazy import CONFIG
from qwen_pipeline.models.inbox import MARKER
from qwen_pipeline_tests.site import Site, make_site
from qwen_pipeline_tests.tiny import tiny_adapter, tiny_qwen3

ADAPTER_CONFIG = "adapter_config.json"

SEVERAL = """
[bases.small]
model = "base"
names = ["lab/small-*"]

[bases.large]
model = "other"
revision = "0123456789abcdef"

[recipes.wide]
match = ["chat-*", "both-*"]
padding = { tensor_parallel = 3 }

[recipes.floats]
base = "large"
match = ["*-floats", "both-*"]

[recipes.floats.quantization]
method = "fp8-dynamic"
"""


def make_several(root: Path) -> Site:
    """Write a site whose settings have the bases ``small`` and ``large`` and the recipes ``wide`` and ``floats``."""
    site = make_site(root)
    tiny_qwen3(root / "other", hidden_size=96, num_hidden_layers=3)
    file = root / "qwen_pipeline.toml"
    file.write_text(file.read_text().replace('base_model = "base"\n', "") + SEVERAL)
    for base in ("base", "other"):
        tiny_adapter(root / base, root / "adapters" / base)
    return site


def drop(site: Site, name: str, base: str = "base", **config: Any) -> Path:
    """Copy the adapter of a base into the inbox, with other values in its config, and mark it as complete."""
    upload = site.inbox.root / name
    shutil.copytree(site.root / "adapters" / base, upload)
    change(upload, ADAPTER_CONFIG, **config)
    return upload


def drop_model(site: Site, name: str, base: str = "base", **config: Any) -> Path:
    """Copy a base into the inbox as a whole model, with other values in its config, and mark it as complete."""
    upload = site.inbox.root / name
    shutil.copytree(site.root / base, upload)
    change(upload, CONFIG, **config)
    return upload


def change(upload: Path, file: str, **values: Any) -> None:
    """Change values in a JSON file of an upload, and mark it as complete."""
    path = upload / file
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
    (upload / MARKER).unlink(missing_ok=True)
    (upload / MARKER).touch()
