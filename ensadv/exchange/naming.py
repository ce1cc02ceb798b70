"""What a network's weights are called in PyTorch, here and elsewhere. Pure functions of NumPy.

Here a kernel is HWIO, or [inputs, outputs], and in PyTorch OIHW, or [outputs, inputs].
"""

import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np


class Naming(NamedTuple):
    """Names of a Wide ResNet's layers.

    Attributes:
      layers: by our name; of a block's layers after the block's.
      block: of a block, of 'group' and 'block', from 1.
      kernel: what follows the name of a convolution.
      unused: pattern of tensors that such networks have and do not compute with.
      padding: their model.padding.
      has_any_activation: whether networks with these names have different activations.
    """

    layers: Mapping[str, str]
    block: str
    kernel: str = '.weight'
    unused: str = ''
    padding: str = 'symmetric'
    has_any_activation: bool = False


# PyTorch's most common names, and those of what is exported here.
OWN = 'bn1, fc'
NAMINGS = {
    # https://github.com/xternalz/WideResNet-pytorch, and so TRADES and RobustBench. Some of theirs
    # have a sub_block1, which their forward pass passes over.
    OWN: Naming(
        {
            'conv_0': 'conv1',
            'norm': 'bn1',
            'linear': 'fc',
            'norm_1': 'bn1',
            'conv_1': 'conv1',
            'norm_2': 'bn2',
            'conv_2': 'conv2',
            'shortcut': 'convShortcut',
        },
        'block{group}.layer.{block0}',
        unused=r'sub_block1\..*',
    ),
    # Gowal et al. (2020), https://github.com/google-deepmind/deepmind-research, in PyTorch.
    'init_conv, logits': Naming(
        {
            'conv_0': 'init_conv',
            'norm': 'batchnorm',
            'linear': 'logits',
            'norm_1': 'batchnorm_0',
            'conv_1': 'conv_0',
            'norm_2': 'batchnorm_1',
            'conv_2': 'conv_1',
            'shortcut': 'shortcut',
        },
        'layer.{group0}.block.{block0}',
        padding='same',
        has_any_activation=True,
    ),
    # Zagoruyko & Komodakis (2016), https://github.com/szagoruyko/wide-residual-networks.
    'group0, convdim': Naming(
        {
            'conv_0': 'conv0',
            'norm': 'bn',
            'linear': 'fc',
            'norm_1': 'bn0',
            'conv_1': 'conv0',
            'norm_2': 'bn1',
            'conv_2': 'conv1',
            'shortcut': 'convdim',
        },
        'group{group0}.block{block0}',
        kernel='',
    ),
}
_LEAVES = {
    'kernel': 'weight', 'scale': 'weight', 'bias': 'bias', 'mean': 'running_mean',
    'var': 'running_var',
}  # fmt: skip
# What networks call the mean and the deviation by which they standardise images.
_STANDARDISATION = {'mean': ('mean', 'mu', 'means'), 'std': ('std', 'sigma', 'stds', 'sds')}


class Found(NamedTuple):
    """A network in a file.

    Attributes:
      naming: a key of NAMINGS.
      prefix: of the names of its weights, as 'module.'; what precedes members' numbers.
      is_ensemble: whether the names have members' numbers, as exported ensembles' have.
    """

    naming: str
    prefix: str
    is_ensemble: bool


def find(names: Collection[str]) -> Found | None:
    """Returns in which naming tensors of these names are a network; None if in none.

    >>> find(['module.fc.weight', 'module.block1.layer.0.conv1.weight'])
    Found(naming='bn1, fc', prefix='module.', is_ensemble=False)
    """
    for key, naming in NAMINGS.items():
        first = re.escape(naming.block.format(group=1, group0=0, block0=0))
        for name in names:
            # What precedes ends with a point: block1 is in sub_block1 as well.
            if match := re.fullmatch(rf'((?:.*\.)??)(members\.0\.)?{first}\.[^.]+(\.[^.]+)?', name):
                return Found(key, match[1], bool(match[2]))
    if any(name.startswith('members.0.') for name in names):  # an exported VGG
        return Found(OWN, '', True)
    return None


