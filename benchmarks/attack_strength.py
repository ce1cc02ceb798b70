"""Whether our attacks are as strong as foolbox's and torchattacks', on the same trained weights.

    pip install -r requirements-benchmark.txt
    pip install --no-deps torchattacks==3.5.1
    python benchmarks/attack_strength.py --workdir=DIR [--n=1000] [--steps 5 20 100]

DIR is a finished run of Wide ResNets. The script rebuilds its last snapshot in PyTorch, and ends
with one line and exit code 1 unless both networks give the same log-probabilities. Then it attacks
the first n test images with ensadv and with both libraries, at equal epsilon, step size, number of
steps and start, and judges what each returns in the same way. Where the images left standing by
ours are over 0.5 points more than by the best of theirs it prints FAIL, with exit code 1. It prints
a report in Markdown. Nothing in DIR changes.

ensadv and the libraries run their own code, whole. Only the noise that a random start begins with
is the same for all: ensadv draws it, and the libraries get it in place of their own.
"""

import argparse
import dataclasses
import os
import pathlib
import sys
from functools import partial
from unittest import mock

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import eagerpy
import foolbox
import jax
import jax.numpy as jnp
import numpy as np
import torch
import torchattacks
from etils import epath
from ml_collections import ConfigDict

from benchmarks import machine, peer_pytorch
from benchmarks.speed_tables import markdown
from configs import default
from ensadv import build, losses, prng
from ensadv.attacks import driver
from ensadv.attacks.first_order import IFGSM, PGD
from ensadv.attacks.threat_model import ThreatModel
from ensadv.errors import UserError
from ensadv.evaluation import finished_runs
from ensadv.models import ensemble

ALLOWED_POINTS = 0.5  # our robust accuracy over the best of theirs, at most
ALLOWED_DIFFERENCE = 1e-4  # between the two networks' log-probabilities
ALLOWED_OUTSIDE = 1e-6  # of the ball and the box, in pixels: rounding
STEP_SIZES = {'ifgsm': 1 / 4, 'pgd': 1 / 2}  # of epsilon, as evaluation's
STARTS = ('none', 'uniform')
# What is run, in the order of the report's columns. The verdict is on OURS against THEIRS.
OURS, FOOLBOX, TORCHATTACKS, FOOLBOX_RAW = 'ensadv', 'foolbox', 'torchattacks', 'foolbox raw'
KINDS = {'ifgsm': (OURS, FOOLBOX, TORCHATTACKS), 'pgd': (OURS, FOOLBOX, FOOLBOX_RAW)}
THEIRS = (FOOLBOX, FOOLBOX_RAW, TORCHATTACKS)


@dataclasses.dataclass
class Run:
    """A run's network, ours and PyTorch's, and the images to attack.

    Attributes:
      config: of the run.
      network, variables: ours, with its weights.
      peer: the same in PyTorch: [B, C, H, W] -> [B, classes].
      images, y: uint8 [n, H, W, C], int32 [n].
      batch_size: at which images are attacked, so that few are padding.
      title: says in the report what was attacked.
    """

    config: ConfigDict
    network: ensemble.Network
    variables: ensemble.Variables
    peer: torch.nn.Module
    images: np.ndarray
    y: np.ndarray
    batch_size: int
    title: str

    @property
    def x(self):
        """The images as pixels, float32 in [0, 1]."""
        return self.images.astype(np.float32) / 255


