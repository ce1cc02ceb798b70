"""Objectives and adversarial weight perturbation against formulas written out again."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import tiny_config

from ensadv import config_checks
from ensadv.training import from_config, objectives
from ensadv.training.step import initial_state, perturbed, train_step


class Linear(nn.Module):
    """Batch norm, of all devices if they have a name, and a linear layer."""

    devices: str | None = None

    @nn.compact
    def __call__(self, x, train):
        x = x.reshape(len(x), -1)
        devices = self.devices if train and not self.is_initializing() else None
        norm = nn.BatchNorm(use_running_average=not train, momentum=0.5, axis_name=devices)
        return nn.Dense(3, name='linear')(norm(x))


X = jax.random.uniform(jax.random.key(0), (8, 2, 2, 1))
X_ADV = jnp.clip(X + 0.3 * jnp.sin(50 * X), 0, 1)
Y = jnp.arange(8) % 3
MIXED = jax.nn.softmax(jax.random.normal(jax.random.key(5), (8, 3)))
KEYS = jax.random.split(jax.random.key(1), 8)
RATE = 0.5
OPTIMIZER = optax.sgd(RATE)


def given(log_prob_fn, rng, x, target):
    """An attack whose result is known: X_ADV, of X."""
    del log_prob_fn, rng, target
    return jnp.clip(x + 0.3 * jnp.sin(50 * x), 0, 1)


@functools.cache
def first_state():
    return jax.jit(lambda: initial_state(Linear(), jax.random.key(2), 2, (2, 2, 1), OPTIMIZER))()


def state_of(number=0):
    return first_state().replace(step=jnp.int32(number))


@functools.cache
def made(name, *settings, gamma=0.0, start=0):
    """An objective, one object for all tests, so that its step is compiled once."""
    objective = {'paper': objectives.paper, 'trades': objectives.trades, 'mart': objectives.mart}
    return objectives.awp(objective[name](*settings), gamma, start)


STATIC = ('model', 'optimizer', 'attack', 'combine', 'objective', 'mean_over_devices')
make_step = jax.jit(train_step, static_argnames=STATIC)


def step(state, objective, y=Y, combine='probs', attack=given):
    settings = {'model': Linear(), 'optimizer': OPTIMIZER, 'attack': attack}
    return make_step(state, (X, y), KEYS, combine=combine, objective=objective, **settings)


def gradient_of(before, after):
    """The gradient that a step descended."""
    return jax.tree.map(lambda old, new: (old - new) / RATE, before.params, after.params)


def assert_close(found, expected, atol=2e-6):
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=atol)
    jax.tree.map(close, found, expected)


def probs(params, x, combine='probs'):
    """The ensemble's probabilities; each batch is normalised by itself."""
    x = x.reshape(len(x), -1)
    x = (x - x.mean(0)) / jnp.sqrt(x.var(0) + 1e-5)
    norm, linear = params['BatchNorm_0'], params['linear']
    logits = [
        (x * norm['scale'][i] + norm['bias'][i]) @ linear['kernel'][i] + linear['bias'][i]
        for i in range(2)
    ]
    if combine == 'gating':
        total = sum(map(jnp.exp, logits))
        return total / total.sum(-1, keepdims=True)
    return sum(map(jax.nn.softmax, logits)) / 2


def cross_entropy(p, weights):
    return -jnp.mean(jnp.sum(weights * jnp.log(p), axis=1))


@functools.partial(jax.jit, static_argnames=('name', 'combine'))
@functools.partial(jax.value_and_grad, argnums=1)
def by_hand(name, params, weights=None, combine='probs'):
    """The value and gradient of an objective with rho or beta 2.5, of probabilities."""
    clean, adversarial = probs(params, X, combine), probs(params, X_ADV, combine)
    rows, weights = jnp.arange(8), jnp.eye(3)[Y] if weights is None else weights
    if name == 'paper':
        return (cross_entropy(clean, weights) + 2.5 * cross_entropy(adversarial, weights)) / 3.5
    divergence = jnp.sum(clean * jnp.log(clean / adversarial), axis=1)
    if name == 'trades':
        return cross_entropy(clean, weights) + 2.5 * jnp.mean(divergence)
    rival = jnp.max(jnp.where(jnp.eye(3, dtype=bool)[Y], 0, adversarial), axis=1)
    boosted = -jnp.log(adversarial[rows, Y]) - jnp.log(1 - rival)
    return jnp.mean(boosted + 2.5 * (1 - clean[rows, Y]) * divergence)


