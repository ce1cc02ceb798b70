"""conv.py against jax.lax's own convolution, gradients and vmap."""

import functools
import os
import pathlib
import re
import subprocess

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from ensadv.cpu import backend, gradients, onednn
from ensadv.cpu import conv as cpu_conv
from ensadv.models import conv

DIMENSIONS = ('NHWC', 'HWIO', 'NHWC')
SEPARATE = conv.get('separate')
CASES = [
    # size, window, strides, padding
    ((6, 6), (3, 3), (1, 1), 'SAME'),
    ((6, 7), (3, 3), (2, 2), 'SAME'),
    ((7, 6), (3, 3), (2, 1), 'VALID'),
    ((8, 8), (3, 3), (2, 2), ((1, 1), (1, 1))),
    ((7, 5), (1, 1), (2, 2), ((0, 0), (0, 0))),
    ((5, 5), (1, 1), (1, 1), 'VALID'),
    ((6, 5), (1, 1), (2, 1), ((1, 0), (-1, 2))),
    ((7, 8), (2, 4), (1, 2), ((0, 3), (2, 1))),
    ((9, 8), (3, 2), (3, 3), ((2, 0), (-1, 1))),
    ((6, 6), (5, 5), (2, 2), 'SAME_LOWER'),
]
# What these say is of XLA's own operations.
by_xla = pytest.mark.parametrize('uses_onednn', [False], indirect=True, ids=['xla'])


def by_onednn(test):
    """A test of oneDNN's operations, where they are there."""
    test = pytest.mark.parametrize('uses_onednn', [True], indirect=True, ids=['onednn'])(test)
    return pytest.mark.skipif(not onednn.available(), reason='no oneDNN in this jaxlib')(test)


@pytest.fixture(autouse=True, params=[True, False], ids=['onednn', 'xla'])
def uses_onednn(request, monkeypatch):
    """Both ways of separate convolutions."""
    if request.param:
        monkeypatch.setitem(globals(), 'SEPARATE', conv.get('onednn'))
    else:
        monkeypatch.setattr(onednn, 'available', lambda: False)


def arrays(size=(6, 6), window=(3, 3), lead_x=(), lead_w=(), dtype=jnp.float32, channels=(3, 5)):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(*lead_x, 4, *size, channels[0]))
    w = rng.normal(size=(*lead_w, *window, *channels))
    return jnp.asarray(x, dtype), jnp.asarray(w, dtype)


def both(strides=(1, 1), padding='SAME', **kwargs):
    """Returns (ours, lax's own), each a function of x and w."""
    kwargs = {'dimension_numbers': DIMENSIONS, **kwargs}
    return tuple(
        lambda x, w, f=f: f(x, w, strides, padding, **kwargs)
        for f in (SEPARATE, lax.conv_general_dilated)
    )


def value_and_gradients(function, x, w):
    """The value and both gradients, of a loss whose gradient differs from place to place."""

    def loss(x, w):
        y = function(x, w).astype(jnp.float32)
        return jnp.sum(y * jnp.sin(jnp.arange(y.size)).reshape(y.shape)), y

    return jax.jit(jax.grad(loss, (0, 1), has_aux=True))(x, w)


def assert_same(ours, theirs, x, w, tolerance=1e-5):
    expected = value_and_gradients(theirs, x, w)
    actual = value_and_gradients(ours, x, w)
    assert jax.tree.map(lambda a: (a.shape, a.dtype), actual) == jax.tree.map(
        lambda a: (a.shape, a.dtype), expected
    )
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        assert np.abs(b).max() > 0
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * np.abs(b).max())


def group_counts(function, *args):
    """Every group count of every convolution, in the jaxpr and in what XLA made of it."""
    text = str(jax.make_jaxpr(function)(*args))
    counts = re.findall(r'(?:feature|batch)_group_count=(\d+)', text)
    compiled = jax.jit(function).lower(*args).compile().as_text()
    assert 'convolution(' in compiled
    return {*counts, *re.findall(r'(?:feature|batch)_group_count=(\d+)', compiled)}


