"""Ensembles: k members of one architecture, stacked on a leading axis of every variable."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from ensadv.cpu.parts import FEWEST_IMAGES

Variables = dict[str, Any]


def init(model: nn.Module, rng: Array, k: int, input_shape: tuple[int, ...]) -> Variables:
    """Initialises k members that differ in their random weights alone.

    Args:
      model: a network whose `__call__(x, train)` gives logits.
      rng: a key. Member i depends on (rng, i) and not on k.
      k: the number of members, >= 1.
      input_shape: (H, W, C) of one image.

    Returns:
      {'params': ..., 'batch_stats': ...}, every leaf float32 [k, ...].
    """
    x = jnp.zeros((1, *input_shape))
    keys = jax.vmap(lambda i: jax.random.fold_in(rng, i))(jnp.arange(k))
    return jax.vmap(lambda key: model.init(key, x, train=False))(keys)


def apply(model: nn.Module, variables: Variables, x: Array) -> Array:
    """Returns the members' logits, float32 [k, B, classes], with running-average batch norm.

    Args:
      model: the members' network.
      variables: as `init` returns them, with a leading [k] axis.
      x: images [B, H, W, C] in [0, 1], the same for every member.
    """
    # Restored weights may be NumPy's, which a convolution's batching rule does not take in a jit.
    variables = jax.tree.map(jnp.asarray, variables)
    return _of_each_member(lambda v, x: model.apply(v, x, train=False), variables, x)


def apply_train(model: nn.Module, variables: Variables, x: Array) -> tuple[Array, Any]:
    """As `apply`, but with the batch's statistics in batch norm.

    Returns:
      The logits, and the running averages (`batch_stats`) that now include this batch.
    """

    def member(v: Variables, x: Array) -> tuple[Array, Any]:
        logits, updated = model.apply(v, x, train=True, mutable=['batch_stats'])
        return logits, updated['batch_stats']

    return _of_each_member(member, variables, x)


def _of_each_member(
    function: Callable[[Variables, Array], Any], variables: Variables, x: Array
) -> Any:
    """Returns function(v, x) of every member's variables, stacked."""
    if stacks_members():
        return jax.vmap(function, (0, None))(variables, x)
    k = len(jax.tree.leaves(variables)[0])
    # Traced once for all members. The first step of 4 WRN-10-1s begins after 0.78 of the time so.
    function = jax.jit(function)
    # Cut apart here, and not where they are used, which may be in a loop.
    members = [jax.tree.map(lambda leaf, i=i: leaf[i], variables) for i in range(k)]
    members = jax.lax.optimization_barrier(members)
    outputs = _in_turn([functools.partial(function, member) for member in members], x)
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *outputs)


def _in_turn(functions: Sequence[Callable[[Array], Any]], x: Array) -> list[Any]:
    """Returns f(x) of every function; on a CPU none takes x before the one before it has an output.

    XLA would run two at a time there, which take the caches from each other: a step of four
    WRN-10-2s with batch 64 takes 0.93 of the time in turn (median of 5, two cores of an AMD EPYC).
    Gradients are in turn where x has one, so in attacks, but not those of training.
    """
    outputs = []
    for function in functions:
        if outputs:
            x, outputs[-1] = _after(x, outputs[-1])
        outputs.append(function(x))
    return outputs


@jax.custom_vjp
def _after(x: Array, output: Any) -> tuple[Array, Any]:
    """Returns both as they are, x when output is there; the other way round for their gradients."""
    return when_there(x, jax.tree.leaves(output)[0]), output


def _after_backward(_: None, gradients: tuple[Array, Any]) -> tuple[Array, Any]:
    of_x, of_output = gradients
    (first, *others), tree = jax.tree.flatten(of_output)
    return of_x, jax.tree.unflatten(tree, [when_there(first, of_x), *others])


_after.defvjp(lambda x, output: (_after(x, output), None), _after_backward)


def when_there(array: Array, awaited: Any) -> Array:
    """Returns the array; on a CPU, what uses it begins only when every leaf of `awaited` is there.

    XLA:CPU begins whatever has its operands. Two passes at a time take the caches from each other,
    and each keeps all its activations in memory. Elsewhere the order is left to XLA.
    """
    if stacks_members():
        return array
    # Nothing is above infinity, which XLA does not know. A barrier would not last: XLA:CPU removes
    # it before it orders what it runs.
    one_of_each = sum(leaf.ravel()[0] for leaf in jax.tree.leaves(awaited))
    return jnp.where(one_of_each > jnp.inf, 0, array)


def stacks_members() -> bool:
    """Returns whether members are computed at the same time, by `vmap`: everywhere but on a CPU.

    A CPU takes one member after the other: its caches hold the activations of one, but not of all.
    A training step of 4 WRN-10-2s with batch 64 takes 0.89 of the time so.
    """
    return jax.default_backend() != 'cpu'


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
    if how == 'probs':
        k = member_logits.shape[0]
        log_probs = jax.nn.log_softmax(member_logits)
        return log_probs[0] if k == 1 else jax.nn.logsumexp(log_probs, axis=0) - math.log(k)
    if how == 'logits':
        return jax.nn.log_softmax(jnp.mean(member_logits, axis=0))
    if how == 'gating':
        return jax.nn.log_softmax(jax.nn.logsumexp(member_logits, axis=0))
    raise ValueError(f"combine: expected 'probs', 'logits' or 'gating', found {how!r}")


class Network(NamedTuple):
    """What is evaluated: the ensemble of one run, or one whose members are runs.

    Attributes:
      member_logits: (variables, images [B, H, W, C]) -> logits [k, B, classes].
      combine: how members' outputs become one, see `combine`.
      variables: what `member_logits` takes, as jax.ShapeDtypeStructs.
      images_at_a_time: how many 32x32 images a CPU takes at a time, at least.
    """

    member_logits: Callable[[Any, Array], Array]
    combine: str
    variables: Any
    images_at_a_time: int = FEWEST_IMAGES

    def log_probs(self, variables: Any, x: Array) -> Array:
        """Returns the ensemble's log-probabilities, [B, classes], of images [B, H, W, C]."""
        return combine(self.member_logits(variables, x), self.combine)


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
        return jnp.stack(_in_turn(of_each, x))

    return Network(
        member_logits,
        how,
        [network.variables for network in networks],
        min(network.images_at_a_time for network in networks),
    )
