"""Zero and equal rows and columns of a weight, found in blocks, compared with the obvious loop."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from qwen_pipeline.evaluation.structure.weights import RowsAndColumns


@given(
    values=st.lists(st.lists(st.integers(0, 1), min_size=4, max_size=4), min_size=1, max_size=6),
    block=st.integers(1, 3),
)
def test_rows_and_columns_are_found_for_every_block_size(values: list[list[int]], block: int) -> None:
    weight = torch.tensor(values).float()
    lines = RowsAndColumns.of_shape(*weight.shape)
    for start in range(0, len(weight), block):
        lines.update(start, weight[start : start + block])

    columns = [list(column) for column in zip(*values, strict=True)]
    assert lines.zero_rows.tolist() == [not any(row) for row in values]
    assert lines.zero_columns.tolist() == [not any(column) for column in columns]
    assert lines.duplicate_rows.tolist() == [i > 0 and values[i] == values[i - 1] for i in range(len(values))]
    assert lines.duplicate_columns.tolist() == [i > 0 and columns[i] == columns[i - 1] for i in range(4)]
