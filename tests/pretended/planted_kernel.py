"""A kernel to launch, for planted faults."""

import triton
import triton.language as tl


@triton.jit
def double(x, count, BLOCK: tl.constexpr = 16):  # pyright: ignore[reportArgumentType]
    at = tl.arange(0, BLOCK)
    values = tl.load(x + at, mask=at < count)
    tl.store(x + at, values * 2, mask=at < count)
