"""The speed of ensadv against PyTorch's, foolbox's and torchattacks', on a CPU or a GPU.

    pip install -r requirements-benchmark.txt
    pip install --no-deps torchattacks==3.5.1
    python benchmarks/speed.py [--tables 1 2 3] [--workdir=DIR] [--quick]
    python benchmarks/speed.py --tables 1 --network DEPTH WIDTH MEMBERS BATCH
    python benchmarks/speed.py --device=gpu [--tables 1 2 3 4] ...

1. A whole adversarial training step, against PyTorch at its best doing the same work.
2. Attacks on a trained network, PGD-500 and IFGSM-20, against foolbox and torchattacks. Needs
   --workdir, a finished run of Wide ResNets; left out without.
3. Peak memory of a step, and what rematerialisation saves and costs. For Linux.
4. On a GPU: one grouped convolution against one for each member (`model.conv`).

Prints each table when it is measured. --quick tries this program with tiny networks. Exit code 1
where both sides do not compute the same or something cannot be measured. Every measurement is a
process of its own (speed_workers.py); tables 1 and 2 time both sides in turns. Nothing else should
run beside it.

On a GPU training computes in bfloat16, PyTorch's by autocast, and attacks in float32 without TF32.
JAX and PyTorch share a process, and so a CUDA: PyTorch's default build brings 13, which
"jax[cuda13]" takes.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from benchmarks import machine, speed_tables
from benchmarks.speed_tables import COMPILED, EAGER, KINDS, OURS

WORKERS = machine.ROOT / 'benchmarks' / 'speed_workers.py'
START = time.monotonic()
TITLES = {
    '1': 'One whole adversarial training step',
    '2': 'Attacks on a trained network',
    '3': 'Peak memory, and rematerialisation',
    '4': 'Grouped or separate convolutions',
}


def network(depth, width, members, batch, attack_steps=7):
    """Returns a network as the workers take it."""
    return locals()


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is measured.

    Attributes:
      device, dtype: what is computed on ('cpu' or 'gpu'), and in.
      repeats: timed turns of each side.
      num_steps: steps of a turn; of ours they are one call, as `train.steps_per_call` makes them.
      compiled: whether torch.compile is tried.
      check: network on which gradients are compared; None: each row's own.
      steps: networks of table 1.
      attacks: of table 2: (name, images, turns).
      memory: networks of table 3.
    """

    device: str = 'cpu'
    dtype: str = 'float32'
    repeats: int = 9
    num_steps: int = 3
    compiled: bool = True
    check: dict | None = None
    steps: tuple = (
        *(network(10, 2, k, 64) for k in (1, 2, 4)),
        *(network(16, 4, k, 32) for k in (1, 2)),
    )
    attacks: tuple = (('pgd500', 200, 3), ('ifgsm20', 360, 5))
    memory: tuple = (network(16, 4, 1, 32), network(10, 2, 2, 128))


GPU = {
    'device': 'gpu',
    'dtype': 'bfloat16',
    'repeats': 5,
    'num_steps': 10,
    # Deep networks in float32 amplify rounding beyond any tolerance that would find mistakes.
    'check': network(16, 4, 2, 32),
    'steps': tuple(network(28, 10, k, 128) for k in (1, 2, 4)),
    'attacks': (('pgd500', 1000, 1), ('ifgsm20', 2000, 3)),
    'memory': (network(28, 10, 1, 128), network(28, 10, 2, 128)),
}
QUICK = {
    'repeats': 1,
    'num_steps': 2,
    'compiled': False,
    'check': network(10, 1, 1, 8, 2),
    'steps': (network(10, 1, 2, 8, 2),),
    'attacks': (('pgd100', 16, 1), ('ifgsm3', 16, 1)),
    'memory': (network(10, 1, 1, 8, 2),),
}


def say(text):
    """Tells on stderr what is under way."""
    print(f'{time.monotonic() - START:6.0f} s  {text}', file=sys.stderr, flush=True)


def measure(plan, function, /, **settings):
    """Returns what a function of speed_workers.py returns, None where memory was too small for it.

    Any other failure ends the program, with exit code 2 for a user's mistake and 1 for all else.
    """
    settings = json.dumps(settings | {'device': plan.device})
    with tempfile.TemporaryDirectory() as compiled:
        env = os.environ | {'TF_CPP_MIN_LOG_LEVEL': '2', 'TORCHINDUCTOR_CACHE_DIR': compiled}
        # On a GPU PyTorch computes, too, and JAX is not to take most of its memory beforehand.
        env |= {'XLA_PYTHON_CLIENT_PREALLOCATE': 'false', 'XLA_PYTHON_CLIENT_MEM_FRACTION': '.95'}
        if plan.device == 'cpu':
            env['JAX_PLATFORMS'] = 'cpu'
        # It would let one row profit from another.
        env.pop('JAX_COMPILATION_CACHE_DIR', None)
        command = [sys.executable, WORKERS, function, settings]
        child = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True, check=False)
    if child.returncode == 0:
        return json.loads(child.stdout.splitlines()[-1])
    sys.exit(2 if child.returncode == 2 else 1)