@pytest.mark.parametrize('size,window,strides,padding', CASES)
def test_value_and_gradients_are_those_of_lax(size, window, strides, padding):
    assert_same(*both(strides, padding), *arrays(size, window))


@by_onednn
@pytest.mark.parametrize(
    'size, window, padding',
    [
        ((6, 7), (3, 3), 'SAME'),
        ((6, 7), (3, 3), 'VALID'),
        ((7, 5), (2, 3), ((2, 0), (0, 3))),
        ((4, 4), (5, 5), ((3, 4), (2, 2))),
        ((8, 7), (3, 2), ((-1, 2), (1, -2))),
    ],
)
@pytest.mark.parametrize('inputs', [1, 3])
def test_few_channels_in(size, window, padding, inputs):
    assert_same(*both(padding=padding), *arrays(size, window, channels=(inputs, 16)))


def test_few_channels_in_vmap_and_twice_differentiated():
    ours, theirs = both()
    x, w = arrays(lead_x=(2,), lead_w=(2,), channels=(3, 16))
    assert_same(jax.vmap(ours), jax.vmap(theirs), x, w)

    def penalty(function, x, w):
        g = jax.grad(lambda x: jnp.sum(jnp.tanh(function(x, w) / 10)))(x)
        return jnp.sum(g**2)

    second = [jax.jit(jax.grad(functools.partial(penalty, f), (0, 1))) for f in (ours, theirs)]
    for a, b in zip(*(f(x[0], w[0]) for f in second), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4 * np.abs(b).max())


@pytest.mark.parametrize('preferred', [None, jnp.float32])
def test_onednn_is_of_float32_alone(preferred):
    ours, theirs = both(preferred_element_type=preferred)
    x, w = arrays(channels=(3, 16), dtype=jnp.bfloat16)
    assert ' convolution(' in jax.jit(ours).lower(x, w).compile().as_text()
    assert_same(ours, theirs, x, w, tolerance=2e-2)


@pytest.mark.parametrize('strides', [(1, 1), (2, 2)])
@pytest.mark.parametrize('preferred', [None, jnp.float32])
def test_bfloat16(strides, preferred):
    functions = both(strides, preferred_element_type=preferred)
    assert_same(*functions, *arrays(dtype=jnp.bfloat16), tolerance=1e-2)


@by_xla
def test_dtypes_and_precision_reach_every_convolution():
    x, w = arrays(dtype=jnp.bfloat16)
    ours, _ = both((2, 2), precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32)
    assert ours(x, w).dtype == jnp.float32
    text = str(jax.make_jaxpr(lambda x, w: value_and_gradients(ours, x, w))(x, w))
    found = re.findall(r'precision=(.*)', text)
    assert len(found) == 5  # forward, and four phases of the input's gradient
    assert all('HIGHEST' in line for line in found)
    assert text.count('preferred_element_type=float32') >= 5


@pytest.mark.parametrize('strides', [(1, 1), (2, 2)])
@pytest.mark.parametrize(
    'lead_x,lead_w,axes',
    [
        ((), (2,), [(None, 0)]),
        ((2,), (), [(0, None)]),
        ((2,), (2,), [(0, 0)]),
        ((2,), (3, 2), [(None, 0), (0, 0)]),
        ((3,), (2,), [(None, 0), (0, None)]),
        ((3,), (2,), [(0, None), (None, 0)]),
    ],
)
def test_vmap_then_gradient(strides, lead_x, lead_w, axes):
    def batched(function):
        return functools.reduce(jax.vmap, reversed(axes), function)

    assert_same(*map(batched, both(strides)), *arrays(lead_x=lead_x, lead_w=lead_w))


@pytest.mark.parametrize('axes', [(None, 0), (0, None), (0, 0)])
def test_gradient_then_vmap(axes):
    x, w = arrays(lead_x=(2,) * (axes[0] == 0), lead_w=(2,) * (axes[1] == 0))
    ours, theirs = (jax.vmap(functools.partial(value_and_gradients, f), axes) for f in both((2, 2)))
    for a, b in zip(jax.tree.leaves(ours(x, w)), jax.tree.leaves(theirs(x, w)), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-4)


