"""Convolutions with 3x3 kernels by Winograd's minimal filtering, F(2x2, 3x3).

Lavin & Gray, 2015, "Fast Algorithms for Convolutional Neural Networks", section 4.1: a tile of 2x2
outputs is A^T [(G w G^T) * (B^T d B)] A, where d is the 4x4 tile of inputs that it sees. Summed
over the input channels the product is a matrix multiplication for each of the 16 places, and takes
16 multiplications where the sum over the kernel takes 36. All constants are 0, 1 and 1/2, so that
float32 loses nothing to speak of.
"""

import math
from collections.abc import Callable, Sequence

import jax.numpy as jnp
from jax import Array, lax

from ensadv.cpu.parts import in_parts, size_of_parts

# Input values of the images that are transformed at a time. The transforms hold eight times as
# many, which is to stay in a processor's cache: 2^18 x 4 bytes x 8 = 8 MiB.
_VALUES = 2**18

_Vector = Sequence[Array]


def conv(x: Array, w: Array) -> Array:
    """Convolves x [N, H, W, I] with w [3, 3, I, O], stride 1, zeros around x: [N, H, W, O]."""
    filters = _both_axes(_filter, [[w[a, b] for b in range(3)] for a in range(3)])
    # Or XLA would cut some of them out of w in every turn of a loop.
    filters = lax.optimization_barrier(filters)

    def images(x):
        products = [
            [tile @ weights for tile, weights in zip(*rows, strict=True)]
            for rows in zip(_input_tiles(x), filters, strict=True)
        ]
        y = _both_axes(_output, products)
        y = jnp.stack([jnp.stack(row, axis=3) for row in y], axis=2)
        rows, columns = _tiles(x)
        y = y.reshape(len(x), 2 * rows, 2 * columns, w.shape[3])
        return y[:, : x.shape[1], : x.shape[2]]

    return in_parts(images, size_of_parts(_VALUES, x), x)


def input_gradient(g: Array, w: Array) -> Array:
    """Returns d/dx of conv(x, w) . g, [N, H, W, I], for g [N, H, W, O]."""
    return conv(g, jnp.flip(w, (0, 1)).swapaxes(2, 3))


def weight_gradient(x: Array, g: Array) -> Array:
    """Returns d/dw of conv(x, w) . g, [3, 3, I, O], for x [N, H, W, I] and g [N, H, W, O]."""

    def images(x, g):
        height, width = (2 * tiles for tiles in _tiles(x))
        # One more than needed, so that it is an array of its own: XLA would cut each of the 16
        # transforms out of all images, which takes longer.
        g = jnp.pad(g, ((0, 0), (0, height + 1 - g.shape[1]), (0, width + 1 - g.shape[2]), (0, 0)))
        outputs = [[g[:, a:height:2, b:width:2] for b in range(2)] for a in range(2)]
        flat = lambda array: array.reshape(-1, array.shape[3])
        products = [
            [(flat(output).T @ flat(tile)).T for tile, output in zip(*rows, strict=True)]
            for rows in zip(_input_tiles(x), _both_axes(_output_t, outputs), strict=True)
        ]
        return jnp.stack([jnp.stack(row) for row in _both_axes(_filter_t, products)])[None]

    return jnp.sum(in_parts(images, size_of_parts(_VALUES, x), x, g), axis=0)


def _tiles(x: Array) -> tuple[int, int]:
    return math.ceil(x.shape[1] / 2), math.ceil(x.shape[2] / 2)


def _input_tiles(x: Array) -> list[list[Array]]:
    """Returns B^T d B of every tile: 4x4 arrays [N, rows, columns, I]."""
    rows, columns = _tiles(x)
    x = jnp.pad(
        x, ((0, 0), (1, 2 * rows + 1 - x.shape[1]), (1, 2 * columns + 1 - x.shape[2]), (0, 0))
    )
    places = [
        [x[:, a : a + 2 * rows : 2, b : b + 2 * columns : 2] for b in range(4)] for a in range(4)
    ]
    return _both_axes(_input, places)


def _input(d: _Vector) -> _Vector:
    """B^T d."""
    return d[0] - d[2], d[1] + d[2], d[2] - d[1], d[1] - d[3]


def _filter(w: _Vector) -> _Vector:
    """G w."""
    return w[0], (w[0] + w[1] + w[2]) / 2, (w[0] - w[1] + w[2]) / 2, w[2]


def _output(m: _Vector) -> _Vector:
    """A^T m."""
    return m[0] + m[1] + m[2], m[1] - m[2] - m[3]


def _filter_t(u: _Vector) -> _Vector:
    """G^T u."""
    return u[0] + (u[1] + u[2]) / 2, (u[1] - u[2]) / 2, (u[1] + u[2]) / 2 + u[3]


def _output_t(y: _Vector) -> _Vector:
    """A y."""
    return y[0], y[0] + y[1], y[0] - y[1], -y[1]


def _both_axes(transform: Callable[[_Vector], _Vector], matrix: Sequence[_Vector]):
    """Transforms the columns, then the rows, of a matrix of arrays."""
    columns = [transform(column) for column in zip(*matrix, strict=True)]
    return [transform(row) for row in zip(*columns, strict=True)]
