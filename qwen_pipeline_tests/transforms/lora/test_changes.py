"""Changes are measured while blocks are read: exactly whether one changed, and its norm closely."""

import pytest
import torch

from qwen_pipeline.checkpoint.digest import block_ranges
from qwen_pipeline.checkpoint.lazy import Checkpoint, LazyTensor
from qwen_pipeline.checkpoint.safetensors_file import TensorSpec
from qwen_pipeline.transforms.lora.changes import ChangeMeter, is_changed

ROWS, COLUMNS = 6000, 512


def in_memory(tensor: torch.Tensor, dtype: str = "BF16") -> LazyTensor:
    return LazyTensor(
        spec=TensorSpec(dtype=dtype, shape=tuple(tensor.shape)), read=lambda start, stop: tensor[start:stop]
    )


def checkpoint(**tensors: LazyTensor) -> Checkpoint:
    return Checkpoint(config={}, tensors=tensors, shards=dict.fromkeys(tensors, "model.safetensors"))


def measured(before: torch.Tensor, after: torch.Tensor, *, read: int | None = None) -> tuple[int, float]:
    """Return the number of changed tensors and the relative change, after the first ``read`` blocks were read."""
    meter, base, result = ChangeMeter(), in_memory(before), in_memory(after)

    def merged(source: LazyTensor) -> LazyTensor:
        def rows(start: int, stop: int) -> torch.Tensor:
            source.read(start, stop)
            return result.read(start, stop)

        return LazyTensor(spec=result.spec, read=rows)

    watched = meter.watched("w", base, base, merged)
    for start, stop in list(block_ranges(watched.spec))[:read]:
        assert watched.read(start, stop) is not None
    figures = meter.figures(checkpoint(w=watched, other=base))
    assert (figures.updated, figures.total) == (1, 2)
    return figures.changed, figures.relative


def weights(rows: int = ROWS) -> torch.Tensor:
    return torch.randn(rows, COLUMNS, generator=torch.Generator().manual_seed(0)).bfloat16()


@pytest.mark.parametrize("read", [None, 0, 1])
def test_the_norm_of_a_low_rank_change_is_close(read: int | None) -> None:
    before = weights()
    update = torch.randn(ROWS, 4) @ torch.randn(4, COLUMNS) * 0.01
    after = (before.float() + update).bfloat16()
    delta, norm = ((t.double().norm()) for t in (after.double() - before.double(), before.double()))
    changed, relative = measured(before, after, read=read)
    assert changed == 1
    assert relative == pytest.approx(float(delta / norm), rel=0.05)


@pytest.mark.parametrize("where", [0, 1, ROWS * COLUMNS // 2, -1])
def test_one_changed_value_is_never_missed(where: int) -> None:
    before = weights()
    after = before.clone()
    after.view(-1)[where] += 1
    changed, relative = measured(before, after)
    assert changed == 1
    assert relative > 0
    assert measured(before, before.clone()) == (0, 0.0)
    assert is_changed(checkpoint(w=in_memory(before)), checkpoint(w=in_memory(after)))


def test_new_rows_of_a_vocabulary_are_a_change() -> None:
    before, after = weights(), weights(ROWS + 3)
    after[:ROWS] = before
    assert measured(before, after)[0] == 1
    assert is_changed(checkpoint(w=in_memory(before)), checkpoint(w=in_memory(after)))


def test_values_of_another_dtype_are_compared_as_numbers() -> None:
    before = weights()
    base = checkpoint(w=in_memory(before))
    assert not is_changed(base, checkpoint(w=in_memory(before.float(), "F32")))
    assert not is_changed(base, base)
    assert is_changed(base, checkpoint(w=in_memory(before.float() + 1e-6, "F32")))