def to_pytorch(variables: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Returns members' variables as PyTorch's, by the names of model.py.

    Args:
      variables: {'params': ..., 'batch_stats': ...}, float32, every leaf [k, ...].
    """
    return {
        own_name(path, i): _to_pytorch(path, np.asarray(leaf[i]))
        for path, leaf in _leaves(variables)
        for i in range(len(leaf))
    }


def own_name(path: tuple[str, ...], member: int) -> str:
    """Returns the name of a leaf of a member in what is exported; `path` is that of its modules."""
    part, *rest = path
    if part == 'gate':
        return f'gates.{member}.{".".join(rest[:-1])}.{_LEAVES[path[-1]]}'
    return f'members.{member}.{_name(path, NAMINGS[OWN])}'


def _name(path: tuple[str, ...], naming: Naming) -> str:
    """Returns the name of a leaf in a network without members' numbers."""
    *modules, leaf = path[1:] if path[0] == 'member' else path
    names = [naming.layers.get(module, module) for module in modules]
    if match := re.fullmatch(r'group_(\d+)_block_(\d+)', modules[0]):
        group, block = map(int, match.groups())
        names[0] = naming.block.format(group=group, group0=group - 1, block0=block - 1)
    is_convolution = leaf == 'kernel' and modules[-1] != 'linear'
    return '.'.join(names) + (naming.kernel if is_convolution else f'.{_LEAVES[leaf]}')


class MismatchError(Exception):
    """Tensors that are not those of the expected network; the message is one line."""


def from_pytorch(
    tensors: Mapping[str, np.ndarray], found: Found, like: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Returns the variables that tensors are, and the standardisation among these.

    Args:
      tensors: by name.
      found: what `find` says of the names.
      like: as the variables have to be, every leaf with a shape [k, ...].

    Returns:
      {'params': ..., 'batch_stats': ...}, float32, and {'mean': float32 [C], 'std': float32 [C]},
      which lacks what the tensors do not have.

    Raises:
      MismatchError: if tensors are missing, are left over, or have other shapes.
    """
    naming = NAMINGS[found.naming]
    left, wrong, missing = dict(tensors), [], []

    own = found.is_ensemble

    def take(path: tuple[str, ...], shape: tuple[int, ...], member: int) -> np.ndarray:
        is_own = own or path[0] == 'gate'
        name = found.prefix + (own_name(path, member) if is_own else _name(path, naming))
        array = left.pop(name, None)
        if array is None:
            missing.append(name)
            return np.zeros(shape, np.float32)
        array = _from_pytorch(path, array)
        if array.shape != shape or array.dtype != np.float32:
            expected = list(_to_pytorch(path, np.zeros(shape, np.float32)).shape)
            wrong.append(f'{name} {list(tensors[name].shape)}, expected {expected}')
        return array

    tree: dict[str, Any] = {collection: {} for collection in like}
    for collection, path, leaf in _paths(like):
        k, *shape = leaf.shape
        if k > 1 and not own:
            raise MismatchError(f'one network, where {k} members are expected')
        members = [take(path, tuple(shape), i) for i in range(k)]
        *modules, last = path
        at = tree[collection]
        for module in modules:
            at = at.setdefault(module, {})
        if not (missing or wrong):
            at[last] = np.stack(members)
    standardisation = _standardisation(left)
    unused = re.compile(rf'{re.escape(found.prefix)}(?:{naming.unused or "(?!)"})')
    extra = [
        name
        for name in left
        if not name.endswith('num_batches_tracked') and not unused.fullmatch(name)
    ]
    lists = {'missing': missing, 'of another shape': wrong, 'left over': extra}
    if told := [f'{what}: {_listed(names)}' for what, names in lists.items() if names]:
        raise MismatchError('; '.join(told))
    return tree, standardisation


def _standardisation(left: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Takes the standardisation out of tensors; nothing where there are several."""
    found = {}
    for kind, names in _STANDARDISATION.items():
        matching = [name for name in left if name.rpartition('.')[2] in names]
        if len(matching) == 1:
            found[kind] = left.pop(matching[0]).ravel()
    return found


def _listed(names: list[str]) -> str:
    more = f' and {len(names) - 4} more' if len(names) > 4 else ''
    return ', '.join(names[:4]) + more


def _leaves(variables: Mapping[str, Any]) -> Iterator[tuple[tuple[str, ...], Any]]:
    return ((path, leaf) for _, path, leaf in _paths(variables))


def _paths(tree: Mapping[str, Any]) -> Iterator[tuple[str, tuple[str, ...], Any]]:
    """Yields (collection, path in it, leaf) of variables."""

    def below(tree, path):
        for name, value in tree.items():
            if isinstance(value, Mapping):
                yield from below(value, (*path, name))
            else:
                yield (*path, name), value

    for collection, inside in tree.items():
        for path, leaf in below(inside, ()):
            yield collection, path, leaf


def _to_pytorch(path: tuple[str, ...], array: np.ndarray) -> np.ndarray:
    """HWIO -> OIHW, [inputs, outputs] -> [outputs, inputs]; others stay."""
    return np.moveaxis(array, (-1, -2), (0, 1)) if path[-1] == 'kernel' else array


def _from_pytorch(path: tuple[str, ...], array: np.ndarray) -> np.ndarray:
    if path[-1] != 'kernel' or array.ndim < 2:
        return array
    return np.moveaxis(array, (0, 1), (-1, -2))
