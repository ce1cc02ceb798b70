"""The speed of ensadv against PyTorch's, foolbox's and torchattacks' on a GPU, in bfloat16.

    pip install -r requirements-benchmark.txt
    pip install --no-deps torchattacks==3.5.1
    pip install -U "jax[cuda13]>=0.10.2,<0.11"
    python benchmarks/speed_gpu.py [--tables 1 2 ...] [--data=CIFAR10.npz] [--workdir=DIR]
        [--out=FILE] [--quick] [--device=cpu]

1 to 5: as speed.py has them, for WRN-28-10 at batch 128. PyTorch computes by autocast in bfloat16,
  channels_last, with torch.compile; robust accuracy (2) is float32 on both sides, without TF32.
6. The largest batch that fits, of each side, and its images per second.
7. One grouped convolution against one for each member (`model.conv`).
8. Share of the bfloat16 peak, as a product of two matrices of 8192 x 8192 reaches it.
9. WRN-16-4, SingleAdv, trained for 30 epochs by `main.py`: time to 45 % PGD20 accuracy. Needs
   --data, an .npz of CIFAR's images as `data.name=npz` takes it; left out without.

--out writes the report to a file. --device=cpu --quick tries the program without a GPU. Neither
TensorFlow, TFDS nor CLU is needed. Exit codes are those of speed.py; rows that run out of memory
say so. JAX and PyTorch share a process, and so a CUDA: PyTorch's default build brings 13. Nothing
else should be on the GPU.
"""

import dataclasses
import functools
import os
import pathlib
import statistics
import sys
import tempfile

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import numpy as np

from benchmarks import speed, speed_tables
from benchmarks.speed import network
from benchmarks.speed_children import measure, run_main, say
from benchmarks.speed_tables import COMPILED, EAGER, OURS, at_least, markdown, name_of, seconds_cell
from ensadv.storage import files, workdir

TARGET, SHARE_TARGET = 1.3, 50  # times PyTorch's speed; % of the peak, of WRN-28-10
ACCURACY = 0.45  # robust, of PGD20, that the training is timed to
TITLES = speed.TITLES | {
    '6': 'The largest batch that fits',
    '7': 'Grouped or separate convolutions',
    '8': 'Share of the peak',
    '9': 'Training to 45 % PGD20 accuracy',
}


@dataclasses.dataclass(frozen=True)
class Plan(speed.Plan):
    """What is measured; more than on a CPU:

    Attributes:
      largest: networks of table 6, at the batch from which on it is doubled.
      doublings: how often, at most.
      matrix: size of table 8's.
      trained: the network of table 9.
      epochs: for how many it is trained.
    """

    device: str = 'gpu'
    dtype: str = 'bfloat16'
    repeats: int = 5
    num_steps: int = 10
    peer: str = COMPILED
    # Deep networks in float32 amplify rounding beyond any tolerance that would find mistakes.
    check: dict | None = dataclasses.field(default_factory=lambda: network(16, 4, 2, 32))
    steps: tuple = tuple(network(28, 10, k, 128) for k in (1, 2, 4))
    steps_target: float = TARGET
    attacks: tuple = (('pgd500', 1000, 1, 3.0), ('ifgsm20', 2000, 3, 1.2))
    base: dict = dataclasses.field(default_factory=lambda: network(28, 10, 1, 128))
    batches: tuple = (32, 64, 128, 256)
    devices: tuple = ()
    main: dict = dataclasses.field(default_factory=lambda: network(28, 10, 1, 128))
    log_every: int = 20
    memory: tuple = (network(28, 10, 1, 128), network(28, 10, 2, 128))
    largest: tuple = tuple(network(28, 10, k, 128) for k in (1, 2, 4))
    doublings: int = 6
    matrix: int = 8192
    trained: dict = dataclasses.field(default_factory=lambda: network(16, 4, 1, 128))
    epochs: int = 30


_TINY = network(10, 1, 1, 8, 2)
QUICK = speed.QUICK | {
    'check': _TINY,
    'peer': EAGER,
    'largest': (_TINY,),
    'doublings': 1,
    'matrix': 128,
    'trained': _TINY,
    'epochs': 2,
}