@pytest.mark.parametrize(
    'name, combine', [('trades', 'probs'), ('trades', 'gating'), ('mart', 'probs')]
)
def test_loss_and_update_are_the_papers_of_that_name(name, combine):
    state = state_of()
    loss, gradient = by_hand(name, state.params, combine=combine)
    new, metrics = step(state, made(name, 2.5), combine=combine)
    np.testing.assert_allclose(metrics['loss'], loss, rtol=1e-5)
    assert_close(gradient_of(state, new), gradient)
    for kind, x in (('clean', X), ('adversarial', X_ADV)):
        p = probs(state.params, x, combine)
        expected = cross_entropy(p, jnp.eye(3)[Y])
        np.testing.assert_allclose(metrics[f'{kind}_loss'], expected, rtol=1e-5)
        assert metrics[f'{kind}_accuracy'] == np.mean(np.argmax(p, 1) == Y)
    # Both passes are in the running averages, the clean one first.
    means = [x.reshape(8, -1).mean(0) for x in (X, X_ADV)]
    expected = 0.25 * means[0] + 0.5 * means[1]
    np.testing.assert_allclose(new.batch_stats['BatchNorm_0']['mean'][1], expected, rtol=1e-5)


@pytest.mark.parametrize('name, y', [('paper', MIXED), ('trades', Y)])
def test_targets_may_be_distributions_and_smoothed(name, y):
    state = state_of()
    weights = y if y.ndim == 2 else jnp.eye(3)[y]
    loss, gradient = by_hand(name, state.params, 0.8 * weights + 0.2 / 3)
    new, metrics = step(state, made(name, 2.5, 0.2), y=y)
    np.testing.assert_allclose(metrics['loss'], loss, rtol=1e-5)
    assert_close(gradient_of(state, new), gradient)
    right = np.argmax(probs(state.params, X), 1) == np.argmax(weights, 1)
    assert metrics['clean_accuracy'] == np.mean(right)


def test_trades_with_beta_0_is_clean_training():
    def forbidden(*_):
        raise AssertionError('attacked')

    def program(objective):
        one = functools.partial(step, objective=objective, attack=forbidden)
        return str(jax.make_jaxpr(one)(state_of()))

    # The same program, and so the same bits.
    assert program(made('trades', 0.0, 0.1)) == program(made('paper', 0.0, 0.1))
    with pytest.raises(AssertionError, match='attacked'):
        program(made('trades', 0.1, 0.1))


def test_the_attack_of_trades_takes_the_clean_prediction():
    """With the statistics that the attack has, here running averages."""
    prediction = lambda x: jax.nn.log_softmax(jnp.sin(9 * x.reshape(8, -1)))
    target = made('trades', 2.5).attack_target(prediction, X, Y)
    np.testing.assert_allclose(jnp.log(target), prediction(X), rtol=1e-5)
    seen = []
    objective = objectives.Objective(
        (objectives.Term(1, lambda predict, x, x_adv, y: (predict(x).log_probs.sum(), {})),),
        attack_target=lambda log_prob_fn, x, y: seen.append(log_prob_fn) or y,
    )
    attack = lambda log_prob_fn, rng, x, target: seen.append(log_prob_fn) or x
    jax.eval_shape(functools.partial(step, objective=objective, attack=attack), state_of())
    assert seen[0] is seen[1]


# Adversarial weight perturbation.


def moved_by_hand(params, gradient, gamma):
    """Each member's kernels, moved along their gradient by gamma times their norm."""
    moved = jax.tree.map(np.array, params)
    for layer in moved:
        kernels = moved[layer].get('kernel', ()), gradient[layer].get('kernel', ())
        for w, g in zip(*kernels, strict=True):
            w += gamma * np.linalg.norm(w) / np.linalg.norm(g) * np.asarray(g)
    return moved


def test_each_layer_and_member_is_perturbed_by_gamma_times_its_norm():
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.normal(0, 1, shape).astype(np.float32)
    # Of members and layers that differ much in norm, both of weights and of gradients.
    params, gradient = (
        {
            'conv': {'kernel': draw(2, 3, 3, 4) * scales[:, None, None, None]},
            'norm': {'scale': draw(2, 4), 'bias': draw(2, 4)},
            'linear': {'kernel': 50 * draw(2, 4, 3), 'bias': draw(2, 3)},
        }
        for scales in np.float32([[1, 100], [1e-9, 1e3]])
    )
    moved = perturbed(params, gradient, 0.02)
    assert_close(moved, moved_by_hand(params, gradient, 0.02), atol=1e-4)
    for layer in ('conv', 'linear'):
        for member in (0, 1):
            old, new = params[layer]['kernel'][member], moved[layer]['kernel'][member]
            share = np.linalg.norm(new - old) / np.linalg.norm(old)
            np.testing.assert_allclose(share, 0.02, rtol=1e-3)
    for layer, name in (('norm', 'scale'), ('norm', 'bias'), ('linear', 'bias')):
        np.testing.assert_array_equal(moved[layer][name], params[layer][name])
    # A gradient of zero has no direction.
    still = perturbed(params, jax.tree.map(jnp.zeros_like, params), 0.02)
    jax.tree.map(np.testing.assert_array_equal, still, params)


