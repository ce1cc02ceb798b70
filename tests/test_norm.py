"""Our batch norm against Flax's: values, gradients, running averages."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ensadv.cpu import backend
from ensadv.models.norm import BatchNorm

SETTINGS = {'momentum': 0.7, 'epsilon': 1e-3}
SHAPES = [(6, 5, 4, 3), (6, 3), (1, 4, 4, 2)]


def case(shape, dtype=jnp.float32):
    """Returns x, which is far from normal, and variables, none of which is zero or one."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(3 + 2 * rng.standard_normal(shape), dtype)
    vector = lambda: jnp.asarray(0.5 + rng.random(shape[-1]), jnp.float32)
    return x, {
        'params': {'scale': vector(), 'bias': vector()},
        'batch_stats': {'mean': vector(), 'var': vector()},
    }


def outcome(module, x, variables):
    """Returns y and the new averages, and the gradients of a loss that differs by place."""

    def loss(x, params):
        y, updated = module.apply(variables | {'params': params}, x, mutable=['batch_stats'])
        weights = jnp.sin(jnp.arange(y.size)).reshape(y.shape)
        return jnp.sum(weights * y.astype(jnp.float32) ** 2), (y, updated)

    return jax.grad(loss, (0, 1), has_aux=True)(x, variables['params'])


def assert_same(ours, theirs, tolerance=1e-5):
    assert jax.tree.map(jnp.shape, ours) == jax.tree.map(jnp.shape, theirs)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert a.dtype == b.dtype
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * max(1, np.abs(b).max()))


@pytest.mark.parametrize('shape', SHAPES)
@pytest.mark.parametrize('use_running_average', [False, True])
def test_is_flaxs(shape, use_running_average):
    x, variables = case(shape)
    modules = (
        norm(use_running_average=use_running_average, **SETTINGS)
        for norm in (BatchNorm, nn.BatchNorm)
    )
    ours, theirs = (jax.jit(partial(outcome, m))(x, variables) for m in modules)
    assert_same(ours, theirs, tolerance=1e-4)


def test_variables_are_those_of_flax():
    x, _ = case((6, 5, 4, 3))
    ours, theirs = (
        norm(use_running_average=False, axis_name='devices', **SETTINGS).init(jax.random.key(0), x)
        for norm in (BatchNorm, nn.BatchNorm)
    )
    assert_same(ours, theirs)


def test_other_backends_compute_the_same(monkeypatch):
    x, variables = case((6, 5, 4, 3))
    module = BatchNorm(use_running_average=False, **SETTINGS)
    on_cpu = outcome(module, x, variables)
    monkeypatch.setattr(backend, 'is_cpu', lambda: False)
    text = str(jax.make_jaxpr(partial(outcome, module))(x, variables))
    assert 'dot_general' not in text
    assert_same(outcome(module, x, variables), on_cpu)


def test_statistics_over_devices():
    x, variables = case((4, 6, 5, 4, 3))
    ours, theirs = (
        jax.vmap(
            partial(outcome, norm(use_running_average=False, axis_name='devices', **SETTINGS)),
            in_axes=(0, None), axis_name='devices',
        )(x, variables)
        for norm in (BatchNorm, nn.BatchNorm)
    )  # fmt: skip
    assert_same(ours, theirs, tolerance=1e-4)
    alone = outcome(BatchNorm(use_running_average=False, **SETTINGS), x[0], variables)
    assert not np.allclose(ours[0][0][0], alone[0][0], atol=1e-2)


def test_members():
    x, variables = case((6, 5, 4, 3))
    members = jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf]), variables)
    module = BatchNorm(use_running_average=False, **SETTINGS)
    stacked = jax.vmap(partial(outcome, module), (None, 0))(x, members)
    for i in range(2):
        alone = outcome(module, x, jax.tree.map(lambda leaf, i=i: leaf[i], members))
        assert_same(jax.tree.map(lambda leaf, i=i: leaf[i], stacked), alone)


def test_bfloat16_with_statistics_in_float32():
    x, variables = case((64, 16, 16, 2), jnp.bfloat16)
    ours, theirs = (
        outcome(norm(use_running_average=False, dtype=jnp.bfloat16, **SETTINGS), x, variables)
        for norm in (BatchNorm, nn.BatchNorm)
    )
    y, updated = ours[1]
    assert y.dtype == ours[0][0].dtype == jnp.bfloat16
    assert_same(ours, theirs, tolerance=2e-2)
    exact = np.asarray(x, np.float64)
    for name, value in (('mean', exact.mean((0, 1, 2))), ('var', exact.var((0, 1, 2)))):
        expected = 0.7 * np.asarray(variables['batch_stats'][name]) + 0.3 * value
        np.testing.assert_allclose(updated['batch_stats'][name], expected, rtol=1e-5)


def test_a_variance_is_never_negative():
    x = jnp.full((64, 3), 1000.1)  # its mean square is not its squared mean, in float32
    _, variables = case((64, 3))
    _, (y, updated) = outcome(BatchNorm(use_running_average=False, **SETTINGS), x, variables)
    assert np.all(np.isfinite(y))
    assert np.all(np.asarray(updated['batch_stats']['var']) >= 0)
