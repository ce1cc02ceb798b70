"""The one convolution everything runs through, and the only door to the CPU's own.

`flax.linen.Conv(..., conv_general_dilated=conv.get(kind))` takes it. The kinds compute the same
numbers and differ in what `vmap` over weights, which is how members are stacked, compiles to:

- 'grouped': `jax.lax.conv_general_dilated` itself, so one grouped convolution for all members.
- 'separate': one plain convolution per member, forward and in both gradients.
- 'onednn': the same, on a CPU by oneDNN where that is available.
- 'auto': 'onednn' on a CPU, 'grouped' elsewhere.
"""

import functools
from collections.abc import Callable
from typing import Any

from jax import lax

from ensadv.cpu import backend, conv, onednn

KINDS = ('auto', 'grouped', 'onednn', 'separate')


def get(kind: str) -> Callable[..., Any]:
    """Returns the convolution of this kind, called like `jax.lax.conv_general_dilated`."""
    functions = {
        'auto': _auto,
        'grouped': lax.conv_general_dilated,
        'onednn': functools.partial(conv.separate, by_onednn=True),
        'separate': conv.separate,
    }
    if kind not in functions:
        raise ValueError(f'kind of convolution is {kind!r}, must be one of {", ".join(KINDS)}')
    return functions[kind]


def library(kind: str, dtype: str) -> str:
    """Returns who computes the convolutions of this kind, in words; '' where that is no question.

    Args:
      kind: of KINDS.
      dtype: 'float32' or 'bfloat16'.
    """
    if not backend.is_cpu() or kind not in ('auto', 'onednn') or dtype != 'float32':
        return ''
    return "oneDNN's" if onednn.available() else "XLA's own, as oneDNN's do not work in this jaxlib"


def _auto(*args, **kwargs):
    # Asked for at each call, because asking starts the backend, which an import should not.
    return get('onednn' if backend.is_cpu() else 'grouped')(*args, **kwargs)
