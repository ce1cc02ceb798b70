"""Random keys whose numbers depend on no environment variable and no other example of a batch."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from ensadv.values import PRNG


def key(seed: int | Array) -> Array:
    """Returns the key of a seed, the same whatever JAX_DEFAULT_PRNG_IMPL says.

    >>> jax.random.key_impl(key(0))
    'threefry2x32'
    """
    return jax.random.key(seed, impl=PRNG)


def of_image(key: Array, image: Array) -> Array:
    """Returns a key that depends on a key and on the bits of an image's pixels.

    So what is drawn for an image is the same whenever that image is met, in whatever batch, and
    another for any other image.

    Args:
      key: of `key`'s kind.
      image: float32 [H, W, C].
    """
    bits = jax.lax.bitcast_convert_type(jax.lax.stop_gradient(image), jnp.uint32).ravel()
    places = jnp.arange(bits.size, dtype=jnp.uint32)
    # Of each word of the key the sum of well mixed words, each with its place.
    words = [
        jnp.sum(_mix(_mix(bits + word) ^ (places * jnp.uint32(salt))), dtype=jnp.uint32)
        for word, salt in zip(jax.random.key_data(key), (0x9E3779B9, 0x85EBCA6B), strict=True)
    ]
    return jax.random.wrap_key_data(jnp.stack(words), impl=PRNG)


def _mix(words: Array) -> Array:
    """Returns words, uint32, each changed so that any bit alters all others (MurmurHash3's end)."""
    for factor, shift in ((0x85EBCA6B, 16), (0xC2B2AE35, 13)):
        words = (words ^ (words >> shift)) * jnp.uint32(factor)
    return words ^ (words >> 16)


class Words(NamedTuple):
    """Keys [B] as raw numbers, which NumPy can hold.

    Attributes:
      words: uint32 [B, 2].
    """

    words: Array


def to_words(tree: Any) -> Any:
    """Returns a tree with `Words` in place of its keys, which have to be of `key`'s kind."""
    is_key = lambda leaf: jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    change = lambda leaf: Words(jax.random.key_data(leaf)) if is_key(leaf) else leaf
    return jax.tree.map(change, tree)


def from_words(tree: Any) -> Any:
    """Returns the tree that `to_words` was given."""
    is_words = lambda leaf: isinstance(leaf, Words)
    wrap = lambda leaf: jax.random.wrap_key_data(leaf.words, impl=PRNG)
    change = lambda leaf: wrap(leaf) if is_words(leaf) else leaf
    return jax.tree.map(change, tree, is_leaf=is_words)


def of_examples(keys: Array) -> Array:
    """Returns keys [B] whose numbers under `vmap` depend on no other example of the batch.

    The numbers of JAX's rbg keys would. Keys of `key`'s kind are returned as they are; each other
    key is turned into one.

    Args:
      keys: of any kind, [B]; or raw ones of JAX's default kind, uint32 [B, words].

    >>> keys = jax.random.split(jax.random.key(0, impl='rbg'), 3)
    >>> jax.random.key_impl(of_examples(keys)), of_examples(keys).shape
    ('threefry2x32', (3,))
    """
    if jax.random.key_impl(keys) == PRNG:
        return keys

    def of_words(words):
        made = key(0)
        for word in words:
            made = jax.random.fold_in(made, word)
        return made

    return jax.vmap(of_words)(jax.random.key_data(keys))
