"""Sums over channels, in slices that XLA:CPU computes right."""

import math
from collections.abc import Callable

import jax.numpy as jnp
from jax import Array, lax

# Values that XLA:CPU contracts in one block, at least: Eigen's blocks of float32 have 288 with a
# first cache of 32 KiB, and up to 320 with a larger one.
_BLOCK = 288


def sum_of_slices(
    function: Callable[[Array, Array], Array], x: Array, w: Array, axis: int, taps: int = 1
) -> Array:
    """Returns function(x, w), which contracts channels, as the sum over slices of the channels.

    With more blocks than one XLA:CPU (jaxlib 0.10.2) may multiply the wrong values, silently: where
    a thread's queue is full, of 1,024 tasks, Eigen runs the next task at once, and packs the second
    block of x into the memory of the first before that one is used. It happens on one device too,
    where a thread gets no core for some tenths of a second (benchmarks/full_queue.py; README, Right
    on a CPU). A convolution of 64 or more channels takes 1.01 to 1.24 of the time in slices.

    Args:
      function: bilinear, such as a convolution or a product.
      x: [..., I], the channels last.
      w: the weights, with the I channels at this axis.
      axis: of w.
      taps: how many values of each channel it sums for one of its outputs.
    """
    channels = x.shape[-1]
    count = math.ceil(channels / max(1, _BLOCK // taps))
    if count <= 1:
        return function(x, w)
    size = math.ceil(channels / count)
    total = 0
    for start in range(0, channels, size):
        stop = min(start + size, channels)
        # As arrays of their own: XLA has its fast convolution only for those.
        part = lax.optimization_barrier(
            (x[..., start:stop], lax.slice_in_dim(w, start, stop, axis=axis))
        )
        y = function(*part)
        total += y.astype(jnp.promote_types(y.dtype, jnp.float32))
    return total.astype(y.dtype)
