import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from ensadv.cpu import backend
from ensadv.models import ensemble
from ensadv.models.wide_resnet import WideResNet

MODEL = WideResNet(num_classes=4, mean=(0.4,), std=(0.3,), depth=10, width=1)
SHAPE = (8, 8, 1)
X = jax.random.uniform(jax.random.key(1), (6, *SHAPE))
Y = jnp.arange(6) % 4


@pytest.fixture(params=[True, False], ids=['stacked', 'one by one'])
def members(request, monkeypatch):
    """Has members computed as on TPUs and GPUs, and as on CPUs."""
    monkeypatch.setattr(backend, 'is_cpu', lambda: not request.param)


init = jax.jit(lambda key, k: ensemble.init(MODEL, key, k, SHAPE), static_argnums=1)


def member(variables, i):
    return jax.tree.map(lambda leaf: leaf[i], variables)


@pytest.fixture(scope='module')
def variables():
    """Three members whose running averages are not those of the start."""
    variables = init(jax.random.key(0), 3)
    stats = jax.tree.map(
        lambda leaf: leaf + jax.random.uniform(jax.random.key(7), leaf.shape),
        variables['batch_stats'],
    )
    return {'params': variables['params'], 'batch_stats': stats}


@jax.jit
def bare(variables, x):
    return MODEL.apply(variables, x, train=False)


def test_one_member_is_the_bare_network_bit_for_bit(variables):
    one = jax.tree.map(lambda leaf: leaf[1:2], variables)
    logits = jax.jit(lambda v, x: ensemble.apply(MODEL, v, x))(one, X)
    np.testing.assert_array_equal(logits[0], bare(member(variables, 1), X))
    for how in ('probs', 'logits'):
        np.testing.assert_allclose(
            ensemble.combine(logits, how), jax.nn.log_softmax(logits[0]), atol=1e-6
        )


@pytest.mark.usefixtures('members')
def test_weights_may_be_numpys(variables):
    weights = jax.device_get(variables)
    logits = jax.jit(lambda x: ensemble.apply(MODEL, weights, x))(X)
    np.testing.assert_allclose(
        logits, jax.jit(lambda v, x: ensemble.apply(MODEL, v, x))(variables, X), atol=1e-5
    )


@pytest.mark.usefixtures('members')
def test_logits_equal_a_loop_over_members(variables):
    logits = jax.jit(lambda v, x: ensemble.apply(MODEL, v, x))(variables, X)
    assert logits.shape == (3, 6, 4)
    for i in range(3):
        np.testing.assert_allclose(logits[i], bare(member(variables, i), X), atol=1e-5)


@pytest.mark.usefixtures('members')
def test_gradients_and_running_averages_equal_a_loop_over_members(variables):
    stats = variables['batch_stats']

    def loss_of(stacked_logits):
        return -jnp.mean(ensemble.combine(stacked_logits, 'probs')[jnp.arange(6), Y])

    @jax.jit
    def stacked(params, x):
        logits, new_stats = ensemble.apply_train(MODEL, {'params': params, 'batch_stats': stats}, x)
        return loss_of(logits), new_stats

    @jax.jit
    def looped(params, x):
        logits, new_stats = [], []
        for i in range(3):
            v = {'params': member(params, i), 'batch_stats': member(stats, i)}
            out, updated = MODEL.apply(v, x, train=True, mutable=['batch_stats'])
            logits.append(out)
            new_stats.append(updated['batch_stats'])
        return loss_of(jnp.stack(logits)), jax.tree.map(lambda *s: jnp.stack(s), *new_stats)

    results = [
        jax.jit(jax.value_and_grad(f, argnums=(0, 1), has_aux=True))(variables['params'], X)
        for f in (stacked, looped)
    ]
    for ours, expected in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_allclose(ours, expected, rtol=1e-3, atol=1e-5)


def test_on_a_cpu_a_member_waits_for_the_one_before(monkeypatch):
    """Without this XLA runs two members at a time, and nothing but time would tell."""
    linear = ensemble.Network(lambda v, x: (x @ v)[None], 'logits', None)
    network = ensemble.of_networks([linear] * 3, 'probs')
    rng = np.random.default_rng(0)
    v = [jnp.asarray(rng.normal(size=(3, 4)), jnp.float32) for _ in range(3)]
    x = jnp.asarray(rng.normal(size=(5, 3)), jnp.float32)

    logits = network.member_logits
    gradient = lambda v, x: jax.grad(lambda x: jnp.sum(logits(v, x) ** 2))(x)

    def comparisons(function):
        # Of a new function, or JAX would find what it has compiled.
        compiled = jax.jit(lambda *args: function(*args)).lower(v, x).compile()
        return len(re.findall(r'compare\(.*direction=GT', compiled.as_text())), compiled(v, x)

    found, waited = zip(comparisons(logits), comparisons(gradient), strict=True)
    assert found[0] >= 2  # two members wait
    assert found[1] > found[0]  # and their gradients
    monkeypatch.setattr(backend, 'is_cpu', lambda: False)
    found, at_once = zip(comparisons(logits), comparisons(gradient), strict=True)
    assert found == (0, 0)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), waited, at_once)


def test_members_differ_and_do_not_depend_on_their_number():
    two, three = (init(jax.random.key(3), k)['params'] for k in (2, 3))
    kernel = three['conv_0']['kernel']
    assert np.all(kernel[0] != kernel[1])
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b[:2]), two, three)


def test_probs_is_the_mean_softmax_in_float64():
    logits = np.random.default_rng(0).normal(0, 5, (3, 10, 4))
    expected = np.log(scipy.special.softmax(logits, axis=-1).mean(axis=0))
    found = ensemble.combine(jnp.asarray(logits, jnp.float32), 'probs')
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_logits_is_the_softmax_of_the_mean():
    logits = np.random.default_rng(0).normal(0, 5, (3, 10, 4))
    expected = scipy.special.log_softmax(logits.mean(axis=0), axis=-1)
    found = ensemble.combine(jnp.asarray(logits, jnp.float32), 'logits')
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_probs_stays_finite_for_extreme_logits():
    logits = jnp.array([[[1e4, -1e4, 0.0]], [[1e4, 1e4, -1e4]]])
    log_probs, gradient = jax.value_and_grad(
        lambda z: ensemble.combine(z, 'probs')[0, 2], argnums=0
    )(logits)
    assert np.isfinite(log_probs)
    assert np.all(np.isfinite(gradient))
    np.testing.assert_allclose(log_probs, -1e4 - np.log(2), rtol=1e-6)


def test_unknown_combination_is_refused():
    with pytest.raises(ValueError, match='median'):
        ensemble.combine(jnp.zeros((2, 3, 4)), 'median')
