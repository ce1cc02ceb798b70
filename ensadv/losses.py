"""What training descends and attacks climb, per example, from an ensemble's log-probabilities."""

import jax
import jax.numpy as jnp
from jax import Array


def cross_entropy(log_probs: Array, labels: Array) -> Array:
    """Returns -log p(label), float [B], for log_probs float [B, classes] and labels int [B]."""
    return -jnp.take_along_axis(log_probs, labels[:, None], axis=-1)[:, 0]


def margin(log_probs: Array, labels: Array) -> Array:
    """Returns by how much the label's log-probability exceeds every other class's, float [B].

    An example counts as correct where its margin is > 0: a tie counts as an error, and so does
    an output that is NaN, whose margin is -inf.

    Args:
      log_probs: float [B, classes], at least two classes.
      labels: int [B].
    """
    is_label = jnp.arange(log_probs.shape[-1]) == labels[:, None]
    others = jnp.where(is_label, -jnp.inf, jax.lax.stop_gradient(log_probs))
    # Not max: its gradient goes to what equals the maximum, and where XLA computes that anew, with
    # another rounding, to nothing.
    other = jnp.argmax(others, axis=-1)
    result = cross_entropy(log_probs, other) - cross_entropy(log_probs, labels)
    return jnp.where(jnp.isnan(result), -jnp.inf, result)


def negative_margin(log_probs: Array, labels: Array) -> Array:
    """Returns -margin, float [B]: the loss whose ascent makes another class win."""
    return -margin(log_probs, labels)


LOSSES = {'cross_entropy': cross_entropy, 'margin': negative_margin}
# The same of log-probabilities and of logits, whose margin is that of their log-probabilities. What
# has log-probabilities takes LOSSES: normalising them once more alters the last digits.
LOSSES_OF_LOGITS = LOSSES | {
    'cross_entropy': lambda logits, labels: cross_entropy(jax.nn.log_softmax(logits), labels)
}
