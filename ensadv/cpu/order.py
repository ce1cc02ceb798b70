"""One computation after the other, where XLA:CPU would begin several at a time.

Several at a time take the caches from each other, and each keeps all its activations in memory.
Elsewhere members are stacked by `vmap`, and the order is left to XLA.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from ensadv.cpu import backend


def each_member(function: Callable[[Any, Array], Any], members: Any, x: Array) -> Any:
    """Returns function(member, x) of every member, stacked.

    Args:
      function: of a tree and images.
      members: such trees, stacked: every leaf [k, ...].
      x: the images, the same for every member.
    """
    if not backend.is_cpu():
        return jax.vmap(function, (0, None))(members, x)
    k = len(jax.tree.leaves(members)[0])
    function = jax.jit(function)  # traced once for all members
    # Cut apart here, and not where they are used, which may be in a loop.
    each = [jax.tree.map(lambda leaf, i=i: leaf[i], members) for i in range(k)]
    each = jax.lax.optimization_barrier(each)
    outputs = in_turn([functools.partial(function, member) for member in each], x)
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *outputs)


def each_learner(function: Callable[..., Any], *trees: Any) -> Any:
    """Returns function(*trees) of every place on the trees' first axis, stacked.

    On a CPU it is a loop, which compiles the function once.
    """
    if not backend.is_cpu():
        return jax.vmap(function)(*trees)
    return jax.lax.map(lambda each: function(*each), trees)


def in_turn(functions: Sequence[Callable[[Array], Any]], x: Array) -> list[Any]:
    """Returns f(x) of every function; on a CPU none takes x before the one before it has an output.

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
    """Returns both as they are, x after the output; the other way round for their gradients."""
    return wait_for(jax.tree.leaves(output)[0], x), output


def _after_backward(_: None, gradients: tuple[Array, Any]) -> tuple[Array, Any]:
    of_x, of_output = gradients
    (first, *others), tree = jax.tree.flatten(of_output)
    return of_x, jax.tree.unflatten(tree, [wait_for(of_x, first), *others])


_after.defvjp(lambda x, output: (_after(x, output), None), _after_backward)


def wait_for(awaited: Any, tree: Any) -> Any:
    """Returns the tree; on a CPU, what uses it begins only after every leaf of `awaited`."""
    if not backend.is_cpu():
        return tree
    # Nothing is above infinity, which XLA does not know. A barrier would not last: XLA:CPU removes
    # it before it orders what it runs.
    one_of_each = sum(leaf.ravel()[0] for leaf in jax.tree.leaves(awaited))
    return jax.tree.map(lambda leaf: jnp.where(one_of_each > jnp.inf, 0, leaf), tree)
