"""Networks that are given as functions: any code that JAX traces, from images to logits."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.extend
import jax.numpy as jnp
from jax import Array

from ensadv import prng
from ensadv.errors import UserError, line_of
from ensadv.models import ensemble

_LARGE = 1000  # values of a weight that is not compiled into a program


class Model(NamedTuple):
    """A function as a network with one member.

    Attributes:
      network: what is evaluated. Of a random function it is one draw, which depends on the seed and
        on each image's pixels alone; `network.draws` are further ones.
      weights: the arrays that the function closes over: the network's variables.
      num_classes: how many logits there are.
    """

    network: ensemble.Network
    weights: Sequence[Array]
    num_classes: int

    @property
    def is_random(self) -> bool:
        return self.network.draws is not None


def takes_key(predict: Callable[..., Any]) -> bool:
    """Returns whether a function takes a key beside the images: it has two parameters to be given.

    >>> takes_key(lambda images: images), takes_key(lambda images, key: images)
    (False, True)
    """
    try:
        parameters = inspect.signature(predict).parameters.values()
    except (TypeError, ValueError):  # of what is not written in Python nothing is known
        return False
    by_place = inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD
    return sum(p.kind in by_place and p.default is p.empty for p in parameters) == 2


def model(
    predict: Callable[..., Any], image_shape: tuple[int, ...], *, seed: int = 0, name: str
) -> Model:
    """Returns a function as a network, traced but not compiled.

    Args:
      predict: images float32 [B, H, W, C] in [0, 1] -> logits, or log-probabilities, [B, classes];
        or of images and a key, for a random one. It has to be a function of the images for any B,
        and the key is of `prng.key`'s kind. A random one is given each image by itself, [1, H, W,
        C], with a key of its own.
      image_shape: (H, W, C).
      seed: of a random function's draws.
      name: what errors call it.

    Raises:
      UserError: if it cannot be traced, or does not return logits.
    """
    random = takes_key(predict)
    if isinstance(predict, type(jax.jit(lambda: 0))):
        predict = predict.__wrapped__  # inside, what it closes over would not be seen

    def drawn(x, draw):
        key = jax.random.fold_in(prng.key(seed), draw)

        def one(image):
            return predict(image[None], prng.of_image(key, image))[0]

        return jax.vmap(one)(x)

    whole = drawn if random else lambda x, draw: predict(x)
    like = _like(jnp.zeros((2, *image_shape))), jax.ShapeDtypeStruct((), jnp.int32)
    _check(whole, like, predict, name, random)
    f, weights = _with_weights(whole, like)
    logits = lambda variables, x, draw: f(variables, x, jnp.int32(draw)).astype(jnp.float32)

    def draws(variables, x, count):
        # One draw's activations at a time.
        one = jax.checkpoint(lambda draw: logits(variables, x, draw))
        return jax.lax.map(one, 1 + jnp.arange(count))

    network = ensemble.Network(
        lambda variables, x: logits(variables, x, 0)[None],
        'logits',
        list(map(_like, weights)),
        draws if random else None,
    )
    return Model(network, weights, jax.eval_shape(whole, *like).shape[-1])


def _like(array: Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(array.shape, array.dtype)


def _check(f, like, predict, name, random) -> None:
    """Raises UserError unless f can be traced, and returns logits."""
    takes = 'images and a key, as it has two parameters' if random else 'images'
    shape = ', '.join(map(str, like[0].shape[1:]))
    expected = (
        f'expected a function that jax.jit takes, of {takes}: float32 [B, {shape}] -> logits '
        '[B, classes]'
    )
    try:
        found = jax.eval_shape(f, *like)
    except UserError:
        raise
    except Exception as error:  # the user's code may raise anything
        code = getattr(inspect.unwrap(predict), '__code__', None)
        where = line_of(error, code.co_filename) if code else ''
        cause = ' '.join(str(error).split())[:300]
        raise UserError(f'{name}: {expected}; {where}{type(error).__name__}: {cause}') from error
    is_logits = (
        isinstance(found, jax.ShapeDtypeStruct)
        and jnp.issubdtype(found.dtype, jnp.floating)
        and len(found.shape) == 2
        and found.shape[0] == like[0].shape[0]
        and found.shape[1] >= 2
    )
    if not is_logits:
        raise UserError(f'{name}: {expected}, at least two; of B = 2 images found {_shown(found)}')


def _shown(outputs: Any) -> str:
    if not hasattr(outputs, 'shape'):
        return type(outputs).__name__
    return f'{outputs.dtype} {list(outputs.shape)}'


def _with_weights(
    f: Callable[..., Array], like: Sequence[jax.ShapeDtypeStruct]
) -> tuple[Callable[..., Array], list[Array]]:
    """Returns f as a function of the large arrays that it closes over too, and these.

    They would be compiled into every program, once for each.

    Args:
      f: of arrays.
      like: its arguments, but for the number of examples.

    Returns:
      (weights, *arguments) -> what f gives; and the weights.
    """
    weights = [c for c in jax.make_jaxpr(f)(*like).consts if jnp.size(c) >= _LARGE]
    places = {id(weight): place for place, weight in enumerate(weights)}

    def of_weights(given, *arguments):
        traced = jax.make_jaxpr(f)(*map(_like, arguments))
        values = [given[places[id(c)]] if id(c) in places else c for c in traced.consts]
        closed = jax.extend.core.ClosedJaxpr(traced.jaxpr, values)
        (result,) = jax.extend.core.jaxpr_as_fun(closed)(*arguments)
        return result

    return of_weights, weights
