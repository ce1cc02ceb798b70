"""What training descends and attacks climb, per example, from an ensemble's log-probabilities."""

import jax
import jax.numpy as jnp
from jax import Array


def cross_entropy(log_probs: Array, labels: Array) -> Array:
    """Returns -log p(label), float [B], for log_probs float [B, classes] and labels int [B].

    >>> cross_entropy(jnp.array([[-2.0, -0.5], [-1.0, -1.5]]), jnp.array([0, 1]))
    Array([2. , 1.5], dtype=float32)
    """
    return -jnp.take_along_axis(log_probs, labels[:, None], axis=-1)[:, 0]


def margin(log_probs: Array, labels: Array) -> Array:
    """Returns by how much the label's log-probability exceeds every other class's, float [B].

    An example counts as correct where its margin is > 0: a tie counts as an error, and so does
    an output that is NaN, whose margin is -inf.

    Args:
      log_probs: float [B, classes], at least two classes.
      labels: int [B].

    >>> margin(jnp.array([[-2.0, -0.5], [-1.0, -1.5]]), jnp.array([0, 0]))
    Array([-1.5,  0.5], dtype=float32)
    """
    is_label = jnp.arange(log_probs.shape[-1]) == labels[:, None]
    others = jnp.where(is_label, -jnp.inf, jax.lax.stop_gradient(log_probs))
    # Not max: its gradient goes to what equals the maximum, and where XLA computes that anew, with
    # another rounding, to nothing.
    other = jnp.argmax(others, axis=-1)
    result = cross_entropy(log_probs, other) - cross_entropy(log_probs, labels)
    return jnp.where(jnp.isnan(result), -jnp.inf, result)


def negative_margin(log_probs: Array, labels: Array) -> Array:
    """Returns -margin, float [B]: the loss whose ascent makes another class win.

    >>> negative_margin(jnp.array([[-2.0, -0.5]]), jnp.array([0]))
    Array([1.5], dtype=float32)
    """
    return -margin(log_probs, labels)


LOSSES = {'cross_entropy': cross_entropy, 'margin': negative_margin}
# The same for logits. Code that has log-probabilities takes LOSSES: to normalise them once more
# would alter the last digits. A margin of logits is that of their log-probabilities.
LOSSES_OF_LOGITS = LOSSES | {
    'cross_entropy': lambda logits, labels: cross_entropy(jax.nn.log_softmax(logits), labels)
}