def measure_largest(plan):
    """Returns the lines of table 6: each side's largest batch, by doubling, and its speed."""
    lines, changes = [], {'model.dtype': plan.dtype}
    for one in plan.largest:
        rates = {}
        for side in (plan.peer, OURS):
            batch, fits = one['batch'], {}
            for _ in range(plan.doublings + 1):
                tried = one | {'batch': batch}
                say(f'{side}: {speed_tables.full_name(tried)}')
                found = measure(
                    plan.device, 'alone', network=tried, side=side, repeats=plan.repeats,
                    num_steps=plan.num_steps, changes=changes, may_fail=True,
                )  # fmt: skip
                if not found or 'out_of_memory' in found:
                    break
                fits, batch = found | {'batch': batch}, 2 * batch
            cells = [name_of(one), one['members'], side]
            # Not every library says that memory is what it lacks.
            reason = 'failed' if found is None else f'out of memory: {found.get("out_of_memory")}'
            beyond = (
                f'{batch}: {reason}' if found is None or 'out_of_memory' in found else 'not tried'
            )
            if not fits:
                lines.append([*cells, None, None, None, beyond, *[None] * 3])
                continue
            rates[side] = fits['batch'] / statistics.median(fits['seconds'])
            cells += [fits['batch'], seconds_cell(fits['seconds']), f'{rates[side]:.0f}', beyond]
            compared = [None] * 3
            if side == OURS and plan.peer in rates:
                ratio = rates[OURS] / rates[plan.peer]
                compared = [f'{ratio:.3g}', *at_least(ratio, TARGET)]
            lines.append([*cells, *compared])
    columns = ['network', 'members', '', 'largest batch', 's per step', 'images per s']
    columns += ['beyond it', 'ensadv / PyTorch', 'target', 'verdict']
    return [*markdown(columns, lines), '', 'Each side has the GPU for itself.']


def measure_convolutions(plan):
    """Returns the lines of table 7."""
    lines, winners = [], set()
    for members in plan.members:
        one = plan.base | {'members': members}
        say(f'convolutions: {speed_tables.full_name(one)}')
        kinds = ('grouped', 'separate')
        times = measure(
            plan.device, 'sweep', networks=[one] * 2, repeats=plan.repeats,
            num_steps=plan.num_steps,
            changes=[{'model.dtype': plan.dtype, 'model.conv': kind} for kind in kinds],
        )['seconds']  # fmt: skip
        cells = [name_of(one), members, one['batch']]
        if any(isinstance(found, str) for found in times):
            shown = ['out of memory' if isinstance(t, str) else seconds_cell(t) for t in times]
            lines.append([*cells, *shown, None, None])
            continue
        medians = list(map(statistics.median, times))
        winner = kinds[medians.index(min(medians))]
        if members > 1:
            winners.add(winner)
        ratio = f'{medians[0] / medians[1]:.3g}'
        lines.append([*cells, *map(seconds_cell, times), ratio, winner])
    columns = ['network', 'members', 'batch', 'grouped, s', 'separate, s']
    columns += ['grouped / separate', 'faster']
    default = "`model.conv=auto` is 'grouped' here" if plan.device == 'gpu' else ''
    verdict = f'With several members the faster one is: {", ".join(sorted(winners)) or "unknown"}.'
    return [*markdown(columns, lines), '', f'{verdict} {default}'.strip()]


def measure_share(plan, step_rows):
    """Returns the lines of table 8; `step_rows` are those of table 1."""
    say('the peak')
    peak = measure(plan.device, 'matrix_peak', size=plan.matrix)['operations_per_second']
    lines = []
    for one, found in step_rows:
        if 'out_of_memory' in found:
            lines.append([name_of(one), one['members'], one['batch'], 'out of memory', *[None] * 5])
            continue
        count = measure(plan.device, 'operations', network=one)['operations']
        for side, times in found['seconds'].items():
            rate = count / statistics.median(times)
            share = 100 * rate / peak
            judged = at_least(share, SHARE_TARGET if side == OURS else None)
            cells = [name_of(one), one['members'], one['batch'], side, f'{count / 1e12:.3g}']
            lines.append([*cells, f'{rate / 1e12:.4g}', f'{share:.1f}', *judged])
    columns = ['network', 'members', 'batch', '', '10^12 operations in a step', 'TFLOP/s']
    columns += ['share of the peak, %', 'target', 'verdict']
    return [
        f'The peak: {peak / 1e12:.4g} TFLOP/s, products of bfloat16 matrices of {plan.matrix} x '
        f'{plan.matrix} in JAX, one after the other. Times are those of table 1; a multiply-add '
        'counts as 2.',
        '',
        *markdown(columns, lines),
    ]


