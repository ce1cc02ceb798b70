import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ensadv import ensemble
from ensadv.models.wide_resnet import WideResNet

CIFAR = {'mean': (0.49, 0.48, 0.45), 'std': (0.25, 0.24, 0.26)}


def init(model, x):
    return jax.jit(lambda: model.init(jax.random.key(1), x, train=False))()


@pytest.mark.parametrize(
    'depth, width, k, expected',
    [(28, 10, 1, 36_479_194), (28, 10, 4, 4 * 36_479_194), (28, 15, 1, 82_040_154)],
)
def test_parameter_counts_of_the_papers_networks(depth, width, k, expected):
    model = WideResNet(10, **CIFAR, depth=depth, width=width)
    shapes = jax.eval_shape(lambda: ensemble.init(model, jax.random.key(0), k, (32, 32, 3)))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes['params'])) == expected


def test_standardisation_is_inside():
    x = jax.random.uniform(jax.random.key(0), (2, 8, 8, 3))
    inside = WideResNet(5, **CIFAR, depth=10, width=1)
    bare = WideResNet(5, mean=(0.0,) * 3, std=(1.0,) * 3, depth=10, width=1)
    variables = init(bare, x)
    standardised = (x - jnp.array(CIFAR['mean'])) / jnp.array(CIFAR['std'])
    np.testing.assert_allclose(
        inside.apply(variables, x, train=False),
        bare.apply(variables, standardised, train=False),
        atol=1e-5,
    )


def test_bfloat16_computes_but_keeps_weights_and_logits_in_float32():
    x = jax.random.uniform(jax.random.key(0), (4, 8, 8, 1))
    full = WideResNet(5, depth=10, width=1)
    half = full.clone(dtype=jnp.dtype('bfloat16'))
    variables = init(half, x)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype('float32')}
    low, high = (m.apply(variables, x, train=False) for m in (half, full))
    assert low.dtype == jnp.float32
    assert np.any(low != high)
    np.testing.assert_allclose(low, high, atol=0.1)


def test_batch_norm_updates_the_running_averages_as_told():
    x = jax.random.uniform(jax.random.key(0), (16, 8, 8, 1))
    model = WideResNet(5, depth=10, width=1, norm_momentum=0.75)
    variables = init(model, x)
    _, updated = model.apply(variables, x, train=True, mutable=['batch_stats'])
    _, state = model.apply(
        variables, x, train=True, mutable=['batch_stats', 'intermediates'],
        capture_intermediates=lambda module, _: module.name == 'conv_0',
    )  # fmt: skip
    activations = state['intermediates']['conv_0']['__call__'][0]
    found = updated['batch_stats']['group_1_block_1']['norm_1']
    np.testing.assert_allclose(found['mean'], 0.25 * activations.mean((0, 1, 2)), atol=1e-5)
    np.testing.assert_allclose(found['var'], 0.75 + 0.25 * activations.var((0, 1, 2)), atol=1e-5)


@pytest.mark.parametrize('depth', [9, 4, 27])
def test_depths_that_do_not_exist_are_refused(depth):
    with pytest.raises(ValueError, match='6n'):
        WideResNet(5, depth=depth).init(jax.random.key(0), jnp.zeros((1, 8, 8, 1)), train=False)
