"""An adversarial step's time by where the hypervisor has put this machine's cores.

    python benchmarks/core_placement.py [--network DEPTH WIDTH MEMBERS BATCH] [--processes N]

Virtual cores move between real ones, and two of them may share a last level of cache or not. Before
and after each timed turn core_distance.c tells how long a cache line takes from core 0 to core 1;
turns are 'near' below 200 ns, 'far' above it, and left out where the two disagree. Processes with
ensadv on one and on two CPU devices, each of which normalises its half of the batch, take turns,
PyTorch's eager step in each. For Linux, with a C compiler and requirements-benchmark.txt.

Two CPU devices are for this comparison alone: what XLA of jaxlib 0.10.2 computes wrong when a
thread's queue is full (README, Right on a CPU) it computes there most often.
"""

import argparse
import os
import pathlib
import shutil
import statistics
import subprocess
import sys
import tempfile

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from benchmarks import machine
from benchmarks.speed_children import measure, say
from benchmarks.speed_tables import EAGER, OURS, markdown

NEAR, FAR = 'near', 'far'
LIMIT = 200  # nanoseconds; near were 50 to 150, far 240 to 350, on the AMD EPYC of the results
STEPS = 3
DEVICES = '--xla_force_host_platform_device_count={}'


def placement(distances):
    """Returns NEAR or FAR; None where the cores were moved during a turn."""
    far = {distance > LIMIT for distance in distances}
    return None if len(far) > 1 else FAR if far == {True} else NEAR


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        '--network', nargs=4, type=int, default=(10, 2, 1, 64),
        metavar=('DEPTH', 'WIDTH', 'MEMBERS', 'BATCH'), help='10 2 1 64',
    )  # fmt: skip
    parser.add_argument('--processes', type=int, default=3, help='of each kind (3)')
    parser.add_argument('--repeats', type=int, default=10, help='turns of each process (10)')
    args = parser.parse_args()
    if missing := machine.missing_packages():
        parser.exit(
            2, f'{", ".join(missing)}: missing; pip install -r requirements-benchmark.txt\n'
        )
    if shutil.which('cc') is None:
        parser.exit(2, 'cc: not found; a C compiler is needed\n')
    os.environ['JAX_PLATFORMS'] = 'cpu'
    load = os.getloadavg()[0]
    fields = ('depth', 'width', 'members', 'batch')
    network = dict(zip(fields, args.network, strict=True)) | {'attack_steps': 7}
    seconds, moved = {}, 0
    with tempfile.TemporaryDirectory() as folder:
        probe = f'{folder}/core_distance'
        source = machine.ROOT / 'benchmarks' / 'core_distance.c'
        subprocess.run(['cc', '-O2', '-pthread', '-o', probe, source], check=True)
        for process in range(args.processes):
            for count in (1, 2):
                side, flags = f'{OURS}, devices: {count}', DEVICES.format(count)
                say(f'{side}, process {process + 1} of {args.processes}')
                settings = {'network': network, 'repeats': args.repeats, 'num_steps': STEPS}
                for name, distances, value in measure(
                    'cpu', 'by_placement', xla=flags, probe=probe, **settings
                ):
                    if (where := placement(distances)) is None:
                        moved += 1
                    else:
                        key = (side if name == OURS else EAGER, where)
                        seconds.setdefault(key, []).append(value)
    print('# Where the cores are\n')
    print('\n'.join(machine.describe(load)))
    print(f'- WRN-{args.network[0]}-{args.network[1]}, members: {args.network[2]}, batch '
          f'{args.network[3]}, 7 attack steps; turns of {STEPS} steps, float32; '
          f'processes of each kind: {args.processes}, turns of each side: {args.repeats}, '
          f'left out: {moved}\n')  # fmt: skip
    rows = []
    for (side, where), values in sorted(seconds.items()):
        spread = f'{min(values):.3f} to {max(values):.3f}'
        rows.append([side, where, len(values), f'{statistics.median(values):.3f}', spread])
    head = ['side', 'cores', 'turns', 'seconds per step, median', 'least and largest']
    print('\n'.join(markdown(head, rows)))


if __name__ == '__main__':
    main()
