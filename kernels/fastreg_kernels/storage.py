"""How a weight is read from memory and written back.

`read` turns the raw blocks of its sources into the weight; `write` turns the new weight into the raw
blocks of its targets, whose conversion to the stored dtype, where still needed, is to nearest.
"""

import triton
import triton.language as tl

from .random import bits16


@triton.jit
def read_plain(source):
    return source


@triton.jit
def write_plain(weight, at):
    return (weight,)


@triton.jit
def high_half(bits):
    return (bits >> 16).to(tl.uint16)


@triton.jit
def write_bfloat16(weight, at, key):
    # NVIDIA's NaN, 0x7fffffff, would carry into the sign.
    bits = weight.to(tl.uint32, bitcast=True) + bits16(key, at, weight, 10)
    return (high_half(tl.where(weight == weight, bits, 0x7FC00000)).to(tl.bfloat16, bitcast=True),)


@triton.jit
def write_float16(weight, at, key):
    bits = weight.to(tl.uint32, bitcast=True)
    scaled = tl.abs(weight * 1.925929944387236e-34).to(tl.uint32, bitcast=True)
    scaled = tl.minimum(scaled + (bits16(key, at, weight, 10) & 0x1FFF), 0x0F800000) >> 13
    magnitude = tl.where(weight == weight, scaled, 0x7E00)
    return ((magnitude | (bits >> 16 & 0x8000)).to(tl.uint16).to(tl.float16, bitcast=True),)


@triton.jit
def read_split(high, low):
    wide = high.to(tl.uint16, bitcast=True).to(tl.uint32) << 16
    return (wide.to(tl.int32, bitcast=True) + low.to(tl.int32)).to(tl.float32, bitcast=True)


@triton.jit
def write_split(weight, at):
    bits = tl.where(weight == weight, weight.to(tl.uint32, bitcast=True), 0x7FC00000)
    high = high_half(bits + 0x8000).to(tl.bfloat16, bitcast=True)
    return high, bits.to(tl.uint16).to(tl.int16, bitcast=True)
