"""The one convolution everything runs through.

`flax.linen.Conv(..., conv_general_dilated=conv.get(kind))` takes it. The kinds compute the same
numbers and differ in what `vmap` over weights, which is how members are stacked, compiles to:

- 'grouped': `jax.lax.conv_general_dilated` itself, so one grouped convolution for all members.
- 'separate': one plain convolution per member, forward and in both gradients.
- 'onednn': the same, on the CPU by oneDNN where that is there (`onednn`).
- 'auto': 'onednn' on the CPU, 'grouped' elsewhere. On the CPU `ensemble` does not stack members;
  there it is for fast gradients.

XLA:CPU runs only plain convolutions of NHWC images with HWIO kernels fast. It misses that path for
grouped convolutions, and for gradients in a loop, where it folds the transposition of an operand
into the convolution: the gradient of the weights then takes a hundred times as long. Hence
`optimization_barrier`, which keeps the transposed operand an array of its own.

XLA:CPU also computes those of many channels wrong, now and then, where it falls behind with its
tasks: hence `sum_of_slices`. 'grouped' has no such care.

Two kinds of convolution are matrix multiplications on the CPU instead, in 'separate': large ones
with 3x3 kernels (`winograd`), and those of few input channels, as a network's first. So are, in
float32, the input gradients where there is a stride, and the weight gradients of all convolutions
but those of few input channels. In 'onednn' so are strided input gradients, and large convolutions
with 3x3 kernels whose weights are constant, as in attacks.
"""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
from jax import lax

from ensadv import onednn, order, winograd
from ensadv.parts import in_parts, size_of_parts
from ensadv.slices import sum_of_slices

KINDS = ('auto', 'grouped', 'onednn', 'separate')
_NHWC = ('NHWC', 'HWIO', 'NHWC')
# On two cores of an AMD EPYC, jaxlib 0.10.2: from so many channels on Winograd's convolution is
# faster than XLA's (32 channels, 32x32, batch 64: 6.3 ms and 7.1; 128, 8x8: 3.4 and 5.8).
_WINOGRAD_CHANNELS = 32
# And faster than oneDNN's, where the weights are constant: an attack's step of a WRN-16-4, batch
# 32, takes 0.89 of the time (two cores of an Intel Xeon with AVX-512). Where they are not, all
# filters are transformed for each pass, and the two passes of training take 1.26 times as long.
_WINOGRAD_CHANNELS_BEFORE_ONEDNN = 128
# It takes 0.4 s longer to compile, which smaller ones than this do not earn.
_WINOGRAD_MULTIPLICATIONS = 2**24
# Up to so many channels XLA's convolution is far slower than matrix multiplications (an image's
# 3 channels to 16, batch 64: 2.4 ms and 0.8, batch 128: 4.5 and 2.1; its input gradient, batch 64:
# 4.0 and 0.8).
_FEW_INPUTS = 4
_TIMES_AS_MANY_OUTPUTS = 4  # at least; where fewer come out nothing was measured
# Of the images, or of their gradients, that gradients of weights take at a time.
_VALUES = 2**19


def get(kind):
    """Returns the convolution of this kind, called like `jax.lax.conv_general_dilated`.

    The convolution maps lhs [N, H, W, I] and rhs [KH, KW, I, O], of the same floating dtype, to
    [N, H', W', O] of that dtype or of `preferred_element_type`.
    """
    functions = {
        'auto': _auto,
        'grouped': lax.conv_general_dilated,
        'onednn': functools.partial(_separate, by_onednn=True),
        'separate': _separate,
    }
    if kind not in functions:
        raise ValueError(f'kind of convolution is {kind!r}, must be one of {", ".join(KINDS)}')
    return functions[kind]


def _auto(*args, **kwargs):
    # Asked for at each call, because asking starts the backend, which an import should not.
    kind = 'onednn' if jax.default_backend() == 'cpu' else 'grouped'
    return get(kind)(*args, **kwargs)


def _separate(
    lhs,
    rhs,
    window_strides,
    padding,
    lhs_dilation=None,
    rhs_dilation=None,
    dimension_numbers=None,
    feature_group_count=1,
    batch_group_count=1,
    precision=None,
    preferred_element_type=None,
    out_sharding=None,
    by_onednn=False,
):
    plain = (
        jnp.ndim(lhs) == jnp.ndim(rhs) == 4
        and lhs.size * rhs.size > 0
        and lhs.dtype == rhs.dtype
        and all(d == 1 for d in (*(lhs_dilation or ()), *(rhs_dilation or ())))
        and feature_group_count == batch_group_count == 1
        and out_sharding is None
        and lax.conv_dimension_numbers(lhs.shape, rhs.shape, dimension_numbers)
        == lax.conv_dimension_numbers(lhs.shape, rhs.shape, _NHWC)
    )
    if not plain:
        return lax.conv_general_dilated(
            lhs,
            rhs,
            window_strides,
            padding,
            lhs_dilation,
            rhs_dilation,
            dimension_numbers,
            feature_group_count,
            batch_group_count,
            precision,
            preferred_element_type,
            out_sharding,
        )
    strides = tuple(window_strides)
    if isinstance(padding, str):
        padding = lax.padtype_to_pads(lhs.shape[1:3], rhs.shape[:2], strides, padding)
    dtypes = (lhs.dtype, preferred_element_type)
    sizes = lhs.shape[:3], rhs.shape, strides, padding
    return _build(*sizes, precision, *dtypes, by_onednn)(lhs, rhs)


