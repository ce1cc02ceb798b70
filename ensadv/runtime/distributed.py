"""Devices and processes: the only file that names pmap, its axis, jax.distributed, and where
arrays live."""

import contextlib
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tqdm
from absl import logging
from etils import epath
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ensadv.errors import TrainingError, UserError
from ensadv.runtime import peers

AXIS = 'devices'
_JOIN_SECONDS = 300  # for all processes to start
_SHARED_SECONDS = 60  # for a file to be seen by all hosts
_peers = peers.Peers()  # this process alone, until it has joined the others


def take_device(kind: str) -> None:
    """Has JAX compute on the CPU if that is asked for, whatever else is there.

    Before JAX looks for devices: it then takes no accelerator, which may be another process's.

    Args:
      kind: config.device.
    """
    if kind == 'cpu':
        jax.config.update('jax_platforms', 'cpu')


def check_device(kind: str) -> None:
    """Checks that JAX computes on the kind of device that is asked for.

    Args:
      kind: config.device.

    Raises:
      UserError: if it does not, or finds no device at all.
    """
    platforms = jax.config.jax_platforms
    told = f' (JAX_PLATFORMS={platforms})' if platforms else ''
    try:
        found = jax.devices()[0].platform
    except Exception as error:  # whatever JAX and its plugins raise
        cause = ' '.join(f'{error}'.split())[:300] or type(error).__name__
        raise UserError(f'device: JAX finds none to compute on{told}: {cause}') from error
    if kind not in ('auto', found):
        raise UserError(
            f'device: expected {kind}, found {found}{told}; --config.device=auto takes what is '
            'there. "Install" in README.md names the build of JAX that an accelerator needs'
        )


def initialize() -> None:
    """Joins the other processes of this command, if there are any; before JAX's first computation.

    Cloud TPU pods, Slurm and Open MPI say how many there are. Elsewhere JAX_COORDINATOR_ADDRESS
    (process 0's host and a free port there), JAX_NUM_PROCESSES and JAX_PROCESS_ID do.

    Raises:
      UserError: if the variables make no sense, or the processes do not find each other.
    """
    global _peers
    address, count, index = _environment_settings()
    if count is None:
        count = _detected_count()
    if count == 1:
        return
    # It would take SIGTERM for itself.
    jax.config.update('jax_enable_preemption_service', False)
    try:
        jax.distributed.initialize(address, count, index, initialization_timeout=_JOIN_SECONDS)
        found = jax.process_count()
    except Exception as error:
        cause = ' '.join(f'{error}'.split())[:300]
        raise UserError(
            f'the {count} processes of this command did not find each other within '
            f'{_JOIN_SECONDS} s: start all of them, with the same command ({cause})'
        ) from error
    if found != count:
        raise UserError(f'expected {count} processes, found {found} with devices')
    from jax._src import distributed  # no public way leads to the key-value store

    _peers = peers.Peers(distributed.global_state.client, jax.process_index(), count)
    if not is_main():
        # Process 0 tells what there is to tell.
        logging.set_verbosity(logging.WARNING)


def _environment_settings() -> tuple[str | None, int | None, int | None]:
    """Returns the coordinator's address, the number of processes and this one's, as told."""
    address = os.environ.get('JAX_COORDINATOR_ADDRESS')
    numbers = []
    for name, allowed in (('JAX_NUM_PROCESSES', 'from 1'), ('JAX_PROCESS_ID', 'from 0')):
        text = os.environ.get(name)
        if text is not None and not text.isdecimal():
            raise UserError(f'{name}: expected a whole number {allowed}, found {text!r}')
        numbers.append(None if text is None else int(text))
    count, index = numbers
    if count == 1 or (count is None and index is None):
        return address, count, None
    if not address or count is None or index is None or not 0 <= index < count:
        raise UserError(
            'JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES, JAX_PROCESS_ID: expected all three, the '
            f'last from 0 and below the second, found {address!r}, {count}, {index}'
        )
    return address, count, index


