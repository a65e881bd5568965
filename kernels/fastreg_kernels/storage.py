"""How a weight is read from memory and written back.

`read` turns the raw blocks of its sources into the weight; `write` turns the new weight into the raw
blocks of its targets, whose conversion to the stored dtype, where still needed, is to nearest.
"""

import triton
import triton.language as tl  # noqa: F401  (the interpreter looks for it in every module)


@triton.jit
def read_plain(source):
    return source


@triton.jit
def write_plain(weight, at):
    return (weight,)