def _build(images, kernel, strides, padding, precision, dtype, preferred, by_onednn):
    """Returns conv(x, w) for these sizes, with its own rules for `vmap` and for gradients.

    conv(x, w), the gradient of the input and that of the weights are bilinear, and each other's
    gradients, so that three functions are closed under differentiation to any order.
    """
    conv_of = functools.partial(
        lax.conv_general_dilated,
        dimension_numbers=_NHWC,
        precision=precision,
        preferred_element_type=preferred,
    )
    sizes = images, kernel, strides, padding
    is_cpu, is_float32 = jax.default_backend() == 'cpu', dtype == jnp.float32
    is_float32 &= preferred in (None, dtype)
    by_onednn &= is_float32 and onednn.is_there() and _suits_onednn(*sizes)
    if by_onednn:
        functions = _by_onednn(*sizes)
    elif is_cpu and is_float32 and _winograd_pays(_WINOGRAD_CHANNELS, *sizes):
        functions = winograd.conv, _winograd_input_gradient, winograd.weight_gradient
    elif is_cpu:
        functions = _by_xla_cpu(conv_of, *sizes, dtype, is_float32)
    else:
        functions = _by_xla(conv_of, *sizes, dtype)
    forward, input_gradient, weight_gradient = functions

    def gradients(x, w, g):
        of_x = dx(g, w)
        # One after the other, as two at a time would take the caches from each other: a step of a
        # WRN-16-4 takes 0.95 of the time.
        return of_x, dw(x, order.when_there(g, of_x) if by_onednn else g)

    conv = _differentiable(_batched(forward, 1), gradients)
    dx = _differentiable(_batched(input_gradient, 1), lambda g, w, x: (conv(x, w), dw(x, g)))
    dw = _differentiable(_batched(weight_gradient, None), lambda x, g, w: (dx(g, w), conv(x, w)))
    if not (by_onednn and _winograd_pays(_WINOGRAD_CHANNELS_BEFORE_ONEDNN, *sizes)):
        return conv
    constant_dx = _differentiable(
        _batched(_winograd_input_gradient, 1), lambda g, w, x: (conv(x, w), dw(x, g))
    )
    return _where_constant(_batched(winograd.conv, 1), constant_dx, conv, gradients)


def _by_xla(conv_of, images, kernel, strides, padding, dtype):
    """Returns the convolution and its two gradients as JAX has them."""
    forward = lambda x, w: conv_of(x, w, strides, padding)

    def input_gradient(g, w):
        x = jax.ShapeDtypeStruct((g.shape[0], *images[1:], kernel[2]), g.dtype)
        return jax.linear_transpose(lambda x: forward(x, w.astype(g.dtype)), x)(g)[0].astype(dtype)

    def weight_gradient(x, g):
        w = jax.ShapeDtypeStruct(kernel, g.dtype)
        return jax.linear_transpose(lambda w: forward(x.astype(g.dtype), w), w)(g)[0].astype(dtype)

    return forward, input_gradient, weight_gradient


def _by_onednn(images, kernel, strides, padding):
    """Returns the convolution and its two gradients, all by oneDNN but strided input gradients."""
    size, window = images[1:], kernel[:2]
    forward = lambda x, w: onednn.conv(x, w, strides, padding)
    weight_gradient = lambda x, g: _images_as_channels(x, g, window, strides, padding)
    if strides != (1, 1) or _few_come_in(kernel, strides):
        input_gradient = lambda g, w: _sum_of_patches(g, w, size, strides, padding)
    else:
        input_gradient = lambda g, w: _input_gradient(onednn.conv, g, w, size, strides, padding)
    return forward, input_gradient, weight_gradient


