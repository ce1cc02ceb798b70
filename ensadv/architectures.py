"""Architectures by name: where each one's code is, and what is said of it. No JAX."""

import ast
import importlib
import re
from collections.abc import Callable
from typing import Any, NamedTuple

from ensadv.errors import ConfigError, UserError
from ensadv.values import is_integer, shown

ACTIVATIONS = ('relu', 'silu')
PADDINGS = ('symmetric', 'same')
VGG_DEPTHS = (11, 13, 16, 19)
MAX_DEPTH = 1000  # far beyond what anyone trains


class Architecture(NamedTuple):
    """An architecture of this program's.

    Attributes:
      network: its class, a `models.base.ImageNetwork`; or where that is, as 'module:class'.
      has_depth: whether there is one of a depth >= 1.
      depths: which depths there are, in words.
      words: (depth, width) -> what such a network is called.
    """

    network: type | str
    has_depth: Callable[[int], bool]
    depths: str
    words: Callable[[int, int], str]


ARCHITECTURES: dict[str, Architecture] = {
    'wide_resnet': Architecture(
        'ensadv.models.wide_resnet:WideResNet',
        lambda depth: depth >= 10 and (depth - 4) % 6 == 0,
        f'6n + 4 with n >= 1 (10, 16, 22, ...) and <= {MAX_DEPTH}',
        lambda depth, width: f'WRN-{depth}-{width}',
    ),
    'vgg': Architecture(
        'ensadv.models.vgg:VGG',
        lambda depth: depth in VGG_DEPTHS,
        f'one of {", ".join(map(str, VGG_DEPTHS))}',
        lambda depth, width: f'VGG-{depth} with batch norm, {16 * width} to {128 * width} channels',
    ),
}


def network(name: str) -> type:
    """Returns the class of an architecture, for which JAX is imported."""
    found = ARCHITECTURES[name].network
    if isinstance(found, str):
        module, _, code = found.partition(':')
        found = getattr(importlib.import_module(module), code)
    return found


def depth_mistake(name: str, depth: Any) -> str:
    """Returns what to say of a depth that an architecture does not have; '' of one that it has."""
    known = ARCHITECTURES[name]
    if is_integer(depth, 1, MAX_DEPTH) and known.has_depth(depth):
        return ''
    return f'expected {known.depths}, found {shown(depth)}'


def words(name: str, depth: int, width: int, activation: str = 'relu') -> str:
    """Returns what a network is called; of one of the user's own the place is left out.

    >>> words('wide_resnet', 28, 10, 'silu'), words('nets/vit.py:ViT(depth=2)', 28, 10)
    ('WRN-28-10, silu', 'vit.py:ViT(depth=2)')
    """
    if mine := own(name):
        name = name.removeprefix(mine.file.rpartition('/')[0]).removeprefix('/')
    else:
        name = ARCHITECTURES[name].words(depth, width)
    return name if activation == 'relu' else f'{name}, {activation}'


def parse(text: str) -> dict[str, Any]:
    """Returns the fields of a config's group `model` that make a network of this name.

    It is the opposite of `words`, of Wide ResNets; without an activation none is among the fields.

    Raises:
      UserError: for any other name.

    >>> parse('WRN-28-10-silu')
    {'name': 'wide_resnet', 'depth': 28, 'width': 10, 'activation': 'silu'}
    """
    match = re.fullmatch(r'WRN-(\d{1,4})-(\d{1,4})(?:(?:-|, ?)([a-z]+))?', text, re.IGNORECASE)
    activation = match and match[3] and match[3].lower()
    if not match or activation not in (None, *ACTIVATIONS):
        raise UserError(
            f"--architecture: '{shown(text)}': expected WRN-DEPTH-WIDTH, as in WRN-28-10, or with "
            f'an activation, as in WRN-28-10-silu; activations are {", ".join(ACTIVATIONS)}'
        )
    fields = {'name': 'wide_resnet', 'depth': int(match[1]), 'width': int(match[2])}
    return fields | ({'activation': activation} if activation else {})


class Own(NamedTuple):
    """The name of a network of the user's own.

    Attributes:
      file: the path, as it was given.
      name: of the class in it.
      arguments: that its constructor is given, beside what the program gives it.
    """

    file: str
    name: str
    arguments: dict[str, Any]


def own(name: str) -> Own | None:
    """Parses model.name where it names a file; returns None for any other name.

    Raises:
      ConfigError: if it names a file and is not FILE.py:Class or FILE.py:Class(argument=value).

    >>> own('networks/vit.py:ViT(depth=2, pool="mean")')
    Own(file='networks/vit.py', name='ViT', arguments={'depth': 2, 'pool': 'mean'})
    """
    if '.py' not in name:
        return None
    match = re.fullmatch(r'(.*\.py):([^:()]*)(\(.*\))?', name, re.DOTALL)
    if not match or not match[2].isidentifier():
        raise ConfigError(
            f"model.name: '{shown(name)}': expected FILE.py:Class, as in my_network.py:Network, or "
            'FILE.py:Class(argument=value)'
        )
    try:
        call = ast.parse(f'f{match[3] or "()"}', mode='eval').body
        arguments = {each.arg: ast.literal_eval(each.value) for each in call.keywords}
        if call.args or None in arguments:
            raise ValueError('not by name')
    except (SyntaxError, ValueError, TypeError, AttributeError, RecursionError, MemoryError):
        raise ConfigError(
            f"model.name: '{shown(name)}': expected plain values by name in the parentheses, as in "
            'FILE.py:Class(depth=2, pool="mean")'
        ) from None
    return Own(match[1], match[2], arguments)
