"""A log gets each layer once, and bytes at intervals."""

import pytest

from qwen_pipeline.progress import Progress, TransferRate, describe, logging_observer


def test_layers_are_logged_once_bytes_at_intervals_and_the_end_always() -> None:
    lines: list[str] = []
    observe = logging_observer(lines.append, seconds=3600)
    for done in range(1, 4):
        observe(Progress(task="merge", done=done * 10**9, total=3 * 10**9, unit="bytes"))
        observe(Progress(task="quantize", done=done, total=3, unit="layers"))
        observe(Progress(task="quantize", done=done, total=3, unit="layers", remark="another module"))
    lines = [line.partition(", ")[0] if "GB/s" in line else line for line in lines]
    assert lines == [
        "merge: 1.00 of 3.00 GB",
        "quantize: 1 of 3 layers",
        "quantize: 2 of 3 layers",
        "merge: 3.00 of 3.00 GB",
        "quantize: 3 of 3 layers",
    ]


def test_a_line_has_task_amount_and_remark() -> None:
    event = Progress(task="quantize", done=3, total=30, unit="layers", remark="layers.2.mlp.down_proj loss 0.0012")
    assert describe(event) == "quantize: 3 of 30 layers, layers.2.mlp.down_proj loss 0.0012"
    assert describe(Progress(task="pad", done=2 * 10**6, total=4 * 10**6, unit="bytes")) == "pad: 2.00 of 4.00 MB"


def test_the_rate_counts_bytes_since_the_first_event(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 2.0, 2.0])
    monkeypatch.setattr("qwen_pipeline.progress.time.monotonic", lambda: next(clock))
    rates = TransferRate()
    events = [Progress(task="merge", done=done * 10**9, total=5 * 10**9, unit="bytes") for done in (1, 3, 5)]
    assert [rates.describe(event) for event in events] == ["", "1.00 GB/s, 0:02 left", "2.00 GB/s"]
