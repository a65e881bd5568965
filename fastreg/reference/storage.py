"""How a weight is read from memory and written back.

16-bit weights lose every change below half a unit in the last place when they are rounded to nearest: a
weight decay of 1e-4 never moves a bfloat16.  Rounding up or down at random, in proportion to what is lost,
is right on average (Gupta et al. 2015); keeping what is lost in 16 more bits is exact.
"""

import torch
from torch import Tensor

from .random import PhiloxPosition, bits16


def read_plain(source: Tensor) -> Tensor:
    """Returns the parameter as the weight."""
    return source


def write_plain(weight: Tensor, at: PhiloxPosition) -> tuple[Tensor]:
    """Returns the weight, which is rounded to nearest."""
    return (weight,)


def write_bfloat16(weight: Tensor, at: PhiloxPosition, key: Tensor) -> tuple[Tensor]:
    """Returns the weight rounded at random: the nearer of two neighbours is the more likely.

    Adding 16 random bits to the 16 that are cut off carries into the rest in just that share of cases.
    """
    bits = weight.view(torch.int32).where(weight == weight, 0x7FC00000) + bits16(key, at, weight, 10)
    return ((bits & -0x10000).view(torch.float32),)  # which a bfloat16 holds exactly


def write_float16(weight: Tensor, at: PhiloxPosition, key: Tensor) -> tuple[Tensor]:
    """Returns the weight rounded at random.

    Times 2⁻¹¹², a float32 has the bits of the float16 with 13 more behind them, subnormal ones included.
    """
    scaled = _bits((weight * 2.0**-112).abs()) + (bits16(key, at, weight, 10) & 0x1FFF)
    magnitude = (scaled.clamp(max=0x0F800000) >> 13).where(weight == weight, 0x7E00)
    return (_from16(magnitude | (_bits(weight) >> 16 & 0x8000)).view(torch.float16),)


def read_split(high: Tensor, low: Tensor) -> Tensor:
    """Returns the float32 whose nearest bfloat16 is `high` and whose lower 16 bits are `low`, an int16."""
    bits = ((high.view(torch.int16).to(torch.int64) << 16) + low) & 0xFFFFFFFF
    return (bits - ((bits >> 31) << 32)).to(torch.int32).view(torch.float32)


def write_split(weight: Tensor, at: PhiloxPosition) -> tuple[Tensor, Tensor]:
    """Returns the nearest bfloat16 (ties away from zero), and the lower 16 bits as an int16."""
    bits = _bits(weight).where(weight == weight, 0x7FC00000)
    return _from16(bits + 0x8000 >> 16).view(torch.bfloat16), _from16(bits & 0xFFFF)


# Integers are worked on in int64, where nothing wraps around, and narrowed from a range that they fit in.


def _bits(x: Tensor) -> Tensor:
    return x.view(torch.int32).to(torch.int64) & 0xFFFFFFFF


def _from16(bits: Tensor) -> Tensor:
    bits = bits & 0xFFFF
    return (bits - ((bits >> 15) << 16)).to(torch.int16)
