"""The one switch of this room: whether XLA's CPU backend computes."""

import jax


def is_cpu() -> bool:
    """Returns whether a CPU computes, and so whether anything in this room does anything.

    Where it is false the core is what TPUs and GPUs get: members stacked by `vmap`, grouped
    convolutions, whole batches, in the order that XLA chooses. Tests make it false on a CPU.
    """
    return jax.default_backend() == 'cpu'
