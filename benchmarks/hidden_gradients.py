"""What each attack finds of networks whose logits' scale hides their gradients.

    python benchmarks/hidden_gradients.py --workdirs=DIR[,DIR...] [--n=100] [--combine=probs]
        [--factors=1e-4,1e-2,1,1e2,1e4]

The members are those of these finished runs, of the same data and threat model. The first one's
logits are multiplied by each factor. With one member no decision changes, so the truth is the same
for all factors; with several, a large factor lets the first one decide alone, and under `probs` a
small one takes its vote away.

The table has, in %, what stands under each attack alone and under all of them. Its last column is
the best that is known: what stands under all attacks of this table's row and of every row with the
same decisions, and where one member decides under attacks on that member alone. The exit code is 1
where all attacks together leave over a point more standing than that.
"""

import argparse
import os
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from benchmarks import machine
from benchmarks.speed_tables import markdown
from configs import default
from ensadv import build
from ensadv.attacks import registry
from ensadv.attacks.threat_model import ThreatModel
from ensadv.evaluation import finished_runs
from ensadv.evaluation.evaluator import Evaluator
from ensadv.models.ensemble import Network
from ensadv.runtime import distributed

PLAIN = ('pgd20', 'apgd_ce', 'apgd_t')  # PGD and AutoAttack's parts, of which the others fell none
OURS = ('apgd_nce', 'members', 'mora')
ALLOWED_POINTS = 1.0
ONE_DECIDES = 1e3  # the factor from which the first member of two decides alone under `probs`


class Scaled:
    """Runs' members as one network, of which the first is multiplied by a factor."""

    def __init__(self, workdirs, n, combine):
        found = [finished_runs.find(epath.Path(pathlib.Path(path).absolute()), '--workdirs',
                                    default.get_config()) for path in workdirs]  # fmt: skip
        self.config = found[0].config
        loaded = [finished_runs.load_one(run, 'float32') for run in found]
        networks, self.variables = zip(*loaded, strict=True)
        dataset = build.dataset(self.config)
        self.images, self.labels = dataset.image_test[:n], dataset.label_test[:n]
        self.classes, self.threat = dataset.num_classes, ThreatModel.of(self.config)

        def member_logits(given, x):
            *variables, factor = given
            pairs = zip(networks, variables, strict=True)
            logits = jnp.concatenate([network.member_logits(v, x) for network, v in pairs])
            return logits.at[0].multiply(factor)

        network = Network(member_logits, combine, None)
        given = self._given(1.0)
        self.members = len(jax.eval_shape(member_logits, given, self.images / np.float32(255)))
        self.evaluator = Evaluator(network, n)

    def _given(self, factor):
        return [*self.variables, distributed.replicate(np.float32(factor))]

    def stands(self, name, factor):
        """Returns which images stand under an attack, bool [n]."""
        entry, given = registry.entry(name), self._given(factor)
        settings = registry.settings({}, entry, self.threat.epsilon)
        settings |= {'attack': entry.kind, 'seed': 0, **self.threat.to_json()}
        if entry.kind == 'pgd':
            settings |= {'sigma': self.threat.epsilon / 2}
            found = self.evaluator.evaluate(given, settings, self.images, self.labels, name)
            return found.margin > 0
        stages = registry.stages(settings, self.classes, self.members)
        found = self.evaluator.staged_attack(
            given, settings, self.images, self.labels, name, stages=stages
        )
        return found.margin > 0


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--workdirs', required=True, metavar='DIR,...', help='finished runs')
    parser.add_argument('--n', type=int, default=100, help='test images (100)')
    parser.add_argument('--combine', default='probs', choices=['probs', 'logits'])
    parser.add_argument('--factors', default='1e-4,1e-2,1,1e2,1e4')
    args = parser.parse_args()
    load_average = os.getloadavg()[0]
    scaled = Scaled(args.workdirs.split(','), args.n, args.combine)
    factors = [float(text) for text in args.factors.split(',')]
    found = {f: {name: scaled.stands(name, f) for name in PLAIN + OURS} for f in factors}
    together = {f: np.all(list(stands.values()), axis=0) for f, stands in found.items()}
    best = dict(together)
    if scaled.members == 1:
        best = dict.fromkeys(factors, np.all(list(together.values()), axis=0))
    elif scaled.members == 2 and args.combine == 'probs':
        alone = Scaled(args.workdirs.split(',')[:1], args.n, args.combine)
        if alone.members == 1:
            of_first = np.all([alone.stands(name, 1.0) for name in PLAIN + OURS], axis=0)
            best |= {f: best[f] & of_first for f in factors if f >= ONE_DECIDES}
    percent = lambda stands: f'{100 * np.mean(stands):.1f}'
    rows = [
        [f'{f:g}', *(percent(found[f][name]) for name in PLAIN + OURS), percent(together[f]),
         percent(best[f])] for f in factors
    ]  # fmt: skip
    print(f'## {scaled.members} members, {args.combine}, n = {len(scaled.labels)}, '
          f'{scaled.threat}\n')  # fmt: skip
    print('\n'.join(machine.describe(load_average)), end='\n\n')
    print('\n'.join(markdown(['factor', *PLAIN, *OURS, 'all', 'best known'], rows)))
    points = [100 * (np.mean(together[f]) - np.mean(best[f])) for f in factors]
    sys.exit(max(points) > ALLOWED_POINTS)


if __name__ == '__main__':
    main()
