"""Whether our AutoAttack and the reference fell the same images, and what each takes.

    pip install -r requirements-benchmark.txt
    pip install --no-deps torchattacks==3.5.1
    python benchmarks/autoattack_parity.py --workdir=DIR [--n=1000] [--seeds=0,1,2]
        [--attacks=apgd_ce,apgd_t,fab_t,square] [--results=FILE.json] [--warm]

DIR is a finished run of Wide ResNets. Its last snapshot is rebuilt in PyTorch, for which
`pyautoattack` 0.2.0 has the reference's code. Both attack the first n test images with each seed,
with random streams of their own, in turns: attack by attack, and with every other seed the
reference first. --attacks makes only some, each on what those before it left standing.

FILE.json keeps what fell. What it has already is not made again, so the same command goes on after
a kill, or prints the report of a finished one. With --warm ours is compiled beforehand, so that its
seconds have no compilation in them. The report in Markdown has, after each attack:

- both robust accuracies, the mean over the seeds, with the least and the largest;
- how many images stand under more seeds of one than of the other, and the sign test's p for these
  (McNemar's, with one seed): what a fault would make small;
- how many images fell under every seed and under any: what a seed alone does;
- the mean seconds of both.

The exit code is 1 where ours leaves over 0.3 points more standing after some attack. Nothing in DIR
changes.
"""

import argparse
import json
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
from ensadv.attacks import registry
from ensadv.attacks.threat_model import ThreatModel
from ensadv.errors import UserError
from ensadv.evaluation.evaluator import Evaluator
from ensadv.runtime import distributed

ATTACKS = {'apgd_ce': 'apgd-ce', 'apgd_t': 'apgd-t', 'fab_t': 'fab-t', 'square': 'square'}
SIDES = ('ensadv', 'reference')
ALLOWED_POINTS = 0.3
STANDS = -1


class Ours:
    """Our attacks, as an evaluation makes them.

    Attributes:
      stands: bool [n], what no attack of this seed felled so far.
    """

    def __init__(self, run, attacks, warm):
        self._run, self._attacks = run, attacks
        self._evaluator = Evaluator(run.network, run.batch_size)
        self._variables = distributed.replicate(run.variables)
        self._settings = registry.settings({}, registry.entry('autoattack'), run.config.epsilon)
        self._settings |= {'attack': 'autoattack', **ThreatModel.of(run.config).to_json()}
        self.start(0)
        if warm:
            # One step of each attack: one compilation serves every number of steps.
            self._attack(self._stages(attacks, gradient_steps=1, targets=1, queries=1))

    def start(self, seed):
        """Takes all images anew, with this seed."""
        self._settings['seed'] = seed
        self._done = None
        self._done = self._attack(())
        self.stands = self._done.margin > 0

    def attack(self, name):
        """Makes an attack on what stands."""
        until = self._attacks[: self._attacks.index(name) + 1]
        self._done = self._attack(self._stages(until))
        self.stands = self._done.margin > 0

    def _stages(self, attacks, **changes):
        stages = registry.stages(self._settings | changes, classes(self._run))
        return [stage for stage in stages if stage.name.split()[0] in attacks]

    def _attack(self, stages):
        images, labels = self._run.images, self._run.y
        return self._evaluator.staged_attack(
            self._variables, self._settings, images, labels, 'ensadv', stages=stages,
            done=self._done,
        )  # fmt: skip


class Reference:
    """As `Ours`, by the reference on the network in PyTorch."""

    def __init__(self, run):
        self._run = run
        self._x = torch.tensor(run.x).permute(0, 3, 1, 2).contiguous()
        self._y = torch.tensor(run.y).long()

    def start(self, seed):
        """Takes all images anew, with this seed."""
        threat, peer = ThreatModel.of(self._run.config), self._run.peer
        norm = {'linf': 'Linf', 'l2': 'L2'}[threat.norm]
        self._autoattack = pyautoattack.AutoAttack(peer, norm=norm, eps=threat.epsilon, seed=seed)
        self._autoattack.apgd_targeted.n_target_classes = min(9, classes(self._run) - 1)
        self._autoattack.fab.n_target_classes = min(9, classes(self._run) - 1)
        with torch.no_grad():
            outputs = torch.cat([peer(part) for part in self._x.split(self._run.batch_size)])
        self.stands = (outputs.argmax(1) == self._y).numpy()

    def attack(self, name):
        """Makes an attack on what stands."""
        places = torch.tensor(np.flatnonzero(self.stands))
        self._autoattack.attacks_to_run = [ATTACKS[name]]
        if len(places):
            _, found = self._autoattack.run_standard_evaluation(
                self._x[places], self._y[places], batch_size=self._run.batch_size
            )
            self.stands[places] = (found == self._y[places]).numpy()


def classes(run):
    """Returns how many classes a run has."""
    return run.peer.members[0].fc.out_features


def in_turns(sides, attacks, seed):
    """Returns what the attacks of a seed did on each side, for JSON.

    Its felled_by is for each image the number of the attack that felled it, from 1; 0 if it was
    wrong before, and STANDS if it stands.
    """
    order = list(sides) if seed % 2 == 0 else list(reversed(sides))
    results = {}
    for name in order:
        sides[name].start(seed)
        felled_by = np.where(sides[name].stands, STANDS, 0)
        results[name] = {'felled_by': felled_by, 'seconds': []}
    for number, attack in enumerate(attacks, 1):
        for name in order:
            side, found = sides[name], results[name]
            start = time.monotonic()
            side.attack(attack)
            found['seconds'].append(round(time.monotonic() - start, 2))
            found['felled_by'][~side.stands & (found['felled_by'] == STANDS)] = number
            told = f'{np.mean(side.stands):.2%} stand, {found["seconds"][-1]:.1f} s'
            print(f'seed {seed}, {attack}, {name}: {told}', file=sys.stderr, flush=True)
    for found in results.values():
        found['felled_by'] = found['felled_by'].tolist()
    return results


