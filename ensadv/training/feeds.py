"""Where a run's examples are: whole on the devices, or on the host, which streams them."""

import concurrent.futures
import contextlib
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from ml_collections import ConfigDict

from ensadv import prng
from ensadv.data import batches, datasets
from ensadv.data import extra as extra_data
from ensadv.runtime import distributed
from ensadv.training import streams
from ensadv.training.step import Batch
from ensadv.training.streams import Chosen, Examples, Keys, Sampling

# Of what data.on_device=auto keeps on the devices.
DEVICE_SHARE = 1 / 4  # of a device's memory, which training needs as well
CPU_BYTES = 2**30  # where it is the host's memory, and each device would have a copy
MOST_EXAMPLES = 2**22  # of a kind: every step orders them anew, which takes as long as a sort
_CALL_BYTES = 2**27  # of the examples of a call that are streamed

# (sampling, step, number of the step in the call, examples, chosen, keys) -> (batch, rng), on a
# device.
Draw = Callable[..., tuple[Batch, Array]]


def fits_devices(config: ConfigDict, num_bytes: int, most_examples: int) -> bool:
    """Returns whether a run's examples are kept on the devices, the same on all processes.

    Args:
      config: the run's.
      num_bytes: of all images.
      most_examples: of the training split, or of the extra examples, whichever are more.
    """
    if config.data.on_device != 'auto':
        return config.data.on_device == 'yes'
    device = jax.local_devices()[0]
    stats = device.memory_stats() if device.platform != 'cpu' else None
    limit = DEVICE_SHARE * stats['bytes_limit'] if stats else CPU_BYTES
    return distributed.agree(num_bytes <= limit and most_examples <= MOST_EXAMPLES)


def open_feed(
    config: ConfigDict,
    sampling: Sampling,
    keys: Keys,
    dataset: datasets.Dataset,
    extra: extra_data.Extra | None,
) -> 'OnDevice | Streamed':
    """Returns what gives a run's calls their examples; to be closed.

    Args:
      config: the run's.
      sampling: as `streams.sampling` gives it.
      keys: of `streams.learner_keys`.
      dataset, extra: the examples.
    """
    sizes = len(dataset.label_train), len(extra.labels) if extra else 0
    num_bytes = dataset.image_train.nbytes + (extra.nbytes if extra else 0)
    if fits_devices(config, num_bytes, max(sizes)):
        return OnDevice(dataset, extra, config.train.steps_per_call)
    distributed.tell(f'streaming {num_bytes / 2**20:,.0f} MiB of images from the host')
    return Streamed(sampling, keys, dataset, extra, config.train.steps_per_call, config.train.steps)


def draw(
    sampling: Sampling, step: Array, number: Array, examples: Any, chosen: Any, keys: Keys
) -> tuple[Batch, Array]:
    """Returns `streams.draw_batch` of a call's step.

    Args:
      sampling: the run's.
      step: int32 scalar.
      number: the step's in the call, from 0.
      examples, chosen: of `take`.
      keys: the run's.
    """
    if chosen is not None:
        examples = jax.tree.map(lambda leaf: leaf[number], chosen)
    return streams.draw_batch(sampling, step, examples, keys)


class OnDevice:
    """All examples on every device, once."""

    def __init__(
        self, dataset: datasets.Dataset, extra: extra_data.Extra | None, steps_per_call: int
    ):
        self.most_steps = steps_per_call  # of a call
        others = (extra.all_images(), extra.labels) if extra else ()
        examples = Examples(dataset.image_train, dataset.label_train, *others)
        self._examples = distributed.replicate(examples)

    def take(self, step: int, num_steps: int) -> tuple[Examples, None]:
        """Returns what `draw` takes in a call from a step on: what all devices share, and None."""
        del step, num_steps
        return self._examples, None

    def close(self) -> None:
        """Has nothing to end."""


