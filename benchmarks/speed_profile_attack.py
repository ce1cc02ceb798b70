"""What IFGSM-20 on a trained run spends its time on, as `speed_profile` sees it.

    pip install -r requirements-benchmark.txt
    pip install --no-deps torchattacks==3.5.1
    python benchmarks/speed_profile_attack.py WORKDIR [--n=360] [--turns=3]

The attack of table 2 of `speed.py`, ours and each library's. Each side has a process of its own:
oneDNN is in XLA and in PyTorch, and in one process each would overwrite the names that the other
tells perf. WORKDIR is that of a finished run of Wide ResNets.

Needs `perf` and the right to use it (kernel.perf_event_paranoid at most 2).
"""

import argparse
import os
import pathlib
import shutil
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

# First, as it says to oneDNN and to OpenMP, here and in every child, what they read when loaded.
from benchmarks import speed_profile  # isort: skip

from benchmarks import machine, speed_attacks, speed_layers
from benchmarks.speed_children import measure, say
from benchmarks.speed_tables import OURS
from benchmarks.speed_workers import set_up

NAME = 'ifgsm20'
SIDES = (OURS, 'foolbox', 'torchattacks')


def operations(depth, width, members, n, steps):
    """Returns the floating-point operations of all convolutions in an attack on n images.

    Each step is a forward and a backward pass, and the verdict is one more forward pass.
    """
    return members * sum(
        count * (2 * steps + 1) * speed_layers.operations(layer, n)
        for layer, count in speed_layers.layers(depth, width).items()
    )


def profile(workdir, n, turns, side):
    """Attacks `turns` times with one side while perf looks; once both libraries are set up.

    Returns:
      'title' of the run, 'n' images, 'operations' of an attack, 'kinds': {kind: CPU seconds per
      attack}, 'wall': seconds per attack, and 'waits' of ours: see `speed_profile.waits`.
    """
    run = speed_attacks.load(workdir, n)
    sides = speed_attacks.sides_of(run, workdir, NAME)
    config, settings = sides[OURS].config, sides[OURS].settings
    attack, n = sides[side], len(run.y)
    attack.choose(speed_attacks.batch_sizes(n))
    attack()
    kinds, wall = speed_profile.profiled(lambda count: [attack() for _ in range(count)], turns)
    model = config.model
    return {
        'title': run.title,
        'n': n,
        'operations': operations(
            model.depth, model.width, config.ensemble.size, n, settings['steps']
        ),
        'kinds': kinds,
        'wall': wall,
        'waits': speed_profile.waits(lambda _: attack(), 1) if side == OURS else None,
    }


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('workdir')
    parser.add_argument('--n', type=int, default=360, help='images (360)')
    parser.add_argument('--turns', type=int, default=3, help='attacks of each side (3)')
    args = parser.parse_args()
    if shutil.which('perf') is None:
        parser.exit(2, 'perf: not found; it is in the package linux-perf or linux-tools\n')
    load, found = os.getloadavg()[0], {}
    for side in SIDES:
        say(f'{NAME}: {side}')
        found[side] = measure('cpu', 'profile_attack', workdir=args.workdir, n=args.n,
                              turns=args.turns, side=side)  # fmt: skip
    set_up('cpu')
    product, *_ = speed_layers.matrix_products(10)
    mine = found[OURS]
    print('\n'.join(machine.describe(load)))
    print(f'\n{mine["title"]}; {NAME}, n = {mine["n"]}, attacks of each side: {args.turns}; '
          'CPU seconds per attack\n')  # fmt: skip
    kinds = {side: one['kinds'] for side, one in found.items()}
    walls = {side: one['wall'] for side, one in found.items()}
    print('\n'.join(speed_profile.describe(
        kinds, walls, 'attack', mine['operations'], product, mine['waits']
    )))  # fmt: skip


if __name__ == '__main__':
    main()
