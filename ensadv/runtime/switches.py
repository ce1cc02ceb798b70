"""The environment's switches that change numbers: those overridden here, and those recorded.

A run may begin in one shell and go on in another, and its numbers are not to depend on that.
"""

import os
import re
from typing import Any

from absl import logging

from ensadv.errors import UserError
from ensadv.values import PRNG

# By JAX's names for them. With other values the same seed draws other numbers (the first three),
# numbers have other types or are made elsewhere, or JAX refuses or slows down what is right.
PINNED = {
    'jax_default_prng_impl': PRNG,
    'jax_threefry_partitionable': True,
    'jax_random_seed_offset': 0,
    'jax_enable_x64': False,
    'jax_default_device': None,
    'jax_disable_jit': False,
    'jax_numpy_dtype_promotion': 'standard',
    'jax_numpy_rank_promotion': 'allow',
}
# JAX's other switches are taken to alter rounding, since they alter what is compiled and how. But
# these are about what is kept, logged and checked, or about the devices, which are recorded.
_WITHOUT_EFFECT = re.compile(
    r'jax_(check|compilation_cache|cross_host|debug|dump|enable_compilation_cache|explain|include'
    r'|log|num_cpu_devices|persistent_cache|platform|raise_persistent|share_binary|trace'
    r'|transfer_guard|\w*timeout|\w*visible_devices)\w*'
)
_OF_LIBRARIES = re.compile(r'LIBTPU_INIT_ARGS|NVIDIA_TF32_OVERRIDE|(DNNL|ONEDNN)_\w+')
# Gives XLA:CPU's convolutions and products to Eigen, which gets some wrong where a thread's queue
# of tasks is full (benchmarks/full_queue.py).
_WRONG_ON_CPU = '--xla_cpu_experimental_ynn_fusion_type'


def pin() -> None:
    """Gives JAX's switches of `PINNED` their values; a line names those that had others.

    Before the first key is made and JAX's backend starts.

    Raises:
      UserError: if an environment variable of JAX has a value that JAX does not take, or XLA_FLAGS
        a flag with which a CPU computes wrong numbers.
    """
    if _WRONG_ON_CPU in os.environ.get('XLA_FLAGS', ''):
        raise UserError(
            f'XLA_FLAGS: expected without {_WRONG_ON_CPU}, with which a CPU computes wrong numbers'
        )
    jax = _jax()
    overridden = []
    for name, value in PINNED.items():
        if name not in jax.config.values:  # a version of JAX that does not have it
            continue
        found = jax.config.values[name]
        found = getattr(found, 'value', found)  # of an enum
        if found != value:
            jax.config.update(name, value)
            overridden.append(f'{name.upper()}={found} (here always {value})')
    if overridden:
        logging.warning(
            '%s: overridden, so that numbers belong to the run and not to the shell',
            ', '.join(overridden),
        )


def _jax() -> Any:
    try:
        import jax
    except ValueError as error:  # it reads its variables when it is imported
        raise UserError(f'JAX refuses an environment variable: {error}') from error
    return jax


def recorded() -> dict[str, Any]:
    """Returns 'xla_flags' and, by name, the other variables that are set and alter rounding."""
    known = _jax().config.values

    def alters_rounding(name):
        option = name.lower()
        if option in known:
            return option not in PINNED and not _WITHOUT_EFFECT.fullmatch(option)
        return _OF_LIBRARIES.fullmatch(name)

    variables = sorted(os.environ.items())
    return {
        'xla_flags': os.environ.get('XLA_FLAGS', ''),
        'switches': {name: value for name, value in variables if alters_rounding(name)},
    }
