"""Batches taken in parts, which a processor's cache holds where it would not hold the whole."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ensadv.cpu import backend

# Of a network on a CPU, for 32x32 images; of smaller ones more, or starting threads would take
# longer than computing. The time of a whole step of IFGSM-7 whose attack takes so many images at a
# time, over that with all at once (two cores of an AMD EPYC, medians of 5 to 7 turns): WRN-10-2,
# batch 64: 4 images 1.11, 8 0.95, 16 0.95, 32 0.97; WRN-16-4, batch 32: 4 1.01, 8 0.97, 16 0.98.
# IFGSM-20 of 180 images takes 0.86 of the time with 9. But of 360 8x8 digits 6.4 times the time
# with 8.
FEWEST_IMAGES = 8
_VALUES = FEWEST_IMAGES * 32 * 32 * 3  # at least so many in the images of a part
_TIMES_AS_MANY = 4  # images at most, so that a number is found that nearly divides the batch
_FILLING = 1 / 32  # at most so many images more than the batch has


def in_parts(f: Callable[..., Any], size: int, *batch: Any) -> Any:
    """Returns f(*batch), computed for `size` examples after `size` examples, joined.

    Args:
      f: takes trees whose leaves are [n, ...], for any n, and returns such a tree (with an n of its
        own). What it does with an example does not depend on the others.
      size: examples at a time, >= 1; the last ones may be fewer.
      batch: trees whose leaves are [B, ...], B >= 1.
    """
    n = len(jax.tree.leaves(batch)[0])
    size = min(size, n)
    whole = n - n % size
    if whole == size:
        results = [f(*jax.tree.map(lambda leaf: leaf[:size], batch))]
    else:
        split = lambda leaf: leaf[:whole].reshape(-1, size, *leaf.shape[1:])
        result = jax.lax.map(lambda part: f(*part), jax.tree.map(split, batch))
        results = [jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), result)]
    if whole < n:
        results.append(f(*jax.tree.map(lambda leaf: leaf[whole:], batch)))
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *results)


def by_network(
    f: Callable[..., Any], *batch: Any, fewest: int = FEWEST_IMAGES, wanted: Any = None
) -> Any:
    """Returns f(*batch) for an f that runs a network: on a CPU for few images at a time.

    In parts of one size only, or the network would be compiled for each. Copies of the last example
    fill up the last part.

    Args:
      f, batch: as for `in_parts`, with a result for each example; the images are the largest leaf.
      fewest: 32x32 images at a time, at least.
      wanted: bool [n], which examples' results are wanted; None: all. Parts without any are not
        computed on a CPU, and their results are zeros there.
    """
    leaves = jax.tree.leaves(batch)
    n = len(leaves[0])
    values = _VALUES * fewest / FEWEST_IMAGES
    fewest = max(fewest, math.ceil(values * n / max(leaf.size for leaf in leaves)))
    filled = lambda size: math.ceil(n / size) * size
    largest = min(_TIMES_AS_MANY * fewest, n)
    sizes = [m for m in range(fewest, largest + 1) if filled(m) <= n * (1 + _FILLING)]
    if not backend.is_cpu() or not sizes:
        return f(*batch)
    if wanted is not None:
        f, batch = _where_wanted(f), (wanted, *batch)
    if filled(sizes[0]) > n:
        places = np.minimum(np.arange(filled(sizes[0])), n - 1)
        batch = jax.tree.map(lambda leaf: leaf[places], batch)
    return jax.tree.map(lambda leaf: leaf[:n], in_parts(f, sizes[0], *batch))


def _where_wanted(f):
    """Returns g(wanted, *part): f(*part), or zeros where none is wanted."""
    f = jax.jit(f)  # its trace is kept, so that it is traced once and not twice

    def g(wanted, *part):
        results = jax.eval_shape(f, *part)
        zeros = lambda *_: jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), results)
        return jax.lax.cond(jnp.any(wanted), f, zeros, *part)

    return g