@pytest.mark.parametrize('name', ['paper', 'trades'])
def test_awp_descends_the_gradient_at_the_perturbed_weights(name):
    state = state_of()
    unmoved, unmoved_metrics = step(state, made(name, 2.5))
    new, metrics = step(state, made(name, 2.5, gamma=0.3))
    moved = moved_by_hand(state.params, by_hand(name, state.params)[1], 0.3)
    loss, gradient = by_hand(name, moved)
    assert_close(gradient_of(state, new), gradient)
    np.testing.assert_allclose(metrics['perturbed_loss'], loss, rtol=1e-4)
    assert metrics['perturbed_loss'] > metrics['loss'] * 1.05  # it ascends
    # What is measured, and what batch norm takes in, is of the weights as they are.
    assert_close(new.batch_stats, unmoved.batch_stats, atol=1e-7)
    for metric in ('loss', 'clean_loss', 'adversarial_accuracy'):
        np.testing.assert_allclose(metrics[metric], unmoved_metrics[metric], rtol=1e-6)
    assert abs(metrics['gradient_norm'] / unmoved_metrics['gradient_norm'] - 1) > 0.01


def test_awp_with_gamma_0_is_none_and_before_its_start_there_is_none():
    assert made('trades', 2.5).perturbation is None
    for number, gamma in ((1, 0.0), (2, 0.3)):
        state = state_of(number)
        new, metrics = step(state, made('trades', 2.5, gamma=0.3, start=2))
        expected, _ = step(state, made('trades', 2.5, gamma=gamma))
        assert_close(new.params, expected.params, atol=1e-7)
        assert (metrics['perturbed_loss'] == metrics['loss']) == (number == 1)


def test_two_devices_descend_one_gradient():
    """The perturbation is along the gradient of the whole batch, and so the same on all devices."""
    one = step(state_of(), made('trades', 2.5, gamma=0.3))

    @jax.jit
    @functools.partial(jax.vmap, axis_name='devices')
    def on_each(batch, keys):
        return train_step(
            state_of(), batch, keys, model=Linear('devices'), optimizer=OPTIMIZER, attack=given,
            combine='probs', objective=made('trades', 2.5, gamma=0.3),
            mean_over_devices=lambda tree: jax.lax.pmean(tree, 'devices'),
        )  # fmt: skip

    two = on_each((X.reshape(2, 4, 2, 2, 1), Y.reshape(2, 4)), KEYS.reshape(2, 4))
    for device in (0, 1):
        assert_close(jax.tree.map(lambda leaf, i=device: leaf[i], two), one, atol=1e-5)


# From config fields.


def test_the_objective_is_the_configs():
    fields = {'train__beta': 2.5, 'train__label_smoothing': 0.2, 'train__awp_gamma': 0.3}
    log_probs = jax.nn.log_softmax(jax.random.normal(jax.random.key(6), (2, 8, 3)))
    predict = lambda place: objectives.Prediction(None, log_probs[place])
    clean, adversarial = jnp.exp(log_probs)
    divergence = jnp.mean(jnp.sum(clean * jnp.log(clean / adversarial), 1))
    smooth = 0.8 * jnp.eye(3)[Y] + 0.2 / 3
    for name, weights, expected in (
        ('paper', [1, 3], lambda metrics: cross_entropy(clean, smooth)),
        ('trades', [1], lambda metrics: cross_entropy(clean, smooth) + 2.5 * divergence),
        ('mart', [1], lambda metrics: metrics['boosted_loss'] + 2.5 * metrics['divergence']),
    ):
        rho = {'train__adversarial_weight': float(weights[-1])}
        config = tiny_config(train__objective=name, train__awp_start=4, **fields, **rho)
        found = from_config.objective(config)
        assert found.perturbation == (0.3, 4)
        assert (found.attack_target is not None) == (name == 'trades')
        assert [term.weight for term in found.terms] == weights
        loss, metrics = found.terms[0].loss(predict, 0, 1, Y)
        np.testing.assert_allclose(loss, expected(metrics), rtol=1e-5)
    found = from_config.objective(tiny_config('baseline', train__objective='trades', **fields))
    assert (found.attacks, found.perturbation) == (False, (0.3, 0))
    assert {*objectives.OBJECTIVES} == {*config_checks.OBJECTIVES}
