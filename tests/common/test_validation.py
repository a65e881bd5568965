"""Numbers of numpy and of 0-d tensors are numbers; flags are not."""

import numpy as np
import pytest
import torch

from fastreg.common.validation import check_int, check_range, check_rate


@pytest.mark.parametrize("value", (3, 3.0, np.int64(3), np.float32(3), torch.tensor(3), torch.tensor(3.0)))
def test_whole_numbers(value):
    assert check_int("steps", value) == 3 and type(check_int("steps", value)) is int


@pytest.mark.parametrize(
    "value", (True, 2.5, "3", None, torch.tensor(True), torch.tensor(2.5), torch.ones(1))
)
def test_what_is_no_whole_number(value):
    with pytest.raises(ValueError, match="steps must be a whole number >= 1, got steps="):
        check_int("steps", value)


@pytest.mark.parametrize("value", (float("inf"), -float("inf"), float("nan")))
def test_what_is_not_finite(value):
    with pytest.raises(ValueError, match="lr must be finite and >= 0, got lr="):
        check_range("lr", value, 0)
    assert check_range("lr", float("inf"), 0, finite=False) == float("inf")


@pytest.mark.parametrize("value", (True, "0.5", None, torch.tensor(0.5)))
def test_what_is_no_rate(value):
    with pytest.raises(TypeError, match="p must be a number, got p="):
        check_rate("p", value)
    assert check_rate("p", np.float32(0.5)) == 0.5