def measure_training(plan, data):
    """Returns the lines of table 9; `data` is the .npz."""
    with np.load(data, allow_pickle=False) as arrays:
        examples = len(arrays['label_train'])
    one = plan.trained
    # Whole calls of ten steps, and a line of metrics at each snapshot.
    epoch = examples // one['batch']
    epoch -= epoch % 10 if epoch >= 10 else 0
    steps = plan.epochs * epoch
    fields = {
        'data.name': 'npz',
        'data.path': pathlib.Path(data).absolute(),
        'model.depth': one['depth'],
        'model.width': one['width'],
        'attack.steps': one['attack_steps'],
        'train.batch_size': one['batch'],
        'train.steps': steps,
        'train.learning_rate_steps': tuple(int(steps * share) for share in (0.5, 0.75, 0.9)),
        'train.log_every': epoch,
        'train.snapshot_every': epoch,
        'train.checkpoint_every': epoch,
        'eval.attacks': ('clean', 'pgd20'),
        'eval.long_attacks': (),
        'eval.inline': False,
    }
    with tempfile.TemporaryDirectory() as folder:
        path = files.absolute(folder) / 'run'
        say(f'training {speed_tables.full_name(one)} for {steps} steps')
        times = run_main(path, 'configs/singleadv.py', fields)
        say('evaluating its snapshots')
        run_main(path, flags=['--mode=evaluate'])
        evaluations = workdir.read_evaluations(path)
    return training_table(plan, evaluations, times, epoch)


def training_table(plan, evaluations, times, epoch):
    """Returns table 9's lines.

    Args:
      plan: gives the network.
      evaluations: {step: content of eval/<step>.json}.
      times: {step: seconds from the start of training until its metrics were there}.
      epoch: steps.
    """
    accuracy = {
        step: {attack['name']: attack['accuracy'] for attack in content['attacks']}
        for step, content in evaluations.items()
    }
    reached = next((s for s in sorted(accuracy) if accuracy[s]['pgd20'] >= ACCURACY), None)
    rows = [
        (
            s,
            f'{s / epoch:.0f}',
            f'{times[s]:.0f}',
            *(f'{100 * accuracy[s][a]:.1f}' for a in columns),
        )
        for columns in [('clean', 'pgd20')]
        for s in sorted(accuracy)
    ]
    best = max(found['pgd20'] for found in accuracy.values())
    verdict = f'not reached: at best {100 * best:.1f} %'
    if reached:
        verdict = f'reached after {times[reached]:.0f} s, at step {reached}'
    return [
        f'{name_of(plan.trained)}, batch {plan.trained["batch"]}, {plan.epochs} epochs, by '
        '`main.py`, evaluated afterwards on the whole test set. The time is from the start of the '
        'process, with its imports, compiling and checkpoints, and without evaluation.',
        '',
        f'{100 * ACCURACY:.0f} % PGD20 accuracy (worst iterate): **{verdict}**.',
        '',
        *markdown(['step', 'epoch', 's', 'clean, %', 'PGD20, %'], rows),
    ]


def tables(plan, args):
    """Returns the nine tables, as `speed.measurements`."""
    step_rows = functools.cache(lambda: speed.step_rows(plan))
    functions = speed.measurements(plan, args.workdir) | {
        '1': lambda: speed_tables.steps_table(step_rows(), plan.steps_target),
        '6': lambda: measure_largest(plan),
        '7': lambda: measure_convolutions(plan),
        '8': lambda: measure_share(plan, step_rows()),
        '9': lambda: measure_training(plan, args.data),
    }
    return [(f'{number}. {TITLES[number]}', functions[number]) for number in args.tables]


def main():
    parser = speed.make_parser(__doc__, tuple(TITLES))
    parser.add_argument('--data', metavar='FILE', help='.npz of images, for 9')
    parser.add_argument('--device', choices=('gpu', 'cpu'), default='gpu', help='gpu')
    args = speed.parse(parser)
    if args.data and not pathlib.Path(args.data).exists():
        parser.exit(2, f'--data={args.data}: found no such file\n')
    if not args.data and '9' in args.tables and not args.quick:
        say('without --data table 9 is left out')
        args.tables.remove('9')
    if args.device == 'cpu':
        os.environ['JAX_PLATFORMS'] = 'cpu'
    plan = Plan(**(QUICK if args.quick else {}) | {'device': args.device})
    with tempfile.TemporaryDirectory() as folder:
        if args.quick and not args.data:
            args.data = speed.random_images(pathlib.Path(folder) / 'random.npz', 32)
        speed.run_tables(f'Speed on a {args.device.upper()}', plan, tables(plan, args), args.out)


if __name__ == '__main__':
    main()
