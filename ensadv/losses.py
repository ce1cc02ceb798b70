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


def _of(logits: Array, classes: Array) -> Array:
    """Returns the logits [B] of classes int [B]."""
    return jnp.take_along_axis(logits, classes[:, None], axis=-1)[:, 0]


def _largest(logits: Array, count: int) -> list[Array]:
    """Returns the largest logits of each example, [B] each, from the largest down."""
    # By place, as in `margin`: gradients of sorted values are not to be trusted.
    _, places = jax.lax.top_k(jax.lax.stop_gradient(logits), count)
    return [_of(logits, places[:, i]) for i in range(count)]


def gap(logits: Array, labels: Array, targets: Array) -> Array:
    """Returns by how much the targets' logits exceed the labels', float [B].

    >>> gap(jnp.array([[4.0, 1.0, 2.0]]), jnp.array([0]), jnp.array([1]))
    Array([-3.], dtype=float32)
    """
    return _of(logits, targets) - _of(logits, labels)


def dlr(logits: Array, labels: Array) -> Array:
    """Returns the difference of logits ratio, float [B] (Croce & Hein, 2020, equation 6).

    It does not change when logits are scaled or shifted. Of two classes, for which it is not
    defined, the negative margin.

    >>> dlr(jnp.array([[4.0, 1.0, 0.0]]), jnp.array([0]))
    Array([-0.75], dtype=float32)
    """
    if logits.shape[-1] < 3:
        return negative_margin(logits, labels)
    first, _, third = _largest(logits, 3)
    return -margin(logits, labels) / (first - third + 1e-12)


def targeted_dlr(logits: Array, labels: Array, targets: Array) -> Array:
    """Returns the targeted difference of logits ratio, float [B] (Croce & Hein, 2020, equation 7).

    Of fewer than four classes, for which it is not defined, the difference alone.

    Args:
      logits: float [B, classes].
      labels: int [B].
      targets: int [B], other classes.

    >>> targeted_dlr(jnp.array([[4.0, 1.0, 2.0, 0.0]]), jnp.array([0]), jnp.array([1]))
    Array([-0.85714287], dtype=float32)
    """
    found = gap(logits, labels, targets)
    if logits.shape[-1] < 4:
        return found
    first, _, third, fourth = _largest(logits, 4)
    return found / (first - (third + fourth) / 2 + 1e-12)


def ranked_class(logits: Array, labels: Array, rank: int | Array) -> Array:
    """Returns the class with this rank, from 1, among those that are not the label, int32 [B].

    >>> ranked_class(jnp.array([[4.0, 1.0, 2.0, 0.0]]), jnp.array([0]), 1)
    Array([2], dtype=int32)
    """
    is_label = jnp.arange(logits.shape[-1]) == labels[:, None]
    order = jnp.argsort(jnp.where(is_label, -jnp.inf, logits), axis=-1, descending=True)
    return jnp.take(order, rank - 1, axis=-1).astype(jnp.int32)


LOSSES = {'cross_entropy': cross_entropy, 'margin': negative_margin}
# The same for logits. Code that has log-probabilities takes LOSSES: to normalise them once more
# would alter the last digits. A margin of logits is that of their log-probabilities.
LOSSES_OF_LOGITS = LOSSES | {
    'cross_entropy': lambda logits, labels: cross_entropy(jax.nn.log_softmax(logits), labels)
}
# What `attacks.apgd` climbs: functions of logits, labels and targets, int [B].
ATTACK_LOSSES = {
    'cross_entropy': lambda logits, labels, _: LOSSES_OF_LOGITS['cross_entropy'](logits, labels),
    'margin': lambda logits, labels, _: negative_margin(logits, labels),
    'dlr': lambda logits, labels, _: dlr(logits, labels),
    'targeted_dlr': targeted_dlr,
}
TARGETED = ('targeted_dlr',)
