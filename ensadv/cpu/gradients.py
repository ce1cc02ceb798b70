"""Convolutions and their gradients by operations that a CPU is fast at: what `conv` picks from.

x are images [N, H, W, I], w kernels [KH, KW, I, O] and g gradients of the images that come out,
[N, H', W', O]; `window` is (KH, KW), `size` (H, W), `strides` and `padding` are for each of both.
"""

import itertools
import math

import jax.numpy as jnp
from jax import lax

from ensadv.cpu import onednn
from ensadv.cpu.parts import in_parts

# `images_as_channels` takes at most so many images at a time, or a multiple of that which has no
# more values than _VALUES_OF_BOTH, with their gradients: a cache holds these.
_IMAGES = 16
_VALUES_OF_BOTH = 3 * 2**18
# And so many channels in a block; of more than four such blocks it makes two.
_CHANNELS = 8


def input_gradient(conv_of, g, w, size, strides, padding):
    """d/dx of conv(x, w) . g, [N, *size, I]: a convolution of g for each phase of the stride."""

    def phase(part, pads):
        kernel = lax.optimization_barrier(jnp.flip(w[part], (0, 1)).swapaxes(2, 3))
        return conv_of(g, kernel, (1, 1), pads)

    return _of_phases(phase, g, w, size, strides, padding)


def _of_phases(phase, g, w, size, strides, padding):
    """Returns d/dx of conv(x, w) . g, put together from the phases of the stride.

    x[s m + a - pad] sees g[m - t] through w[s t + a]. So each phase of x, every s-th value of it,
    is a convolution of stride 1, which wastes no work on the zeros that dilating g would put in:
    phase(part, pads) is that of g, with these pads, and w[part], backwards.
    """
    count = [math.ceil(n / s) for n, s in zip(size, strides, strict=True)]
    phases = []
    for start in itertools.product(*map(range, strides)):
        first = [divmod(q + low, s) for q, (low, _), s in zip(start, padding, strides, strict=True)]
        part = tuple(slice(a, None, s) for (_, a), s in zip(first, strides, strict=True))
        if w[part].size == 0:
            phases.append(jnp.zeros((g.shape[0], *count, w.shape[2]), g.dtype))
            continue
        pads = [
            (taps - 1 - m, m + n - extent)
            for taps, (m, _), n, extent in zip(
                w[part].shape, first, count, g.shape[1:3], strict=False
            )
        ]
        phases.append(phase(part, pads))
    if math.prod(strides) == 1:
        return phases[0]
    x = jnp.stack(phases).reshape(*strides, *phases[0].shape).transpose(2, 3, 0, 4, 1, 5)
    x = x.reshape(g.shape[0], count[0] * strides[0], count[1] * strides[1], w.shape[2])
    return x[:, : size[0], : size[1]]


def sum_of_patches(g, w, size, strides, padding):
    """d/dx of conv(x, w) . g: g's part of every window's gradient, added up.

    Where there is a stride it is faster than `input_gradient`.
    """
    # Transposed by itself, so that a loop over g does it once.
    kernel = lax.optimization_barrier(w.transpose(3, 0, 1, 2))
    patches = lax.optimization_barrier(jnp.einsum('nhwo,oabi->nhwabi', g, kernel))

    def phase(part, pads):
        seen = patches[:, :, :, *part]
        rows, columns = seen.shape[3:5]
        total = 0
        for a, b in itertools.product(range(rows), range(columns)):
            ahead = [
                (low - taps + 1 + tap, high - tap)
                for (low, high), taps, tap in zip(pads, (rows, columns), (a, b), strict=True)
            ]
            total += _pad(seen[:, :, :, a, b], ahead)
        return total

    return _of_phases(phase, g, w, size, strides, padding)


