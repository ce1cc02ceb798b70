"""What speed.py and speed_gpu.py measure, each in a process of its own.

    python benchmarks/speed_workers.py NAME '{"setting": value, ...}'

runs the function NAME of this module with these settings, and prints what it returns as the last
line, JSON. A process of its own gives each measurement its own peak of memory and number of
devices, and none profits from what another has compiled. Networks are {'depth', 'width',
'members', 'batch', 'attack_steps'}, devices 'cpu' or 'gpu', times in seconds, memory in bytes.
"""

import atexit
import contextlib
import ctypes
import json
import os
import pathlib
import re
import resource
import runpy
import statistics
import subprocess
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from benchmarks.machine import ROOT
from benchmarks.speed_tables import COMPILED, EAGER, OURS

# Only `main_py` does without PyTorch: it is `main.py` as users run it.
if __name__ != '__main__' or sys.argv[1:2] != ['main_py']:
    import jax
    import jax.numpy as jnp
    import torch

    from benchmarks import adversarial_step, speed_attacks
    from benchmarks.speed_attacks import timed
    from ensadv import prng
    from ensadv.errors import UserError
    from ensadv.training import costs


def set_up(device):
    """Gets both libraries ready to compute on a device, as `main.py` and PyTorch's users do."""
    if device == 'cpu':
        jax.config.update('jax_platforms', 'cpu')
    elif jax.default_backend() == 'cpu' or not torch.cuda.is_available():
        raise UserError(
            '--device=gpu: JAX and PyTorch must both see it, and one of them does not: install '
            'their builds for CUDA'
        )
    torch.set_num_threads(os.cpu_count())
    torch.manual_seed(0)
    torch.backends.cudnn.benchmark = True
    # Of one network: batches of several sizes, with gradients and without.
    torch._dynamo.config.recompile_limit = 64
    # float32 is to mean float32, as it does in ensadv; bfloat16 does not pass through here.
    torch.backends.cudnn.allow_tf32 = False


def torch_device(device):
    """Returns PyTorch's name of a device."""
    return 'cuda' if device == 'gpu' else 'cpu'


def ours(network, changes=None):
    """Returns our side of a step, as training runs it."""
    return adversarial_step.Ours(adversarial_step.step_config(**network, changes=changes))


def step(network, repeats, num_steps=1, compiled=True, device='cpu', dtype='float32', check=None):
    """Times a step, ours and PyTorch's in turns, once both are seen to compute the same.

    Args:
      network: what is timed.
      repeats, num_steps: timed turns of each, and steps of a turn; of ours they are one call.
      compiled: whether to time torch.compile too.
      device, dtype: what both compute on, and in.
      check: the network on which gradients and all else is compared, in float32; None: `network`.
        Of `network` itself the losses of a step are always compared.

    Returns:
      'seconds': {side: [seconds per step of each turn]}, 'first': {side: seconds before the first
      step}, 'cores': {side: cores kept busy}, 'found': [[what, difference, allowed], ...]; or
      'out_of_memory': whose.
    """
    set_up(device)
    with _out_of_memory() as failure:
        side = ours(check or network)
        found = adversarial_step.compare(side, torch_device(device))
        adversarial_step.require(found)
        if check or dtype != 'float32':
            side = ours(network, {'model.dtype': dtype})
        peers = {EAGER: adversarial_step.Peer(side, device=torch_device(device))}
        if compiled:
            peers[COMPILED] = adversarial_step.Peer(side, True, torch_device(device))
        first, seconds, cores, timed = adversarial_step.measure(side, peers, repeats, num_steps)
        return {'seconds': seconds, 'first': first, 'cores': cores, 'found': found + timed}
    return failure


