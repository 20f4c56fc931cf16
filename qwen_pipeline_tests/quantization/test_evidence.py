"""Evidence per module: counted from codes, saved as a table, summarized, compared and plotted."""

from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch

from qwen_pipeline.checkpoint.lazy import open_checkpoint
from qwen_pipeline.errors import InputRefused
from qwen_pipeline.quantization.evidence import (
    EVIDENCE,
    ModuleEvidence,
    compare_evidence,
    evidence_frame,
    gather_evidence,
    load_evidence,
    summarize,
    write_evidence,
)
from qwen_pipeline.quantization.plot import draw_evidence
from qwen_pipeline.qwen.linears import decoder_linears
from qwen_pipeline.transforms.codes.parts import word_of
from qwen_pipeline_tests.chain import GROUP_SIZE, Chain

ROW = ModuleEvidence(
    module="model.layers.0.mlp.up_proj", layer=0, kind="mlp.up_proj", loss=0.5, damp=0.05, tokens=64, rounded=False,
    seconds=0.25, gpu_peak_bytes=None, host_peak_bytes=2**20, groups=128, zero_groups=2, saturated_groups=3,
)  # fmt: skip
ROWS = [
    ROW,
    replace(ROW, module="m", layer=1, loss=None, rounded=True, damp=1.0, seconds=None),
    replace(ROW, module="n"),
]


def test_zero_and_saturated_groups_are_counted_from_the_codes(chain: Chain) -> None:
    """The oracle unpacks a nibble at a time; some groups are made zero or saturated."""
    output = open_checkpoint(chain.quantized)
    linears = decoder_linears(open_checkpoint(chain.padded))
    changed = f"{linears[1].module}.qweight"
    words = output.load(changed)
    words[:4, :3], words[4:8, 3:8] = -1, word_of(8, 4)
    tensor = replace(output.tensors[changed], read=lambda start, stop: words[start:stop], stored=None)
    output = output.replace(tensors={changed: tensor})
    losses = [
        ModuleEvidence(
            module=each.module, layer=each.layer, kind=each.kind, loss=1.0, tokens=1, damp=0.05, rounded=False
        )
        for each in linears[1:]
    ]
    found = gather_evidence(output, linears, losses)
    assert [row.module for row in found] == [each.module for each in linears[1:]]
    for row in found:
        qweight, qzeros = output.load(f"{row.module}.qweight"), output.load(f"{row.module}.qzeros")
        codes_IO = torch.stack([(qweight >> 4 * k) & 15 for k in range(8)], dim=1).flatten(0, 1)
        zeros_GO = torch.stack([(qzeros >> 4 * k) & 15 for k in range(8)], dim=2).flatten(1, 2) + 1
        zero = saturated = 0
        for codes_SO, zeros_O in zip(codes_IO.split(GROUP_SIZE), zeros_GO, strict=True):
            zero += sum(bool((codes_SO[:, o] == zeros_O[o]).all()) for o in range(len(zeros_O)))
            ends = sum(((codes_SO == end).sum(0) for end in (0, 15)), torch.zeros(()))
            saturated += int((ends >= GROUP_SIZE / 4).sum())
        assert (row.zero_groups, row.saturated_groups) == (zero, saturated)
        assert row.groups == zeros_GO.numel()
    assert (found[0].saturated_groups or 0) >= 3
    assert (found[0].zero_groups or 0) >= 5


def test_quantizing_writes_the_table_and_its_summary(chain: Chain) -> None:
    from qwen_pipeline.checkpoint.manifest import open_manifest

    rows, manifest = load_evidence(chain.quantized), open_manifest(chain.quantized)
    assert manifest.result["evidence"] == summarize(rows)
    assert [row.loss for row in rows] == [loss["loss"] for loss in manifest.result["losses"]]
    assert all(row.tokens == 16 * 64 for row in rows)
    assert all((row.host_peak_bytes or 0) > 2**27 and row.seconds is not None for row in rows)
    assert EVIDENCE in manifest.contents.files


def test_a_written_table_is_read_back(tmp_path: Path) -> None:
    (tmp_path / EVIDENCE).parent.mkdir()
    write_evidence(ROWS, tmp_path / EVIDENCE)
    assert load_evidence(tmp_path) == ROWS
    with pytest.raises(InputRefused, match=r"no logs/evidence\.csv"):
        load_evidence(tmp_path / "other")


def test_the_data_frame_has_typed_columns_and_missing_values(tmp_path: Path) -> None:
    (tmp_path / EVIDENCE).parent.mkdir()
    write_evidence(ROWS, tmp_path / EVIDENCE)
    frame = evidence_frame(tmp_path)
    assert frame.index.tolist() == [row.module for row in ROWS]
    assert frame.index.name == "module"
    assert frame.columns.tolist() == [field.name for field in fields(ModuleEvidence)][1:]
    assert {str(frame[name].dtype) for name in ("loss", "damp", "seconds")} == {"float64"}
    assert {str(frame[name].dtype) for name in ("gpu_peak_bytes", "groups", "zero_groups")} == {"Int64"}
    assert frame["rounded"].tolist() == [False, True, False]
    assert frame["loss"].isna().tolist() == [False, True, False]
    assert frame["gpu_peak_bytes"].isna().all()
    assert frame["groups"].sum() == 384


def test_the_summary_adds_up() -> None:
    found = summarize(ROWS)
    assert (found["modules"], found["fallbacks"], found["most_damp"]) == (3, 1, 0.05)
    assert (found["groups"], found["zero_groups"], found["saturated_groups"]) == (384, 6, 9)
    assert found["mean_loss"] == pytest.approx(0.5)
    assert found["solver_seconds"] == 0.5


def test_losses_are_compared_module_by_module() -> None:
    before = [replace(ROW, loss=0.25), replace(ROW, module="n", loss=1.0), replace(ROW, module="gone")]
    found = compare_evidence(before, ROWS)
    assert found.modules == 2
    assert found.mean_ratio == pytest.approx(1.0)
    assert list(found.worst) == [ROW.module, "n"]
    assert found.worst[ROW.module] == 2.0
    assert found.sentence("v1") == "Losses of 2 modules are 1.000 times those of v1 (geometric mean)."
    assert compare_evidence([], ROWS).sentence("v1") == "No module has a loss both here and in v1."


def test_the_plot_is_the_same_for_the_same_rows(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        draw_evidence(ROWS, tmp_path / name, before=ROWS)
    draw_evidence([replace(row, seconds=9.0) for row in ROWS], tmp_path / "c.png", seconds=False)
    draw_evidence(ROWS, tmp_path / "d.png", seconds=False)
    assert (tmp_path / "c.png").read_bytes() == (tmp_path / "d.png").read_bytes()
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
