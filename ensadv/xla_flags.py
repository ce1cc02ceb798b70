"""XLA's flags that make the programs faster on a CPU; set before JAX starts its backend."""

import importlib.metadata
import importlib.util
import os

# By default this XLA gives convolutions to a library, YNN, that keeps 1.35 of two cores busy in an
# adversarial step of a WRN-10-2. Its own kernels keep 1.94 busy, and take 0.90 s instead of 1.34 s
# (medians of 5; AMD EPYC, jaxlib 0.10.2; measured before conv.py had convolutions of its own).
_FLAG = '--xla_cpu_experimental_ynn_fusion_type'
# XLA ends a process that names a flag it does not know.
_KNOWN_TO = ('0.10.',)


def set_for_cpu() -> None:
    """Sets what XLA_FLAGS leaves open, where nothing but a CPU can be what JAX computes on."""
    flags = os.environ.get('XLA_FLAGS', '')
    known = importlib.metadata.version('jaxlib').startswith(_KNOWN_TO)
    if _FLAG in flags or not known or not _only_cpu():
        return
    os.environ['XLA_FLAGS'] = f'{flags} {_FLAG}='.strip()


def _only_cpu() -> bool:
    """Returns whether JAX is told to use the CPU, or has no other backend installed."""
    if platforms := os.environ.get('JAX_PLATFORMS'):
        return platforms == 'cpu'
    plugins = importlib.metadata.entry_points(group='jax_plugins')
    return not plugins and importlib.util.find_spec('libtpu') is None
