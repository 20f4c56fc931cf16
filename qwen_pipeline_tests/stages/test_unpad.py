"""The unpad stage: the checkpoint before padding, byte for byte, or a refusal with its reason."""

import json
from pathlib import Path
from typing import get_args

import pytest
import torch
from safetensors.torch import load_file, save_file

from qwen_pipeline.checkpoint.store.verify import require_intact
from qwen_pipeline.errors import CheckpointRefused, InputRefused
from qwen_pipeline.qwen.geometry import load_plan
from qwen_pipeline.qwen.padding_spec import Layout, PaddingSpec
from qwen_pipeline.reports import load_reports
from qwen_pipeline.stages.pad import pad
from qwen_pipeline.stages.unpad import CHECKS, unpad
from qwen_pipeline_tests.tiny import tiny_model, tiny_qwen2

SPEC = PaddingSpec(group_size=32, tensor_parallel=2)


@pytest.mark.parametrize("layout", get_args(Layout))
@pytest.mark.parametrize("family", ["qwen2", "qwen2_moe", "qwen3_vl_moe"])
def test_unpadding_restores_the_checkpoint_byte_for_byte(tmp_path: Path, family: str, layout: Layout) -> None:
    live = tiny_model(family, tmp_path / "live", shards=2)
    odd = json.dumps(json.loads((live / "config.json").read_text()), indent=7).replace("\n", "\r\n")
    (live / "config.json").write_bytes(odd.encode())  # unlike any output of this package
    ours = pad(source=live, destination=tmp_path / "same", spec=PaddingSpec(group_size=1, tensor_parallel=1)).path

    padded = pad(
        source=ours,
        destination=tmp_path / "padded",
        spec=PaddingSpec(group_size=32, tensor_parallel=4, layout=layout),
    )
    assert load_plan(padded.manifest.result["padding"]).changes
    back = unpad(source=padded.path, destination=tmp_path / "back")

    assert (back.path / "config.json").read_bytes() == odd.encode()
    (report,) = load_reports(back.manifest.result)
    assert report.name == CHECKS[0].name
    assert report.passed
    assert report.measured == report.limit
    assert back.manifest.contents == require_intact(ours).contents
    assert unpad(source=padded.path, destination=tmp_path / "back").reused


def test_a_checkpoint_without_added_channels_is_unpadded_unchanged(tmp_path: Path) -> None:
    live = tiny_qwen2(tmp_path / "live", intermediate_size=128)
    padded = pad(source=live, destination=tmp_path / "padded", spec=SPEC)
    back = unpad(source=padded.path, destination=tmp_path / "back")
    assert back.manifest.contents == padded.manifest.contents


def test_a_checkpoint_that_was_changed_after_padding_is_refused(tmp_path: Path) -> None:
    live = tiny_qwen2(tmp_path / "live")
    padded = pad(source=live, destination=tmp_path / "padded", spec=SPEC).path
    tensors = load_file(padded / "model.safetensors")
    tensors["lm_head.weight"] += torch.ones_like(tensors["lm_head.weight"])
    save_file(tensors, padded / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointRefused, match="does not match its manifest"):
        unpad(source=padded, destination=tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_only_outputs_of_the_pad_stage_can_be_unpadded(tmp_path: Path) -> None:
    live = tiny_qwen2(tmp_path / "live")
    with pytest.raises(CheckpointRefused, match=r"has no manifest\.json"):
        unpad(source=live, destination=tmp_path / "back")
    padded = pad(source=live, destination=tmp_path / "padded", spec=SPEC).path
    back = unpad(source=padded, destination=tmp_path / "back").path
    with pytest.raises(InputRefused, match="has no data for unpadding"):
        unpad(source=back, destination=tmp_path / "again")
