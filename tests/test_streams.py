"""Each stream of randomness is the one it is named for, and the same to the bit on any devices."""

import functools
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT, run_environment, tiny_config

from ensadv import build
from ensadv.data import batches, datasets, extra
from ensadv.evaluation import on_device
from ensadv.models import ensemble
from ensadv.runtime import distributed
from ensadv.training import feeds, streams, train

# Labels say which image it is: 37 of them, of which 8 make no whole number of batches.
IMAGES = np.random.default_rng(0).integers(0, 256, (37, 4, 4, 1), np.uint8)
LABELS = np.arange(37, dtype=np.int32)
DESCRIPTION = {'num_classes': 3, 'mean': (0.5,), 'std': (0.25,)}
CONFIG = tiny_config(train__batch_size=8, data__flip=True)
SAMPLING = streams.sampling(CONFIG, DESCRIPTION)
# The same with everything that may be added; the labels of extra images go on.
MIXED = SAMPLING._replace(num_extra=3, cutout=2, cutmix=1.0, num_classes=60)
EXTRA = 255 - IMAGES[:23], np.arange(37, 60, dtype=np.int32)
KEYS = streams.run_keys(3)
STEPS = (0, 4, 1000)  # the second batch straddles two epochs


@functools.cache
def compiled_draw(sampling=SAMPLING):
    def batch(step, keys, arrays):
        (pixels, indices), attack = streams.draw_batch(
            sampling, step, streams.Examples(*arrays), keys
        )
        levels = jnp.rint(255 * pixels).astype(jnp.uint8)
        return gathered((levels, indices, jax.random.key_data(attack)))

    batches = lambda *args: jax.lax.map(lambda step: batch(step, *args), jnp.int32(STEPS))
    return distributed.run_on_devices(batches, 2)


def draw(keys):
    """Returns images, indices and the data of the attack's keys, [steps, batch, ...] each."""
    return jax.device_get(compiled_draw()(*distributed.replicate((keys, (IMAGES, LABELS)))))


@functools.cache
def draw_streamed():
    """Returns what `draw_mixed` does, of examples that the host has chosen."""
    dataset = datasets.Dataset('npz', IMAGES, LABELS, IMAGES, LABELS, 60)
    feed = feeds.Streamed(MIXED, KEYS, dataset, extra.Extra((EXTRA[0],), EXTRA[1]), 1, 2000)

    def batch(step, examples, keys, chosen):
        (pixels, shares), attack = feeds.draw(MIXED, step, 0, examples, chosen, keys)
        levels = jnp.rint(255 * pixels).astype(jnp.uint8)
        return gathered((levels, shares, jax.random.key_data(attack)))

    compiled = distributed.run_on_devices(batch, 3, divided=True)
    drawn = []
    for step in STEPS:
        examples, chosen = feed.take(step, 1)
        drawn.append(jax.device_get(compiled(np.int32(step), examples, KEYS, chosen)))
    feed.close()
    return [np.stack(each) for each in zip(*drawn, strict=True)]


def gathered(tree):
    of_each = jax.lax.all_gather(tree, distributed.AXIS)
    return jax.tree.map(lambda parts: parts.reshape(-1, *parts.shape[2:]), of_each)


@functools.cache
def draw_mixed():
    """Returns as `draw` what is drawn with extra images, Cutout and CutMix."""
    arguments = distributed.replicate((KEYS, (IMAGES, LABELS, *EXTRA)))
    return jax.device_get(compiled_draw(MIXED)(*arguments))


def test_a_run_has_the_streams_that_it_always_had():
    """Otherwise a run that goes on would draw other batches than it would have drawn."""
    found = {name: jax.random.key_data(key).tolist() for name, key in KEYS._asdict().items()}
    assert found == {
        'init': [3716834203, 3481239269],
        'batches': [1946498123, 2217676430],
        'augmentation': [1024511538, 2603795180],
        'attack': [877192987, 3448417067],
    }


def test_every_draw_is_of_its_own_stream():
    for step, images, indices, attack in zip(STEPS, *draw(KEYS), strict=True):
        expected = batches.batch_indices(
            KEYS.batches, step, jnp.arange(8), batch_size=8, num_examples=len(LABELS)
        )
        np.testing.assert_array_equal(indices, expected)
        of_step = lambda key, step=step: jax.vmap(jax.random.fold_in, (None, 0))(
            jax.random.fold_in(key, step), jnp.arange(8)
        )
        expected = batches.augment(of_step(KEYS.augmentation), IMAGES[indices], pad=1, flip=True)
        np.testing.assert_array_equal(images, expected)
        np.testing.assert_array_equal(attack, jax.random.key_data(of_step(KEYS.attack)))