def _pad(x, pads):
    """Pads x [N, H, W, ...] with zeros, or crops it where a number is negative."""
    none = (0, 0, 0)
    spatial = [(low, high, 0) for low, high in pads]
    return lax.pad(x, jnp.zeros((), x.dtype), (none, *spatial, *[none] * (x.ndim - 3)))


def products_of_windows(x, g, window, strides, padding):
    """d/dw of conv(x, w) . g, [*window, I, O]: a product for each place in the window."""
    x = _pad(x, padding)
    ends = [(n - 1) * s + 1 for n, s in zip(g.shape[1:3], strides, strict=True)]

    def product(a, b):
        seen = x[:, a : a + ends[0] : strides[0], b : b + ends[1] : strides[1]]
        return _pixels(lax.optimization_barrier(seen)).T @ _pixels(g)

    products = [product(a, b) for a, b in itertools.product(*map(range, window))]
    return jnp.stack(products).reshape(*window, x.shape[3], g.shape[3])


def _pixels(images):
    """Images [N, H, W, C] as [N H W, C]: XLA would transpose them for a product of four axes."""
    return images.reshape(-1, images.shape[3])


def images_as_channels(x, g, window, strides, padding):
    """d/dw of conv(x, w) . g, [*window, I, O]: x convolved with g, the images what is summed over.

    The input channels lie side by side in the rows of x, which g is therefore dilated for: what
    comes out is KH rows of KW x I values. oneDNN is fast where rows are long. But it gives whole
    rows to a thread, and of three rows one of two threads would have two. So the channels are taken
    in blocks, which are what a batch is to oneDNN, and there are three rows of each.
    """
    pads = _pads_of_seen(x, g, window, strides, padding)
    inputs, outputs = x.shape[3], g.shape[3]
    block = _CHANNELS if inputs <= 4 * _CHANNELS else inputs // 2
    if inputs % block:
        block = inputs

    def images(x, g):
        # What no window sees is cut off.
        x = x[:, : x.shape[1] + min(pads[0][1], 0), : x.shape[2] + min(pads[1][1], 0)]
        n, height, width, _ = x.shape
        # Transposed by itself: as a part of another operation XLA would do it slowly.
        x, g = lax.optimization_barrier((x, g))
        x = x.reshape(n, height * width, -1, block).transpose(2, 1, 3, 0)
        x = lax.optimization_barrier(x).reshape(-1, height, width * block, n)
        ahead = [
            (size * low, size * max(high, 0))
            for (low, high), size in zip(pads, (1, block), strict=True)
        ]
        dilation = (strides[0], strides[1] * block)
        return onednn.conv(x, g, (1, 1), ahead, dilation, inputs_first=True)[None]

    n = len(x)
    most = _IMAGES * max(1, _VALUES_OF_BOTH * n // (_IMAGES * (x.size + g.size)))
    w = jnp.sum(in_parts(images, math.ceil(n / math.ceil(n / most)), x, g), axis=0)
    w = w.reshape(-1, *window, block, outputs).transpose(1, 2, 0, 3, 4)
    return w.reshape(*window, inputs, outputs)


def weight_gradient(conv_of, x, g, window, strides, padding):
    """d/dw of conv(x, w) . g, [*window, I, O]: x convolved with g, batch and channels swapped."""
    pads = _pads_of_seen(x, g, window, strides, padding)
    x = lax.optimization_barrier(x.transpose(3, 1, 2, 0))
    g = lax.optimization_barrier(g.transpose(1, 2, 0, 3))
    w = conv_of(x, g, (1, 1), pads, rhs_dilation=strides)
    return lax.optimization_barrier(w).transpose(1, 2, 0, 3)


def _pads_of_seen(x, g, window, strides, padding):
    """Returns the pads of x without what no window sees: the second are below 0 where that is."""
    return [
        (low, (n - 1) * stride + taps - extent - low)
        for (low, _), n, stride, taps, extent in zip(
            padding, g.shape[1:3], strides, window, x.shape[1:3], strict=True
        )
    ]
