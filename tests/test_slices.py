"""Sums over slices of the channels."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from ensadv import conv, slices
from ensadv.slices import sum_of_slices


@pytest.mark.parametrize(
    'channels,taps,sizes',
    [
        (288, 1, [288]),
        (289, 1, [145, 144]),
        (640, 1, [214, 214, 212]),
        (32, 9, [32]),
        (70, 9, [24, 24, 22]),
        (3, 400, [1, 1, 1]),
    ],
)
def test_sizes(channels, taps, sizes):
    found = []

    def product(x, w):
        found.append(x.shape[-1])
        return x @ w

    x, w = np.random.default_rng(0).integers(-9, 9, (2, 5, channels)).astype(np.float32)
    y = sum_of_slices(product, jnp.asarray(x), jnp.asarray(w.T), axis=0, taps=taps)
    np.testing.assert_array_equal(y, x @ w.T)
    assert found == sizes


def test_slices_of_bfloat16_are_summed_in_float32():
    # 256 + 1 is 256 in bfloat16.
    x, w = jnp.ones((1, 578), jnp.bfloat16), jnp.zeros((578, 1), jnp.bfloat16)
    w = w.at[jnp.asarray([0, 200, 400]), 0].set(jnp.asarray([256, 1, 1], jnp.bfloat16))
    y = sum_of_slices(jnp.matmul, x, w, axis=0)
    assert y.dtype == jnp.bfloat16
    assert y.item() == 258


@pytest.mark.parametrize('window,strides', [(3, 1), (3, 2), (1, 1), (1, 2)])
@pytest.mark.parametrize('channels', [(7, 9), (33, 34)])
def test_convolutions(monkeypatch, window, strides, channels):
    # 33 and 34 of so many pixels are Winograd's.
    monkeypatch.setattr(slices, '_BLOCK', 20)
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(8, 16, 16, channels[0])), jnp.float32)
    w = jnp.asarray(rng.normal(size=(window, window, *channels)), jnp.float32)

    def gradients(convolve):
        convolve = functools.partial(
            convolve,
            window_strides=(strides, strides),
            padding='SAME',
            dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
        )
        loss = lambda x, w: (jnp.sum(jnp.sin(y := convolve(x, w))), y)
        return jax.jit(jax.grad(loss, (0, 1), has_aux=True))(x, w)

    ours, lax_own = gradients(conv.get('separate')), gradients(lax.conv_general_dilated)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(lax_own), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-4 * float(jnp.abs(b).max()))
