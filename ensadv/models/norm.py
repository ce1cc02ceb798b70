"""Batch norm, with the gradient written out.

Flax's `nn.BatchNorm` computes the same. Its gradient, as JAX derives it, sums over the images more
often than the two times that it takes written out (Ioffe & Szegedy, 2015, section 3).
"""

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array, lax

from ensadv.cpu.means import channel_mean


class BatchNorm(nn.Module):
    """Batch norm over all axes but the last; its variables are those of `nn.BatchNorm`.

    Attributes:
      use_running_average: whether to use the running averages and not the batch's statistics.
      momentum: share of the old average that is kept.
      epsilon: added to the variance.
      dtype: of the result; statistics are float32.
      axis_name: of a mapped axis over which the batch's statistics are averaged, or None.
    """

    use_running_average: bool
    momentum: float
    epsilon: float
    dtype: Any = jnp.float32
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Returns x, [..., C], normalised; with the batch's statistics the averages take it in."""
        shape = x.shape[-1:]
        mean = self.variable('batch_stats', 'mean', jnp.zeros, shape)
        var = self.variable('batch_stats', 'var', jnp.ones, shape)
        scale = self.param('scale', nn.initializers.ones, shape)
        bias = self.param('bias', nn.initializers.zeros, shape)
        if self.use_running_average:
            y = (x - mean.value) * (lax.rsqrt(var.value + self.epsilon) * scale) + bias
            return y.astype(self.dtype)
        # While the variables are made there may be no such axis.
        axis_name = None if self.is_initializing() else self.axis_name
        y, batch_mean, batch_var = normalise(x, scale, bias, self.epsilon, axis_name)
        if not self.is_initializing():
            mean.value = self.momentum * mean.value + (1 - self.momentum) * batch_mean
            var.value = self.momentum * var.value + (1 - self.momentum) * batch_var
        return y.astype(self.dtype)


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def normalise(
    x: Array, scale: Array, bias: Array, epsilon: float, axis_name: str | None
) -> tuple[Array, Array, Array]:
    """Normalises by the batch's statistics.

    Args:
      x: [N, ..., C].
      scale, bias: float32 [C].
      epsilon: added to the variance.
      axis_name: of a mapped axis over which the statistics are averaged, or None.

    Returns:
      float32: the result [N, ..., C], and the batch's mean and (biased) variance [C], whose
      gradients count as zero.
    """
    return _forward(x, scale, bias, epsilon, axis_name)[0]


def _forward(x, scale, bias, epsilon, axis_name):
    values = x.astype(jnp.float32)
    mean, square = _means((values, jnp.square(values)), axis_name)
    var = jnp.maximum(square - jnp.square(mean), 0)  # rounding makes it negative
    inverse = lax.rsqrt(var + epsilon)
    y = (values - mean) * (inverse * scale) + bias
    return (y, mean, var), (x, scale, mean, inverse)


def _backward(epsilon, axis_name, saved, gradients):
    x, scale, mean, inverse = saved
    g, *_ = gradients
    centred = x.astype(jnp.float32) - mean
    means = _means((g, g * centred))
    count = x.size // x.shape[-1]
    bias_gradient, scale_gradient = count * means[0], count * means[1] * inverse
    # The statistics are of all devices, and so all devices' gradients come through them.
    mean_g, mean_product = lax.pmean(means, axis_name) if axis_name else means
    x_gradient = (g - mean_g - centred * (jnp.square(inverse) * mean_product)) * (inverse * scale)
    return x_gradient.astype(x.dtype), scale_gradient, bias_gradient


normalise.defvjp(_forward, _backward)


def _means(arrays: tuple[Array, ...], axis_name: str | None = None) -> tuple[Array, ...]:
    """Returns the means over all axes but the last, and over a mapped axis."""
    means = tuple(map(channel_mean, arrays))
    return lax.pmean(means, axis_name) if axis_name else means
