"""Whether a training step from the same state comes to the same weights each time, to the bit.

    python benchmarks/repeatability.py DEPTH WIDTH MEMBERS BATCH [--attack_steps=1] [--repeats=12]
    XLA_FLAGS=--xla_force_host_platform_device_count=2 python benchmarks/repeatability.py 16 4 1 32

Prints how many outcomes there were and how often each came; batch norm's statistics are of all
devices. Exit code 1 where there is more than one. For a CPU, with requirements-benchmark.txt.
"""

import argparse
import collections
import os
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import adversarial_step, machine
from benchmarks.speed_workers import set_up
from ensadv.runtime import distributed


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name in ('depth', 'width', 'members', 'batch'):
        parser.add_argument(name, type=int)
    parser.add_argument('--attack_steps', type=int, default=1)
    parser.add_argument('--repeats', type=int, default=12)
    args = parser.parse_args()
    load = os.getloadavg()[0]
    set_up('cpu')
    ours = adversarial_step.Ours(
        adversarial_step.step_config(
            args.depth, args.width, args.members, args.batch, args.attack_steps,
            {'batch_norm.sync': True},
        )
    )  # fmt: skip
    outcomes, first, largest = collections.Counter(), None, 0.0
    for _ in range(args.repeats):
        ours.state = distributed.replicate(jax.tree.map(jnp.array, ours.start))
        ours.step()
        for device in range(jax.device_count()):
            weights = [
                np.asarray(leaf.addressable_shards[device].data)
                for leaf in jax.tree.leaves(ours.state.params)
            ]
            outcomes[b''.join(leaf.tobytes() for leaf in weights)] += 1
            first = first or weights
            differences = (np.abs(a - b).max() for a, b in zip(weights, first, strict=True))
            largest = max(largest, *map(float, differences))
    print('\n'.join(machine.describe(load)))
    counts = ', '.join(str(count) for _, count in outcomes.most_common())
    print(
        f'- {args.repeats} steps on {jax.device_count()} devices: outcomes of the devices: '
        f'{len(outcomes)} ({counts}); weights differ by {largest:.2g} at most'
    )
    sys.exit(len(outcomes) > 1)


if __name__ == '__main__':
    main()
