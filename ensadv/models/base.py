"""What the networks share: their common settings, and their layers made from these."""

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from ensadv.models import conv
from ensadv.models.norm import BatchNorm

# Initialisation as Zagoruyko & Komodakis: convolutions as He et al. (2015) by fan-out, the linear
# layer as Torch's default, which is uniform in +-1/sqrt(fan-in).
conv_init = nn.initializers.variance_scaling(2.0, 'fan_out', 'normal')
linear_init = nn.initializers.variance_scaling(1 / 3, 'fan_in', 'uniform')
_ACTIVATIONS = {'relu': nn.relu, 'silu': nn.silu}


class ImageNetwork(nn.Module):
    """Images [B, H, W, C] in [0, 1] -> logits, with the per-channel standardisation inside.

    Attributes:
      num_classes: width of the output.
      mean, std: per channel, in pixels of [0, 1].
      depth, width: see the network.
      dtype: compute type; weights, batch-norm averages and logits are float32.
      conv: which convolution, see `models.conv.get`.
      remat: whether backward passes compute the activations inside each block (of vgg: each
        stage) again, so that only those between blocks are kept.
      norm_momentum, norm_epsilon: of batch norm.
      norm_axis: name of a mapped axis over which batch statistics are averaged, or None.
      activation: 'relu', or 'silu', x * sigmoid(x) (Elfwing et al., 2018), which the robust
        networks of Gowal et al. (2020) have.
    """

    num_classes: int
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    depth: int = 0
    width: int = 0
    dtype: Any = jnp.float32
    conv: str = 'auto'
    remat: bool = False
    norm_momentum: float = 0.9
    norm_epsilon: float = 1e-5
    norm_axis: str | None = None
    activation: str = 'relu'

    def standardise(self, x: Array) -> Array:
        """Returns images whose channels have mean 0 and deviation 1 over the training images."""
        return (x - jnp.asarray(self.mean)) / jnp.asarray(self.std)

    def convolution(self) -> Callable[..., nn.Conv]:
        """Returns what makes a convolution without bias."""
        return partial(
            nn.Conv,
            use_bias=False,
            dtype=self.dtype,
            # float32 is to mean float32: left to themselves, TPUs and GPUs would round the factors.
            precision='highest' if self.dtype == jnp.float32 else None,
            kernel_init=conv_init,
            conv_general_dilated=conv.get(self.conv),
        )

    def norm(self, train: bool) -> Callable[..., BatchNorm]:
        """Returns what makes a batch norm, by the batch's statistics where `train`."""
        return partial(
            BatchNorm,
            use_running_average=not train,
            momentum=self.norm_momentum,
            epsilon=self.norm_epsilon,
            dtype=self.dtype,
            axis_name=self.norm_axis if train else None,
        )

    @property
    def activate(self) -> Callable[[Array], Array]:
        """The activation, as a function of arrays of any shape."""
        return _ACTIVATIONS[self.activation]

    def block(self, block: Callable[..., Any]) -> Callable[..., Any]:
        """Returns a module's class, or a function of a module and images, as `remat` wants it."""
        return nn.remat(block) if self.remat else block

    def linear(self) -> nn.Dense:
        """Returns the last layer: logits, float32 [B, num_classes], of features [B, F]."""
        return nn.Dense(
            self.num_classes, precision='highest', kernel_init=linear_init, name='linear'
        )
