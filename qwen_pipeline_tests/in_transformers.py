"""Run modules in the environment where Transformers can load packed codes."""

import json
import os
import subprocess
from collections.abc import Mapping
from typing import Any

from qwen_pipeline.workers.environments import find_environment
from qwen_pipeline_tests import REPOSITORY


def in_transformers(module: str, *arguments: str) -> Mapping[str, Any]:
    """Run a module of the tests; return the object that it prints last."""
    file = REPOSITORY.joinpath(*module.split(".")).with_suffix(".py")
    command = [find_environment("gptqmodel").python, file, *arguments]
    env = {**os.environ, "GPTQMODEL_CPU_WORKERS": "2"}
    output = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True, check=True).stdout
    return json.loads(output.splitlines()[-1])