def _by_xla_cpu(conv_of, images, kernel, strides, padding, dtype, is_float32):
    """Returns the convolution and its two gradients, as XLA:CPU is fast and right."""
    size, window = images[1:], kernel[:2]
    whole, conv_of = conv_of, functools.partial(_in_slices, conv_of)
    forward = lambda x, w: conv_of(x, w, strides, padding)

    def input_gradient(g, w):
        w = w.astype(g.dtype)
        return _input_gradient(conv_of, g, w, size, strides, padding).astype(dtype)

    def weight_gradient(x, g):
        x = x.astype(g.dtype)
        return _weight_gradient(whole, x, g, window, strides, padding).astype(dtype)

    few = is_float32 and _few_come_in(kernel, strides)
    if few:
        forward = lambda x, w: _conv_of_patches(x, w, padding)
    if few or (is_float32 and strides != (1, 1)):
        input_gradient = lambda g, w: _sum_of_patches(g, w, size, strides, padding)
    if is_float32 and window == (1, 1) and not any(map(any, padding)):
        weight_gradient = lambda x, g: _product_of_pixels(x, g, strides)
    elif is_float32 and not few:
        weight_gradient = lambda x, g: _products_of_windows(x, g, window, strides, padding)
    return forward, input_gradient, weight_gradient


def _few_come_in(kernel, strides):
    """Whether there is no stride, and few channels come in, and far more out."""
    inputs, outputs = kernel[2:]
    return (
        strides == (1, 1) and inputs <= _FEW_INPUTS and outputs >= _TIMES_AS_MANY_OUTPUTS * inputs
    )


def _suits_onednn(images, kernel, strides, padding):
    """Whether windows fit in, and all pads, those of the input's gradient too, are >= 0."""
    return all(
        0 <= low < taps and 0 <= high < taps and n + low + high >= taps
        for n, taps, (low, high) in zip(images[1:], kernel[:2], padding, strict=True)
    )


def _winograd_pays(channels, images, kernel, strides, padding):
    """Whether it is a 3x3 convolution that is large enough, with so many channels at least."""
    return (
        (strides, kernel[:2]) == ((1, 1), (3, 3))
        and all(tuple(pads) == (1, 1) for pads in padding)
        and min(kernel[2:]) >= channels
        and math.prod(images) * math.prod(kernel) >= _WINOGRAD_MULTIPLICATIONS
    )


def _winograd_input_gradient(g, w):
    return winograd.conv(g, jnp.flip(w, (0, 1)).swapaxes(2, 3))


def _where_constant(constant_conv, constant_dx, conv, gradients):
    """Returns a convolution that is the constant one where the weights are not differentiated."""

    @jax.custom_vjp
    def function(x, w):
        return constant_conv(x, w)

    def forward(x, w):
        if w.perturbed:
            return conv(x.value, w.value), (x.value, w.value)
        return constant_conv(x.value, w.value), (None, w.value)

    def backward(saved, g):
        x, w = saved
        if x is None:
            return constant_dx(g, w), None
        return gradients(x, w, g)

    function.defvjp(forward, backward, symbolic_zeros=True)
    return function


def _differentiable(function, gradients):
    """Gives function(a, b) the gradients(a, b, cotangent) -> (of a, of b)."""
    function = jax.custom_vjp(function)
    function.defvjp(lambda a, b: (function(a, b), (a, b)), lambda saved, g: gradients(*saved, g))
    return function


def _batched(function, weights):
    """Gives function(a, b) a `vmap` that calls it per member; `weights`: which argument they are.

    Where the weights are shared, or only they lack a batch, members are merged into the images.
    """
    function = jax.custom_batching.custom_vmap(function)

    @function.def_vmap
    def rule(members, batched, a, b):
        if weights == 1 and not batched[1]:
            out = function(a.reshape(-1, *a.shape[2:]), b)
            return out.reshape(*a.shape[:2], *out.shape[1:]), True
        pick = lambda array, is_batched, i: array[i] if is_batched else array
        out = [function(pick(a, batched[0], i), pick(b, batched[1], i)) for i in range(members)]
        return jnp.stack(out), True

    return function


def _input_gradient(conv_of, g, w, size, strides, padding):
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


def _in_slices(conv_of, x, w, strides, padding):
    """conv_of(x, w), of slices of the channels."""
    taps = math.prod(w.shape[:2])
    return sum_of_slices(lambda x, w: conv_of(x, w, strides, padding), x, w, axis=2, taps=taps)


def _conv_of_patches(x, w, padding):
    """conv(x, w) of stride 1: a matrix multiplication, for all of the kernel's rows at once.

    Its left operand are the values that the row of a window sees; what the kernel's rows give is
    added up, each a row further on.
    """
    x = _pad(x, padding)
    rows, columns = (n - taps + 1 for n, taps in zip(x.shape[1:3], w.shape, strict=False))
    windows = [x[:, :, b : b + columns] for b in range(w.shape[1])]
    patches = lax.optimization_barrier(jnp.concatenate(windows, axis=-1))
    kernel = lax.optimization_barrier(w.reshape(w.shape[0], -1, w.shape[3]).swapaxes(0, 1))
    products = lax.optimization_barrier(jnp.einsum('nhwp,pao->nhwao', patches, kernel))
    return sum(products[:, a : a + rows, :, a] for a in range(w.shape[0]))


