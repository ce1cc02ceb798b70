import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import tiny_config

from configs import default
from ensadv.training import from_config, optim


@pytest.mark.parametrize(
    'step, expected',
    [(0, 0.1), (29_999, 0.1), (30_000, 0.02), (60_000, 0.004), (89_999, 0.004), (90_000, 8e-4),
     (499_999, 8e-4)],
)  # fmt: skip
def test_learning_rate_of_the_paper(step, expected):
    np.testing.assert_allclose(
        from_config.schedule(default.get_config())(step), expected, rtol=1e-6
    )


PEAK = {'train__learning_rate': 0.4, 'train__steps': 110}


@pytest.mark.parametrize(
    'schedule, warmup_steps, expected',
    [
        ('steps', 10, {0: 0, 5: 0.2, 10: 0.4, 19: 0.4, 20: 0.08, 39: 0.08, 40: 0.016, 109: 0.016}),
        ('cosine', 0, {0: 0.4, 55: 0.2, 110: 0}),
        ('cosine', 10, {0: 0, 5: 0.2, 10: 0.4, 35: 0.2 + 0.2 / 2**0.5, 60: 0.2, 110: 0, 200: 0}),
        ('linear', 0, {0: 0.4, 11: 0.36, 55: 0.2, 110: 0}),
        ('linear', 10, {0: 0, 5: 0.2, 10: 0.4, 35: 0.3, 60: 0.2, 110: 0, 200: 0}),
        # Torch's OneCycleLR: from peak / 25 at 30 % to the peak, and to peak / 25e4.
        ('one_cycle', 0, {0: 0.016, 33: 0.4, 110: 1.6e-6, 200: 1.6e-6}),
        ('one_cycle', 29, {0: 0.016, 29: 0.4, 110: 1.6e-6}),
        ('one_cycle', 50, {0: 0.016, 25: 0.208, 50: 0.4, 80: 0.2000008, 110: 1.6e-6}),
    ],
)
def test_schedules(schedule, warmup_steps, expected):
    config = tiny_config(
        train__schedule=schedule, train__warmup_steps=warmup_steps, **PEAK,
        train__learning_rate_steps=(20, 40), train__learning_rate_factor=0.2,
    )  # fmt: skip
    rates = jax.vmap(from_config.schedule(config))(jnp.arange(201))
    found = [rates[step] for step in expected]
    np.testing.assert_allclose(found, [*expected.values()], rtol=1e-5, atol=5e-8)
    assert int(np.argmax(rates)) in expected


def test_without_warm_up_the_papers_schedule_has_the_same_bits_as_ever():
    ever = optax.piecewise_constant_schedule(0.1, {30_000: 0.2, 60_000: 0.2, 90_000: 0.2})
    steps = jnp.array([0, 29_999, 30_000, 60_000, 90_000, 499_999])
    found = jax.vmap(from_config.schedule(default.get_config()))(steps)
    np.testing.assert_array_equal(found, jax.vmap(ever)(steps))


@pytest.mark.parametrize('decays_on', ['all', 'kernels'])
def test_what_decays_is_told_by_its_name(decays_on):
    config = tiny_config(
        train__weight_decay=0.5, train__learning_rate=1.0, train__weight_decay_on=decays_on
    )
    optimizer = from_config.optimizer(config)
    params = {
        'conv': {'kernel': jnp.ones((2, 3))},
        'norm': {'scale': jnp.ones(2), 'bias': jnp.ones(2)},
        'kernel': {'bias': jnp.ones(2)},
        'linear': {'kernel': jnp.ones((2, 2)), 'bias': jnp.ones(2)},
    }
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = optimizer.update(zeros, optimizer.init(params), params)
    decayed = {
        '/'.join(key.key for key in path)
        for path, leaf in jax.tree_util.tree_leaves_with_path(updates)
        if np.all(leaf == -0.5)
    }
    biases = {'norm/scale', 'norm/bias', 'kernel/bias', 'linear/bias'}
    assert decayed == {'conv/kernel', 'linear/kernel'} | (biases if decays_on == 'all' else set())
    assert all(np.all(leaf == -0.5) or not np.any(leaf) for leaf in jax.tree.leaves(updates))


@pytest.mark.parametrize('nesterov', [False, True])
def test_sgd_equals_the_formula(nesterov):
    """Torch's SGD with weight decay, as the Wide ResNets were trained with."""
    optimizer = optim.sgd(
        optim.learning_rate('steps', 0.5, num_steps=4, steps=(2,), factor=0.1),
        momentum=0.9,
        nesterov=nesterov,
        weight_decay=0.01,
    )
    w, velocity = 2.0, 0.0
    params = {'w': jnp.array(w)}
    state = optimizer.init(params)
    for step, gradient in enumerate([1.0, -0.5, 0.25, 2.0]):
        rate = 0.5 if step < 2 else 0.05
        decayed = gradient + 0.01 * w
        velocity = 0.9 * velocity + decayed
        w -= rate * (decayed + 0.9 * velocity if nesterov else velocity)
        updates, state = optimizer.update({'w': jnp.array(gradient)}, state, params)
        params = optax.apply_updates(params, updates)
        np.testing.assert_allclose(params['w'], w, rtol=1e-6)


@pytest.mark.parametrize('decay', [0.5, 0.9999])
def test_a_moving_average_weighs_the_values_so_far(decay):
    """With weights decay^age that sum to one, as a loop has them."""
    values = np.array([3.0, -1.0, 4.0, 1.0, -5.0])
    averaged = 100.0
    for step in range(1, 6):
        averaged = optim.moving_average(averaged, values[step - 1], jnp.int32(step), decay)
        weights = decay ** np.arange(step - 1, -1, -1)
        expected = np.sum(weights * values[:step]) / np.sum(weights)
        np.testing.assert_allclose(averaged, expected, rtol=1e-5)
