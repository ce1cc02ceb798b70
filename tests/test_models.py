import itertools
import re
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ensadv import architectures
from ensadv.cpu import backend
from ensadv.models import ensemble
from ensadv.models.vgg import VGG
from ensadv.models.wide_resnet import Block, WideResNet

CIFAR = {'mean': (0.49, 0.48, 0.45), 'std': (0.25, 0.24, 0.26)}
WRN_10_1 = partial(WideResNet, 5, depth=10, width=1)
VGG_11_1 = partial(VGG, 5, depth=11, width=1)
small_networks = pytest.mark.parametrize('network', [WRN_10_1, VGG_11_1], ids=['wrn', 'vgg'])


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


def test_parameter_count_of_vgg_16():
    # As the layers of torchvision's vgg16_bn, less the convolutions' biases and two linear layers:
    # 9 * (inputs * outputs) per convolution, scale and bias per channel of batch norm, and the
    # weights and bias of the linear layer.
    channels = [3, *[64] * 2, *[128] * 2, *[256] * 3, *[512] * 6]
    convolutions = sum(9 * i * o for i, o in itertools.pairwise(channels))
    assert convolutions == 14_710_464
    expected = convolutions + 2 * sum(channels[1:]) + (512 * 10 + 10)
    assert expected == 14_724_042
    model = VGG(10, **CIFAR, depth=16, width=4)
    shapes = jax.eval_shape(lambda: ensemble.init(model, jax.random.key(0), 1, (32, 32, 3)))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes['params'])) == expected


@pytest.mark.parametrize('depth', architectures.VGG_DEPTHS)
def test_depth_of_vgg_counts_convolutions_and_the_originals_linear_layers(depth):
    model = VGG(10, depth=depth, width=1)
    shapes = jax.eval_shape(lambda: ensemble.init(model, jax.random.key(0), 1, (8, 8, 1)))
    assert sum(name.startswith('conv') for name in shapes['params']) == depth - 3


@small_networks
@pytest.mark.parametrize('shape', [(8, 8, 1), (28, 28, 1), (32, 32, 3)])
def test_images_of_all_data_sets_fit(network, shape):
    model = network(mean=(0.5,) * shape[-1], std=(0.2,) * shape[-1])
    x = jax.ShapeDtypeStruct((2, *shape), jnp.float32)
    logits, _ = jax.eval_shape(lambda x: model.init_with_output(jax.random.key(0), x, False), x)
    assert logits.shape == (2, 5)
    assert logits.dtype == jnp.float32


@pytest.mark.parametrize('side, expected', [(32, [32, 16, 8, 4, 2]), (8, [8, 4, 2, 1, 1])])
def test_vgg_pools_after_each_stage_while_there_is_something_to_pool(side, expected):
    def stages(x):
        _, state = VGG_11_1().init_with_output(
            jax.random.key(0), x, False, mutable=True,
            capture_intermediates=lambda module, _: (module.name or '').startswith('conv'),
        )  # fmt: skip
        # Convolutions keep the size, so theirs is that of what the stage is given.
        return [state['intermediates'][f'conv_{s}_1']['__call__'][0] for s in range(1, 6)]

    found = jax.eval_shape(stages, jax.ShapeDtypeStruct((1, side, side, 1), jnp.float32))
    assert [stage.shape[1:3] for stage in found] == [(n, n) for n in expected]


@small_networks
def test_standardisation_is_inside(network):
    x = jax.random.uniform(jax.random.key(0), (2, 8, 8, 3))
    inside = network(**CIFAR)
    bare = network(mean=(0.0,) * 3, std=(1.0,) * 3)
    variables = init(bare, x)
    standardised = (x - jnp.array(CIFAR['mean'])) / jnp.array(CIFAR['std'])
    np.testing.assert_allclose(
        inside.apply(variables, x, train=False),
        bare.apply(variables, standardised, train=False),
        atol=1e-5,
    )


@small_networks
def test_bfloat16_computes_but_keeps_weights_and_logits_in_float32(network):
    x = jax.random.uniform(jax.random.key(0), (4, 8, 8, 1))
    full = network()
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


def test_activations():
    x = jnp.array([[-1.0, 0.0, 1.0]])
    as_it_is = lambda *_, **__: lambda x: x
    block = lambda activate: Block(3, 1, as_it_is, as_it_is, activate).apply({}, x)
    once = x / (1 + np.exp(-x))
    np.testing.assert_allclose(once, [[-0.26894143, 0, 0.73105860]], atol=1e-7)
    expected = x + once / (1 + np.exp(-once))
    np.testing.assert_allclose(block(WRN_10_1(activation='silu').activate), expected, atol=1e-6)
    np.testing.assert_allclose(block(WRN_10_1().activate), x + np.maximum(x, 0), atol=1e-6)


