"""The speed of ensadv against PyTorch's, foolbox's and torchattacks', in five tables, on a CPU.

    pip install -r requirements-benchmark.txt
    pip install --no-deps torchattacks==3.5.1
    python benchmarks/speed.py [--tables 1 2 3 4 5] [--out=FILE] [--workdir=DIR] [--quick]
    python benchmarks/speed.py --tables 1 --network DEPTH WIDTH MEMBERS BATCH

1. A whole adversarial training step, against PyTorch at its best doing the same work.
2. Robust accuracy of a trained network (--workdir; without it one on digits is trained first)
   under PGD-500 and IFGSM-20, against foolbox and torchattacks.
3. Our step over members, attack steps, batch and CPU devices.
4. `main.py` around the step: time per step, start, and second start.
5. Peak memory, and what rematerialisation saves and costs.

Tables are printed as they are done. All five together are also written to
benchmarks/results/speed_cpu.md; --out names another file, also for some of the tables. --quick is
a trial of this program with tiny networks. Exit code 1 where both sides do not compute the same or
something cannot be measured; a target that is missed is said in its row and is no error.

Every measurement is a process of its own (speed_workers.py). What is compared is timed in turns.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import sys
import tempfile

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import numpy as np

from benchmarks import machine, speed_tables
from benchmarks.machine import ROOT
from benchmarks.speed_children import measure, run_main, say
from benchmarks.speed_tables import EAGER, OURS

CACHE = ROOT / 'runs' / 'benchmark'  # what is trained or made once for all runs of this
RESULT = ROOT / 'benchmarks' / 'results' / 'speed_cpu.md'
REMAT = f'{OURS}, remat'


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
      peer: PyTorch's side of table 5, eager or compiled.
      check: network on which gradients are compared; None: each row's own.
      steps, steps_target: of table 1.
      attacks: of table 2: (name, images, turns, target).
      train_steps: of the network on digits.
      base: whose settings are varied in table 3.
      members, attack_steps, batches, devices: its values.
      main, log_every: of table 4: the network, and how often metrics are written (of 12 times).
      memory: networks of table 5.
    """

    device: str = 'cpu'
    dtype: str = 'float32'
    repeats: int = 9
    num_steps: int = 3
    compiled: bool = True
    peer: str = EAGER
    check: dict | None = None
    steps: tuple = (
        *(network(10, 2, k, 64) for k in (1, 2, 4)),
        *(network(16, 4, k, 32) for k in (1, 2)),
    )
    steps_target: float = 1.0
    attacks: tuple = (('pgd500', 200, 3, 3.0), ('ifgsm20', 360, 5, 1.2))
    train_steps: int = 300
    base: dict = dataclasses.field(default_factory=lambda: network(10, 2, 1, 32))
    members: tuple = (1, 2, 4)
    attack_steps: tuple = (1, 3, 7, 14)
    batches: tuple = (16, 32, 64, 128)
    devices: tuple = (1, 2, 4)
    main: dict = dataclasses.field(default_factory=lambda: network(16, 4, 1, 32))
    log_every: int = 2
    memory: tuple = (network(16, 4, 1, 32), network(10, 2, 2, 128))


_TINY = network(10, 1, 1, 8, 2)
QUICK = {
    'repeats': 1,
    'num_steps': 2,
    'compiled': False,
    'steps': (_TINY | {'members': 2},),
    'attacks': (('pgd100', 16, 1, 3.0), ('ifgsm3', 16, 1, 1.2)),
    'train_steps': 4,
    'base': _TINY,
    'members': (1, 2),
    'attack_steps': (),
    'batches': (),
    'devices': (2,),
    'main': _TINY,
    'log_every': 1,
    'memory': (_TINY,),
}


def step_rows(plan):
    """Measures table 1: [(network, what `speed_workers.step` returned), ...]."""
    rows = []
    for one in plan.steps:
        say(speed_tables.full_name(one))
        result = measure(
            plan.device, 'step', network=one, repeats=plan.repeats, num_steps=plan.num_steps,
            compiled=plan.compiled, dtype=plan.dtype, check=plan.check,
        )  # fmt: skip
        rows.append((one, result))
    return rows


def measure_attacks(plan, workdir):
    """Returns the lines of table 2, of a finished run, or of one on digits where that is None."""
    workdir = workdir or trained(plan)
    rows = []
    for name, n, repeats, target in plan.attacks:
        say(f'{name} on {workdir}')
        result = measure(
            plan.device, 'attack', workdir=str(workdir), name=name, n=n,
            repeats=repeats, compiled=plan.compiled,
        )  # fmt: skip
        rows.append((name, target, result))
    return speed_tables.attacks_table(rows)


