"""Random keys whose numbers neither the shell nor a batch's other examples decide."""

import jax
from jax import Array

from ensadv.config import PRNG


def key(seed: int | Array) -> Array:
    """Returns the key of a seed, the same whatever JAX_DEFAULT_PRNG_IMPL says."""
    return jax.random.key(seed, impl=PRNG)


def of_examples(keys: Array) -> Array:
    """Returns keys [B] whose numbers under `vmap` depend on no other example of the batch.

    Those of JAX's rbg would. Keys of `key`'s kind are returned as they are, and of each other one
    such a key is made.

    Args:
      keys: of any kind, [B]; or raw ones of JAX's default kind, uint32 [B, words].
    """
    if jax.random.key_impl(keys) == PRNG:
        return keys

    def of_words(words):
        made = key(0)
        for word in words:
            made = jax.random.fold_in(made, word)
        return made

    return jax.vmap(of_words)(jax.random.key_data(keys))
