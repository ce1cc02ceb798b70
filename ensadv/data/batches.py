"""Sampling and augmentation on the device: pure `jnp`, inside the compiled training step."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from ensadv.errors import DataError


def places_by_kind(batch_size: int, num_extra: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns which places of a batch hold extra examples, and each place's rank in its kind.

    Extra examples are spread evenly, so that the shares of any number of devices have as many of
    them, but for one.

    Args:
        batch_size: places in the global batch.
        num_extra: how many of them hold extra examples.

    Returns:
        bool [batch_size], and int32 [batch_size]: 0, 1, 2, ... among the places of a kind.

    >>> is_extra, rank = places_by_kind(5, 2)
    >>> is_extra.tolist(), rank.tolist()
    ([False, False, True, False, True], [0, 1, 0, 2, 1])
    """
    extra_before = np.arange(batch_size + 1, dtype=np.int64) * num_extra // batch_size
    is_extra = np.diff(extra_before) > 0
    before, places = extra_before[:-1], np.arange(batch_size)
    return is_extra, np.where(is_extra, before, places - before).astype(np.int32)


def epoch_order(key: jax.Array, epoch: int | jax.Array, num_examples: int) -> jax.Array:
    """Returns the order in which an epoch reads all examples, int32 [num_examples]."""
    return jax.random.permutation(jax.random.fold_in(key, epoch), num_examples)


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

    this = epoch_order(key, epoch, num_examples)
    # A permutation sorts all examples, so the second one is drawn only where it is read.
    straddles = start + batch_size > num_examples
    following = jax.lax.cond(
        straddles, lambda: epoch_order(key, epoch + 1, num_examples), lambda: this
    )
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


# A key's own splits are its first two folds, with which `augment` crops and flips.
_CUTOUT, _CUTMIX = 2, 3


def _in_box(
    shape: tuple[int, ...], centre: jax.Array, sides: tuple[int | jax.Array, ...]
) -> jax.Array:
    """Returns which pixels of an image [H, W, ...] are in a box, bool [H, W, 1].

    A box of `sides` begins sides // 2 above and left of its centre; what is outside is dropped.
    """
    inside = [
        (places >= middle - side // 2) & (places < middle - side // 2 + side)
        for places, middle, side in zip(map(jnp.arange, shape[:2]), centre, sides, strict=True)
    ]
    return (inside[0][:, None] & inside[1])[..., None]


def _random_place(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return jax.random.randint(key, (2,), 0, jnp.array(shape[:2]))


def cutout(keys: jax.Array, pixels: jax.Array, *, side: int, fill: tuple[float, ...]) -> jax.Array:
    """Returns images in each of which a square is filled with one colour.

    The centre is uniform over the image, and what lies outside of it is dropped (DeVries & Taylor
    2017, arXiv 1708.04552, section 3.2). They fill with 0 after standardisation: give the mean.

    Args:
        keys: those given to `augment`, [B].
        pixels: float32 [B, H, W, C].
        side: of the square, in pixels.
        fill: a value for each channel.

    Returns:
        float32 [B, H, W, C].
    """

    def one(key, image):
        centre = _random_place(jax.random.fold_in(key, _CUTOUT), image.shape)
        hidden = _in_box(image.shape, centre, (side, side))
        return jnp.where(hidden, jnp.array(fill, image.dtype), image)

    return jax.vmap(one)(keys, pixels)


def cutmix(
    keys: jax.Array,
    pixels: tuple[jax.Array, jax.Array],
    labels: tuple[jax.Array, jax.Array],
    *,
    alpha: float,
    num_classes: int,
) -> tuple[jax.Array, jax.Array]:
    """Returns images into each of which a box of its partner is pasted, and their labels' shares.

    A box has the image's proportions, the area 1 - lambda of it with lambda from
    Beta(alpha, alpha), and a centre uniform over the image; what lies outside is dropped (Yun et
    al., ICCV 2019, equations 1 and 2, with a box for each image instead of each batch). Labels
    count by the area that is really pasted.

    Args:
        keys: those given to `augment`, [B].
        pixels: the images and their partners, float32 [B, H, W, C] each.
        labels: of both, int32 [B] each.
        alpha: above 0; 1 draws lambda uniformly.
        num_classes: of the labels.

    Returns:
        Images float32 [B, H, W, C], and distributions of labels float32 [B, num_classes].
    """

    def one(key, image, partner, label, partner_label):
        size_key, place_key = jax.random.split(jax.random.fold_in(key, _CUTMIX))
        # Beta(1, 1), the usual one, is uniform, which compiles in a tenth of the time.
        draw = jax.random.uniform if alpha == 1 else partial(jax.random.beta, a=alpha, b=alpha)
        scale = jnp.sqrt(1 - draw(size_key))
        sides = tuple((scale * side).astype(jnp.int32) for side in image.shape[:2])
        pasted = _in_box(image.shape, _random_place(place_key, image.shape), sides)
        share = jnp.mean(pasted, dtype=jnp.float32)
        first, second = (jax.nn.one_hot(each, num_classes) for each in (label, partner_label))
        return jnp.where(pasted, partner, image), (1 - share) * first + share * second

    return jax.vmap(one)(keys, *pixels, *labels)


def to_pixels(images: jax.Array) -> jax.Array:
    """Returns uint8 images of any shape as float32 pixels in [0, 1]."""
    return images.astype(jnp.float32) / 255
