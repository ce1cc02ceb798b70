"""Gating: a member's network together with the small network that says how much it counts."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from ensadv.models import conv
from ensadv.models.base import ImageNetwork, conv_init


class Gate(nn.Module):
    """Two 3x3 convolutions of stride 2 and a linear layer: [B, H, W, C] -> scores, float32 [B].

    Attributes:
      width: channels of the first convolution; the second has twice as many.
      conv: which convolution, see `models.conv.get`.
    """

    width: int
    conv: str = 'auto'

    @nn.compact
    def __call__(self, x: Array) -> Array:
        for layer in (1, 2):
            x = nn.Conv(
                layer * self.width,
                (3, 3),
                strides=2,
                padding=1,
                precision='highest',
                kernel_init=conv_init,
                conv_general_dilated=conv.get(self.conv),
                name=f'conv_{layer}',
            )(x)
            x = nn.relu(x)
        x = jnp.mean(x, axis=(1, 2))
        # All scores are 0 at first, so that an untrained ensemble weighs its members equally.
        zeros = nn.initializers.zeros
        return nn.Dense(1, precision='highest', kernel_init=zeros, name='linear')(x)[:, 0]


class Gated(nn.Module):
    """A member that brings its own data-dependent weight, for `ensemble.combine(..., 'gating')`.

    Its outputs are log p(y|x) + s(x), log-probabilities short of a normalisation over members:
    their total mass exp(s) is the member's share of the ensemble,
    p(y|x) = sum_i w_i(x) p(y|x, theta_i) with w = softmax_i(s_i(x)). Combining by 'probs' or by
    'logits' ignores the score. The gate computes in float32, whatever the member's type.

    Attributes:
      member: the member's network.
      width: channels of the gate's first convolution.
    """

    member: ImageNetwork
    width: int = 16

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        """Returns log-probabilities plus score, float32 [B, classes], for images as the member's.

        Args:
          train: whether the member's batch norm uses the batch's statistics.
        """
        log_probs = jax.nn.log_softmax(self.member(x, train))
        score = Gate(self.width, self.member.conv, name='gate')(self.member.standardise(x))
        return log_probs + score[:, None]
