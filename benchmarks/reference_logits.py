"""Logits of a WRN-10-1 and a VGG-11 by PyTorch, for tests/test_reference_logits.py.

    pip install -r requirements-benchmark.txt
    python benchmarks/reference_logits.py

It writes tests/reference_logits.npz, in float64, from layers of PyTorch's alone. The test needs no
PyTorch: weights and images are random numbers of NumPy's, and made again there. The file says what
these networks are, and was made once. It is not to be made again because the test fails.
"""

import pathlib
import sys
import zlib

import jax
import numpy as np

try:
    import torch
    from torch.nn import functional
except ImportError:
    torch = None  # what the test asks for does without

ROOT = pathlib.Path(__file__).resolve().parents[1]
PATH = ROOT / 'tests' / 'reference_logits.npz'
MEMBERS, SHAPE = 2, (64, 32, 3)  # so high that VGG's last mean is of two places
MEAN, STD = (0.49, 0.48, 0.45), (0.25, 0.24, 0.26)
NETWORKS = {'wide_resnet': 10, 'vgg': 11}  # depths; the width is 1


def images():
    """Returns pixels, float32 [2, 64, 32, 3] in [0, 1]."""
    return np.random.RandomState(0).uniform(size=(2, *SHAPE)).astype(np.float32)


def weights(shapes):
    """Returns variables of these shapes, float32, none of which is the initial one.

    Each leaf depends on its path and its shape alone. RandomState's numbers never change.

    Args:
      shapes: {'params': ..., 'batch_stats': ...}, leaves with a shape [k, ...].
    """

    def random(*names):
        return np.random.RandomState(zlib.crc32('/'.join(names).encode()))

    def make(path, leaf):
        *modules, kind = (entry.key for entry in path[1:])
        rng = random(*modules, kind)
        # From 1e-4 up, so that an epsilon of 1e-5 is seen; the scale makes up for it.
        variance = lambda: 10 ** random(*modules, 'var').uniform(-4, 0.3, leaf.shape)
        if kind == 'kernel':
            values = rng.normal(0, np.sqrt(2 / np.prod(leaf.shape[1:-1])), leaf.shape)
        elif kind == 'scale':
            values = rng.uniform(0.5, 1.5, leaf.shape) * np.sqrt(variance())
        elif kind == 'var':
            values = variance()
        else:  # bias, mean
            values = rng.normal(0, 0.3, leaf.shape)
        return values.astype(np.float32)

    return jax.tree_util.tree_map_with_path(make, shapes)


class _Layers:
    """PyTorch's layers with one member's weights, called by name on float64 [N, C, H, W]."""

    def __init__(self, variables, member):
        self._weights = {}
        for tree in variables.values():
            for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
                name = '/'.join(entry.key for entry in path)
                self._weights[name] = torch.tensor(leaf[member], dtype=torch.float64)

    def __getitem__(self, name):
        return self._weights[name]

    def conv(self, name, x, stride=1, padding=1):
        kernel = self[f'{name}/kernel'].permute(3, 2, 0, 1)  # HWIO
        return functional.conv2d(x, kernel, stride=stride, padding=padding)

    def norm_relu(self, name, x):
        averages = (self[f'{name}/{leaf}'] for leaf in ('mean', 'var'))
        learned = (self[f'{name}/{leaf}'] for leaf in ('scale', 'bias'))
        return functional.relu(functional.batch_norm(x, *averages, *learned, eps=1e-5))

    def linear(self, x):
        return x.mean((2, 3)) @ self['linear/kernel'] + self['linear/bias']


def _wide_resnet(layers, x):
    """WRN-10-1: three groups of one pre-activation block."""
    x = layers.conv('conv_0', x)
    for group, stride in ((1, 1), (2, 2), (3, 2)):
        name = f'group_{group}_block_1'
        y = activated = layers.norm_relu(f'{name}/norm_1', x)
        y = layers.conv(f'{name}/conv_1', y, stride)
        y = layers.norm_relu(f'{name}/norm_2', y)
        y = layers.conv(f'{name}/conv_2', y)
        # At width 1 the first group has as many channels as it is given: no convolution there.
        x = y + (x if group == 1 else layers.conv(f'{name}/shortcut', activated, stride, 0))
    return layers.linear(layers.norm_relu('norm', x))


def _vgg(layers, x):
    """VGG-11 with batch norm: convolutions 1, 1, 2, 2, 2, a pooling after each stage."""
    for stage, convolutions in enumerate((1, 1, 2, 2, 2), start=1):
        for i in range(1, convolutions + 1):
            x = layers.conv(f'conv_{stage}_{i}', x)
            x = layers.norm_relu(f'norm_{stage}_{i}', x)
        x = functional.max_pool2d(x, 2)
    return layers.linear(x)


def main():
    sys.path.insert(0, str(ROOT))
    from configs import default
    from ensadv import build

    x = torch.tensor(images(), dtype=torch.float64).permute(0, 3, 1, 2)
    mean, std = (torch.tensor(v, dtype=torch.float64)[:, None, None] for v in (MEAN, STD))
    logits = {}
    for name, forward in (('wide_resnet', _wide_resnet), ('vgg', _vgg)):
        config = default.get_config()
        config.ensemble.size = MEMBERS
        config.model.update(name=name, depth=NETWORKS[name], width=1)
        description = {'num_classes': 10, 'mean': MEAN, 'std': STD, 'image_shape': SHAPE}
        variables = weights(build.network(config, description).variables)
        members = [forward(_Layers(variables, i), (x - mean) / std) for i in range(MEMBERS)]
        logits[name] = np.stack([member.numpy() for member in members])
        print(name, logits[name].shape, f'deviation {logits[name].std():.3g}')
    np.savez(PATH, **logits)


if __name__ == '__main__':
    main()
