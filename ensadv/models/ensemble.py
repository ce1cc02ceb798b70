"""Ensembles: k members of one architecture, stacked on a leading axis of every variable."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from ensadv.cpu import order

Variables = dict[str, Any]


def init(model: nn.Module, rng: Array, k: int, input_shape: tuple[int, ...]) -> Variables:
    """Initialises k members that differ in their random weights alone.

    Args:
      model: a network whose `__call__(x, train)` gives logits.
      rng: a key. Member i depends on (rng, i) and not on k.
      k: the number of members, >= 1.
      input_shape: (H, W, C) of one image.

    Returns:
      {'params': ..., 'batch_stats': ...}, every leaf float32 [k, ...]. Without batch norm the
      latter is empty.
    """
    x = jnp.zeros((1, *input_shape))
    keys = jax.vmap(lambda i: jax.random.fold_in(rng, i))(jnp.arange(k))
    return {'batch_stats': {}} | jax.vmap(lambda key: model.init(key, x, train=False))(keys)


def apply(model: nn.Module, variables: Variables, x: Array) -> Array:
    """Returns the members' logits, float32 [k, B, classes], with running-average batch norm.

    Args:
      model: the members' network.
      variables: as `init` returns them, with a leading [k] axis.
      x: images [B, H, W, C] in [0, 1], the same for every member.
    """
    # Restored weights may be NumPy's, which a convolution's batching rule does not take in a jit.
    variables = jax.tree.map(jnp.asarray, variables)
    return order.each_member(lambda v, x: model.apply(v, x, train=False), variables, x)


def apply_train(model: nn.Module, variables: Variables, x: Array) -> tuple[Array, Any]:
    """As `apply`, but with the batch's statistics in batch norm.

    Args:
      model, variables: as in `apply`.
      x: images [B, H, W, C], the same for every member; or each member's own, [k, B, H, W, C].

    Returns:
      The logits, and the running averages (`batch_stats`) that now include this batch.
    """

    def member(v: Variables, x: Array) -> tuple[Array, Any]:
        logits, updated = model.apply(v, x, train=True, mutable=['batch_stats'])
        return logits, updated.get('batch_stats', {})

    if x.ndim == 4:
        return order.each_member(member, variables, x)
    places = jnp.arange(len(x))
    return order.each_member(lambda one, x: member(one[0], x[one[1]]), (variables, places), x)


def combine(member_logits: Array, how: str) -> Array:
    """Combines the members' outputs into the ensemble's log-probabilities, [B, classes].

    'probs' averages the members' probabilities, p(y|x) = 1/k sum_i p(y|x, theta_i) (section 3 of
    the paper), in log space, so that it stays finite for any finite logits; 'logits' averages
    their logits (Liu et al., 2016). With one member both give log_softmax of its logits. 'gating'
    weighs the members' probabilities by the total mass of each, sum_y exp(logits), which gives
    p(y|x) = sum_i w_i(x) p(y|x, theta_i) for members with a gate (`models.gated`).

    Args:
      member_logits: float [k, B, classes].
      how: 'probs', 'logits' or 'gating'.

    Raises:
      ValueError: for any other `how`.

    >>> logits = jnp.log(jnp.array([[[0.1, 0.9]], [[0.5, 0.5]]]))  # of two members, one image
    >>> [f'{p:.2f}' for p in jnp.exp(combine(logits, 'probs'))[0]]
    ['0.30', '0.70']
    >>> [f'{p:.2f}' for p in jnp.exp(combine(logits, 'logits'))[0]]
    ['0.25', '0.75']
    """
    logits = scores(member_logits, how)
    is_normalised = how == 'probs' and len(member_logits) > 1
    return logits if is_normalised else jax.nn.log_softmax(logits)


def scores(member_logits: Array, how: str) -> Array:
    """Returns logits of the ensemble, [B, classes]: `combine` gives their log_softmax.

    They are normalised only where that cannot be avoided, for the differences of small logits drown
    in the rounding of their log-probabilities.

    Args:
      member_logits, how: as in `combine`.
    """
    if how == 'probs':
        k = len(member_logits)
        if k == 1:
            return member_logits[0]
        return jax.nn.logsumexp(jax.nn.log_softmax(member_logits), axis=0) - math.log(k)
    if how == 'logits':
        return jnp.mean(member_logits, axis=0)
    if how == 'gating':
        return jax.nn.logsumexp(member_logits, axis=0)
    raise ValueError(f"combine: expected 'probs', 'logits' or 'gating', found {how!r}")


class Network(NamedTuple):
    """What is evaluated: the ensemble of one run, or one whose members are runs.

    Attributes:
      member_logits: (variables, images [B, H, W, C]) -> logits [k, B, classes].
      combine: how members' outputs become one, see `combine`.
      variables: what `member_logits` takes, as jax.ShapeDtypeStructs.
      draws: of a random network (variables, images, m) -> logits [m, B, classes] of m draws that
        are independent of each other and of `member_logits`, for each image anew; None: nothing in
        it is random.
      members: of an ensemble of networks, see `of_networks`, these; None: every leaf of the
        variables has a leading [k] axis.
    """

    member_logits: Callable[[Any, Array], Array]
    combine: str
    variables: Any
    draws: Callable[[Any, Array, int], Array] | None = None
    members: Sequence[Any] | None = None

    def log_probs(self, variables: Any, x: Array) -> Array:
        """Returns the ensemble's log-probabilities, [B, classes], of images [B, H, W, C]."""
        return combine(self.member_logits(variables, x), self.combine)

    def scores(self, member_logits: Array) -> Array:
        """Returns logits of the ensemble, [B, classes], of its members' [k, B, classes]."""
        return scores(member_logits, self.combine)


def of_networks(networks: Sequence[Network], how: str) -> Network:
    """Returns the ensemble whose members are these networks, of any architectures.

    Its variables are the list of theirs. A network counts as one member with its combined
    prediction, however many members it has itself; for a network with one member this is that
    member.
    """

    def member_logits(variables, x):
        # Log-probabilities are logits: log_softmax takes them as they are.
        of_each = [
            functools.partial(network.log_probs, v)
            for network, v in zip(networks, variables, strict=True)
        ]
        return jnp.stack(order.in_turn(of_each, x))

    variables = [network.variables for network in networks]
    return Network(member_logits, how, variables, members=tuple(networks))


def part(network: Network, variables: Any, members: Sequence[int]) -> tuple[Network, Any]:
    """Returns the ensemble of some of an ensemble's members, and its weights.

    They are combined as in the whole; with gates, each counts by its weight among those left.

    Args:
      network: the whole.
      variables: its weights.
      members: their numbers, from 0; at least one.
    """
    if network.members is not None:
        networks = [network.members[i] for i in members]
        return of_networks(networks, network.combine), [variables[i] for i in members]
    places = jnp.asarray(members)
    variables = jax.tree.map(lambda leaf: leaf[places], variables)
    like = lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
    return network._replace(variables=jax.tree.map(like, variables)), variables
