"""Batches taken in parts, which a processor's cache holds where it would not hold the whole."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ensadv.cpu import backend

# Images that a network takes at a time, at least: of fewer, starting threads takes longer than
# computing; the activations of many more are in no cache. Of images smaller than 32x32 more.
_IMAGES = 32
_VALUES = 32 * 32 * 3
_TIMES_AS_MANY = 4  # images at most, so that a number is found that nearly divides the batch
_FILLING = 1 / 32  # at most so many images more than the batch has
_SIZES = 8  # of batches, so that only a few are compiled for


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


def by_network(f: Callable[..., Any], *batch: Any, wanted: Any = None) -> Any:
    """Returns f(*batch) for an f that runs a network: on a CPU for few images at a time.

    In parts of one size only, or the network would be compiled for each. Copies of the last example
    fill up the last part.

    Args:
      f, batch: as for `in_parts`, with a result for each example; the images are the largest leaf.
      wanted: bool [n], which examples' results are wanted; None: all. Parts without any are not
        computed on a CPU, and their results are zeros there.
    """
    leaves = jax.tree.leaves(batch)
    n = len(leaves[0])
    size = _part_size(n, max(leaf.size for leaf in leaves) / n)
    if size is None:
        return f(*batch)
    if wanted is not None:
        f, batch = _where_wanted(f), (wanted, *batch)
    if (filled := math.ceil(n / size) * size) > n:
        places = np.minimum(np.arange(filled), n - 1)
        batch = jax.tree.map(lambda leaf: leaf[places], batch)
    return jax.tree.map(lambda leaf: leaf[:n], in_parts(f, size, *batch))


def _part_size(n: int, values: float) -> int | None:
    """Returns of how many images, of so many values each, parts of n are; None: no parts."""
    fewest = max(_IMAGES, math.ceil(_IMAGES * _VALUES / values))
    largest = min(_TIMES_AS_MANY * fewest, n)
    filled = lambda size: math.ceil(n / size) * size
    sizes = (m for m in range(fewest, largest + 1) if filled(m) <= n * (1 + _FILLING))
    return next(sizes, None) if backend.is_cpu() else None


def batch_size(count: int, largest: int, values: int) -> int:
    """Returns the size of batches in which few places are padding, where that saves time.

    That is on a CPU, where half as many images take half the time; but not where a batch goes
    through the network in parts, since parts of padding are not computed.

    Args:
      count: examples in all, >= 1.
      largest: size at most.
      values: of an image.
    """
    part = _part_size(largest, values)
    if not backend.is_cpu() or (part is not None and part < largest):
        return largest
    even, grain = math.ceil(count / math.ceil(count / largest)), math.ceil(largest / _SIZES)
    return min(math.ceil(even / grain) * grain, largest)


def _where_wanted(f):
    """Returns g(wanted, *part): f(*part), or zeros where none is wanted."""
    f = jax.jit(f)  # its trace is kept, so that it is traced once and not twice

    def g(wanted, *part):
        results = jax.eval_shape(f, *part)
        zeros = lambda *_: jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), results)
        return jax.lax.cond(jnp.any(wanted), f, zeros, *part)

    return g
