"""Needs of steps: above what was measured, not far above, and replaced by the settings."""

import json
from pathlib import Path
from typing import Any

import pytest

from qwen_pipeline.config import Settings, settings_from_values
from qwen_pipeline.config.execution import Step
from qwen_pipeline.defs.execution.needs import GB, Needs, step_needs
from qwen_pipeline.errors import InputRefused
from qwen_pipeline_tests.qwen.published import config_of

GIB = 2**30
MEASURED: dict[str, dict[Step, float]] = {
    "Qwen2-72B, Qwen2.5-72B, Qwen2-VL-72B": {
        "merge": 1.3 * GIB,
        "calibrate": 0.9 * GIB,
        "quantize": 4.8 * GIB,
        "validate": 3.2 * GIB,
        "publish": 0.6 * GIB,
    },
    "Qwen3-30B-A3B": {"quantize": 3.7 * GIB},
}
"""Peak memory of the host on one H200: ``docs/performance.md``."""


def settings_for(root: Path, config: dict[str, Any], **values: Any) -> Settings:
    root.mkdir(exist_ok=True)
    (root / "config.json").write_text(json.dumps(config))
    quantization = {"device": "cuda", "threads": 16, **values.pop("quantization", {})}
    execution = {"kind": "kubernetes", **values.pop("execution", {})}
    return settings_from_values(
        {"base_model": str(root), "quantization": quantization, "execution": execution, **values}
    )


@pytest.mark.parametrize("name", MEASURED)
def test_memory_is_more_than_was_measured_and_less_than_a_node_has(name: str, tmp_path: Path) -> None:
    needs = step_needs(settings_for(tmp_path, config_of(name)))
    for step, peak in MEASURED[name].items():
        assert peak < needs[step].memory_bytes < 32 * GB, step
    assert needs["quantize"].cores == 16
    assert {step: need.gpus for step, need in needs.items() if need.gpus} == {
        "quantize": 1,
        "validate": 1,
        **({"calibrate": 1} if "A3B" in name else {}),
    }


def test_needs_follow_the_settings(tmp_path: Path) -> None:
    config = config_of("Qwen2.5-7B")
    usual = step_needs(settings_for(tmp_path, config))
    on_cpu = step_needs(settings_for(tmp_path, config, quantization={"device": "cpu"}))
    assert not any(need.gpus for need in on_cpu.values())
    assert on_cpu["quantize"].memory_bytes > usual["quantize"].memory_bytes
    floats = step_needs(settings_for(tmp_path, config, quantization={"method": "fp8"}))
    assert floats["quantize"] == floats["pad"]
    own_loop = step_needs(settings_for(tmp_path, config, quantization={"engine": "gptqmodel", "gpus": 2}))
    assert own_loop["quantize"].gpus == 2
    assert own_loop["quantize"].memory_bytes > 15 * GB, "the whole model"
    served = step_needs(
        settings_for(tmp_path, config, validation={"serve": {"engine": "vllm", "tensor_parallel": [4]}})
    )
    assert served["validate"].gpus == 4
    given = {"needs": {"quantize": {"gpus": 3, "memory_gb": 100.5}}}
    assert step_needs(settings_for(tmp_path, config, execution=given)) == {
        **usual,
        "quantize": Needs(cores=16, memory_bytes=int(100.5 * GB), gpus=3),
    }


def test_a_base_that_is_not_here_is_refused_unless_its_memory_is_given() -> None:
    values = {"base_model": "owner/absent", "quantization": {"device": "cuda", "threads": 8}}
    with pytest.raises(InputRefused, match=r"memory of the step calibrate .* owner/absent is not here"):
        step_needs(settings_from_values({**values, "execution": {"kind": "ray"}}))
    given = {step: {"memory_gb": 10} for step in ("calibrate", "quantize", "validate")}
    needs = step_needs(settings_from_values({**values, "execution": {"kind": "ray", "needs": given}}))
    assert needs["validate"].memory_bytes == 10 * GB


def test_the_recipe_that_needs_most_decides(tmp_path: Path) -> None:
    config = config_of("Qwen2.5-7B")
    served = {"validation": {"serve": {"engine": "vllm", "tensor_parallel": [4]}}}
    recipes = {
        "small": {"quantization": {"samples": 8}},
        "served": served,
        "floats": {"quantization": {"method": "fp8"}},
    }
    several = step_needs(settings_for(tmp_path, config, recipes=recipes))
    usual = step_needs(settings_for(tmp_path, config))
    assert several["quantize"] == usual["quantize"]
    assert (several["validate"].gpus, usual["validate"].gpus) == (4, 1)


def test_settings_that_differ_between_machines_must_be_given() -> None:
    with pytest.raises(InputRefused, match=r"several machines, but quantization\.device and quantization\.threads"):
        settings_from_values({"execution": {"kind": "ray"}})
    with pytest.raises(InputRefused, match=r"but quantization\.threads are"):
        settings_from_values({"execution": {"kind": "kubernetes"}, "quantization": {"device": "cpu"}})
    floats = {"execution": {"kind": "ray"}, "quantization": {"method": "fp8"}}
    assert settings_from_values(floats).execution.kind == "ray"
    with pytest.raises(InputRefused, match=r"quantization\.threads are"):
        settings_from_values({**floats, "recipes": {"codes": {"quantization": {"method": "gptq"}}}})