def trained(plan):
    """Returns the workdir of a WRN-10-2 trained on digits, as the quickstart's SingleAdv is."""
    workdir = CACHE / f'digits_{plan.train_steps}'
    if not (workdir / 'snapshots' / str(plan.train_steps)).exists():
        say(f'training a network in {workdir}')
        fields = {
            'system': 'SingleAdv',
            'train.steps': plan.train_steps,
            'eval.attacks': ('clean',),
            'eval.long_attacks': (),
            'eval.inline': False,
        }
        run_main(workdir, 'configs/quickstart.py', fields)
    return workdir


def measure_scaling(plan):
    """Returns the lines of table 3."""
    rows = []

    def sweep(networks, **more):
        changes = [{'model.dtype': plan.dtype}] * len(networks)
        turns = {'repeats': plan.repeats, 'num_steps': plan.num_steps}
        settings = {'networks': networks, 'changes': changes} | turns
        return measure(plan.device, 'sweep', **settings, **more)['seconds']

    for name, field, values, target in (
        ('members', 'members', plan.members, 1.05),
        ('attack steps', 'attack_steps', plan.attack_steps, None),
        ('batch', 'batch', plan.batches, None),
    ):
        if not values:
            continue
        say(f'our step over {name}')
        rows.append((name, values, sweep([plan.base | {field: value} for value in values]), target))
    seconds = []
    for count in plan.devices:
        say(f'our step over {count} devices')
        flag = f'--xla_force_host_platform_device_count={count}'
        seconds += sweep([plan.base], xla=flag)
    if seconds:
        rows.append(('devices', plan.devices, seconds, None))
    text = f'{speed_tables.name_of(plan.base)}, unless said otherwise {plan.base["members"]} member'
    text += f', batch {plan.base["batch"]}, {plan.base["attack_steps"]} attack steps.'
    return [text, '', *speed_tables.scaling_table(rows)]


def measure_main(plan):
    """Returns the lines of table 4."""
    result = {'network': plan.main, 'log_every': plan.log_every, 'bare': [], 'runs': []}
    fields = {
        'data.name': 'npz',
        'data.pad': 4,
        'data.flip': True,
        'model.depth': plan.main['depth'],
        'model.width': plan.main['width'],
        'model.dtype': plan.dtype,
        'ensemble.size': plan.main['members'],
        'attack.steps': plan.main['attack_steps'],
        'train.batch_size': plan.main['batch'],
        'train.steps': 12 * plan.log_every,
        'train.steps_per_call': plan.log_every,
        'train.log_every': plan.log_every,
        'eval.inline': False,
    }
    changes = [{'data.pad': 4, 'data.flip': True, 'model.dtype': plan.dtype}]

    def bare():
        say('the bare step')
        turns = {'repeats': plan.repeats, 'num_steps': plan.log_every}
        settings = {'networks': [plan.main], 'changes': changes} | turns
        result['bare'] += measure(plan.device, 'sweep', **settings)['seconds']

    bare()
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        programs = folder / 'programs'
        fields['data.path'] = random_images(folder / 'random.npz', 4 * plan.main['batch'])
        for name in ('first', 'second'):
            say(f'main.py, {name} start')
            before = kept(programs)
            flags = [f'--compilation_cache={programs}']
            counts = folder / f'{name}.json'
            times = run_main(folder / name, 'configs/singleadv.py', fields, flags, counts)
            session = json.loads((folder / name / 'config.json').read_text())['sessions'][-1]
            result['runs'].append(
                json.loads(counts.read_text())
                | {'first_metrics': min(times.values())}
                | {'seconds_per_step': session['seconds_per_step']}
                | {'new_files': sorted(kept(programs) - before)}
            )
    bare()
    return speed_tables.main_table(result)


def kept(folder):
    """Returns the programs in a compilation cache, but not the times at which they were used."""
    return {path.name for path in folder.rglob('*') if path.is_file()} - {
        path.name for path in folder.rglob('*-atime')
    }


def random_images(path, n):
    """Writes n random training images of CIFAR's size, as `data.name=npz` takes them; the path."""
    rng, arrays = np.random.default_rng(0), {}
    for split, count in (('train', n), ('test', 16)):
        arrays[f'image_{split}'] = rng.integers(0, 256, (count, 32, 32, 3), np.uint8)
        # Every class is there, whatever n.
        arrays[f'label_{split}'] = np.arange(count, dtype=np.int32) % 10
    np.savez(path, **arrays)
    return path


