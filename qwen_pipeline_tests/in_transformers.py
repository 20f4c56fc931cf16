"""Run scripts in the environment in which Transformers can load packed codes."""

import json
import os
import subprocess
from collections.abc import Mapping
from typing import Any

from qwen_pipeline.workers.environments import find_environment


def in_transformers(script: str, *arguments: str) -> Mapping[str, Any]:
    """Run a script; return the JSON object in its last line of output."""
    command = [find_environment("gptqmodel").python, "-c", script, *arguments]
    env = {**os.environ, "GPTQMODEL_CPU_WORKERS": "2"}
    said = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True, check=True).stdout
    return json.loads(said.splitlines()[-1])
