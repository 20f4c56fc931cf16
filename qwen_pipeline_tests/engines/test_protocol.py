"""A spec refuses what no engine does, and survives the way to the worker."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from qwen_pipeline.engines.protocol import QuantJob, QuantSpec
from qwen_pipeline.errors import InputRefused


@pytest.mark.parametrize(
    "wrong",
    [
        {"engine": "other"}, {"device": "tpu"}, {"bits": 3}, {"group_size": 0}, {"group_size": -1}, {"samples": 0},
        {"seq_len": 0}, {"batch_size": 0}, {"threads": 0}, {"damp_percent": 0.0}, {"damp_percent": 1.0}, {"mse": -1.0},
        {"mse": 2.4, "engine": "autogptq"},
    ],
    ids=str,
)  # fmt: skip
def test_a_wrong_setting_is_named(wrong: dict[str, Any]) -> None:
    with pytest.raises(InputRefused, match=next(iter(wrong))) as caught:
        QuantSpec(**wrong)
    assert caught.value.remedy


def test_a_job_survives_json() -> None:
    spec = QuantSpec(bits=8, desc_act=True, threads=3, device="cuda")
    job = QuantJob(spec=spec, source=Path("/a"), windows=Path("/b.npy"), workshop=Path("/c"))
    assert QuantJob.from_json(json.loads(json.dumps(job.to_json()))) == job


def test_every_setting_is_in_the_json() -> None:
    base = QuantSpec(threads=2, device="cpu")
    others = [
        replace(base, seed=1),
        replace(base, threads=1),
        replace(base, batch_size=1),
        replace(base, device="cuda"),
    ]
    assert len({json.dumps(spec.to_json(), sort_keys=True) for spec in (base, *others)}) == 5
