"""Separate convolutions: a plain one for each member, forward and in both gradients.

XLA:CPU runs only plain convolutions of NHWC images with HWIO kernels fast. It misses that path for
grouped convolutions, and for gradients in a loop, where it folds the transposition of an operand
into the convolution. Hence `optimization_barrier`, which keeps the transposed operand an array of
its own.

Where oneDNN is slower at something, matrix multiplications or XLA's convolution take its place.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from ensadv.cpu import backend, gradients, onednn

_NHWC = ('NHWC', 'HWIO', 'NHWC')
# Up to so many input channels, and at least so many times as many output channels, matrix
# multiplications are faster than oneDNN's gradient of the images.
_FEW_INPUTS = 4
_TIMES_AS_MANY_OUTPUTS = 4


def separate(
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
    """Convolves, called like `jax.lax.conv_general_dilated`; `by_onednn`: where that works.

    It maps lhs [N, H, W, I] and rhs [KH, KW, I, O], of the same floating dtype, to [N, H', W', O]
    of that dtype or of `preferred_element_type`. Anything else is left to `jax.lax`.
    """
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
    is_float32 = dtype == jnp.float32 and preferred in (None, dtype)
    if by_onednn and is_float32 and onednn.available() and _suits_onednn(*sizes):
        functions = _by_onednn(conv_of, *sizes)
    elif backend.is_cpu():
        functions = _by_xla_cpu(conv_of, *sizes, dtype)
    else:
        functions = _by_xla(conv_of, *sizes, dtype)
    forward, input_gradient, weight_gradient = functions

    conv = _differentiable(_batched(forward, 1), lambda x, w, g: (dx(g, w), dw(x, g)))
    dx = _differentiable(_batched(input_gradient, 1), lambda g, w, x: (conv(x, w), dw(x, g)))
    dw = _differentiable(_batched(weight_gradient, None), lambda x, g, w: (dx(g, w), conv(x, w)))
    return conv


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


def _by_onednn(conv_of, images, kernel, strides, padding):
    """Returns the convolution and its two gradients, by oneDNN where that is the fastest."""
    size, window = images[1:], kernel[:2]
    forward = lambda x, w: onednn.conv(x, w, strides, padding)
    few = _few_come_in(kernel, strides)
    if few:
        weight_gradient = lambda x, g: gradients.weight_gradient(
            conv_of, x, g, window, strides, padding
        )
    elif _is_of_pixels(window, padding):
        weight_gradient = lambda x, g: gradients.products_of_windows(x, g, window, strides, padding)
    else:
        weight_gradient = lambda x, g: gradients.images_as_channels(x, g, window, strides, padding)
    if few or strides != (1, 1):
        input_gradient = lambda g, w: gradients.sum_of_patches(g, w, size, strides, padding)
    else:
        input_gradient = lambda g, w: gradients.input_gradient(
            onednn.conv, g, w, size, strides, padding
        )
    return forward, input_gradient, weight_gradient


def _by_xla_cpu(conv_of, images, kernel, strides, padding, dtype):
    """Returns the convolution and its two gradients, without oneDNN: for any CPU and dtype."""
    forward = lambda x, w: conv_of(x, w, strides, padding)

    def input_gradient(g, w):
        w = w.astype(g.dtype)
        return gradients.input_gradient(conv_of, g, w, images[1:], strides, padding).astype(dtype)

    def weight_gradient(x, g):
        # Not a convolution, which XLA may give to Eigen, whose sums of many values may be wrong.
        x = x.astype(g.dtype)
        return gradients.products_of_windows(x, g, kernel[:2], strides, padding).astype(dtype)

    return forward, input_gradient, weight_gradient


def _few_come_in(kernel, strides):
    """Whether there is no stride, and few channels come in, and far more out."""
    inputs, outputs = kernel[2:]
    return (
        strides == (1, 1) and inputs <= _FEW_INPUTS and outputs >= _TIMES_AS_MANY_OUTPUTS * inputs
    )


def _is_of_pixels(window, padding):
    """Whether each output sees one pixel of the image, and none of a pad."""
    return window == (1, 1) and not any(map(any, padding))


def _suits_onednn(images, kernel, strides, padding):
    """Whether windows fit in, and all pads, those of the input's gradient too, are >= 0."""
    return all(
        0 <= low < taps and 0 <= high < taps and n + low + high >= taps
        for n, taps, (low, high) in zip(images[1:], kernel[:2], padding, strict=True)
    )


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
