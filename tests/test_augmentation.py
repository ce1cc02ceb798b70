"""Cutout and CutMix: which pixels, and which labels' shares."""

import collections
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import beta

from ensadv.data import batches

SHAPE = (5, 4)


def box(centre, sides):
    """The pixels of a box whose parts outside are dropped, bool [5, 4], by a loop."""
    found = np.zeros(SHAPE, bool)
    for row, column in itertools.product(range(sides[0]), range(sides[1])):
        place = centre[0] - sides[0] // 2 + row, centre[1] - sides[1] // 2 + column
        if 0 <= place[0] < SHAPE[0] and 0 <= place[1] < SHAPE[1]:
            found[place] = True
    return found


CENTRES = list(itertools.product(*map(range, SHAPE)))


def assert_uniform(masks, sides):
    """Checks that boxes are at every place equally often."""
    expected = collections.Counter(box(centre, sides).tobytes() for centre in CENTRES)
    seen = collections.Counter(np.ascontiguousarray(mask).tobytes() for mask in masks)
    assert seen.keys() == expected.keys()
    n = len(masks) / len(CENTRES)
    chi_square = sum((seen[mask] - n * m) ** 2 / (n * m) for mask, m in expected.items())
    assert chi_square < len(expected) + 8 * np.sqrt(2 * len(expected))


def keys_of(n, seed=0):
    return jax.random.split(jax.random.key(seed), n)


@pytest.mark.parametrize('side', [1, 2, 3])
def test_cutout_hides_a_square_at_any_place(side):
    images = np.random.default_rng(0).random((600, *SHAPE, 3), np.float32)
    fill = (2.0, 3.0, 4.0)
    found = np.asarray(batches.cutout(keys_of(600), images, side=side, fill=fill))
    hidden = found[..., 0] == 2
    np.testing.assert_array_equal(found[hidden], np.broadcast_to(fill, (hidden.sum(), 3)))
    np.testing.assert_array_equal(found[~hidden], images[~hidden])
    assert_uniform(hidden, (side, side))


def cutmix(n, alpha):
    """Returns what is pasted of images of ones into zeros, [n, 5, 4], and the labels' shares."""
    zeros, labels = jnp.zeros((n, *SHAPE, 1)), jnp.arange(n) % 3
    mixed = jax.jit(lambda *args: batches.cutmix(*args, alpha=alpha, num_classes=4))
    pixels, shares = mixed(keys_of(n), (zeros, zeros + 1), (labels, jnp.full(n, 3)))
    return np.asarray(pixels)[..., 0] == 1, np.asarray(shares), labels


def test_cutmix_pastes_a_box_and_labels_count_by_its_area():
    pasted, shares, labels = cutmix(600, alpha=1e6)  # lambda is 1/2
    assert_uniform(pasted, (3, 2))  # floors of 5 and 4 times sqrt(1/2)
    expected = np.zeros((600, 4))
    expected[:, 3] = area = pasted.mean((1, 2))
    expected[np.arange(600), labels] = 1 - area
    np.testing.assert_allclose(shares, expected, atol=1e-6)
    assert shares.dtype == np.float32


@pytest.mark.parametrize('alpha', [0.5, 1.0])
def test_cutmix_draws_areas_from_beta(alpha):
    pasted, _, _ = cutmix(4000, alpha)
    found = pasted.mean((1, 2))
    expected = [
        box(centre, [int(side * np.sqrt(area)) for side in SHAPE]).mean()
        for area in beta.ppf((np.arange(200) + 0.5) / 200, alpha, alpha)
        for centre in CENTRES
    ]
    assert abs(found.mean() - np.mean(expected)) < 5 * found.std() / np.sqrt(len(found))
    assert abs(found.std() - np.std(expected)) < 0.02


def test_an_image_is_not_cropped_by_what_places_its_box():
    key = jax.random.key(3)
    drawn = [*jax.random.split(key), *(jax.random.fold_in(key, n) for n in (2, 3))]
    assert (batches._CUTOUT, batches._CUTMIX) == (2, 3)
    assert len({tuple(jax.random.key_data(each).tolist()) for each in drawn}) == 4


@pytest.mark.parametrize('size, extra', [(8, 0), (8, 8), (8, 3), (128, 90), (512, 358), (7, 2)])
def test_extra_examples_are_spread_evenly(size, extra):
    is_extra, rank = batches.places_by_kind(size, extra)
    assert is_extra.sum() == extra
    np.testing.assert_array_equal(rank[is_extra], np.arange(extra))
    np.testing.assert_array_equal(rank[~is_extra], np.arange(size - extra))
    for devices in (d for d in (1, 2, 4, 8) if size % d == 0):
        shares = is_extra.reshape(devices, -1).sum(1)
        assert shares.max() - shares.min() <= 1
