"""What speed.py measures, each in a process of its own.

    python benchmarks/speed_workers.py NAME '{"setting": value, ...}'

runs the function NAME of this module with these settings, and prints what it returns as the last
line, JSON; null where the device's memory is too small. A process of its own gives each measurement
its own peak of memory, and none profits from what another has compiled. Networks are {'depth',
'width', 'members', 'batch', 'attack_steps'}, devices 'cpu' or 'gpu', times in seconds, memory in
bytes.
"""

import ctypes
import json
import os
import pathlib
import re
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import jax
import torch

from benchmarks import adversarial_step, speed_attacks
from benchmarks.speed_attacks import timed
from benchmarks.speed_tables import COMPILED, EAGER, OURS
from ensadv.errors import UserError


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
    """Times a step, ours and PyTorch's in turns, after both are seen to compute the same.

    Args:
      network: what is timed.
      repeats, num_steps: timed turns of each, and steps of a turn; of ours they are one call.
      compiled: whether to time torch.compile too.
      device, dtype: what both compute on, and in.
      check: the network on which gradients and all else is compared, in float32; None: `network`.
        Of `network` itself the losses of a step are always compared.

    Returns:
      'seconds': {side: [seconds per step of each turn]}, 'found': [[what, difference, allowed],
      ...].
    """
    side = ours(check or network)
    found = adversarial_step.compare(side, torch_device(device))
    adversarial_step.require(found)
    if check or dtype != 'float32':
        side = ours(network, {'model.dtype': dtype})
    peers = {EAGER: adversarial_step.Peer(side, device=torch_device(device))}
    if compiled:
        peers[COMPILED] = adversarial_step.Peer(side, True, torch_device(device))
    seconds, of_steps = adversarial_step.measure(side, peers, repeats, num_steps)
    return {'seconds': seconds, 'found': found + of_steps}


def alone(network, side, repeats=2, num_steps=1, device='cpu', changes=None):
    """Measures the memory and time of steps of one side, with nothing else in the process.

    Args:
      network, device: as in `step`.
      side: OURS, EAGER or COMPILED.
      repeats, num_steps: timed turns, and steps of each, after two steps without a clock.
      changes: fields of the config, of both sides.

    Returns:
      'seconds': [seconds per step of each turn], 'peak' and 'level': bytes at the most, and just
      before the first step.
    """
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


def attack(device='cpu', **settings):
    """See `speed_attacks.attack`; `device` is named as here."""
    return speed_attacks.attack(device=torch_device(device), **settings)


def _memory_level(side, device):
    """Returns the memory in use, and has the peak be counted from now on."""
    if device == 'gpu' and side == OURS:
        return jax.devices()[0].memory_stats()['bytes_in_use']
    if device == 'gpu':
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    # What was freed would else be used again, and not be seen to be.
    ctypes.CDLL(None).malloc_trim(0)
    pathlib.Path('/proc/self/clear_refs').write_text('5')
    return _status('VmRSS')


def _memory_peak(side, device):
    """Returns the most memory in use since `_memory_level`."""
    if device == 'gpu' and side == OURS:
        return jax.devices()[0].memory_stats()['peak_bytes_in_use']
    if device == 'gpu':
        return torch.cuda.max_memory_allocated()
    return _status('VmHWM')


def _status(field):
    """Returns a field of Linux's account of this process, in bytes."""
    text = pathlib.Path('/proc/self/status').read_text()
    return int(re.search(rf'^{field}:\s+(\d+) kB', text, re.MULTILINE)[1]) * 1024


WORKERS = {one.__name__: one for one in (step, alone, attack)}


def main():
    name, settings = sys.argv[1], json.loads(sys.argv[2])
    try:
        set_up(settings['device'])
        result = WORKERS[name](**settings)
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    except Exception as error:
        if not adversarial_step.is_out_of_memory(error):
            raise
        result = None
    print(json.dumps(result))


if __name__ == '__main__':
    main()
