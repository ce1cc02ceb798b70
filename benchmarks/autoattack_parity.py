"""Whether our AutoAttack and the reference fell the same images, and what each takes.

    pip install -r requirements-benchmark.txt
    pip install --no-deps torchattacks==3.5.1
    python benchmarks/autoattack_parity.py --workdir=DIR [--n=1000] [--seed=0]

DIR is a finished run of Wide ResNets. Its last snapshot is rebuilt in PyTorch, for which
`pyautoattack` 0.2.0 has the reference's code. Both attack the first n test images, with random
streams of their own. The report in Markdown has, after each attack of the standard version, both
robust accuracies, the images on which they differ and McNemar's p for these, and both times. With
--warm ours runs once before, so that its time has no compilation in it. The exit code is 1 where
ours leaves over 0.3 points more standing after some attack. Nothing in DIR changes.
"""

import argparse
import os
import pathlib
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import numpy as np
import pyautoattack
import torch
from scipy import stats

from benchmarks import machine
from benchmarks.attack_strength import load
from benchmarks.speed_tables import markdown
from ensadv.attacks import driver, registry
from ensadv.attacks.threat_model import ThreatModel
from ensadv.errors import UserError
from ensadv.evaluation.evaluator import Evaluator
from ensadv.runtime import distributed

ATTACKS = {'apgd_ce': 'apgd-ce', 'apgd_t': 'apgd-t', 'fab_t': 'fab-t', 'square': 'square'}
ALLOWED_POINTS = 0.3


def ours(run, args):
    """Returns by attack what stands after it, bool [n], and seconds."""
    threat = ThreatModel.of(run.config)
    settings = registry.settings({}, registry.entry('autoattack'), threat.epsilon)
    settings |= {'attack': 'autoattack', 'seed': args.seed, **threat.to_json()}
    stages = registry.stages(settings, run.peer.members[0].linear.out_features)
    evaluator, variables = Evaluator(run.network, run.batch_size), run.variables
    attack = lambda: evaluator.staged_attack(
        distributed.replicate(variables), settings, run.images, run.y, 'ensadv', stages=stages
    )
    if args.warm:
        attack()
    found = attack()
    results = {}
    for name in ATTACKS:
        numbers = [i for i, s in enumerate(found.stages, 1) if s['name'].split()[0] == name]
        seconds = sum(found.stages[i - 1]['seconds'] for i in numbers)
        felled = (found.felled_by != driver.NEVER) & (found.felled_by <= max(numbers))
        results[name] = ~felled, seconds
    return results


def reference(run, args):
    """As `ours`, by the reference on the network in PyTorch."""
    threat = ThreatModel.of(run.config)
    x = torch.tensor(run.x).permute(0, 3, 1, 2).contiguous()
    y = torch.tensor(run.y).long()
    attack = pyautoattack.AutoAttack(
        run.peer, norm={'linf': 'Linf', 'l2': 'L2'}[threat.norm], eps=threat.epsilon,
        seed=args.seed, version='standard', device='cpu',
    )  # fmt: skip
    classes = run.peer.members[0].linear.out_features
    attack.apgd_targeted.n_target_classes = attack.fab.n_target_classes = min(9, classes - 1)
    with torch.no_grad():
        stands = torch.cat([run.peer(part) for part in x.split(250)]).argmax(1) == y
    results = {}
    for name, theirs in ATTACKS.items():
        start = time.monotonic()
        attack.attacks_to_run = [theirs]
        places = torch.nonzero(stands).flatten()
        if len(places):
            _, found = attack.run_standard_evaluation(
                x[places], y[places], batch_size=run.batch_size
            )
            stands[places] = found == y[places]
        results[name] = stands.numpy().copy(), time.monotonic() - start
    return results


def table(found, expected):
    """Returns the rows of the report."""
    rows = []
    for name in ATTACKS:
        (our, our_seconds), (their, their_seconds) = found[name], expected[name]
        only = int(np.sum(our & ~their)), int(np.sum(their & ~our))
        p = stats.binomtest(only[0], sum(only)).pvalue if sum(only) else 1.0
        rows.append(
            [
                f'after {name}', f'{100 * np.mean(our):.1f}', f'{100 * np.mean(their):.1f}',
                f'{only[0]}, {only[1]}', f'{p:.2f}', f'{our_seconds:.1f}', f'{their_seconds:.1f}',
            ]
        )  # fmt: skip
    seconds = [sum(results[name][1] for name in ATTACKS) for results in (found, expected)]
    rows.append(['all', '', '', '', '', f'{seconds[0]:.1f}', f'{seconds[1]:.1f}'])
    return rows


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--workdir', required=True, metavar='DIR', help='a finished run')
    parser.add_argument('--n', type=int, default=1000, help='test images (1000, or all)')
    parser.add_argument('--seed', type=int, default=0, help='of both (0)')
    parser.add_argument('--warm', action='store_true', help='run ours once before, to compile')
    args = parser.parse_args()
    try:
        run = load(args.workdir, args.n)
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    load_average = os.getloadavg()[0]
    found, expected = ours(run, args), reference(run, args)
    print(f'## AutoAttack: {run.title}, n = {len(run.y)}, {ThreatModel.of(run.config)}\n')
    print('\n'.join(machine.describe(load_average)), end='\n\n')
    header = ['', 'ensadv, %', 'reference, %', 'stand only under ours, theirs', 'p', 'ensadv, s',
              'reference, s']  # fmt: skip
    print('\n'.join(markdown(header, table(found, expected))))
    worse = max(100 * (np.mean(found[name][0]) - np.mean(expected[name][0])) for name in ATTACKS)
    sys.exit(bool(worse > ALLOWED_POINTS))


if __name__ == '__main__':
    main()