class Streamed:
    """Examples that the host chooses for every call, in the background while the one before runs.

    They are those that the devices would choose, so that a run may go on either way.
    """

    def __init__(
        self,
        sampling: Sampling,
        keys: Keys,
        dataset: datasets.Dataset,
        extra: extra_data.Extra | None,
        steps_per_call: int,
        last_step: int,
    ):
        self._last_step = last_step
        self._places = distributed.places_here(sampling.batch_size)
        self._separate = keys.batches.ndim > 0  # each learner has batches of its own
        with _on_cpu():
            keys = prng.from_words(jax.device_get(prng.to_words(keys)))
            each = jax.tree.map(jnp.atleast_1d, keys)
            self._learners = [
                _Chooser(sampling, jax.tree.map(lambda key, i=i: key[i], each), dataset, extra)
                for i in range(len(each.batches))
            ]
        of_step = self._places.size * len(self._learners) * (1 + bool(sampling.cutmix))
        of_step *= dataset.image_train[0].nbytes
        # The same on all hosts, since what is compiled depends on it.
        self.most_steps = distributed.agree(min(steps_per_call, max(1, _CALL_BYTES // of_step)))
        self._thread = concurrent.futures.ThreadPoolExecutor(1, 'examples')
        self._coming: dict[int, concurrent.futures.Future[Chosen]] = {}

    def take(self, step: int, num_steps: int) -> tuple[None, Chosen]:
        """Returns what `draw` takes in a call: None, and what each device has of its own.

        Args:
          step: the call's first.
          num_steps: at most `most_steps`.

        Returns:
          Leaves [local devices, most_steps, m, ...], or [local devices, k, most_steps, m, ...]
          where k learners have batches of their own; behind `num_steps` they are zeros.
        """
        ahead = min(step + num_steps + self.most_steps, self._last_step)
        until = max(step + num_steps, ahead)
        coming = {each: self._coming.get(each) for each in range(step, until)}
        for dropped in self._coming.keys() - coming.keys():
            self._coming[dropped].cancel()
        for each, choice in coming.items():
            coming[each] = choice or self._thread.submit(self._choose, each)
        chosen = [coming.pop(each).result() for each in range(step, step + num_steps)]
        self._coming = coming
        return None, jax.tree.map(self._stack, *chosen)

    def _stack(self, *steps: np.ndarray) -> np.ndarray:
        axis = 1 + self._separate
        shape = steps[0].shape
        found = np.zeros((*shape[:axis], self.most_steps, *shape[axis:]), steps[0].dtype)
        np.stack(steps, axis, out=found[(slice(None),) * axis + (slice(len(steps)),)])
        return found

    def _choose(self, step: int) -> Chosen:
        """Returns the examples of a step's places here, [local devices, (k,) m, ...]."""
        with _on_cpu():
            found = [learner.choose(step, self._places) for learner in self._learners]
        return jax.tree.map(lambda *each: np.stack(each, 1), *found) if self._separate else found[0]

    def close(self) -> None:
        """Ends the choosing in the background."""
        self._thread.shutdown(cancel_futures=True)


class _Chooser:
    """Chooses on the host what `streams.draw_batch` chooses on a device."""

    def __init__(
        self,
        sampling: Sampling,
        keys: Keys,
        dataset: datasets.Dataset,
        extra: extra_data.Extra | None,
    ):
        self._sampling, self._keys, self._dataset, self._extra = sampling, keys, dataset, extra
        size, num_extra = sampling.batch_size, sampling.num_extra
        self._is_extra, self._rank = batches.places_by_kind(size, num_extra)
        self._partners = jax.jit(functools.partial(streams.partners, size))
        self._main = _Epochs(keys.batches, size - num_extra, len(dataset.label_train))
        if extra:
            key = streams.extra_key(keys.batches)
            self._others = _Epochs(key, num_extra, len(extra.labels))

    def choose(self, step: int, places: np.ndarray) -> Chosen:
        """Returns the examples of a step's places, int32 [devices, m], and of their partners.

        Returns:
          Leaves [devices, m, ...], or [devices, 2m, ...] with CutMix.
        """
        if self._sampling.cutmix:
            partners = np.asarray(self._partners(step, self._keys.augmentation))
            places = np.concatenate([places, partners[places]], axis=1)
        is_extra, rank = self._is_extra[places], self._rank[places]
        shape = self._dataset.image_shape
        found = Chosen(
            np.empty((*places.shape, *shape), np.uint8), np.empty(places.shape, np.int32)
        )
        main = self._main.indices(step, rank[~is_extra])
        found.images[~is_extra] = self._dataset.image_train[main]
        found.labels[~is_extra] = self._dataset.label_train[main]
        if self._extra:
            others = self._others.indices(step, rank[is_extra])
            found.images[is_extra] = self._extra.images(others)
            found.labels[is_extra] = self._extra.labels[others]
        return found


class _Epochs:
    """`batches.batch_indices`, with the orders of two epochs kept, and numbers of any size."""

    def __init__(self, key: Array, batch_size: int, num_examples: int):
        self._batch_size, self._num_examples = batch_size, num_examples
        order = lambda epoch: np.asarray(batches.epoch_order(key, epoch, num_examples))
        self._order = functools.lru_cache(maxsize=2)(order)

    def indices(self, step: int, ranks: np.ndarray) -> np.ndarray:
        """Returns the indices of examples, int [m], for ranks int [m] in a step's batch."""
        epoch, start = divmod(step * self._batch_size, self._num_examples)
        places = start + ranks.astype(np.int64)
        later = places >= self._num_examples
        found = self._order(epoch)[np.where(later, 0, places)]
        if later.any():
            found[later] = self._order(epoch + 1)[places[later] - self._num_examples]
        return found


def _on_cpu() -> contextlib.AbstractContextManager:
    """Has JAX compute on the host, beside what runs on the devices, where it can."""
    try:
        return jax.default_device(jax.local_devices(backend='cpu')[0])
    except RuntimeError:  # JAX_PLATFORMS leaves the CPU out
        return contextlib.nullcontext()