def _sum_of_patches(g, w, size, strides, padding):
    """d/dx of conv(x, w) . g: g's part of every window's gradient, added up.

    For stride 2 and 3x3 kernels, in a loop, this takes 0.75 to 0.90 of `_input_gradient`'s CPU time
    with 8 images and 0.85 to 0.98 with 64 (from 32 to 64 channels up to 160 to 320; on two cores of
    an AMD EPYC). Of 1x1 kernels both are products.
    """
    # Transposed by itself, so that a loop over g does it once.
    kernel = lax.optimization_barrier(w.transpose(3, 0, 1, 2))
    product = functools.partial(jnp.einsum, 'nhwo,oabi->nhwabi')
    patches = lax.optimization_barrier(sum_of_slices(product, g, kernel, axis=0))

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


def _product_of_pixels(x, g, strides):
    """d/dw of conv(x, w) . g for a 1x1 kernel without padding, [1, 1, I, O].

    Convolved (see `_weight_gradient`) it took three to six times as long: 32 to 64 channels,
    stride 2, 32x32, batch 64: 4.0 ms and 1.4; 16 to 160, stride 1: 20.8 and 3.6.
    """
    x = lax.optimization_barrier(x[:, :: strides[0], :: strides[1]])
    return (_pixels(x).T @ _pixels(g))[None, None]


def _pixels(images):
    """Images [N, H, W, C] as [N H W, C]: XLA would transpose them for a product of four axes."""
    return images.reshape(-1, images.shape[3])


def _products_of_windows(x, g, window, strides, padding):
    """d/dw of conv(x, w) . g, [*window, I, O]: a product for each place in the window.

    Alone this takes about as long as `_weight_gradient`. But in a step that one's transposition of
    all images is slow: a step of IFGSM-1 of a WRN-10-2 with batch 64 takes 0.97 of the time with
    this one (median of 9 turns, two cores of an AMD EPYC).
    """

    def images(x, g):
        x = lax.optimization_barrier(_pad(x, padding))
        ends = [(n - 1) * s + 1 for n, s in zip(g.shape[1:3], strides, strict=True)]
        seen = lambda a, b: x[:, a : a + ends[0] : strides[0], b : b + ends[1] : strides[1]]
        places = itertools.product(*map(range, window))
        return jnp.stack([_pixels(seen(a, b)).T @ _pixels(g) for a, b in places])[None]

    w = jnp.sum(in_parts(images, size_of_parts(_VALUES, x, g), x, g), axis=0)
    return w.reshape(*window, x.shape[3], g.shape[3])


def _images_as_channels(x, g, window, strides, padding):
    """d/dw of conv(x, w) . g, [*window, I, O]: x convolved with g, the images what is summed over.

    The input channels are a third spatial axis: oneDNN is fast where the last of them is long. As a
    product for each place of the window, or by Winograd, it took 1.1 to 1.9 times as long (16 to
    256 channels, batch 32 and 64, but 64 channels, 16x16, batch 64: 0.8).
    """
    pads = [
        (low, (n - 1) * stride + taps - extent - low)
        for (low, _), n, stride, taps, extent in zip(
            padding, g.shape[1:3], strides, window, x.shape[1:3], strict=True
        )
    ]

    def images(x, g):
        # What no window sees is cut off.
        x = x[:, : x.shape[1] + min(pads[0][1], 0), : x.shape[2] + min(pads[1][1], 0)]
        n, height, width, inputs = x.shape
        # Transposed by themselves: as parts of other operations XLA would do it slowly.
        x, g = lax.optimization_barrier((x, g))
        x, g = lax.optimization_barrier((x.reshape(n, -1).T, g.transpose(1, 2, 0, 3)))
        x = x.reshape(1, height, width, inputs, n)
        ahead = [(low, max(high, 0)) for low, high in pads]
        return onednn.conv(x, g[:, :, None], (1, 1, 1), (*ahead, (0, 0)), (*strides, 1))

    return jnp.sum(in_parts(images, size_of_parts(_VALUES, x, g), x, g), axis=0)


def _weight_gradient(conv_of, x, g, window, strides, padding):
    """d/dw of conv(x, w) . g, [*window, I, O]: x convolved with g, batch and channels swapped."""
    pads = [
        (low, (n - 1) * s + taps - extent - low)
        for (low, _), n, s, taps, extent in zip(
            padding, g.shape[1:3], strides, window, x.shape[1:3], strict=True
        )
    ]
    x = lax.optimization_barrier(x.transpose(3, 1, 2, 0))
    g = lax.optimization_barrier(g.transpose(1, 2, 0, 3))
    w = conv_of(x, g, (1, 1), pads, rhs_dilation=strides)
    return lax.optimization_barrier(w).transpose(1, 2, 0, 3)