def measure_steps(plan):
    """Returns the lines of table 1."""
    rows = []
    for one in plan.steps:
        say(speed_tables.full_name(one))
        result = measure(
            plan, 'step', network=one, repeats=plan.repeats, num_steps=plan.num_steps,
            compiled=plan.compiled, dtype=plan.dtype, check=plan.check,
        )  # fmt: skip
        rows.append((one, result))
    return speed_tables.steps_table(rows)


def measure_attacks(plan, workdir):
    """Returns the lines of table 2."""
    rows = []
    for name, n, repeats in plan.attacks:
        say(f'{name} on {workdir}')
        result = measure(
            plan, 'attack', workdir=str(workdir), name=name, n=n, repeats=repeats,
            compiled=plan.compiled,
        )  # fmt: skip
        rows.append((name, result))
    return speed_tables.attacks_table(rows)


def measure_alone(plan, one, side, **changes):
    """Returns what `speed_workers.alone` does, with these fields of the config."""
    say(f'{side}, {changes}: {speed_tables.full_name(one)}')
    return measure(
        plan, 'alone', network=one, side=side, repeats=plan.repeats, num_steps=plan.num_steps,
        changes={'model.dtype': plan.dtype} | changes,
    )  # fmt: skip


def measure_memory(plan):
    """Returns the lines of table 3."""
    peer = COMPILED if plan.compiled and plan.device == 'gpu' else EAGER
    rows = []
    for one in plan.memory:
        sides = {side: measure_alone(plan, one, side) for side in (peer, OURS)}
        sides[f'{OURS}, remat'] = measure_alone(plan, one, OURS, **{'model.remat': True})
        rows.append((one, sides))
    return speed_tables.memory_table(rows)


def measure_convolutions(plan):
    """Returns the lines of table 4."""
    changes = [{'model.conv': kind} for kind in KINDS]
    rows = [(one, [measure_alone(plan, one, OURS, **c) for c in changes]) for one in plan.steps]
    return speed_tables.convolutions_table(rows)


def run_tables(plan, tables):
    """Measures and prints; tables: [(heading, function of nothing that returns lines), ...]."""
    load = os.getloadavg()[0]
    lines = [f'# Speed on a {plan.device.upper()}', '', *machine.describe(load)]
    turns = f'{plan.repeats} turns of {plan.num_steps} steps of each side'
    lines.append(f'- {turns}, {plan.dtype}; all seeds are 0')
    print('\n'.join(lines), flush=True)
    for heading, function in tables:
        say(heading)
        print('\n'.join(['', f'## {heading}', '', *function()]), flush=True)


def parse_args():
    """Returns the flags; ends the program for what is missing, before anything is measured."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--device', choices=('cpu', 'gpu'), default='cpu', help='cpu')
    parser.add_argument(
        '--tables', nargs='+', choices=TITLES, metavar='TABLE', help='which; all of the device'
    )
    parser.add_argument('--workdir', metavar='DIR', help='a finished run of Wide ResNets, for 2')
    parser.add_argument('--quick', action='store_true', help='tiny networks: tries this program')
    parser.add_argument(
        '--network', nargs=4, type=int, metavar=('DEPTH', 'WIDTH', 'MEMBERS', 'BATCH'),
        help='of table 1, instead of its own',
    )  # fmt: skip
    args = parser.parse_args()
    if missing := machine.missing_packages():
        parser.exit(
            2,
            f'{", ".join(missing)}: missing; pip install -r requirements-benchmark.txt; '
            'pip install --no-deps torchattacks==3.5.1\n',
        )
    if args.workdir and not (pathlib.Path(args.workdir) / 'config.json').exists():
        parser.exit(2, f'--workdir={args.workdir}: no run is here (no config.json)\n')
    if not args.tables:
        args.tables = list(TITLES if args.device == 'gpu' else '123')
    if not args.workdir and '2' in args.tables:
        say('without --workdir table 2 is left out')
        args.tables.remove('2')
    return args


def main():
    args = parse_args()
    plan = Plan(**(GPU if args.device == 'gpu' else {}) | (QUICK if args.quick else {}))
    if args.network:
        plan = dataclasses.replace(plan, steps=(network(*args.network),))
    functions = {
        '1': lambda: measure_steps(plan),
        '2': lambda: measure_attacks(plan, args.workdir),
        '3': lambda: measure_memory(plan),
        '4': lambda: measure_convolutions(plan),
    }
    run_tables(plan, [(f'{n}. {TITLES[n]}', functions[n]) for n in args.tables])


if __name__ == '__main__':
    main()
