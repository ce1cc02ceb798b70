"""Wide residual networks (Zagoruyko & Komodakis, 2016, "Wide Residual Networks")."""

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from ensadv import conv

# The authors' initialisation: convolutions as He et al. (2015) by fan-out, the linear layer as
# Torch's default, which is uniform in +-1/sqrt(fan-in).
conv_init = nn.initializers.variance_scaling(2.0, 'fan_out', 'normal')
linear_init = nn.initializers.variance_scaling(1 / 3, 'fan_in', 'uniform')


class Block(nn.Module):
    """A pre-activation residual block of two 3x3 convolutions: [B, H, W, C] -> [B, H', W', F]."""

    features: int
    stride: int
    conv: Callable[..., Any]
    norm: Callable[..., Any]

    @nn.compact
    def __call__(self, x: Array) -> Array:
        y = nn.relu(self.norm(name='norm_1')(x))
        # Where the shape changes, the shortcut takes the activated input, as in the authors' code.
        shortcut = x
        if self.stride > 1 or x.shape[-1] != self.features:
            shortcut = self.conv(self.features, (1, 1), self.stride, padding=0, name='shortcut')(y)
        y = self.conv(self.features, (3, 3), self.stride, padding=1, name='conv_1')(y)
        y = nn.relu(self.norm(name='norm_2')(y))
        y = self.conv(self.features, (3, 3), 1, padding=1, name='conv_2')(y)
        return shortcut + y


class WideResNet(nn.Module):
    """WRN-depth-width, with the per-channel standardisation of the images inside.

    Attributes:
      num_classes: width of the output.
      mean, std: per channel, in pixels of [0, 1].
      depth: 6n + 4 with n >= 1 blocks in each of the three groups.
      width: the groups have 16, 32 and 64 times this many channels.
      dtype: compute type; weights, batch-norm averages and logits are float32.
      conv: which convolution, see `ensadv.conv.get`.
      norm_momentum, norm_epsilon: of batch norm.
      norm_axis: name of a mapped axis over which batch statistics are averaged, or None.
    """

    num_classes: int
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    depth: int = 28
    width: int = 10
    dtype: Any = jnp.float32
    conv: str = 'auto'
    norm_momentum: float = 0.9
    norm_epsilon: float = 1e-5
    norm_axis: str | None = None

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        """Returns logits, float32 [B, num_classes], for images [B, H, W, C] in [0, 1].

        Args:
          train: whether batch norm uses the batch's statistics (and updates the averages).
        """
        if self.depth < 10 or (self.depth - 4) % 6:
            raise ValueError(f'depth: expected 6n + 4 with n >= 1, found {self.depth}')
        # float32 is to mean float32: left to their default, TPUs and GPUs would round the factors.
        precision = 'highest' if self.dtype == jnp.float32 else None
        convolution = partial(
            nn.Conv,
            use_bias=False,
            dtype=self.dtype,
            precision=precision,
            kernel_init=conv_init,
            conv_general_dilated=conv.get(self.conv),
        )
        norm = partial(
            nn.BatchNorm,
            use_running_average=not train,
            momentum=self.norm_momentum,
            epsilon=self.norm_epsilon,
            dtype=self.dtype,
            axis_name=self.norm_axis if train else None,
        )
        x = (x - jnp.asarray(self.mean)) / jnp.asarray(self.std)
        x = convolution(16, (3, 3), padding=1, name='conv_0')(x)
        for group in range(3):
            for block in range((self.depth - 4) // 6):
                stride = 2 if group > 0 and block == 0 else 1
                name = f'group_{group + 1}_block_{block + 1}'
                features = 16 * 2**group * self.width
                x = Block(features, stride, convolution, norm, name=name)(x)
        x = nn.relu(norm(name='norm')(x))
        x = jnp.mean(x, axis=(1, 2), dtype=jnp.float32)
        return nn.Dense(
            self.num_classes, precision='highest', kernel_init=linear_init, name='linear'
        )(x)
