"""The run's independent streams of randomness, and the batch of every step, drawn from them."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from ml_collections import ConfigDict

from ensadv import prng
from ensadv.data import batches, datasets
from ensadv.runtime import distributed
from ensadv.training.step import Batch


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


def draw_batch(
    config: ConfigDict, step: Array, arrays: tuple[Array, Array], keys: Keys
) -> tuple[Batch, Array]:
    """Returns this device's share of a step's batch, and a key for each example's attack.

    Inside `distributed.run_on_devices` only. `arrays` are the whole training split.
    """
    images, labels = arrays
    batch_size = config.train.batch_size
    flip = config.data.flip
    if flip is None:
        flip = datasets.flips_by_default(config.data.name)
    places = distributed.my_share(batch_size)
    indices = batches.batch_indices(
        keys.batches, step, places, batch_size=batch_size, num_examples=len(labels)
    )

    def example_keys(key):
        key = jax.random.fold_in(key, step)
        return jax.vmap(lambda place: jax.random.fold_in(key, place))(places)

    x = batches.augment(
        example_keys(keys.augmentation), images[indices], pad=config.data.pad, flip=flip
    )
    return (batches.to_pixels(x), labels[indices]), example_keys(keys.attack)
