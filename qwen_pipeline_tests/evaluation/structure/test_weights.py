"""Zero and equal rows and columns of a weight, found in blocks, compared with the obvious loop."""

from unittest.mock import patch

import torch
from hypothesis import given
from hypothesis import strategies as st

from qwen_pipeline.evaluation.structure import weights
from qwen_pipeline.evaluation.structure.weights import RowsAndColumns
from qwen_pipeline.transforms.codes.gptq import count_extremes, pack_rows, unpack_columns, unpack_rows


@given(
    values=st.lists(st.lists(st.integers(0, 1), min_size=4, max_size=4), min_size=1, max_size=6),
    block=st.integers(1, 3),
    head=st.integers(1, 5),
)
def test_rows_and_columns_are_found_for_every_block_size(values: list[list[int]], block: int, head: int) -> None:
    weight = torch.tensor(values).float()
    lines = RowsAndColumns.of_shape(len(weight), 4, weight.device)
    with patch.object(weights, "HEAD", head):
        for start in range(0, len(weight), block):
            lines.update(start, weight[start : start + block])

    columns = [list(column) for column in zip(*values, strict=True)]
    assert lines.zero_rows.tolist() == [not any(row) for row in values]
    assert lines.zero_columns.tolist() == [not any(column) for column in columns]
    assert lines.duplicate_rows.tolist() == [i > 0 and values[i] == values[i - 1] for i in range(len(values))]
    assert lines.duplicate_columns.tolist() == [i > 0 and columns[i] == columns[i - 1] for i in range(4)]


@given(
    codes=st.lists(st.sampled_from([0, 1, 7, 14, 15, 128, 254, 255]), min_size=16, max_size=16),
    bits=st.sampled_from([4, 8]),
)
def test_codes_at_the_ends_of_their_range_are_counted(codes: list[int], bits: int) -> None:
    kept = torch.tensor(codes) % 2**bits
    words = pack_rows(kept[:, None], bits)
    assert count_extremes(words, bits) == sum(code in (0, 2**bits - 1) for code in kept.tolist())
    assert torch.equal(unpack_columns(words.T.contiguous(), bits).T, unpack_rows(words, bits))
