"""Sampling and augmentation on the device: pure `jnp`, inside the compiled training step."""

import math

import jax
import jax.numpy as jnp

from ensadv.errors import DataError


def batch_indices(
    key: jax.Array, step: jax.Array, positions: jax.Array, *, batch_size: int, num_examples: int
) -> jax.Array:
    """Returns which examples make up a batch, or one device's part of it.

    Training reads a stream of epochs, each a fresh permutation of all examples; step t reads from
    place t * batch_size on. So a batch may straddle two epochs, each epoch has every example once,
    and a batch depends on `key` and `step` alone.

    Args:
        key: the run's `prng.key` for sampling, the same at every step.
        step: int32 scalar, from 0 up.
        positions: int32 [m], places 0..batch_size - 1 in the global batch.
        batch_size: examples in the global batch, at most `num_examples`.
        num_examples: examples in the training split.

    Returns:
        int32 [m], in 0..num_examples - 1.

    Raises:
        DataError: the batch is larger than the split, or the two exceed 32-bit arithmetic.
    """
    # The stream repeats its phase every num_examples / gcd steps. Such cycles are counted apart, so
    # every product stays below the bound checked here; step * batch_size would overflow.
    gcd = math.gcd(batch_size, num_examples)
    cycle_steps, cycle_epochs = num_examples // gcd, batch_size // gcd
    possible = batch_size <= num_examples and cycle_steps * batch_size + num_examples < 2**31
    if not possible:
        raise DataError(
            f'train.batch_size: found {batch_size} for {num_examples} examples, allowed is at most '
            'their number, and a common multiple < 2^31'
        )
    cycle, step_in_cycle = jnp.divmod(jnp.asarray(step, jnp.int32), cycle_steps)
    epoch_in_cycle, start = jnp.divmod(step_in_cycle * batch_size, num_examples)
    epoch = cycle * cycle_epochs + epoch_in_cycle

    def permutation(epoch):
        return jax.random.permutation(jax.random.fold_in(key, epoch), num_examples)

    this = permutation(epoch)
    # A permutation sorts all examples, so the second one is drawn only where it is read.
    straddles = start + batch_size > num_examples
    following = jax.lax.cond(straddles, lambda: permutation(epoch + 1), lambda: this)
    place = start + jnp.asarray(positions, jnp.int32)
    wrapped = place % num_examples
    return jnp.where(place < num_examples, this[wrapped], following[wrapped]).astype(jnp.int32)


def augment(keys: jax.Array, images: jax.Array, *, pad: int, flip: bool) -> jax.Array:
    """Returns random crops of images padded by reflection, randomly mirrored left to right.

    Wide ResNets are trained so, with 4 pixels (Zagoruyko & Komodakis 2016, section 3). The
    reflection does not repeat the border pixel.

    Args:
        keys: `prng.key`s [B], one for each image, so that an image's augmentation does not
            depend on which others share its device.
        images: uint8 [B, H, W, C].
        pad: pixels on each side; 0 does not crop.
        flip: whether each image is mirrored with probability 1/2.

    Returns:
        uint8 [B, H, W, C].
    """

    def one(key, image):
        crop_key, flip_key = jax.random.split(key)
        if pad:
            padded = jnp.pad(image, ((pad, pad), (pad, pad), (0, 0)), mode='reflect')
            top, left = jax.random.randint(crop_key, (2,), 0, 2 * pad + 1)
            image = jax.lax.dynamic_slice(padded, (top, left, 0), image.shape)
        if flip:
            image = jnp.where(jax.random.bernoulli(flip_key), image[:, ::-1], image)
        return image

    return jax.vmap(one)(keys, images)


def to_pixels(images: jax.Array) -> jax.Array:
    """Returns uint8 images of any shape as float32 pixels in [0, 1]."""
    return images.astype(jnp.float32) / 255
