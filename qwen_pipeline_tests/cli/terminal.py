"""The command line with an exit code and two streams: in this process, or in one of its own."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from typer.testing import CliRunner

from qwen_pipeline.cli import app


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    code: int
    out: str
    err: str

    @property
    def data(self) -> dict[str, Any]:
        """Standard output, which must be exactly one JSON object."""
        value = json.loads(self.out)
        assert isinstance(value, dict)
        return value


def qwen_pipeline(*arguments: object, env: Mapping[str, str] | None = None) -> Ended:
    result = CliRunner().invoke(app, [*map(str, arguments)], prog_name="qwen-pipeline", env=env)
    return Ended(code=result.exit_code, out=result.stdout, err=result.stderr)


def qwen_pipeline_process(*arguments: object, env: Mapping[str, str] | None = None) -> Ended:
    command = [sys.executable, "-m", "qwen_pipeline", *map(str, arguments)]
    ended = subprocess.run(command, env={**os.environ, **(env or {})}, capture_output=True, text=True, check=False)
    return Ended(code=ended.returncode, out=ended.stdout, err=ended.stderr)
