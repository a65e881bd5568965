"""Numbers out of losses, for all tests of losses."""

import pytest
import torch


@pytest.fixture
def number():
    """Returns a loss as a float."""
    return lambda value: value.detach().item() if isinstance(value, torch.Tensor) else float(value)
