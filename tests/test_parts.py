"""Batches in parts: the same as whole, and what a network takes at a time."""

import jax
import numpy as np
import pytest

from ensadv.cpu import backend, parts


def rows(n):
    return {'x': np.arange(2.0 * n).reshape(n, 2), 'y': np.arange(n)}


def pictures(n, side=32):
    return {'x': np.arange(n, dtype=np.float32)[:, None, None, None] + np.zeros((side, side, 3)),
            'y': np.arange(n)}  # fmt: skip


@pytest.mark.parametrize('size', [1, 2, 3, 5, 6, 7])
def test_parts_are_joined_in_order(size):
    seen = []

    def f(tree, more):
        seen.append(len(more))
        return {'sum': tree['x'].sum(axis=1) + more, 'y': tree['y']}

    result = jax.jit(lambda *batch: parts.in_parts(f, size, *batch))(rows(6), 10.0 * np.arange(6))
    np.testing.assert_array_equal(result['sum'], [1, 15, 29, 43, 57, 71])
    np.testing.assert_array_equal(result['y'], range(6))
    # A part's program is made once, and another one for the last where that is smaller.
    assert seen == [min(size, 6)] + [6 % size] * (size < 6 and 6 % size > 0)


def test_what_a_part_adds_up_is_joined_too():
    totals = parts.in_parts(lambda x: x.sum(axis=0, keepdims=True), 4, rows(10)['x'])
    np.testing.assert_array_equal(totals, [[12, 16], [44, 48], [34, 36]])


def test_keys_are_split_as_well():
    keys = jax.random.split(jax.random.key(0), 6)
    draw = jax.vmap(lambda key: jax.random.normal(key))
    # Compiled otherwise, and so rounded otherwise.
    np.testing.assert_allclose(parts.in_parts(draw, 4, keys), draw(keys), rtol=1e-6)


@pytest.mark.parametrize(
    'n, side, at_a_time',
    [(1, 32, 1), (31, 32, 31), (32, 32, 32), (64, 32, 32), (96, 32, 32), (360, 32, 33),
     (64, 64, 32),
     # The last part is filled up where that takes few images: three for 61; one for 95; for 100 it
     # would take no more than three.
     (95, 32, 32), (70, 32, 35), (65, 32, 33), (45, 32, 45), (200, 32, 34),
     # Small images are taken as many at a time as have so many values.
     (360, 16, 180), (64, 8, 64)],
)  # fmt: skip
def test_a_network_takes_a_few_images_of_one_number(n, side, at_a_time):
    seen = []

    def f(batch):
        seen.append(len(batch['y']))
        return batch['x']

    np.testing.assert_array_equal(parts.by_network(f, pictures(n, side)), pictures(n, side)['x'])
    assert seen == [at_a_time]


def test_parts_that_nobody_wants_are_not_computed():
    def f(batch):
        return {'twice': 2 * batch['x'] + 1, 'y': batch['y'] > 15}

    result = jax.jit(lambda wanted, batch: parts.by_network(f, batch, wanted=wanted))(
        np.arange(96) == 40, pictures(96)
    )
    second = np.arange(96) // 32 == 1
    expected = np.where(second[:, None, None, None], 2 * pictures(96)['x'] + 1, 0)
    np.testing.assert_array_equal(result['twice'], expected)
    np.testing.assert_array_equal(result['y'], second)
    assert result['y'].dtype == bool


def test_what_fills_up_the_last_part_is_dropped_again():
    keys = jax.random.split(jax.random.key(0), 255)

    def f(keys, batch):
        return jax.vmap(jax.random.key_data)(keys), batch['y'], batch['x']

    for wanted in (None, np.ones(255, bool)):
        data, y, x = parts.by_network(f, keys, pictures(255), wanted=wanted)
        np.testing.assert_array_equal(data, jax.random.key_data(keys))
        np.testing.assert_array_equal(y, range(255))
        np.testing.assert_array_equal(x, pictures(255)['x'])


def test_few_that_are_wanted_cost_few_parts():
    """58 of 200 examples that are left of a long attack are two parts of 34."""
    seen = []

    def f(batch):
        jax.debug.callback(lambda y: seen.append(len(y)), batch['y'])
        return batch['y']

    y = jax.jit(lambda wanted, batch: parts.by_network(f, batch, wanted=wanted))(
        np.arange(200) < 58, pictures(200)
    )
    jax.effects_barrier()
    np.testing.assert_array_equal(y[:58], range(58))
    assert seen == [34, 34]


@pytest.mark.parametrize(
    'count, largest, side, size',
    # Two batches of 137, rounded up to an eighth of 180. Parts make a smaller batch needless.
    [(274, 180, 8, 138), (360, 180, 8, 180), (361, 180, 8, 138), (1, 180, 8, 23), (20, 40, 32, 20),
     (58, 200, 32, 200)],
)  # fmt: skip
def test_batches_are_even_and_of_few_sizes(count, largest, side, size, monkeypatch):
    assert parts.batch_size(count, largest, side * side * 3) == size
    monkeypatch.setattr(backend, 'is_cpu', lambda: False)
    assert parts.batch_size(count, largest, side * side * 3) == largest


def test_elsewhere_than_on_a_cpu_it_takes_all(monkeypatch):
    monkeypatch.setattr(backend, 'is_cpu', lambda: False)
    assert parts.by_network(lambda batch: [len(batch['y'])], pictures(64)) == [64]