def _detected_count() -> int:
    """Returns how many processes the cluster runs; 1 where there is no cluster.

    Asks what `jax.distributed.initialize` asks: with one process that is not to be called, since
    it may wait for a coordinator that a single machine does not have.
    """
    from jax._src.clusters import ClusterEnv

    try:
        for kind in ClusterEnv._cluster_types:
            if not kind.opt_in_only_method and kind.is_env_present():
                return kind.get_process_count()
    except Exception as error:
        raise UserError(
            'cannot find out how many processes run this command '
            f'({type(error).__name__}: {error}); JAX_NUM_PROCESSES=1 says that it is one'
        ) from error
    return 1


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Does a job on all processes: what fails on one of them ends all, with one line.

    Alone, it does nothing. Otherwise errors with an `exit_code` do not come out of it: it ends
    this process.
    """
    if num_processes() == 1:
        yield
        return
    try:
        yield
    except SystemExit:
        _peers.close(timeout=60)
        raise
    except BaseException as error:
        if not isinstance(error, (UserError, TrainingError)) and isinstance(error, Exception):
            # Whatever JAX, Orbax and the storage raise where another process is gone.
            _peers.end_if_one_died()
        if (code := getattr(error, 'exit_code', None)) is not None:
            _peers.end(str(error), code)
        traceback.print_exc()
        sys.stderr.flush()
        lines = f'{error}'.strip().splitlines() or ['']
        message = f'process {_peers.index}: {type(error).__name__}: {lines[0][:300]}'
        _peers.end(message, 130 if isinstance(error, KeyboardInterrupt) else 1)
    _peers.close()


def num_processes() -> int:
    """Returns how many processes run this command."""
    return _peers.count


def is_main() -> bool:
    """Returns whether this process decides, writes files and tells the user."""
    return _peers.index == 0


def tell(line: str) -> None:
    """Tells the user a line on process 0: in the log, and on a terminal, whose log has less."""
    if not is_main():
        return
    if logging.get_verbosity() >= logging.INFO:
        logging.info('%s', line)
    elif sys.stderr.isatty():
        tqdm.tqdm.write(line, file=sys.stderr)  # above a bar that may be there


def agree(value: Any) -> Any:
    """Returns process 0's value on all processes; alone, `value` itself.

    For whatever depends on the disk, the clock or chance.

    Args:
      value: what JSON can hold; among several processes it returns tuples as lists.
    """
    return _peers.gather('agree', value if is_main() else None)[0]


def any_process(flag: bool) -> bool:
    """Returns on all processes whether `flag` is true on one of them."""
    return any(_peers.gather('any', flag))


def barrier(name: str) -> None:
    """Waits until all processes are here."""
    _peers.gather(name)


def check_same(what: str, value: Any) -> None:
    """Checks that all processes have the same value.

    Args:
      what: its name, for the error.
      value: what JSON can hold.

    Raises:
      UserError: on all of them, if one has another than process 0.
    """
    first, *others = _peers.gather('same', value)
    if different := [i for i, other in enumerate(others, 1) if other != first]:
        raise UserError(f'{what}: found another on process {_text(different)} than on process 0')


def check_shared(path: epath.Path) -> None:
    """Checks that all processes see a file that process 0 has written.

    Raises:
      UserError: on all of them, if one does not.
    """
    if num_processes() == 1:
        return
    barrier('written')
    until = time.monotonic() + _SHARED_SECONDS  # network file systems may be late
    while not (seen := path.exists()) and time.monotonic() < until:
        time.sleep(1)
    if blind := [i for i, sees in enumerate(_peers.gather('seen', seen)) if not sees]:
        raise UserError(
            f'{path}: process 0 wrote it, and process {_text(blind)} does not see it; expected a '
            'workdir that all hosts share'
        )


@contextlib.contextmanager
def failing_together() -> Iterator[None]:
    """Lets an error out only where all processes have one; what one has alone ends all.

    For errors that do not end the program.
    """
    try:
        yield
    except (UserError, TrainingError) as error:
        try:
            _peers.gather('failed', timeout=60)
        except Exception:
            _peers.end(str(error), error.exit_code)
        raise


def _text(numbers: list[int]) -> str:
    return ', '.join(map(str, numbers))


def num_devices() -> int:
    """Returns over how many devices, of all processes, a step's batch is divided."""
    return jax.device_count()