def alone(network, side, repeats=2, num_steps=1, device='cpu', changes=None):
    """Measures the memory and time of steps of one side, with nothing else in the process.

    Args:
      network, device: as in `step`.
      side: OURS, EAGER or COMPILED.
      repeats, num_steps: timed turns, and steps of each, after two steps without a clock.
      changes: fields of the config, of both sides.

    Returns:
      'seconds': [seconds per step of each turn], 'peak' and 'level': bytes at the most, and just
      before the first step; or 'out_of_memory': whose.
    """
    set_up(device)
    with _out_of_memory() as failure:
        stepped = ours(network, changes)
        if side == OURS:
            stepped.step(0)  # compiles
        else:
            stepped = adversarial_step.Peer(stepped, side == COMPILED, torch_device(device))
        level = _memory_level(side, device)
        for _ in range(2):
            stepped.step()
        peak = _memory_peak(side, device)
        seconds = [timed(stepped.step, num_steps) / num_steps for _ in range(repeats)]
        return {'seconds': seconds, 'peak': peak, 'level': level}
    return failure


def by_placement(network, repeats, num_steps, probe, device='cpu'):
    """Times our steps and PyTorch's in turns, and how far the cores are from each other.

    Args:
      network, device: as in `step`.
      repeats, num_steps: timed turns of each, and steps of a turn.
      probe: program that prints the nanoseconds of a cache line's way.

    Returns:
      [[side, the nanoseconds before and after the turn, seconds per step], ...]
    """
    set_up(device)
    side = ours(network)
    sides = {OURS: side, EAGER: adversarial_step.Peer(side)}
    for stepped in sides.values():
        stepped.step()
        stepped.step(num_steps)
    distance = lambda: float(subprocess.check_output([probe]))
    turns = []
    for _ in range(repeats):
        for name, stepped in sides.items():
            before = distance()
            seconds = timed(stepped.step, num_steps) / num_steps
            turns.append([name, [before, distance()], seconds])
    return turns


def sweep(networks, repeats, num_steps=1, changes=None, device='cpu'):
    """Times our steps of several networks in turns.

    Args:
      networks: what is timed.
      repeats, num_steps: timed calls of each, and steps of a call; before them a step without a
        clock.
      changes: fields of the config, for each network; None: none.
      device: what they run on.

    Returns:
      'seconds': for each network [seconds per step of each call], or who ran out of memory.
    """
    set_up(device)
    sides = []
    for network, change in zip(networks, changes or [None] * len(networks), strict=True):
        with _out_of_memory() as failure:
            side = ours(network, change)
            side.step(0)
            side.step()
            sides.append(side)
            continue
        sides.append(failure['out_of_memory'])
    seconds = [side if isinstance(side, str) else [] for side in sides]
    for _ in range(repeats):
        for side, times in zip(sides, seconds, strict=True):
            if not isinstance(side, str):
                times.append(timed(side.step, num_steps) / num_steps)
    return {'seconds': seconds}


def attack(device='cpu', **settings):
    """See `speed_attacks.attack`; `device` is named as here."""
    set_up(device)
    return speed_attacks.attack(device=torch_device(device), **settings)


def profile_attack(device='cpu', **settings):
    """See `speed_profile_attack.profile`."""
    from benchmarks import speed_profile_attack  # says to oneDNN what is for a profile alone

    set_up(device)
    return speed_profile_attack.profile(**settings)


def operations(network, device='cpu'):
    """Counts a step's operations (a multiply-add is 2), of all images and members.

    Returns:
      'operations': XLA's count for plain convolutions, as `ensadv.costs` has it.
    """
    set_up(device)
    # However they are computed: the kinds for the CPU do not do all the multiplications.
    config = adversarial_step.step_config(**network, changes={'model.conv': 'grouped'})
    dataset = {'num_classes': adversarial_step.CLASSES, 'image_shape': adversarial_step.SHAPE}
    dataset |= {'mean': adversarial_step.MEAN, 'std': adversarial_step.STD}
    return {'operations': network['batch'] * costs.operations(config, dataset).train_step}