def test_vmap_over_another_axis():
    x, w = arrays(lead_w=(2,))
    ours, theirs = (jax.vmap(f, (None, 3), 2) for f in both())
    w = jnp.moveaxis(w, 0, 3)
    np.testing.assert_allclose(ours(x, w), theirs(x, w), atol=1e-4)


def test_in_a_loop():
    x, w = arrays(lead_w=(2,))

    def ascend(function, x, w):
        gradient = jax.grad(lambda x: jnp.sum(jax.vmap(function, (None, 0))(x, w) ** 2))
        return lax.fori_loop(0, 3, lambda _, x: x + 1e-3 * gradient(x), x)

    ours, theirs = (jax.jit(functools.partial(ascend, f))(x, w) for f in both((2, 2)))
    assert np.abs(theirs - x).max() > 0.1
    np.testing.assert_allclose(ours, theirs, atol=1e-4)


def test_second_derivatives():
    x, w = arrays()

    def penalty(function, x, w):
        g = jax.grad(lambda x: jnp.sum(jnp.tanh(function(x, w))))(x)
        return jnp.sum(g**2)

    ours, theirs = (jax.jit(jax.grad(functools.partial(penalty, f), (0, 1))) for f in both((2, 2)))
    for a, b in zip(ours(x, w), theirs(x, w), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-3)
    with pytest.raises(TypeError, match='forward-mode'):
        jax.jvp(lambda x: both()[0](x, w), (x,), (x,))


@by_xla
def test_no_grouped_convolution_over_members():
    x, w = arrays(lead_x=(3,), lead_w=(3,))
    ours, theirs = (jax.vmap(f) for f in both((2, 2)))
    gradients = lambda f: lambda x, w: value_and_gradients(f, x, w)
    assert group_counts(ours, x, w) == {'1'}
    assert group_counts(gradients(ours), x, w) == {'1'}
    assert group_counts(jax.vmap(gradients(both()[0])), x, w) == {'1'}
    assert '3' in group_counts(gradients(theirs), x, w)  # so the check can fail


@by_xla
def test_shared_weights_make_one_convolution():
    x, w = arrays(lead_x=(3,))
    function = jax.vmap(both()[0], (0, None))
    gradient = jax.vmap(jax.grad(lambda x, w: both()[0](x, w).sum()), (0, None))
    for compiled in (jax.jit(f).lower(x, w).compile().as_text() for f in (function, gradient)):
        assert len(re.findall(r' convolution\(', compiled)) == 1


@by_xla
def test_other_backends_keep_their_own_gradient(monkeypatch):
    monkeypatch.setattr(backend, 'is_cpu', lambda: False)
    ours, theirs = (jax.vmap(f, (None, 0)) for f in both((2, 2)))
    x, w = arrays(lead_w=(2,))
    assert_same(ours, theirs, x, w)
    gradients = lambda x, w: value_and_gradients(ours, x, w)
    text = str(jax.make_jaxpr(gradients)(x, w))
    assert 'optimization_barrier' not in text
    assert set(re.findall(r'group_count=(\d+)', text)) == {'1'}


@pytest.mark.parametrize(
    'kwargs',
    [
        {'rhs_dilation': (2, 2)},
        {'lhs_dilation': (2, 1), 'padding': ((1, 0), (2, 1))},
        {'dimension_numbers': ('NHWC', 'HWOI', 'NHWC')},
    ],
)
def test_unusual_arguments_are_left_to_lax(kwargs):
    x, w = arrays()
    if kwargs.get('dimension_numbers'):
        w = w.swapaxes(2, 3)
    assert_same(*both(**kwargs), x, w)


def test_groups_are_left_to_lax():
    x, w = arrays()
    x, w = x.repeat(2, -1), w.repeat(2, -1)
    assert_same(*both(feature_group_count=2), x, w)


