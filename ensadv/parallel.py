"""Devices: the only file that names pmap, its axis, and where arrays live."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

AXIS = 'devices'


def num_devices() -> int:
    """Returns over how many devices a step's batch is divided."""
    return jax.device_count()


def replicated() -> NamedSharding:
    """Returns the sharding of an array that every device holds whole."""
    return NamedSharding(Mesh(np.asarray(jax.devices()), (AXIS,)), PartitionSpec())


def replicate(tree: Any) -> Any:
    """Puts every leaf whole on every device, once, so that no later call has to."""
    return jax.device_put(tree, replicated())


def mean_over_devices(tree: Any) -> Any:
    """Averages a tree over the devices; inside `run_on_devices` only."""
    return jax.lax.pmean(tree, AXIS)


def max_over_devices(tree: Any) -> Any:
    """Takes each number's largest value over the devices; inside `run_on_devices` only."""
    return jax.lax.pmax(tree, AXIS)


def my_share(batch_size: int) -> Array:
    """Returns this device's places in the global batch, int32 [batch_size / devices].

    Inside `run_on_devices` only. `batch_size` is divisible by the number of devices.
    """
    share = batch_size // num_devices()
    return jax.lax.axis_index(AXIS) * share + jnp.arange(share)


def run_on_devices(
    f: Callable[..., Any], num_args: int, *, donate_first: bool = False
) -> Callable[..., Any]:
    """Compiles f to run on every device with the same arguments; f asks `my_share` for its part.

    Args:
      f: takes `num_args` trees, all replicated, and returns the same on every device (after
        `mean_over_devices`).
      num_args: how many.
      donate_first: whether the first argument's memory becomes the result's.
    """
    # pmap wants one argument with a device axis, and donates by position only.
    mapped = jax.pmap(
        lambda *args: f(*args[:-1]),
        axis_name=AXIS,
        in_axes=(*[None] * num_args, 0),
        out_axes=None,
        donate_argnums=(0,) if donate_first else (),
    )
    unused = np.zeros(jax.local_device_count(), np.int8)
    return lambda *args: mapped(*args, unused)


def map_examples(f: Callable[..., Any], num_shared: int) -> Callable[..., Any]:
    """Compiles f(*shared, batch) so that every device computes its share of the batch's examples.

    Args:
      f: takes `num_shared` replicated trees, then one whose leaves are [B, ...]; returns another
        such. An example's result may depend on that example alone.
      num_shared: how many.

    Returns:
      The function, whose batch is of NumPy arrays with B divisible by the devices, and so is its
      result.
    """
    devices = num_devices()
    mapped = jax.pmap(f, axis_name=AXIS, in_axes=(*[None] * num_shared, 0))

    def call(*args):
        batch = jax.tree.map(lambda leaf: leaf.reshape(devices, -1, *leaf.shape[1:]), args[-1])
        result = jax.device_get(mapped(*args[:-1], batch))
        return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), result)

    return call
