"""The networks compute what PyTorch computes with the same weights, and begin as they should."""

import functools

import jax
import numpy as np
import pytest
import scipy.stats

from benchmarks import reference_logits as reference
from configs import default
from ensadv import build
from ensadv.models import ensemble

DESCRIPTION = {
    'num_classes': 10,
    'mean': reference.MEAN,
    'std': reference.STD,
    'image_shape': reference.SHAPE,
}
networks = pytest.mark.parametrize('name', reference.NETWORKS)


def config_of(name, width=1, combine='probs'):
    config = default.get_config()
    config.ensemble.update(size=reference.MEMBERS, combine=combine)
    config.model.update(name=name, depth=reference.NETWORKS[name], width=width)
    return config


@networks
def test_logits_are_pytorchs(name):
    """Made again because it fails, the file would say nothing: see its program."""
    network = build.network(config_of(name), DESCRIPTION)
    weights = reference.weights(network.variables)
    found = jax.jit(network.member_logits)(weights, reference.images())
    np.testing.assert_allclose(found, np.load(reference.PATH)[name], atol=1e-4)


@functools.cache
def initial(name):
    """Returns a gated member's first variables by path; at width 2 layers have many weights."""
    model = build.model(config_of(name, width=2, combine='gating'), DESCRIPTION, dtype='float32')
    init = jax.jit(lambda: ensemble.init(model, jax.random.key(0), 1, (8, 8, 3)))
    leaves = jax.tree_util.tree_leaves_with_path(jax.device_get(init()))
    return {'/'.join(entry.key for entry in path): leaf[0] for path, leaf in leaves}


@networks
def test_convolutions_begin_as_he_et_al_by_fan_out(name):
    kernels = [leaf for leaf in initial(name).values() if leaf.ndim == 4]
    assert len(kernels) == {'wide_resnet': 10, 'vgg': 8}[name] + 2
    # By sqrt(2 / (height * width * outputs)), which makes them standard normal.
    scaled = [kernel / np.sqrt(2 / kernel[:, :, 0].size) for kernel in kernels]
    for kernel in scaled:
        assert abs(kernel.std() - 1) < 4 / np.sqrt(2 * kernel.size)
        assert abs(kernel.mean()) < 4 / np.sqrt(kernel.size)
    everything = np.concatenate([kernel.ravel() for kernel in scaled])
    assert scipy.stats.kstest(everything[::10], 'norm').pvalue > 1e-3  # not uniform
    assert np.abs(everything).max() > 3  # and not cut off


@networks
def test_everything_else_begins_as_said(name):
    variables = initial(name)
    kernel = variables['params/member/linear/kernel']
    bound = 1 / np.sqrt(len(kernel))
    uniform = scipy.stats.uniform(-bound, 2 * bound)
    assert scipy.stats.kstest(kernel.ravel(), uniform.cdf).pvalue > 1e-3
    np.testing.assert_array_equal(variables['params/gate/linear/kernel'], 0)
    vectors = {path: leaf for path, leaf in variables.items() if leaf.ndim == 1}
    # The linear layer's, batch norm's four and the gate's three.
    assert len(vectors) == 1 + 4 * {'wide_resnet': 7, 'vgg': 8}[name] + 3
    beginning = {'scale': 1, 'bias': 0, 'mean': 0, 'var': 1}
    for path, leaf in vectors.items():
        np.testing.assert_array_equal(leaf, beginning[path.split('/')[-1]], err_msg=path)
