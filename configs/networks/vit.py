"""A small vision transformer, a network of your own in plain Flax, without batch norm.

Run: python main.py --config=configs/singleadv.py --workdir=DIR \
    --config.model.name=configs/networks/vit.py:ViT --config.train.learning_rate=0.01
  A smaller one: --config.model.name="configs/networks/vit.py:ViT(depth=2, width=32, heads=2)"
After Dosovitskiy et al. (2021, "An Image is Worth 16x16 Words"), with patches of 4x4 pixels, the
mean over patches in place of a class token, and no dropout. 2,693,194 parameters for 10 classes and
32x32 colour images.
"""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp


class Layer(nn.Module):
    """Attention and a perceptron, each after a layer norm and beside a shortcut."""

    width: int
    heads: int
    dtype: Any

    @nn.compact
    def __call__(self, x):
        y = nn.LayerNorm(dtype=self.dtype)(x)
        x = x + nn.MultiHeadDotProductAttention(self.heads, dtype=self.dtype)(y)
        y = nn.LayerNorm(dtype=self.dtype)(x)
        y = nn.gelu(nn.Dense(4 * self.width, dtype=self.dtype)(y))
        return x + nn.Dense(self.width, dtype=self.dtype)(y)


class ViT(nn.Module):
    """Images [B, H, W, C] in [0, 1] -> logits [B, num_classes].

    The program gives the first five fields, and would give others by the names that `ImageNetwork`
    in ensadv/models/base.py has for them. The rest are set in model.name.
    """

    num_classes: int
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    dtype: Any = jnp.float32
    remat: bool = False
    patch: int = 4
    depth: int = 6
    width: int = 192
    heads: int = 3

    @nn.compact
    def __call__(self, x, train):
        del train  # nothing differs between training and evaluation
        x = (x - jnp.asarray(self.mean)) / jnp.asarray(self.std)
        size = (self.patch, self.patch)
        x = nn.Conv(self.width, size, size, padding='VALID', dtype=self.dtype, name='patches')(x)
        x = x.reshape(len(x), -1, self.width)
        places = self.param('places', nn.initializers.normal(0.02), x.shape[1:])
        x = x + places.astype(self.dtype)
        layer_of = nn.remat(Layer) if self.remat else Layer
        for number in range(self.depth):
            x = layer_of(self.width, self.heads, self.dtype, name=f'layer_{number + 1}')(x)
        x = nn.LayerNorm(name='norm')(x)
        return nn.Dense(self.num_classes, name='linear')(jnp.mean(x, axis=1))