@pytest.mark.parametrize(
    'stream, changed',
    [
        ('init', (False, False, False)),
        ('batches', (True, True, False)),
        ('augmentation', (True, False, False)),
        ('attack', (False, False, True)),
    ],
)
def test_another_stream_changes_what_it_is_named_for_alone(stream, changed):
    other = KEYS._replace(**{stream: jax.random.key(77)})
    found = tuple(np.any(a != b) for a, b in zip(draw(KEYS), draw(other), strict=True))
    assert found == changed


@pytest.mark.usefixtures('small_network')
def test_weights_are_of_the_stream_init():
    config = tiny_config('ensemble2adv')
    model = build.model(config, DESCRIPTION, dtype='float32')
    params = jax.jit(lambda keys: train.init_state(config, model, (4, 4, 1), keys).params)
    expected = jax.jit(lambda key: ensemble.init(model, key, 2, (4, 4, 1)))(KEYS.init)['params']
    jax.tree.map(np.testing.assert_array_equal, params(KEYS), expected)


def test_evaluation_draws_by_its_own_seed_and_the_place_in_the_split():
    places = np.array([5, 0, 1000], np.int32)
    found = jax.random.key_data(on_device.keys(np.int32(7), places))
    expected = [jax.random.fold_in(jax.random.key(7), place) for place in places]
    np.testing.assert_array_equal(found, jax.random.key_data(jnp.stack(expected)))


def everything():
    """Returns what training and evaluation draw on this process's devices."""
    evaluation = lambda places: jax.random.key_data(on_device.keys(0, places))
    places = np.arange(12, dtype=np.int32)
    evaluated = distributed.map_examples(evaluation, 0)(places)
    return *draw(KEYS), *draw_streamed(), evaluated


def test_a_mixed_batch_is_what_its_parts_would_be():
    """Extra images have epochs of their own, and a partner is the image at another place."""
    is_extra, rank = batches.places_by_kind(8, 3)
    for step, images, shares, attack in zip(STEPS, *draw_mixed(), strict=True):
        own = batches.batch_indices(
            KEYS.batches, step, jnp.arange(5), batch_size=5, num_examples=len(LABELS)
        )
        extra = batches.batch_indices(
            streams.extra_key(KEYS.batches), step, jnp.arange(3), batch_size=3, num_examples=23
        )
        chosen = np.where(is_extra, 37 + extra[rank % 3], own[rank % 5])
        of_step = lambda key, step=step: jax.vmap(jax.random.fold_in, (None, 0))(
            jax.random.fold_in(key, step), jnp.arange(8)
        )
        keys = of_step(KEYS.augmentation)
        raw = np.concatenate([IMAGES, EXTRA[0]])[chosen]
        x = batches.to_pixels(batches.augment(keys, raw, pad=1, flip=True))
        x = batches.cutout(keys, x, side=2, fill=(0.5,))
        partners = np.asarray(streams.partners(8, step, KEYS.augmentation))
        assert sorted(partners) == list(range(8))
        x, y = batches.cutmix(
            keys, (x, x[partners]), (chosen, chosen[partners]), alpha=1.0, num_classes=60
        )
        np.testing.assert_array_equal(images, np.rint(255 * x).astype(np.uint8))
        np.testing.assert_allclose(shares, y, atol=1e-6)
        np.testing.assert_array_equal(attack, jax.random.key_data(of_step(KEYS.attack)))


def test_the_host_chooses_what_the_devices_would():
    for streamed, drawn in zip(draw_streamed(), draw_mixed(), strict=True):
        np.testing.assert_array_equal(streamed, drawn)


@pytest.mark.parametrize('devices', [2, 4])
def test_on_any_number_of_devices_the_draws_are_the_same_to_the_bit(devices, tmp_path):
    program = (
        'import sys, jax, numpy; sys.path[:0] = [".", "tests"]; import test_streams; '
        'numpy.savez(sys.argv[1], jax.device_count(), *test_streams.everything())'
    )
    path = tmp_path / 'draws.npz'
    command = [sys.executable, '-c', program, path]
    subprocess.run(command, cwd=ROOT, env=run_environment(devices), check=True)
    count, *found = np.load(path).values()
    assert (count, jax.device_count()) == (devices, 1)
    for there, here in zip(found, everything(), strict=True):
        np.testing.assert_array_equal(there, here)