@by_xla
def test_kinds():
    x, w = arrays(lead_x=(2,), lead_w=(2,))
    for kind in conv.KINDS:
        call = functools.partial(conv.get(kind), dimension_numbers=DIMENSIONS)
        function = jax.vmap(lambda x, w, call=call: call(x, w, (1, 1), 'SAME'))
        counts = group_counts(function, x, w)
        separate = kind in ('separate', 'onednn') or (
            kind == 'auto' and jax.default_backend() == 'cpu'
        )
        assert (counts == {'1'}) == separate, kind
    with pytest.raises(ValueError, match="'fast', must be one of auto, grouped, onednn, separate"):
        conv.get('fast')


@by_xla
@pytest.mark.parametrize('strides', [1, 2])
def test_flax(strides):
    def layer(kind):
        settings = {'strides': strides, 'padding': 1, 'use_bias': False}
        return nn.Conv(5, (3, 3), conv_general_dilated=conv.get(kind), **settings)

    x, _ = arrays(lead_x=(2,))
    keys = jax.random.split(jax.random.key(0), 2)
    variables = jax.vmap(layer('separate').init, (0, None))(keys, x[0])
    assert variables['params']['kernel'].shape == (2, 3, 3, 3, 5)
    ours, theirs = (
        lambda x, w, kind=kind: jax.vmap(layer(kind).apply)({'params': {'kernel': w}}, x)
        for kind in ('separate', 'grouped')
    )
    assert_same(ours, theirs, x, variables['params']['kernel'])
    assert group_counts(ours, x, variables['params']['kernel']) == {'1'}


def operations(function, *args):
    """How many of oneDNN's convolutions, and how many of XLA's, a function has compiled."""
    text = jax.jit(function).lower(*args).compile().as_text()
    return text.count('custom_call_target="__onednn$convolution"'), text.count(' convolution(')


@pytest.fixture
def only_onednn(monkeypatch):
    """Whatever else would compute it is not to be reached."""
    for name in ('_by_xla', '_by_xla_cpu'):
        monkeypatch.setattr(cpu_conv, name, None)


@by_onednn
@pytest.mark.usefixtures('only_onednn')
@pytest.mark.parametrize('images_at_a_time', [4, 3, 1])
@pytest.mark.parametrize(
    'size, window, strides, padding',
    [
        ((6, 6), (3, 3), (1, 1), 'SAME'),
        ((6, 7), (3, 3), (2, 2), 'SAME'),
        ((7, 6), (3, 3), (2, 1), 'VALID'),
        ((8, 8), (3, 3), (2, 2), ((1, 1), (1, 1))),
        # Rows and columns that no window sees.
        ((7, 8), (1, 1), (2, 2), ((0, 0), (0, 0))),
        ((9, 8), (2, 2), (4, 3), ((0, 0), (1, 0))),
        ((6, 7), (5, 2), (1, 1), ((4, 1), (0, 1))),
    ],
)
def test_onednn(monkeypatch, size, window, strides, padding, images_at_a_time):
    monkeypatch.setattr(gradients, '_IMAGES', images_at_a_time)
    monkeypatch.setattr(gradients, '_VALUES_OF_BOTH', 0)
    assert_same(*both(strides, padding), *arrays(size, window, channels=(8, 5)))


@by_onednn
@pytest.mark.usefixtures('only_onednn')
@pytest.mark.parametrize('inputs', [5, 12, 16, 34, 40])
@pytest.mark.parametrize('strides', [(1, 1), (2, 1), (1, 2)])
def test_blocks_of_channels(inputs, strides):
    assert_same(*both(strides), *arrays((5, 7), (3, 2), channels=(inputs, 6)))


@by_onednn
def test_images_at_a_time_of_gradients_of_weights():
    def images(size, inputs, outputs, batch=64):
        x, g = (jnp.zeros((batch, size, size, channels)) for channels in (inputs, outputs))
        gradient = lambda x, g: gradients.images_as_channels(x, g, (3, 3), (1, 1), ((1, 1), (1, 1)))
        text = jax.jit(gradient).lower(x, g).as_text()
        (kernel,) = re.findall(r'onednn\$convolution.*tensor<(\d+)x\d+x\d+x\d+xf32>\) ->', text)
        return int(kernel)

    assert images(32, 32, 32) == 16
    assert images(8, 128, 128) == 32  # two parts of 64, of 48 at most
    assert images(8, 16, 16) == 64
    assert images(8, 16, 16, batch=768) == 384
    assert images(32, 160, 160) == 16


