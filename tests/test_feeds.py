"""What the host streams is what the devices would draw, whatever the data's size."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import tiny_config

from ensadv.data import batches, datasets, extra
from ensadv.training import feeds, streams

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (37, 4, 4, 1), np.uint8)
DATASET = datasets.Dataset('npz', IMAGES, np.arange(37, dtype=np.int32), IMAGES, np.arange(37), 60)
EXTRA = extra.Extra((255 - IMAGES[:20], 255 - IMAGES[20:23]), np.arange(37, 60, dtype=np.int32))
MIXED = streams.Sampling(
    batch_size=8, num_extra=3, pad=1, flip=True, cutout=2, cutmix=1.0, mean=(0.5,), num_classes=60
)  # fmt: skip


@pytest.mark.parametrize('num_examples, batch_size', [(10, 4), (7, 3), (5, 5), (9, 8)])
def test_the_host_draws_the_indices_of_the_device(num_examples, batch_size):
    key = jax.random.key(3)
    epochs = feeds._Epochs(key, batch_size, num_examples)
    sample = jax.jit(
        lambda step: batches.batch_indices(
            key, step, jnp.arange(batch_size), batch_size=batch_size, num_examples=num_examples
        )
    )
    for step in (0, 1, 2, 3, 1000, 2**31 - 1):
        found = epochs.indices(step, np.arange(batch_size))
        np.testing.assert_array_equal(found, sample(step))
        ranks = np.array([batch_size - 1, 0])
        np.testing.assert_array_equal(epochs.indices(step, ranks), found[ranks])


@pytest.fixture
def streamed():
    """Returns what makes feeds that stream, and ends them."""
    made = []

    def make(keys, steps_per_call, dataset=DATASET, sampling=MIXED, added=EXTRA):
        made.append(feeds.Streamed(sampling, keys, dataset, added, steps_per_call, last_step=9))
        return made[-1]

    yield make
    for feed in made:
        feed.close()


def test_calls_of_any_length_get_the_examples_of_their_steps(streamed):
    """Whatever was expected to come next; after the steps there are zeros."""
    keys = streams.run_keys(3)
    feed = streamed(keys, 3)
    examples, whole = feed.take(0, 3)
    assert examples is None
    assert whole.images.shape == (1, 3, 16, 4, 4, 1)  # with CutMix's partners
    assert (whole.images.dtype, whole.labels.dtype) == (np.uint8, np.int32)
    assert len({tuple(labels) for labels in whole.labels[0].tolist()}) == 3
    # Labels are the places of the images.
    everything = np.concatenate([IMAGES, EXTRA.all_images()])
    np.testing.assert_array_equal(whole.images, everything[whole.labels])
    for first, num_steps in (
        (3, 2),
        (5, 3),
        (8, 1),
        (9, 1),
        (0, 1),
        (1, 2),
        (2, 1),
    ):  # as a replay does
        _, found = feed.take(first, num_steps)
        assert not found.labels[:, num_steps:].any()
        for step in range(first, min(first + num_steps, 3)):
            np.testing.assert_array_equal(found.labels[:, step - first], whole.labels[:, step])


def test_each_learner_has_batches_of_its_own(streamed):
    both = jax.tree.map(lambda *keys: jnp.stack(keys), *map(streams.run_keys, (3, 4)))
    _, found = streamed(both, 2).take(0, 2)
    assert found.images.shape == (1, 2, 2, 16, 4, 4, 1)
    for number, seed in enumerate((3, 4)):
        _, alone = streamed(streams.run_keys(seed), 2).take(0, 2)
        np.testing.assert_array_equal(found.labels[:, number], alone.labels)


def test_a_file_larger_than_memory_is_not_read_into_it(tmp_path, streamed):
    """What is private to the process hardly grows, and the file's pages can be dropped."""
    shape = (200_000, 64, 64, 1)  # 781 MiB, of which the disk holds nothing
    images = np.lib.format.open_memmap(tmp_path / 'image.npy', 'w+', np.uint8, shape)
    np.save(tmp_path / 'label.npy', np.zeros(len(images), np.uint8))
    images[-1] = 7
    del images
    added = extra.load((str(tmp_path),), shape[1:], 2)
    small = np.zeros((8, *shape[1:]), np.uint8)
    dataset = datasets.Dataset('npz', small, np.ones(8, np.int32), small, np.ones(8), 2)
    sampling = MIXED._replace(batch_size=64, num_extra=60)
    feed = streamed(streams.run_keys(0), 2, dataset, sampling, added)
    before = private_bytes()
    for step in range(0, 8, 2):
        _, found = feed.take(step, 2)
        assert np.sum(found.labels == 0) == 2 * 2 * 60
    assert private_bytes() - before < added.nbytes / 8
    assert added.images(np.array([199_999])).min() == 7


def private_bytes():
    with open('/proc/self/status') as file:
        (line,) = (line for line in file if line.startswith('RssAnon'))
    return int(line.split()[1]) * 1024


@pytest.mark.parametrize(
    'on_device, limit, examples, expected',
    [
        ('auto', 400, 100, True),
        ('auto', 399, 100, False),  # a quarter of a device's memory is for data
        ('auto', 400, 2**22 + 1, False),
        ('auto', None, 100, True),  # a device that does not tell
        ('yes', 1, 2**23, True),
        ('no', 10**9, 1, False),
    ],
)
def test_what_fits_the_devices_is_kept_there(monkeypatch, on_device, limit, examples, expected):
    stats = None if limit is None else {'bytes_limit': limit}
    device = types.SimpleNamespace(platform='gpu', memory_stats=lambda: stats)
    monkeypatch.setattr(jax, 'local_devices', lambda: [device])
    config = tiny_config(data__on_device=on_device)
    assert feeds.fits_devices(config, 100, examples) is expected


def test_on_a_cpu_the_limit_is_a_gibibyte():
    config = tiny_config()
    assert feeds.fits_devices(config, 2**30, 1)
    assert not feeds.fits_devices(config, 2**30 + 1, 1)
