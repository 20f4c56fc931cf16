"""A value that is not finite is found in every floating-point dtype."""

import pytest
import torch

from qwen_pipeline.checkpoint.digest import is_finite


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_one_such_value_is_found(dtype: torch.dtype, value: float) -> None:
    tensor = torch.randn(33, 17).to(dtype)
    assert is_finite(tensor)
    for position in (0, 280, 560):
        broken = tensor.flatten().clone()
        broken[position] = value
        assert not is_finite(broken.view(33, 17))


@pytest.mark.parametrize(
    ("dtype", "values"), [(torch.float8_e4m3fn, ["nan"]), (torch.float8_e5m2, ["nan", "inf", "-inf"])]
)
def test_so_it_is_in_8_bit_floats(dtype: torch.dtype, values: list[str]) -> None:
    assert is_finite(torch.tensor([448.0, -448.0, 0.0]).to(dtype))
    assert not any(is_finite(torch.tensor([1.0, float(value)]).to(dtype)) for value in values)


def test_an_empty_tensor_is_finite() -> None:
    assert is_finite(torch.empty(0, 4))
