"""VGG-like networks (Simonyan & Zisserman, 2015, "Very Deep Convolutional Networks ...")."""

from functools import partial

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from ensadv import architectures
from ensadv.models.base import ImageNetwork

# How many 3x3 convolutions each of the five stages has, by depth: table 1, columns A, B, D, E.
_STAGES = {
    11: (1, 1, 2, 2, 2),
    13: (2, 2, 2, 2, 2),
    16: (2, 2, 3, 3, 3),
    19: (2, 2, 4, 4, 4),
}


class VGG(ImageNetwork):
    """VGG-depth with batch norm, and the per-channel standardisation of the images inside.

    Batch norm follows each convolution, as in torchvision's vgg16_bn. As is usual on CIFAR, global
    average pooling and one linear layer stand in for the original's three, which `depth` counts.

    Attributes:
      depth: convolutions and linear layers of the original: 11, 13, 16 or 19.
      width: the stages have 16, 32, 64, 128 and 128 times this many channels; 4 is the original.
    """

    depth: int = 16
    width: int = 4

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        """Returns logits, float32 [B, num_classes], for images [B, H, W, C] in [0, 1].

        Args:
          train: whether batch norm uses the batch's statistics (and updates the averages).
        """
        if mistake := architectures.depth_mistake('vgg', self.depth):
            raise ValueError(f'depth: {mistake}')
        convolution = partial(self.convolution(), kernel_size=(3, 3), padding=1)
        norm = self.norm(train)
        x = self.standardise(x)
        for stage, layers in enumerate(_STAGES[self.depth], start=1):
            features = 16 * 2 ** min(stage - 1, 3) * self.width

            def convolutions(_, x, stage=stage, layers=layers, features=features):
                for layer in range(1, layers + 1):
                    x = convolution(features, name=f'conv_{stage}_{layer}')(x)
                    x = self.activate(norm(name=f'norm_{stage}_{layer}')(x))
                return x

            x = self.block(convolutions)(self, x)
            # Images smaller than 32x32 run out of pixels before they run out of stages.
            if min(x.shape[1:3]) >= 2:
                # Not jnp.max of a reshaped array, although it is a little faster: its gradient goes
                # to elements that equal the maximum, and XLA may round the two differently when it
                # computes them again for the backward pass, which loses that gradient (jax #40564).
                x = nn.max_pool(x, (2, 2), strides=(2, 2))
        x = jnp.mean(x, axis=(1, 2), dtype=jnp.float32)
        return self.linear()(x)
