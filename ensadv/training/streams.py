"""The run's independent streams of randomness, and the batch of every step, drawn from them."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from ml_collections import ConfigDict

from ensadv import prng
from ensadv.data import batches, datasets
from ensadv.runtime import distributed
from ensadv.training.step import Batch

# Folded into a key where others fold in epochs, or places in a batch, all of which are smaller.
_APART = np.uint32(2**32 - 1)


class Keys(NamedTuple):
    """The run's independent streams of randomness; a step folds in its number where it draws."""

    init: Array
    batches: Array
    augmentation: Array
    attack: Array


def run_keys(seed: int) -> Keys:
    """Returns the keys of the run with this seed."""
    return Keys(*jax.random.split(prng.key(seed), len(Keys._fields)))


def learner_keys(config: ConfigDict) -> Keys:
    """Returns the keys of what is trained by one loss each: the ensemble, or each member.

    Members trained separately are k runs of one member with the seeds k * seed + i, which differ
    for all members of all runs of a study.

    Returns:
      Keys without an axis for joint training, with a leading [k] axis for separate training.
    """
    if config.ensemble.training == 'joint':
        return run_keys(config.seed)
    k = config.ensemble.size
    return jax.tree.map(
        lambda *keys: jnp.stack(keys), *(run_keys(k * config.seed + i) for i in range(k))
    )


def extra_key(key: Array) -> Array:
    """Returns the key by which extra examples are sampled; `key` samples the training split."""
    return jax.random.fold_in(key, _APART)


class Sampling(NamedTuple):
    """How a batch is drawn and augmented.

    Attributes:
      batch_size: examples in the global batch.
      num_extra: how many of them are extra ones, see `batches.places_by_kind`.
      pad, flip: see `batches.augment`.
      cutout: side of a square, in pixels; 0: none.
      cutmix: the parameter of `batches.cutmix`; 0: none.
      mean: of each channel of the training split, which fills the square.
      num_classes: of the labels.
    """

    batch_size: int
    num_extra: int
    pad: int
    flip: bool
    cutout: int
    cutmix: float
    mean: tuple[float, ...]
    num_classes: int


def num_extra(config: ConfigDict) -> int:
    """Returns how many examples of each batch are extra ones."""
    return round(config.data.extra_fraction * config.train.batch_size)


def sampling(config: ConfigDict, dataset: Mapping[str, Any]) -> Sampling:
    """Returns how a run's batches are drawn.

    Args:
      config: the run's.
      dataset: 'mean' and 'num_classes', as `data.Dataset.describe` gives them.
    """
    group = config.data
    return Sampling(
        batch_size=config.train.batch_size,
        num_extra=num_extra(config),
        pad=group.pad,
        flip=datasets.flips_by_default(group.name) if group.flip is None else group.flip,
        cutout=group.cutout,
        cutmix=group.cutmix,
        mean=tuple(dataset['mean']),
        num_classes=dataset['num_classes'],
    )


class Examples(NamedTuple):
    """All examples that a run trains on, uint8 images [n, H, W, C] and int32 labels [n]."""

    images: Array
    labels: Array
    extra_images: Array | None = None
    extra_labels: Array | None = None


class Chosen(NamedTuple):
    """A device's examples of a step, and then their partners in CutMix.

    uint8 images [m, H, W, C] and int32 labels [m].
    """

    images: Array
    labels: Array


def partners(batch_size: int, step: Array, augmentation: Array) -> Array:
    """Returns the place of each image's partner in a step's batch, for CutMix, int32 [batch_size].

    Args:
      batch_size: of the global batch.
      step: int32 scalar.
      augmentation: the run's key.
    """
    key = jax.random.fold_in(jax.random.fold_in(augmentation, step), _APART)
    return jax.random.permutation(key, batch_size)


def draw_batch(
    sampling: Sampling, step: Array, examples: Examples | Chosen, keys: Keys
) -> tuple[Batch, Array]:
    """Returns this device's share of a step's batch, and a key for each example's attack.

    Inside `distributed.run_on_devices` only.

    Args:
      sampling: the run's.
      step: int32 scalar.
      examples: all there are, or those of this step that `feeds.Streamed` has chosen.
      keys: the run's.
    """
    mine = distributed.my_share(sampling.batch_size)
    places = mine
    if sampling.cutmix:
        others = partners(sampling.batch_size, step, keys.augmentation)
        places = jnp.concatenate([mine, others[mine]])
    if isinstance(examples, Examples):
        examples = _choose(sampling, step, places, examples, keys.batches)

    def example_keys(key, places):
        key = jax.random.fold_in(key, step)
        return jax.vmap(lambda place: jax.random.fold_in(key, place))(places)

    drawn = example_keys(keys.augmentation, places)
    x = batches.augment(drawn, examples.images, pad=sampling.pad, flip=sampling.flip)
    x, y = batches.to_pixels(x), examples.labels
    if sampling.cutout:
        x = batches.cutout(drawn, x, side=sampling.cutout, fill=sampling.mean)
    if sampling.cutmix:
        m = len(mine)
        x, y = batches.cutmix(
            drawn[:m], (x[:m], x[m:]), (y[:m], y[m:]),
            alpha=sampling.cutmix, num_classes=sampling.num_classes,
        )  # fmt: skip
    return (x, y), example_keys(keys.attack, mine)


def _choose(
    sampling: Sampling, step: Array, places: Array, examples: Examples, key: Array
) -> Chosen:
    """Returns the examples at places of a step's batch; the training split and extra examples have
    a stream of epochs each."""
    size, extra = sampling.batch_size, sampling.num_extra

    def read(key, ranks, size, images, labels):
        indices = batches.batch_indices(key, step, ranks, batch_size=size, num_examples=len(labels))
        return Chosen(images[indices], labels[indices])

    if not extra:
        return read(key, places, size, examples.images, examples.labels)
    tables = map(jnp.asarray, batches.places_by_kind(size, extra))
    is_extra, rank = (table[places] for table in tables)
    main = read(key, jnp.where(is_extra, 0, rank), size - extra, examples.images, examples.labels)
    others = read(
        extra_key(key), jnp.where(is_extra, rank, 0), extra,
        examples.extra_images, examples.extra_labels,
    )  # fmt: skip
    return Chosen(
        jnp.where(is_extra[:, None, None, None], others.images, main.images),
        jnp.where(is_extra, others.labels, main.labels),
    )