def matrix_peak(size=8192, repeats=5, device='gpu'):
    """Measures operations per second of bfloat16 products of two [size, size] matrices in JAX."""
    set_up(device)
    count = 20
    a, b = (jax.random.normal(key, (size, size), jnp.bfloat16) for key in _keys(2))
    # Each product takes the last one, scaled so that it stays finite.
    product = jax.jit(lambda a, b: jax.lax.fori_loop(0, count, lambda _, c: c @ b / size**0.5, a))
    run = lambda: product(a, b).block_until_ready()
    run()
    seconds = statistics.median(timed(run) for _ in range(repeats))
    return {'operations_per_second': 2 * size**3 * count / seconds}


def _keys(n):
    return jax.random.split(prng.key(0), n)


def main_py(counts, arguments):
    """Runs `main.py` and writes what it did to the file `counts`, JSON.

    The file has 'requests', programs that were asked for, 'hits', those of them that the
    compilation cache had, and 'calls', [when it began, when it ended] in seconds of every call of
    the compiled steps.
    """
    import jax.monitoring

    from ensadv.training import train

    found = {'requests': 0, 'hits': 0, 'calls': []}
    loop = train._loop

    def watched(config, state, step, advance, log, writer):
        def timed_advance(*args):
            begin = time.monotonic()
            result = advance(*args)
            found['calls'].append((begin, time.monotonic()))
            return result

        loop(config, state, step, timed_advance, log, writer)

    train._loop = watched
    events = {
        '/jax/compilation_cache/compile_requests_use_cache': 'requests',
        '/jax/compilation_cache/cache_hits': 'hits',
    }

    def on_event(event, **_):
        if event in events:
            found[events[event]] += 1

    jax.monitoring.register_event_listener(on_event)
    atexit.register(lambda: pathlib.Path(counts).write_text(json.dumps(found)))
    sys.argv = ['main.py', *arguments]
    runpy.run_path(str(ROOT / 'main.py'), run_name='__main__')


@contextlib.contextmanager
def _out_of_memory():
    """Fills the dict that it gives with whose step ran out of the device's memory, if one does."""
    failure = {}
    try:
        yield failure
    except Exception as error:
        if not adversarial_step.is_out_of_memory(error):
            raise
        whose = EAGER if isinstance(error, torch.OutOfMemoryError) else OURS
        failure['out_of_memory'] = whose


def _status(field):
    """Returns a field of Linux's account of this process, in bytes; None elsewhere."""
    path = pathlib.Path('/proc/self/status')
    match = path.exists() and re.search(rf'^{field}:\s+(\d+) kB', path.read_text(), re.MULTILINE)
    return int(match[1]) * 1024 if match else None


def _memory_level(side, device):
    """Returns the memory in use, and forgets the peak until now where that can be done."""
    if device == 'gpu' and side == OURS:
        return jax.devices()[0].memory_stats()['bytes_in_use']
    if device == 'gpu':
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    with contextlib.suppress(OSError, AttributeError):
        # What was freed would else be used again, and not be seen to be.
        ctypes.CDLL(None).malloc_trim(0)
    with contextlib.suppress(OSError):
        pathlib.Path('/proc/self/clear_refs').write_text('5')
    return _status('VmRSS') or _resource_peak()


def _memory_peak(side, device):
    """Returns the most memory in use since `_memory_level`."""
    if device == 'gpu' and side == OURS:
        return jax.devices()[0].memory_stats()['peak_bytes_in_use']
    if device == 'gpu':
        return torch.cuda.max_memory_allocated()
    return _status('VmHWM') or _resource_peak()


def _resource_peak():
    # In KiB on Linux, in bytes on macOS.
    scale = 1 if sys.platform == 'darwin' else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale


WORKERS = {
    function.__name__: function
    for function in (
        step,
        alone,
        by_placement,
        sweep,
        attack,
        profile_attack,
        operations,
        matrix_peak,
        main_py,
    )
}


def main():
    name, settings = sys.argv[1], json.loads(sys.argv[2])
    if name == 'main_py':
        main_py(**settings)
        return
    try:
        result = WORKERS[name](**settings)
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    print(json.dumps(result))


if __name__ == '__main__':
    main()