def load(workdir, n, batch=250):
    """Returns the last snapshot of the workdir, as a `Run`; raises UserError.

    Args:
      workdir: of a finished run of Wide ResNets.
      n: test images, or all if fewer.
      batch: images at a time, at most.
    """
    path = epath.Path(pathlib.Path(workdir).absolute())
    found = finished_runs.find(path, '--workdir', default.get_config())
    run, facts = found.config, found.record['dataset']
    if run.model.name != 'wide_resnet' or run.ensemble.combine not in ('probs', 'logits'):
        raise UserError(
            f'--workdir={workdir}: expected Wide ResNets combined by probs or logits, found '
            f'{run.model.name} and {run.ensemble.combine}'
        )
    dataset = build.dataset(run)
    if dataset.fingerprint != facts['fingerprint']:
        raise UserError(f'--workdir={workdir}: its run was made on other data (fingerprint)')
    network, variables = finished_runs.load([found], combine='probs', dtype='float32')
    k, n = run.ensemble.size, min(n, len(dataset.label_test))
    peer = peer_pytorch.Ensemble(
        run.model.depth, run.model.width, k, facts['num_classes'], facts['mean'], facts['std'],
        combine=run.ensemble.combine,
    )  # fmt: skip
    for module in peer.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eps = run.batch_norm.epsilon
    peer_pytorch.load(peer, variables[0]['params'], variables[0]['batch_stats'])
    return Run(
        config=run,
        network=network,
        variables=variables,
        peer=peer.eval().requires_grad_(False),  # no attack needs gradients of the weights
        images=dataset.image_test[:n],
        y=dataset.label_test[:n],
        batch_size=-(-n // -(-n // batch)),
        title=f'{run.system} on {run.data.name}: {k} x WRN-{run.model.depth}-'
        f'{run.model.width}, combine {run.ensemble.combine}, snapshot of step {found.step}',
    )


def in_batches(function, size, *arrays):
    """Returns function(*arrays), NumPy [n, ...], computed in padded batches of one size."""
    n, results = len(arrays[0]), []
    for first in range(0, n, size):
        places = np.minimum(np.arange(first, first + size), n - 1)
        results.append(np.asarray(function(*(array[places] for array in arrays)))[: n - first])
    return np.concatenate(results)


class Ours:
    """Our attacks, as users call them."""

    def __init__(self, run, seed):
        self._run = run
        self._keys = jax.vmap(partial(jax.random.fold_in, prng.key(seed)))(jnp.arange(len(run.x)))
        self._compiled = {}

    def last(self, attack, name):
        """Returns the last iterates, [n, H, W, C]; what has one name is compiled once."""
        run = self._run

        def compute(variables, keys, x, y, steps):
            predict = partial(run.network.log_probs, variables)
            threat = ThreatModel('linf', run.config.epsilon)
            one = dataclasses.replace(attack, steps=steps)
            return driver.last_iterate(one, predict, threat, keys, x, y)

        compiled = self._compiled.setdefault((name, attack.start), jax.jit(compute))
        call = lambda keys, x, y: compiled(run.variables, keys, x, y, np.int32(attack.steps))
        return in_batches(call, run.batch_size, self._keys, run.x, run.y)


def _on_device_of(run, x):
    """Puts images, NumPy NHWC, where the run's peer is, as it takes them."""
    return peer_pytorch.images(x).to(next(run.peer.parameters()).device)


def on_peer(run, attack):
    """Makes of attack(x, y, x_start), tensors NCHW, the same for a batch of arrays NHWC."""

    def call(x, y, x_start):
        x, x_start = _on_device_of(run, x), _on_device_of(run, x_start)
        x_adv = attack(x, torch.tensor(y).long().to(x.device), x_start)
        return x_adv.permute(0, 2, 3, 1).cpu().numpy()

    return call


def foolbox_attack(run, kind, start, num_steps, step_size, *, raw_gradient=False):
    """Returns foolbox's last iterate as a function of (x, y, x_start).

    `raw_gradient`: its Adam as published takes the gradient's *sign*; whether to leave that out.
    """
    base = {'ifgsm': foolbox.attacks.LinfPGD, 'pgd': foolbox.attacks.LinfAdamPGD}[kind]
    device = next(run.peer.parameters()).device
    model = foolbox.PyTorchModel(run.peer, bounds=(0, 1), device=device)

    def attack(x, y, x_start):
        class Attack(base):
            def get_random_start(self, x0, epsilon):
                return eagerpy.astensor(x_start)

            def normalize(self, gradients, *, x, bounds):
                if raw_gradient:
                    return gradients
                return super().normalize(gradients, x=x, bounds=bounds)

        attack = Attack(abs_stepsize=step_size, steps=num_steps, random_start=start != 'none')
        _, x_adv, _ = attack(model, x, y, epsilons=run.config.epsilon)
        return x_adv

    return on_peer(run, attack)


def torchattacks_attack(run, start, num_steps, step_size):
    """Returns torchattacks' last iterate as a function of (x, y, x_start)."""
    settings = {'eps': run.config.epsilon, 'alpha': step_size, 'steps': num_steps}
    if start == 'none':
        bim = torchattacks.BIM(run.peer, **settings)
        return on_peer(run, lambda x, y, _: bim(x, y))
    pgd = torchattacks.PGD(run.peer, **settings, random_start=True)

    def attack(x, y, x_start):
        # It draws its noise in the middle of its only method, with this call and no other.
        draw = mock.Mock(side_effect=lambda low, high: x_start - x)
        with mock.patch.object(torch.Tensor, 'uniform_', draw):
            x_adv = pgd(x, y)
        draw.assert_called_once_with(-run.config.epsilon, run.config.epsilon)
        return x_adv

    return on_peer(run, attack)


@dataclasses.dataclass
class Judged:
    """What an attack left standing, by our network and by PyTorch's: bool [n] each."""

    ours: np.ndarray
    peer: np.ndarray

    def percent(self):
        return 100 * self.ours.mean()


class Judge:
    """Judges everybody's x_adv alike, and remembers the largest discrepancies."""

    def __init__(self, run):
        self._run = run
        self._log_probs = jax.jit(run.network.log_probs)
        self.difference = 0.0  # of the networks' log-probabilities
        self.clean_difference = 0.0  # of them on the clean images alone
        self.outside = 0.0  # of ball or box, in pixels

    def peer_log_probs(self, x):
        """Returns log-probabilities [B, classes] by PyTorch's network."""
        with torch.no_grad():
            return self._run.peer(_on_device_of(self._run, x)).cpu().numpy()

    def log_probs(self, x):
        """Returns log-probabilities [n, classes] by our network and by PyTorch's."""
        size = self._run.batch_size
        ours = partial(self._log_probs, self._run.variables)
        return in_batches(ours, size, x), in_batches(self.peer_log_probs, size, x)

    def judge(self, x_adv):
        """Returns what stands, once x_adv is seen to be in the ball and the box."""
        run = self._run
        # NumPy's maximum is NaN where one of its arguments is, and so fails what is required.
        outside = (np.abs(x_adv - run.x) - run.config.epsilon, -x_adv, x_adv - 1)
        self.outside = float(np.max([self.outside, *map(np.max, outside)]))
        both = self.log_probs(x_adv)
        self.difference = float(np.maximum(self.difference, np.abs(both[0] - both[1]).max()))
        return Judged(*(np.asarray(losses.margin(lp, run.y)) > 0 for lp in both))


def implementations(run, ours, x_start, kind, start, num_steps, step_size):
    """Returns everybody's attack of one kind: {name: function of nothing -> x_adv [n, H, W, C]}."""
    on_all = lambda attack: lambda: in_batches(attack, run.batch_size, run.x, run.y, x_start)
    from_foolbox = partial(foolbox_attack, run, kind, start, num_steps, step_size)
    attack = {'ifgsm': IFGSM, 'pgd': PGD}[kind](num_steps, step_size, start=start)
    made = {
        OURS: lambda: ours.last(attack, kind),
        FOOLBOX: on_all(from_foolbox()),
        FOOLBOX_RAW: on_all(from_foolbox(raw_gradient=True)),
        TORCHATTACKS: on_all(torchattacks_attack(run, start, num_steps, step_size)),
    }
    return {name: made[name] for name in KINDS[kind]}


def measure(run, ours, judge, args):
    """Returns what every attack left standing: {(kind, steps, start): {name: Judged}}."""
    results = {}
    # No step is taken: this is where the attacks start.
    x_starts = {start: ours.last(IFGSM(0, 0.0, start=start), 'no step') for start in STARTS}
    groups = [(k, n, start) for k in KINDS for n in args.steps for start in STARTS]
    for kind, num_steps, start in groups:
        step_size = STEP_SIZES[kind] * run.config.epsilon
        attack_all = implementations(run, ours, x_starts[start], kind, start, num_steps, step_size)
        results[kind, num_steps, start] = judged = {}
        for name, attack in attack_all.items():
            judged[name] = judge.judge(attack())
            told = f'{kind}{num_steps}, start {start}: {name}: {judged[name].percent():.1f} %'
            print(told, file=sys.stderr, flush=True)
    return results


def points(judged):
    """Returns by how many points more ours leaves standing than the best of theirs.

    The larger one of what the two networks say.
    """
    theirs = [judged[name] for name in THEIRS if name in judged]
    more = lambda by: by(judged[OURS]).mean() - min(by(other).mean() for other in theirs)
    return 100 * float(max(more(lambda one: one.ours), more(lambda one: one.peer)))


def passes(judged):
    """Whether ours is as strong as the best of theirs."""
    return points(judged) <= ALLOWED_POINTS + 1e-9  # 5 of 1000 is 0.5, however it is rounded


def table(results, kind):
    """Returns the lines of what one kind of attack left standing, Markdown."""
    rows = []
    for (found, num_steps, start), judged in results.items():
        if found == kind:
            accuracies = [f'{judged[name].percent():.1f}' for name in KINDS[kind]]
            verdict = 'ok' if passes(judged) else 'FAIL'
            rows.append([num_steps, start, *accuracies, f'{points(judged):+.2f}', verdict])
    return markdown(['steps', 'start', *KINDS[kind], 'ensadv - best', 'verdict'], rows)


def report(args, run, judge, clean, results):
    """Returns the report, Markdown."""
    n, largest, epsilon = len(run.y), max(map(points, results.values())), run.config.epsilon
    passed = all(map(passes, results.values()))
    lines = [
        f'# Strength of the attacks: {run.title}',
        '',
        *machine.describe(os.getloadavg()[0]),
        '',
        f'Robust accuracy in %, lower is stronger; n = {n}, the first test images (one is '
        f'{100 / n:.2f} points), clean accuracy {clean:.1f} %; epsilon {epsilon:.5g}, seed '
        f'{args.seed}, loss cross-entropy, one start, the last iterate. Everybody has the same '
        'weights, images, epsilon, step size, number of steps and start.',
        '',
        f'ensadv leaves at most {largest:+.2f} points more standing than the best of '
        f'{", ".join(THEIRS)} (allowed: {ALLOWED_POINTS:+.1f}): '
        f'**{"ok in every row" if passed else "FAIL"}**.',
        '',
        f'## Sign of the gradient, step size {STEP_SIZES["ifgsm"] * epsilon:.5g}',
        '',
        *table(results, 'ifgsm'),
        '',
        f'## Adam, rate {STEP_SIZES["pgd"] * epsilon:.5g}',
        '',
        *table(results, 'pgd'),
        '',
        f'- {FOOLBOX}: `LinfPGD` and `LinfAdamPGD`, clipped. Its Adam takes the *sign* of the '
        f'gradient. {FOOLBOX_RAW}: `LinfAdamPGD` with `normalize` overridden to leave the gradient '
        "as it is, the paper's PGD.",
        f'- {TORCHATTACKS}: `BIM` without a random start, `PGD` with one. It has no PGD with Adam.',
        '- start uniform: one draw from the ball, cut to [0, 1], by ensadv and the same for all.',
        "- Every x_adv is judged by the ensemble in JAX and in PyTorch; the table has JAX's "
        'verdict, and "ensadv - best" is the larger of the two differences. Log-probabilities '
        f'differ by at most {judge.clean_difference:.1e} on the clean images (allowed: '
        f'{ALLOWED_DIFFERENCE:.0e}) and {judge.difference:.1e} on all x_adv.',
    ]
    return '\n'.join(lines)


def parse_args():
    """Returns the flags."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--workdir', required=True, metavar='DIR', help='a finished run')
    parser.add_argument('--n', type=int, default=1000, help='test images (1000, or all)')
    parser.add_argument('--steps', type=int, nargs='+', default=[5, 20, 100], help='5 20 100')
    parser.add_argument('--seed', type=int, default=0, help='of the random start (0)')
    return parser.parse_args()


def main():
    args = parse_args()
    try:
        run = load(args.workdir, args.n)
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    judge = Judge(run)
    clean = judge.judge(run.x).percent()
    judge.clean_difference = judge.difference
    if not judge.difference <= ALLOWED_DIFFERENCE:
        sys.exit(
            f'ensadv and PyTorch do not compute the same: log-probabilities differ by '
            f'{judge.difference:.2g}, allowed {ALLOWED_DIFFERENCE:.0e}'
        )
    results = measure(run, Ours(run, args.seed), judge, args)
    if not judge.outside <= ALLOWED_OUTSIDE:
        sys.exit(f'an x_adv is {judge.outside:.2g} outside of the ball or of [0, 1]')
    print(report(args, run, judge, clean, results))
    sys.exit(not all(map(passes, results.values())))


if __name__ == '__main__':
    main()
