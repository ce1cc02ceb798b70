"""PreActResNet-18 for small images, a network of your own that is made of this program's parts.

Run: python main.py --config=configs/singleadv.py --workdir=DIR \
    --config.model.name=configs/networks/preactresnet18.py:PreActResNet18
  A narrower one: --config.model.name="configs/networks/preactresnet18.py:PreActResNet18(width=16)"
It is the 18-layer network of He et al. (2016, "Identity Mappings in Deep Residual Networks") with a
stem for 32x32 pixels, one 3x3 convolution and no pooling, as fast adversarial training uses it
(Wong et al., 2020). 11,172,170 parameters for 10 classes and colour images.
"""

import flax.linen as nn
import jax.numpy as jnp

from ensadv.models.base import ImageNetwork
from ensadv.models.wide_resnet import Block


class PreActResNet18(ImageNetwork):
    """Four groups of two pre-activation blocks.

    `ImageNetwork` has all that a config sets, from the number of classes to batch norm's epsilon.

    Attributes:
      width: channels of the first group; each further one has twice as many.
    """

    width: int = 64

    @nn.compact
    def __call__(self, x, train):
        convolution, norm, activate = self.convolution(), self.norm(train), self.activate
        block_of = self.block(Block)
        x = self.standardise(x)
        x = convolution(self.width, (3, 3), padding=1, name='conv_0')(x)
        for group in range(4):
            for block in range(2):
                stride = 2 if group > 0 and block == 0 else 1
                name = f'group_{group + 1}_block_{block + 1}'
                features = self.width * 2**group
                x = block_of(features, stride, convolution, norm, activate, name=name)(x)
        x = activate(norm(name='norm')(x))
        return self.linear()(jnp.mean(x, axis=(1, 2), dtype=jnp.float32))