@by_onednn
def test_which_operations_of_a_step_are_onednns():
    x, w = arrays((8, 8), channels=(8, 5))
    for strides, count in ((1, 3), (2, 2)):
        ours, _ = both((strides, strides))
        assert operations(functools.partial(value_and_gradients, ours), x, w) == (count, 0)
    ours = functools.partial(value_and_gradients, both()[0])
    pixels = arrays((8, 8), (1, 1), channels=(8, 5))
    assert operations(ours, *pixels) == (2, 0)
    # Of few input channels gradients of weights are XLA's convolution, those of images products.
    few = arrays((8, 8), channels=(3, 16))
    assert operations(ours, *few) == (1, 1)


@by_onednn
@pytest.mark.parametrize(
    'size, window, padding',
    [
        ((6, 7), (3, 3), ((1, 3), (1, 1))),
        ((6, 7), (1, 1), ((0, 1), (0, 0))),
        ((6, 7), (3, 3), ((-1, 1), (1, 1))),
    ],
)
def test_pads_that_onednn_may_not_take_are_left_to_xla(size, window, padding):
    x, w = arrays(size, window, channels=(8, 5))
    assert operations(both(padding=padding)[0], x, w) == (0, 1)
    assert_same(*both(padding=padding), x, w)


@pytest.fixture
def trial(monkeypatch, tmp_path):
    """oneDNN's trial as a first start makes it; whether it succeeds is set, and calls counted."""
    calls = []

    def run(*args, check, env, **kwargs):
        assert (pathlib.Path(env['PYTHONPATH'].split(os.pathsep)[0]) / 'ensadv').is_dir()
        calls.append(args)
        return subprocess.CompletedProcess(args, 0)

    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
    monkeypatch.setattr(onednn.subprocess, 'run', run)
    monkeypatch.setattr(onednn, '_keep_out_of_the_cache', lambda: None)
    return calls


@by_xla
def test_onednn_is_tried_once_for_a_version(trial, monkeypatch):
    works = onednn._works.__wrapped__
    assert works()
    assert works()
    assert len(trial) == 1
    monkeypatch.setattr(onednn.importlib.metadata, 'version', lambda name: '99.0')
    assert works()
    assert len(trial) == 2


@by_xla
@pytest.mark.parametrize(
    'error',
    [subprocess.CalledProcessError(-6, 'it'), subprocess.TimeoutExpired('it', 1), OSError()],
)
def test_where_the_trial_fails_there_is_no_onednn(trial, monkeypatch, error):
    def fail(*args, **kwargs):
        trial.append(args)
        raise error

    monkeypatch.setattr(onednn.subprocess, 'run', fail)
    works = onednn._works.__wrapped__
    assert not works()
    assert not works()  # the next start tries again
    assert len(trial) == 2


@by_xla
def test_an_operation_that_xla_does_not_know_fails_the_trial(monkeypatch):
    before = jax.config.jax_compilation_cache_dir
    monkeypatch.setattr(onednn, 'TARGET', '__onednn$nothing')
    with pytest.raises(Exception, match='onednn'):
        onednn.try_out()
    jax.config.update('jax_compilation_cache_dir', before)


@by_xla
def test_a_line_says_whose_convolutions_are_used(monkeypatch):
    for there, words in ((True, "oneDNN's"), (False, "XLA's own")):
        monkeypatch.setattr(onednn, 'available', lambda there=there: there)
        assert conv.library('auto', 'float32').startswith(words)
    # Where nothing else was to be expected, nothing is said.
    assert conv.library('separate', 'float32') == conv.library('auto', 'bfloat16') == ''
    monkeypatch.setattr(backend, 'is_cpu', lambda: False)
    assert conv.library('auto', 'float32') == ''
