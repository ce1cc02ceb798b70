"""Wide residual networks (Zagoruyko & Komodakis, 2016, "Wide Residual Networks")."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from ensadv import architectures
from ensadv.models.base import ImageNetwork


class Block(nn.Module):
    """A pre-activation residual block of two 3x3 convolutions: [B, H, W, C] -> [B, H', W', F]."""

    features: int
    stride: int
    conv: Callable[..., Any]
    norm: Callable[..., Any]
    activate: Callable[[Array], Array]
    padding: str = 'symmetric'

    @nn.compact
    def __call__(self, x: Array) -> Array:
        y = self.activate(self.norm(name='norm_1')(x))
        # Where the shape changes, the shortcut takes the activated input, as in the authors' code.
        shortcut = x
        if self.stride > 1 or x.shape[-1] != self.features:
            shortcut = self.conv(self.features, (1, 1), self.stride, padding=0, name='shortcut')(y)
        padding = 'SAME' if self.padding == 'same' else 1
        y = self.conv(self.features, (3, 3), self.stride, padding=padding, name='conv_1')(y)
        y = self.activate(self.norm(name='norm_2')(y))
        y = self.conv(self.features, (3, 3), 1, padding=1, name='conv_2')(y)
        return shortcut + y


class WideResNet(ImageNetwork):
    """WRN-depth-width, with the per-channel standardisation of the images inside.

    Attributes:
      depth: 6n + 4 with n >= 1 blocks in each of the three groups.
      width: the groups have 16, 32 and 64 times this many channels.
      padding: of the 3x3 convolutions with stride 2: 'symmetric', a pixel on each side, as in the
        authors' code; or 'same', as TensorFlow pads: images of even sides below and on the right
        alone, which the networks of Gowal et al. (2020) do.
    """

    depth: int = 28
    width: int = 10
    padding: str = 'symmetric'

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        """Returns logits, float32 [B, num_classes], for images [B, H, W, C] in [0, 1].

        Args:
          train: whether batch norm uses the batch's statistics (and updates the averages).
        """
        if mistake := architectures.depth_mistake('wide_resnet', self.depth):
            raise ValueError(f'depth: {mistake}')
        convolution, norm, activate = self.convolution(), self.norm(train), self.activate
        block_of = self.block(Block)
        x = self.standardise(x)
        x = convolution(16, (3, 3), padding=1, name='conv_0')(x)
        for group in range(3):
            for block in range((self.depth - 4) // 6):
                stride = 2 if group > 0 and block == 0 else 1
                name = f'group_{group + 1}_block_{block + 1}'
                features = 16 * 2**group * self.width
                settings = convolution, norm, activate, self.padding
                x = block_of(features, stride, *settings, name=name)(x)
        x = activate(norm(name='norm')(x))
        x = jnp.mean(x, axis=(1, 2), dtype=jnp.float32)
        return self.linear()(x)