def replicated() -> NamedSharding:
    """Returns the sharding of an array that every device holds whole."""
    # One process's after the other's, as pmap has them.
    devices = [
        device
        for index in range(jax.process_count())
        for device in jax.local_devices(process_index=index)
    ]
    return NamedSharding(Mesh(np.asarray(devices), (AXIS,)), PartitionSpec())


def replicate(tree: Any) -> Any:
    """Puts every leaf whole on every device, once, so that no later call has to.

    All processes have the same values.
    """
    sharding = replicated()
    if num_processes() == 1:
        return jax.device_put(tree, sharding)

    def put(leaf):
        if isinstance(leaf, Array) and not leaf.is_fully_addressable:
            return leaf  # made of replicated arrays, and so replicated
        # A device_put to all devices would compare what all processes have, at their expense.
        shards = [jax.device_put(leaf, device) for device in jax.local_devices()]
        return jax.make_array_from_single_device_arrays(shards[0].shape, sharding, shards)

    return jax.tree.map(put, tree)


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


def places_here(batch_size: int) -> np.ndarray:
    """Returns the places in the global batch that `my_share` gives each device of this process.

    Returns:
      int32 [local devices, batch_size / devices].
    """
    local = jax.local_device_count()
    places = np.arange(batch_size, dtype=np.int32).reshape(num_devices(), -1)
    return places[jax.process_index() * local :][:local]


def run_on_devices(
    f: Callable[..., Any], num_args: int, *, donate_first: bool = False, divided: bool = False
) -> Callable[..., Any]:
    """Compiles f to run on every device with the same arguments; f asks `my_share` for its part.

    Args:
      f: takes `num_args` trees, all replicated, and returns the same on every device (after
        `mean_over_devices`).
      num_args: how many.
      donate_first: whether the first argument's memory becomes the result's.
      divided: whether f takes one more tree, of which each device has a part of its own: the
        leaves that are given, [local devices, ...], are in the order of `places_here`.
    """
    # pmap wants one argument with a device axis, and donates by position only.
    mapped = jax.pmap(
        lambda *args: f(*args[:-1]),
        axis_name=AXIS,
        in_axes=(*[None] * num_args, *[0] * divided, 0),
        out_axes=None,
        donate_argnums=(0,) if donate_first else (),
    )
    unused = np.zeros(jax.local_device_count(), np.int8)
    if num_processes() == 1:
        return lambda *args: mapped(*args, unused)
    sharding = replicated()

    def global_array(leaf):
        # Among several processes pmap returns arrays of this process alone. As parts of arrays of
        # all, without a copy, Orbax takes them, and pmap as its next argument.
        shards = [shard.data for shard in leaf.addressable_shards]
        return jax.make_array_from_single_device_arrays(leaf.shape, sharding, shards)

    return lambda *args: jax.tree.map(global_array, mapped(*args, unused))


def map_examples(f: Callable[..., Any], num_shared: int) -> Callable[..., Any]:
    """Compiles f(*shared, batch) so that every device computes its share of the batch's examples.

    Args:
      f: takes `num_shared` replicated trees, then one whose leaves are [B, ...]; returns another
        such. An example's result may depend on that example alone.
      num_shared: how many.

    Returns:
      The function, whose batch is of NumPy arrays with B divisible by the devices, and so is its
      result. All processes give the whole batch, and get the whole result.
    """
    several = num_processes() > 1

    def gathered(*args):
        result = f(*args)
        if not several:
            return result
        return jax.tree.map(lambda leaf: jax.lax.all_gather(leaf, AXIS), result)

    mapped = jax.pmap(
        gathered,
        axis_name=AXIS,
        in_axes=(*[None] * num_shared, 0),
        out_axes=None if several else 0,
    )
    local = jax.local_device_count()
    first = jax.process_index() * local

    def call(*args):
        def mine(leaf):
            return leaf.reshape(num_devices(), -1, *leaf.shape[1:])[first : first + local]

        result = jax.device_get(mapped(*args[:-1], jax.tree.map(mine, args[-1])))
        return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), result)

    return call