def test_same_padding_is_below_and_on_the_right_where_sides_are_even():
    # Kernels that pass on what is at their centre, and no shortcut.
    kernel = np.zeros((3, 3, 1, 1), np.float32)
    kernel[1, 1] = 1
    params = {name: {'kernel': kernel} for name in ('conv_1', 'conv_2')}
    params['shortcut'] = {'kernel': np.zeros((1, 1, 1, 1), np.float32)}
    convolution = partial(nn.Conv, use_bias=False)
    as_it_is = lambda *_, **__: lambda x: x

    def block(x, padding):
        module = Block(1, 2, convolution, as_it_is, lambda x: x, padding)
        return np.ravel(module.apply({'params': params}, x[None, :, None, None]))

    even, odd = jnp.arange(6.0), jnp.arange(5.0)
    np.testing.assert_array_equal(block(even, 'symmetric'), [0, 2, 4])
    np.testing.assert_array_equal(block(even, 'same'), [1, 3, 5])
    np.testing.assert_array_equal(block(odd, 'same'), [0, 2, 4])


@small_networks
@pytest.mark.parametrize('activation', architectures.ACTIVATIONS)
def test_all_activations_of_a_network_are_of_one_kind(network, activation):
    model = network(activation=activation)
    x = jax.ShapeDtypeStruct((2, 8, 8, 1), jnp.float32)
    forward = lambda x: model.init_with_output(jax.random.key(0), x, train=True)[0]
    program = re.sub(r'\s+', '', str(jax.make_jaxpr(forward)(x)))
    found = {name: program.count(f'jit[name={name}') for name in ('relu', 'silu')}
    assert found == {'relu': 0, 'silu': 0, activation: {WRN_10_1: 7, VGG_11_1: 8}[network]}


@pytest.mark.parametrize('depth', [9, 4, 27])
def test_depths_that_do_not_exist_are_refused(depth):
    with pytest.raises(ValueError, match='6n'):
        WideResNet(5, depth=depth).init(jax.random.key(0), jnp.zeros((1, 8, 8, 1)), train=False)


@pytest.mark.parametrize('depth', [10, 15, 28])
def test_depths_that_vgg_has_not_are_refused(depth):
    with pytest.raises(ValueError, match='11, 13, 16, 19, found'):
        VGG(5, depth=depth).init(jax.random.key(0), jnp.zeros((1, 8, 8, 1)), train=False)


def test_stacked_vggs_equal_a_loop_over_members(monkeypatch):
    monkeypatch.setattr(backend, 'is_cpu', lambda: False)
    model, x = VGG_11_1(), jax.random.uniform(jax.random.key(0), (6, 8, 8, 1))
    variables = jax.jit(lambda: ensemble.init(model, jax.random.key(1), 2, x.shape[1:]))()
    pick = lambda tree, i: jax.tree.map(lambda leaf: leaf[i], tree)

    @jax.jit
    @partial(jax.grad, argnums=(0, 1), has_aux=True)
    def stacked(params, x):
        logits, stats = ensemble.apply_train(model, variables | {'params': params}, x)
        return jnp.sum(logits**2), (logits, stats)

    @jax.jit
    @partial(jax.grad, argnums=(0, 1), has_aux=True)
    def alone(params, x):
        stats = pick(variables['batch_stats'], 0)  # at first the same for all members
        v = {'params': params, 'batch_stats': stats}
        logits, updated = model.apply(v, x, train=True, mutable=['batch_stats'])
        return jnp.sum(logits**2), (logits, updated['batch_stats'])

    (of_params, of_x), aux = stacked(variables['params'], x)
    looped = [alone(pick(variables['params'], i), x) for i in range(2)]
    close = partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-3)
    for i, ((of_member, _), of_member_aux) in enumerate(looped):
        jax.tree.map(close, pick((of_params, aux), i), (of_member, of_member_aux))
    close(of_x, looped[0][0][1] + looped[1][0][1])


def test_running_averages_of_vgg_change_in_train_mode_only():
    model, x = VGG_11_1(), jax.random.uniform(jax.random.key(0), (6, 8, 8, 1))
    variables = init(model, x)
    for train in (False, True):
        _, updated = model.apply(variables, x, train=train, mutable=['batch_stats'])
        changed = jax.tree.map(
            lambda old, new: bool(np.any(old != new)),
            variables['batch_stats'], updated.get('batch_stats', variables['batch_stats']),
        )  # fmt: skip
        assert {*jax.tree.leaves(changed)} == {train}


@small_networks
def test_remat_keeps_less_and_computes_the_same(network):
    x = jnp.asarray(np.random.default_rng(0).random((4, 8, 8, 1)), jnp.float32)
    variables = init(network(), x)

    def gradients(remat):
        def loss(params, x):
            logits, updated = network(remat=remat).apply(
                variables | {'params': params}, x, train=True, mutable=['batch_stats']
            )
            return jnp.sum(jnp.sin(logits)), updated

        return jax.grad(loss, (0, 1), has_aux=True)

    assert jax.tree.map(jnp.shape, init(network(remat=True), x)) == jax.tree.map(
        jnp.shape, variables
    )
    plain, again = (jax.jit(gradients(remat))(variables['params'], x) for remat in (False, True))
    for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(plain), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-4 * max(1, np.abs(b).max()))
    counts = [
        str(jax.make_jaxpr(gradients(remat))(variables['params'], x)).count('rsqrt')
        for remat in (False, True)
    ]
    assert counts[1] > counts[0]  # once more in the backward pass