def stand_after(found, number):
    """Returns by side what stands after so many attacks, bool [seeds, n]."""
    felled_by = {side: np.array([one[side]['felled_by'] for one in found]) for side in SIDES}
    return {side: (by == STANDS) | (by > number) for side, by in felled_by.items()}


def percent(stands):
    """Returns a cell: the share that stands, the mean over seeds, with the extremes."""
    shares = 100 * np.mean(stands, axis=1)
    extremes = f' ({min(shares):.2f} to {max(shares):.2f})' if len(shares) > 1 else ''
    return f'{np.mean(shares):.2f}{extremes}'


def report(attacks, found):
    """Returns the table, Markdown lines, and by how many points ours is weaker at worst.

    Args:
      attacks: their names.
      found: what `in_turns` returned, of each seed.
    """
    rows, worst = [], -100.0
    seconds = {side: np.array([one[side]['seconds'] for one in found]) for side in SIDES}
    for number in range(len(attacks) + 1):
        stands = stand_after(found, number)
        ours, theirs = (stands[side] for side in SIDES)
        more = np.sign(np.sum(ours, axis=0) - np.sum(theirs, axis=0))
        counts = int(np.sum(more > 0)), int(np.sum(more < 0))
        p = stats.binomtest(counts[0], sum(counts)).pvalue if sum(counts) else 1.0
        both = lambda count: ', '.join(str(np.sum(count(stands[side]))) for side in SIDES)  # noqa: B023
        row = [f'after {attacks[number - 1]}' if number else 'clean', percent(ours),
               percent(theirs), '{}, {}'.format(*counts), f'{p:.2f}']  # fmt: skip
        row += [both(lambda s: ~s.any(axis=0)), both(lambda s: ~s.all(axis=0))]
        of_attack = [np.mean(seconds[side][:, number - 1]) if number else 0 for side in SIDES]
        rows.append([*row, *(f'{value:.1f}' if number else '' for value in of_attack)])
        worst = max(worst, 100 * float(np.mean(ours) - np.mean(theirs)))
    total = [np.mean(np.sum(seconds[side], axis=1)) for side in SIDES]
    rows.append(['all', *[''] * 6, *(f'{value:.1f}' for value in total)])
    header = [
        '', 'ensadv, %', 'reference, %', 'stand more often under ours, theirs', 'p',
        'fell with every seed: ours, theirs', 'with any', 'ensadv, s', 'reference, s',
    ]  # fmt: skip
    return markdown(header, rows), worst


def read(path, subject):
    """Returns the results in a file, by seed; none where there is no file; raises UserError."""
    if path is None or not path.exists():
        return {}
    content = json.loads(path.read_text())
    if content['subject'] != subject:
        raise UserError(
            f'--results={path}: expected results of {subject}, found of {content["subject"]}'
        )
    return content['seeds']


def write(path, content):
    """Writes a file of results, whole."""
    if path is not None:
        beside = path.with_name(f'{path.name}.part')
        beside.write_text(json.dumps(content))
        beside.replace(path)


def parse_args():
    """Returns the flags."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    whole = lambda text: [int(seed) for seed in text.split(',')]

    def names(text):
        if unknown := set(text.split(',')) - set(ATTACKS):
            raise argparse.ArgumentTypeError(f'expected {", ".join(ATTACKS)}, found {unknown}')
        return [name for name in ATTACKS if name in text.split(',')]

    parser.add_argument('--workdir', required=True, metavar='DIR', help='a finished run')
    parser.add_argument('--n', type=int, default=1000, help='test images (1000, or all)')
    parser.add_argument('--seeds', type=whole, default=[0], help='of both (0)')
    parser.add_argument('--attacks', type=names, default=list(ATTACKS), help=','.join(ATTACKS))
    parser.add_argument('--results', type=pathlib.Path, metavar='FILE.json', help='kept results')
    parser.add_argument('--warm', action='store_true', help='compile ours beforehand')
    return parser.parse_args()


def main():
    args = parse_args()
    try:
        run = load(args.workdir, args.n)
        threat = ThreatModel.of(run.config)
        subject = {'run': run.title, 'n': len(run.y), 'threat': f'{threat}'}
        subject |= {'attacks': args.attacks, 'warm': args.warm}
        seeds = read(args.results, subject)
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    described = machine.describe(os.getloadavg()[0], (*machine.PACKAGES, 'pyautoattack'))
    missing = [seed for seed in args.seeds if f'{seed}' not in seeds]
    if missing:
        sides = {'ensadv': Ours(run, args.attacks, args.warm), 'reference': Reference(run)}
    for seed in missing:
        seeds[f'{seed}'] = in_turns(sides, args.attacks, seed)
        write(args.results, {'subject': subject, 'machine': described, 'seeds': seeds})
    found = [seeds[f'{seed}'] for seed in args.seeds]
    print(f'## AutoAttack: {run.title}, n = {len(run.y)}, {threat}, seeds {args.seeds}\n')
    print('\n'.join(described), end='\n\n')
    lines, worst = report(args.attacks, found)
    print('\n'.join(lines))
    sys.exit(bool(worst > ALLOWED_POINTS))


if __name__ == '__main__':
    main()
