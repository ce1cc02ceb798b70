"""What training descends and attacks climb, per example, from an ensemble's log-probabilities."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array


def cross_entropy(log_probs: Array, targets: Array) -> Array:
    """Returns -log p(label), or -sum_y q(y) log p(y) for distributions q, float [B].

    Args:
      log_probs: finite floats [B, classes].
      targets: labels int [B], or distributions float [B, classes].

    >>> log_probs = jnp.array([[-2.0, -0.5], [-1.0, -1.5]])
    >>> cross_entropy(log_probs, jnp.array([0, 1]))
    Array([2. , 1.5], dtype=float32)
    >>> cross_entropy(log_probs, jnp.array([[0.5, 0.5], [0.0, 1.0]]))
    Array([1.25, 1.5 ], dtype=float32)
    """
    if targets.ndim == log_probs.ndim:
        return -jnp.sum(targets * log_probs, axis=-1)
    return -jnp.take_along_axis(log_probs, targets[:, None], axis=-1)[:, 0]


def labels_of(targets: Array) -> Array:
    """Returns the labels int [B] of targets: of distributions float [B, classes] the likeliest.

    >>> labels_of(jnp.array([[0.1, 0.9], [0.6, 0.4]]))
    Array([1, 0], dtype=int32)
    """
    return jnp.argmax(targets, axis=-1) if targets.ndim == 2 else targets


def kl_divergence(log_p: Array, log_q: Array) -> Array:
    """Returns KL(p || q) = sum_y p(y) (log p(y) - log q(y)), float [B].

    A class whose p is 0 in floating point adds nothing, to the gradient either, so both stay finite
    where a network is sure.

    Args:
      log_p, log_q: log-probabilities, float [B, classes].

    >>> log_p = jax.nn.log_softmax(jnp.array([[0.0, 0.0], [200.0, 0.0]]))
    >>> log_q = jax.nn.log_softmax(jnp.array([[0.0, 1.0], [0.0, 200.0]]))
    >>> [f'{value:.4f}' for value in kl_divergence(log_p, log_q)]
    ['0.1201', '200.0000']
    """
    p = jnp.exp(log_p)
    return jnp.sum(p * jnp.where(p > 0, log_p - log_q, 0), axis=-1)


def boosted_cross_entropy(log_probs: Array, labels: Array) -> Array:
    """Returns -log p(label) - log(1 - p(rival)), float [B], where the rival is the likeliest other.

    It is MART's (Wang et al., ICLR 2020, section 3). Their code has 1.0001 - p(rival) there, so
    that it is finite; here log(1 - p(rival)) is computed from the other classes' log-probabilities,
    and is.

    Args:
      log_probs: normalised, float [B, classes].
      labels: int [B].

    >>> loss = boosted_cross_entropy(jnp.log(jnp.array([[0.5, 0.3, 0.2]])), jnp.array([0]))
    >>> f'{loss[0]:.4f}'  # -log 0.5 - log 0.7
    '1.0498'
    """
    is_rival = jnp.arange(log_probs.shape[-1]) == ranked_class(log_probs, labels, 1)[:, None]
    others = jax.nn.logsumexp(jnp.where(is_rival, -jnp.inf, log_probs), axis=-1)
    return cross_entropy(log_probs, labels) - others


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
    return found if logits.shape[-1] < 4 else found / _spread(logits)


def normalised_cross_entropy(logits: Array, labels: Array) -> Array:
    """Returns the cross-entropy of logits whose two largest are 1 apart, float [B].

    Its gradient's direction does not depend on the logits' scale, which confident and timid
    networks alike hide behind (Yu & Xu, CVPR 2023, whose factor this is).

    >>> loss = normalised_cross_entropy(jnp.array([[4e3, 2e3], [0.2, 0.1]]), jnp.array([0, 0]))
    >>> [f'{value:.3f}' for value in loss]
    ['0.313', '0.313']
    """
    return cross_entropy(jax.nn.log_softmax(logits / logit_scale(logits)[:, None]), labels)


def logit_scale(logits: Array) -> Array:
    """Returns by how much the two largest logits differ, float [B], without a gradient.

    >>> logit_scale(jnp.array([[4.0, 1.0, 2.0]]))
    Array([2.], dtype=float32)
    """
    first, second = _largest(jax.lax.stop_gradient(logits), 2)
    return first - second + 1e-12


def reweighed_gap(
    member_logits: Array, labels: Array, targets: Array, scores: Callable[[Array], Array]
) -> Array:
    """Returns the members' gaps, weighed by what each still does for the label, float [B].

    An ensemble's own gradient passes by a member that is too sure, since what the ensemble predicts
    does not change with a small change of its logits. So each member's gap, scaled as the targeted
    DLR loss has it, counts by a secant instead: how much the ensemble's gap would rise were the
    member's logits of label and target exchanged, by how far the member is from that. Reweighing
    members is from MORA (Gao et al., 2022, arXiv 2211.08008), these weights are ours.

    Args:
      member_logits: float [k, B, classes].
      labels: int [B].
      targets: int [B], other classes.
      scores: from member_logits to the ensemble's logits [B, classes].

    >>> logits = jnp.array([[[9e3, 0.0, 0.0, 0.0]], [[0.0, 1.0, 0.0, 0.0]]])
    >>> mean_probs = lambda logits: jnp.log(jnp.mean(jax.nn.softmax(logits), axis=0))
    >>> gap_of = lambda logits: reweighed_gap(logits, jnp.array([0]), jnp.array([1]), mean_probs)[0]
    >>> bool(jnp.any(jax.jit(jax.grad(gap_of))(logits)[0] != 0))
    True
    """
    gaps = jax.vmap(gap, (0, None, None))(member_logits, labels, targets)
    fixed = jax.lax.stop_gradient(member_logits)
    scaled = gaps / jax.vmap(_spread)(fixed)
    exchanged = jax.vmap(_exchanged, (0, None, None))(fixed, labels, targets)
    gap_of = lambda logits: gap(jax.nn.softmax(scores(logits)), labels, targets)
    is_member = jnp.eye(len(fixed), dtype=bool)[:, :, None, None]
    rises = jax.vmap(lambda chosen: gap_of(jnp.where(chosen, exchanged, fixed)))(is_member)
    rises = jnp.abs(rises - gap_of(fixed))
    weights = (rises + 1e-12) / (jnp.abs(jax.lax.stop_gradient(scaled)) + 1e-3)
    return jnp.sum(weights / jnp.sum(weights, axis=0) * scaled, axis=0)


def _exchanged(logits: Array, labels: Array, targets: Array) -> Array:
    """Returns logits [B, classes] in which label and target have changed places."""
    classes = jnp.arange(logits.shape[-1])
    labels, targets = labels[:, None], targets[:, None]
    places = jnp.where(classes == labels, targets, jnp.where(classes == targets, labels, classes))
    return jnp.take_along_axis(logits, places, axis=-1)


def _spread(logits: Array) -> Array:
    """Returns by how much the largest of logits [B, classes] exceeds others, [B]."""
    if logits.shape[-1] < 4:
        return jnp.max(logits, axis=-1) - jnp.min(logits, axis=-1) + 1e-12
    first, _, third, fourth = _largest(logits, 4)
    return first - (third + fourth) / 2 + 1e-12


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
    'normalised_cross_entropy': lambda logits, labels, _: normalised_cross_entropy(logits, labels),
}
