"""The solver's log: order of the rows, optional columns, and losses that are not finite."""

from pathlib import Path
from typing import Any

import pytest

from qwen_pipeline.quantization.evidence import ModuleEvidence
from qwen_pipeline.quantization.losses import read_losses
from qwen_pipeline.qwen.linears import Linear

HEADER = "layer,module,loss,samples,damp,time\n"
GATE, DOWN = (
    Linear(
        module=f"model.layers.1.{kind}",
        layer=1,
        kind=kind,
        out_features=64,
        in_features=64,
        tensor=f"model.layers.1.{kind}.weight",
    )
    for kind in ("mlp.gate_proj", "mlp.down_proj")
)


def read(tmp_path: Path, *rows: str) -> list[ModuleEvidence]:
    (tmp_path / "quant_log.csv").write_text(HEADER + "".join(f"{row}\n" for row in rows))
    return read_losses(tmp_path / "quant_log.csv", [GATE, DOWN])


def test_rows_come_in_the_order_of_the_modules(tmp_path: Path) -> None:
    down, gate = "1,mlp.down_proj,0.0001242781,512,0.05000,0.014", "1,mlp.gate_proj,0.0006914565,512,0.07000,0.014"
    shared: dict[str, Any] = {"layer": 1, "tokens": 512, "rounded": False, "seconds": 0.014}
    assert read(tmp_path, down, gate) == [
        ModuleEvidence(module=GATE.module, kind=GATE.kind, loss=0.0006914565, damp=0.07, **shared),
        ModuleEvidence(module=DOWN.module, kind=DOWN.kind, loss=0.0001242781, damp=0.05, **shared),
    ]


def test_optional_columns_are_read(tmp_path: Path) -> None:
    (tmp_path / "quant_log.csv").write_text(
        "layer,module,loss,samples,damp,time,gpu_peak_bytes,host_peak_bytes,zero_groups,saturated_groups\n"
        "1,mlp.down_proj,0.25,512,0.05,0.5,0,1073741824,3,7\n"
    )
    (found,) = read_losses(tmp_path / "quant_log.csv", [DOWN])
    assert (found.seconds, found.gpu_peak_bytes, found.host_peak_bytes) == (0.5, 0, 2**30)
    assert (found.zero_groups, found.saturated_groups) == (3, 7)


@pytest.mark.parametrize("loss", ["999999999.0000000000", "rtn fallback", "fallback(rtn): 0.0012345"])
def test_a_fallback_has_no_loss(tmp_path: Path, loss: str) -> None:
    (found,) = read(tmp_path, f"1,mlp.down_proj,{loss},0,1.00000,0.014")
    assert found.rounded
    assert found.loss is None


@pytest.mark.parametrize("loss", ["nan", "inf"])
def test_a_loss_that_is_not_finite_is_none(tmp_path: Path, loss: str) -> None:
    (found,) = read(tmp_path, f"1,mlp.down_proj,{loss},512,0.05000,0.014")
    assert found.loss is None


def test_a_module_without_a_row_is_left_out(tmp_path: Path) -> None:
    assert read(tmp_path, "0,mlp.down_proj,0.1,512,0.05000,0.014") == []


def test_memory_is_read_without_the_column_of_times(tmp_path: Path) -> None:
    (tmp_path / "quant_log.csv").write_text(
        "layer,module,loss,samples,damp,gpu_peak_bytes,host_peak_bytes\n1,mlp.down_proj,0.1,512,0.05,7,9\n"
    )
    (found,) = read_losses(tmp_path / "quant_log.csv", [GATE, DOWN])
    assert (found.seconds, found.gpu_peak_bytes, found.host_peak_bytes) == (None, 7, 9)
