"""Networks of the user's own: Flax modules from the text of a Python file."""

import ast
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from ensadv import prng, python_files, values
from ensadv.architectures import Own
from ensadv.errors import UserError, in_a_line, place
from ensadv.models.base import ImageNetwork

# What a constructor is given where it takes it. Where it does not, these settings have to be as
# they are when nobody sets them; `mean`, `std` and `conv` alter nothing that a config asks for.
_FIELDS = {
    'dtype': 'model.dtype, eval.dtype',
    'remat': 'model.remat',
    'activation': 'model.activation',
    'norm_momentum': 'batch_norm.momentum',
    'norm_epsilon': 'batch_norm.epsilon',
    'norm_axis': 'batch_norm.sync',
}


class OwnNetwork(ImageNetwork):
    """A module of the user's own with the interface of this program's networks.

    Attributes:
      network: the module, `network(x, train=...)` from images [B, H, W, C] in [0, 1] to logits.
    """

    network: nn.Module | None = None

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        """Returns logits, float32 [B, num_classes], for images [B, H, W, C] in [0, 1]."""
        # float32 is to mean float32, see `ImageNetwork.convolution`.
        precision = 'highest' if self.dtype == jnp.float32 else None
        with jax.default_matmul_precision(precision):
            return self.network(x, train=train).astype(jnp.float32)


def takes(own: Own, text: str, argument: str) -> bool:
    """Returns whether a network's constructor has an argument.

    Raises:
      UserError: as `make` does.
    """
    return argument in _parameters(_found(own, text))


def make(
    own: Own, text: str, settings: Mapping[str, Any], image_shape: Sequence[int]
) -> OwnNetwork:
    """Returns a network, of which it is known that it can be trained and evaluated.

    Args:
      own: its name.
      text: of its file.
      settings: what the program gives to networks, by the names that `ImageNetwork` has for them.
        The constructor gets those that it takes.
      image_shape: (H, W, C).

    Raises:
      UserError: in one line, which names the file and a line of it.
    """
    found = _found(own, text)
    taken = _parameters(found)
    if 'num_classes' not in taken:
        raise _mistake(own, text, f'expected an argument num_classes, found {_listed(taken)}')
    if given := sorted(own.arguments.keys() & settings.keys()):
        raise _mistake(own, text, f'{_listed(given)}: set by the program, not in model.name')
    for argument, field in _FIELDS.items():
        value = settings[argument]
        if argument not in taken and value != getattr(ImageNetwork, argument):
            shown = jnp.dtype(value).name if argument == 'dtype' else value
            raise UserError(
                f'{field}: {shown} needs a network with an argument {argument}; {own.file}:'
                f'{_line(text, own.name)}: {own.name} has {_listed(taken)}'
            )
    with _told(own, text, 'its constructor'):
        module = found(**{k: v for k, v in settings.items() if k in taken}, **own.arguments)
    if not isinstance(module, nn.Module):
        raise _mistake(own, text, f'expected a flax.linen.Module, found {type(module).__name__}')
    network = OwnNetwork(**settings, network=module)
    _check(network, own, text, image_shape)
    return network


def _found(own: Own, text: str) -> Callable[..., Any]:
    try:
        module = python_files.of_text(text, own.file)
    except UserError as error:
        raise UserError(f'model.name: {error}') from error
    found = getattr(module, own.name, None)
    if not callable(found):
        there = [name for name, each in vars(module).items() if _is_here(each, module)]
        hint = values.nearest(own.name, there) or f'; it has {_listed(there)}'
        raise UserError(f'model.name: {own.file}: found no class {own.name} in the file{hint}')
    return found


def _is_here(each: Any, module: Any) -> bool:
    return callable(each) and getattr(each, '__module__', None) == module.__name__


def _parameters(found: Callable[..., Any]) -> list[str]:
    return [name for name in inspect.signature(found).parameters if name not in ('parent', 'name')]


def _line(text: str, name: str) -> int:
    """Returns the number of the line on which a class or function begins."""
    lines = (node.lineno for node in ast.parse(text).body if getattr(node, 'name', None) == name)
    return next(lines, 1)


def _listed(names: Sequence[str]) -> str:
    return ', '.join(names) or 'none'


@contextmanager
def _told(own: Own, text: str, doing: str) -> Iterator[None]:
    """Turns whatever the user's code raises into one line."""
    try:
        yield
    except Exception as error:
        line = place(error, own.file) or _line(text, own.name)
        what = in_a_line(error)[:300]
        if isinstance(error, flax.errors.InvalidRngError):
            what = (
                'asks for random numbers (dropout?), which members are not given; expected a '
                'function of images and weights alone'
            )
        raise UserError(f'model.name: {own.file}:{line}: in {doing}: {what}') from error


def _mistake(own: Own, text: str, what: str) -> UserError:
    return UserError(f'model.name: {own.file}:{_line(text, own.name)}: {own.name}: {what}')


def _check(network: OwnNetwork, own: Own, text: str, image_shape: Sequence[int]) -> None:
    """Traces the network as it is trained and evaluated; computes nothing."""
    module = network.network
    if 'train' not in inspect.signature(type(module).__call__).parameters:
        raise _mistake(own, text, 'expected __call__(self, x, train), found one without train')
    x = jax.ShapeDtypeStruct((1, 2, *image_shape), jnp.float32)
    with _told(own, text, 'its first call'):
        variables = jax.eval_shape(lambda x: module.init(prng.key(0), x[0], train=False), x)
    if others := sorted(variables.keys() - {'params', 'batch_stats'}):
        expected = 'expected variables in params and batch_stats alone'
        raise _mistake(own, text, f'{expected}, found {_listed(others)}')
    found = sorted({str(leaf.dtype) for leaf in jax.tree.leaves(variables)})
    if 'params' not in variables or found != ['float32']:
        raise _mistake(own, text, f'expected weights of float32, found {_listed(found)}')
    for train in (False, True):
        call = partial(module.apply, train=train, mutable=['batch_stats'] if train else False)
        # With the axis that there is in training, of one device.
        call = jax.vmap(call, (None, 0), axis_name=network.norm_axis)
        with _told(own, text, f'__call__ with train={train}'):
            outputs = jax.eval_shape(call, variables, x)
        logits = outputs[0] if train else outputs
        shape = getattr(logits, 'shape', None)
        if shape != (1, 2, network.num_classes) or not jnp.issubdtype(logits.dtype, jnp.floating):
            shown = type(logits).__name__ if shape is None else f'{logits.dtype} {list(shape[1:])}'
            images = ', '.join(map(str, image_shape))
            raise _mistake(
                own, text,
                f'expected logits [B, {network.num_classes}] of images [B, {images}], of B = 2 '
                f'found {shown}',
            )  # fmt: skip