def measure_memory(plan):
    """Returns the lines of table 5."""
    changes = {'model.dtype': plan.dtype}
    sides = {
        plan.peer: (plan.peer, changes),
        OURS: (OURS, changes),
        REMAT: (OURS, changes | {'model.remat': True}),
    }
    ours, rows = (OURS, REMAT), []
    for one in plan.memory:
        found = {}
        for name, (side, change) in sides.items():
            say(f'{name}: {speed_tables.full_name(one)}')
            found[name] = measure(
                plan.device, 'alone', network=one, side=side, num_steps=plan.num_steps,
                changes=change,
            )  # fmt: skip
        say(f'{" and ".join(ours)} in turns: {speed_tables.full_name(one)}')
        seconds = measure(
            plan.device, 'sweep', networks=[one] * len(ours), repeats=plan.repeats,
            num_steps=plan.num_steps, changes=[sides[name][1] for name in ours],
        )['seconds']  # fmt: skip
        seconds = {
            name: times
            for name, times in zip(ours, seconds, strict=True)
            if not isinstance(times, str)
        }
        seconds[plan.peer] = found[plan.peer].get('seconds')
        rows.append((one, found, seconds))
    return speed_tables.memory_table(rows)


TITLES = {
    '1': 'One whole adversarial training step',
    '2': 'Robust accuracy of a trained network',
    '3': 'Scaling',
    '4': 'Everything around the step',
    '5': 'Peak memory, and rematerialisation',
}


def run_tables(title, plan, tables, out):
    """Measures, prints and writes.

    Args:
      title: of the report.
      plan: what is measured.
      tables: [(heading, function of nothing that returns lines), ...].
      out: file for the report, or None.
    """
    load = os.getloadavg()[0]
    lines = [f'# {title}', '', *machine.describe(load)]
    turns = f'{plan.repeats} turns of {plan.num_steps} steps of each side'
    lines.append(f'- {turns}, {plan.dtype}; all seeds are 0')
    if load > 1 and plan.device == 'cpu':
        lines.append(
            "- **The machine was busy.** PyTorch's threads wait by spinning and lose far more than "
            'ensadv: the comparisons flatter ensadv.'
        )
    print('\n'.join(lines), flush=True)
    for heading, function in tables:
        say(heading)
        table = ['', f'## {heading}', '', *function()]
        print('\n'.join(table), flush=True)
        lines += table
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text('\n'.join(lines) + '\n')
        say(f'written: {out}')


def make_parser(description, tables):
    """Returns the parser of a program with these tables."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        '--tables', nargs='+', choices=tables, default=list(tables), metavar='TABLE',
        help=f'which, of {" ".join(tables)} (all)',
    )  # fmt: skip
    parser.add_argument('--out', type=pathlib.Path, metavar='FILE', help='write the report there')
    parser.add_argument('--workdir', metavar='DIR', help='a finished run of Wide ResNets, for 2')
    parser.add_argument('--quick', action='store_true', help='tiny networks: tries this program')
    return parser


def parse(parser):
    """Returns the flags; ends the program for what is missing, before anything is measured."""
    args = parser.parse_args()
    if missing := machine.missing_packages():
        parser.exit(
            2,
            f'{", ".join(missing)}: missing; pip install -r requirements-benchmark.txt; '
            'pip install --no-deps torchattacks==3.5.1\n',
        )
    if args.workdir and not (pathlib.Path(args.workdir) / 'config.json').exists():
        parser.exit(2, f'--workdir={args.workdir}: no run is here (no config.json)\n')
    return args


def measurements(plan, workdir):
    """Returns the five tables, {number: function of nothing that returns lines}."""
    return {
        '1': lambda: speed_tables.steps_table(step_rows(plan), plan.steps_target),
        '2': lambda: measure_attacks(plan, workdir),
        '3': lambda: measure_scaling(plan),
        '4': lambda: measure_main(plan),
        '5': lambda: measure_memory(plan),
    }


def main():
    parser = make_parser(__doc__, tuple(TITLES))
    parser.add_argument(
        '--network', nargs=4, type=int, metavar=('DEPTH', 'WIDTH', 'MEMBERS', 'BATCH'),
        help='of table 1, instead of its five',
    )  # fmt: skip
    args = parse(parser)
    os.environ['JAX_PLATFORMS'] = 'cpu'
    plan = Plan(**QUICK) if args.quick else Plan()
    if args.network:
        plan = dataclasses.replace(plan, steps=(network(*args.network),))
    whole = set(args.tables) == set(TITLES) and not args.quick and not args.network
    out = args.out or (RESULT if whole else None)
    functions = measurements(plan, args.workdir)
    tables = [(f'{number}. {TITLES[number]}', functions[number]) for number in args.tables]
    run_tables('Speed on a CPU', plan, tables, out)


if __name__ == '__main__':
    main()
