"""A project directory for the whole pipeline on a tiny model: base, fine-tune, texts and settings."""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest

from qwen_pipeline.config import FILE_VARIABLE, Settings, load_settings
from qwen_pipeline.models.inbox import Inbox
from qwen_pipeline_tests.tiny import tiny_adapter, tiny_qwen2

FINE_TUNE = "poet"

SETTINGS = """
base_model = "base"
calibration = "calibration.jsonl"
owners = ["team:models"]

[padding]
tensor_parallel = 2

[quantization]
group_size = 32
samples = 8
seq_len = 64
batch_size = 4
threads = 1

[validation]
text = "held-out.txt"
windows = 2
seq_len = 64
"""


@dataclass(frozen=True, slots=True)
class Site:
    """A directory with ``qwen_pipeline.toml`` and everything that it refers to."""

    root: Path

    @property
    def environment(self) -> dict[str, str]:
        """The environment variables that make a process use this site and its cache."""
        return {FILE_VARIABLE: str(self.root / "qwen_pipeline.toml"), "XDG_CACHE_HOME": str(self.root / "cache")}

    @property
    def settings(self) -> Settings:
        return load_settings()

    @property
    def inbox(self) -> Inbox:
        return Inbox(self.root / "workspace" / "inbox")

    def configure(self, more: str) -> None:
        """Append to the settings file."""
        with (self.root / "qwen_pipeline.toml").open("a") as file:
            file.write(more)

    def drop(self, name: str = FINE_TUNE, *, seed: int = 1) -> Path:
        """Have PEFT save a LoRA of the base into the inbox."""
        return tiny_adapter(self.root / "base", self.inbox.root / name, seed=seed)


def make_site(root: Path) -> Site:
    """Write a site into ``root``."""
    root.mkdir(parents=True, exist_ok=True)
    tiny_qwen2(root / "base")
    pages = [
        f"The {word} of day {day} is not like any other {word}. " * 8
        for day, word in enumerate(("whale", "ship", "storm"))
    ]
    records = [{"text": f"Chapter {n}. {pages[n % len(pages)]}"} for n in range(64)]
    (root / "calibration.jsonl").write_text("\n".join(json.dumps(record) for record in records))
    (root / "held-out.txt").write_text("\n".join(f"Call me number {n}, some years ago." for n in range(400)))
    (root / "qwen_pipeline.toml").write_text(SETTINGS)
    return Site(root)


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Site:
    """Make a new site, and have this process's environment point at it."""
    place = make_site(tmp_path / "site")
    monkeypatch.delenv("DAGSTER_HOME", raising=False)
    for name, value in place.environment.items():
        monkeypatch.setenv(name, value)
    return place
