"""What both engines of LMDeploy say to a ``quantization_config``, from its sources alone.

A worker function: it returns for each config and engine the number of inputs that share a scale, or the refusal.
"""

import sys
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

from qwen_pipeline.progress import Observe

PACKAGES = ("lmdeploy", "lmdeploy.turbomind", "lmdeploy.pytorch")
"""Packages whose ``__init__`` is not run."""
OTHERS = (
    "lmdeploy.archs", "lmdeploy.utils", "lmdeploy.messages", "lmdeploy.turbomind._tm", "lmdeploy.turbomind.models",
    "lmdeploy.turbomind.models.base", "lmdeploy.turbomind.models.utils", "lmdeploy.turbomind.supported_models",
    "lmdeploy.turbomind.builders", "lmdeploy.pytorch.utils", "lmdeploy.pytorch.disagg",
    "lmdeploy.pytorch.disagg.config",
)  # fmt: skip
"""Modules that need a GPU's libraries or read models."""


class _Accepted(Exception):
    """The config was accepted; what follows needs a GPU."""


def lookups(job: Mapping[str, Any], _: Observe) -> dict[str, Any]:
    """Ask both engines about each of ``job["configs"]``."""
    for name in PACKAGES:
        package = ModuleType(name)
        package.__path__ = [str(Path(job["sources"]).joinpath(*name.split(".")))]
        sys.modules[name] = package
    sys.modules.update({name: MagicMock() for name in OTHERS})
    found = [{"turbomind": _turbomind(settings), "pytorch": _pytorch(settings)} for settings in job["configs"]]
    return {"found": found}


def _turbomind(settings: Mapping[str, Any]) -> int | str:
    converter: Any = import_module("lmdeploy.turbomind.converter")

    def accept(formats: Any, *_: Any) -> None:
        raise _Accepted(formats[0].block_in)

    config = SimpleNamespace(to_dict=lambda: {"quantization_config": dict(settings)})
    converter.get_model_arch = lambda *_, **__: ("", config)
    converter.search_nested_config = lambda config, name: config[name]
    converter._get_executable_dtypes = accept
    try:
        converter.get_tm_config("", SimpleNamespace(model_format=None, dtype="auto", devices=[0]))
    except _Accepted as accepted:
        return accepted.args[0]
    except (AssertionError, ValueError, KeyError) as refused:
        return f"{type(refused).__name__}: {refused}"[:120]
    raise AssertionError("get_tm_config did not ask for dtypes")


def _pytorch(settings: Mapping[str, Any]) -> int | str:
    config: Any = import_module("lmdeploy.pytorch.config")
    try:
        found = config.QuantizationConfig.from_config(SimpleNamespace(quantization_config=dict(settings)))
    except (TypeError, ValueError) as refused:
        return f"{type(refused).__name__}: {refused}"[:120]
    return found.group_size or found.weight_block_size[1]
