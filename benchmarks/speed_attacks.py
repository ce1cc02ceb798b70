"""An attack on a trained run, ours and the libraries', timed to a verdict: table 2 of speed.py."""

import pathlib
import sys
import time
import types

import foolbox
import numpy as np
import torch
import torchattacks
from etils import epath

from benchmarks import adversarial_step, attack_strength, peer_pytorch
from benchmarks.speed_tables import OURS
from configs import default
from ensadv import build
from ensadv.evaluation import attack_settings, finished_runs
from ensadv.evaluation.evaluator import Evaluator
from ensadv.storage import checkpoints

TRIAL_STEPS = 3  # of an attack, for choosing a batch size


def timed(function, *args):
    """Returns the seconds that function(*args) takes."""
    start = time.perf_counter()
    function(*args)
    return time.perf_counter() - start


def attack(workdir, name, n, repeats, compiled=True, device='cpu'):
    """Times an attack on a trained run, ours and the libraries' in turns, to a verdict on each.

    All attack the first n test images, with the run's epsilon and step size, from the images
    themselves, with one start and the cross-entropy, in float32. Each side takes the batch size,
    and PyTorch the compiled or the eager network, that was the fastest in a trial: of few steps, or
    of the whole attack where examples leave it early.

    Args:
      workdir: of a finished run of Wide ResNets.
      name: pgdN or ifgsmN.
      n: images, or all if fewer.
      repeats: turns of each side.
      compiled: whether to try torch.compile.
      device: PyTorch's name of what it runs on.

    Returns:
      'title', 'n', 'epsilon', 'step_size', 'difference' (of log-probabilities), and 'sides':
      {side: {'seconds': [...], 'first': seconds of compiling, 'accuracy': robust, 'batch': images
      at a time, 'compiled': whether PyTorch was}}.
    """
    run = load(workdir, n)
    n = len(run.y)
    both = attack_strength.Judge(run).log_probs(run.x[:100])
    difference = float(np.abs(both[0] - both[1]).max())
    allowed = attack_strength.ALLOWED_DIFFERENCE
    adversarial_step.require([('log-probabilities', difference, allowed)])
    sides = sides_of(run, workdir, name, compiled, device)
    for side in sides.values():
        side.choose(batch_sizes(n))
    seconds = {side_name: [] for side_name in sides}
    for _ in range(repeats):
        for side_name, side in sides.items():
            seconds[side_name].append(timed(side))
    return {
        'title': run.title,
        'n': n,
        'epsilon': run.epsilon,
        'step_size': sides[OURS].settings['step_size'],
        'difference': difference,
        'sides': {
            name: {
                'seconds': seconds[name],
                'first': side.first,
                'accuracy': float(np.mean(side.correct)),
                'batch': side.batch,
                'compiled': side.compiled,
            }
            for name, side in sides.items()
        },
    }


def load(workdir, n):
    """Returns a finished run with its first n test images, as `attack_strength.load` does."""
    arguments = types.SimpleNamespace(workdir=workdir, n=n, batch=50, data_label=None)
    return attack_strength.load(arguments)


def sides_of(run, workdir, name, compiled=True, device='cpu'):
    """Returns {side: its attack, which has still to choose its batch size}; see `attack`."""
    sides = {OURS: _OurAttack(workdir, name, len(run.y))}
    settings = sides[OURS].settings
    for library in ('foolbox', 'torchattacks'):
        if library == 'foolbox' or settings['attack'] == 'ifgsm':
            sides[library] = _TheirAttack(run, library, settings, compiled, device)
    return sides


def batch_sizes(n):
    """Returns batch sizes worth trying for n images, the largest first."""
    return list(dict.fromkeys(-(-min(n, 500) // 2**i) for i in range(3)))


def _fitting(trial, sizes):
    """Returns [trial(size), ...] of those sizes that the device's memory is large enough for."""
    found = []
    for size in sizes:
        try:
            found.append(trial(size))
        except Exception as error:
            if not adversarial_step.is_out_of_memory(error) or size == sizes[-1]:
                raise
    return found


class _OurAttack:
    """An attack as evaluation runs it: `Evaluator.long_attack` from 100 steps on."""

    def __init__(self, workdir, name, n):
        path = epath.Path(pathlib.Path(workdir).absolute())
        found = finished_runs.find(path, '--workdir', default.get_config())
        config = found.config
        kind = name.rstrip('0123456789')
        fields = {'start': 'none', 'schedule': 'constant', 'restarts': 1, 'loss': 'cross_entropy'}
        config.eval[kind].update(fields)
        config.eval.long_attacks = ()
        self.config = config
        self._network = build.network(config, found.record['dataset'])
        snapshots = checkpoints.open_snapshots(path)
        self._variables = snapshots.restore(found.step, self._network.variables)
        snapshots.close()
        images, labels = build.dataset(config).split('test')
        self._images, self._labels = images[:n], labels[:n]
        self.settings = attack_settings.evaluation_settings(config, name)
        self.long = self.settings['steps'] >= 100
        if self.long:
            # The share that stays to the end by default: 1,000 of CIFAR-10's 10,000.
            self.settings['iterate_examples'] = n // 10
        self.compiled = False
        self.batch = self.first = self.correct = self._evaluator = None

    def _attack(self, evaluator, settings, n):
        """Returns which of the first n images stand, bool [n]."""
        attack = evaluator.long_attack if 'iterate_examples' in settings else evaluator.evaluate
        images, labels = self._images[:n], self._labels[:n]
        verdicts = attack(self._variables, settings, images, labels, 'benchmark')
        return (verdicts.margin > 0) & verdicts.has_gradient

    def choose(self, sizes):
        """Picks the size with the least time per image; what compiles is compiled after that."""
        settings = {k: v for k, v in self.settings.items() if k != 'iterate_examples'}
        settings['steps'] = TRIAL_STEPS
        n = len(self._labels)

        def trial(size):
            evaluator = Evaluator(self._network, size)
            short = lambda: self._attack(evaluator, settings, size)
            first = timed(short)
            if self.long:  # few steps say little, as examples leave later
                seconds = timed(lambda: self._attack(evaluator, self.settings, n)) / n
            else:
                seconds = min(timed(short) for _ in range(3)) / size
            return seconds, size, first, evaluator

        found = min(_fitting(trial, sizes), key=lambda one: one[0])
        _, self.batch, self.first, self._evaluator = found

    def __call__(self):
        self.correct = self._attack(self._evaluator, self.settings, len(self._labels))


class _TheirAttack:
    """A library's attack as its users run it: in batches, then a verdict on each image."""

    def __init__(self, run, library, settings, compile_it, device):
        self._library, self._settings, self._run = library, settings, run
        self._compile_it = compile_it
        self._eager = run.peer.to(device)
        self._x, self._y = peer_pytorch.images(run.x).to(device), torch.tensor(run.y).long()
        self._y = self._y.to(device)
        self.compiled = False
        self.batch = self.first = self.correct = self._network = None

    def _verdicts(self, network, steps, n, size):
        """Returns which of the first n images stand, bool [n]."""
        kind, step_size = self._settings['attack'], self._settings['step_size']
        epsilon, stands = self._run.epsilon, []
        if self._library == 'foolbox':
            attacks = foolbox.attacks
            base = {'ifgsm': attacks.LinfBasicIterativeAttack, 'pgd': attacks.LinfAdamPGD}[kind]
            attack = base(abs_stepsize=step_size, steps=steps, random_start=False)
            model = foolbox.PyTorchModel(network, bounds=(0, 1), device=self._x.device)
        else:
            attack = torchattacks.BIM(network, eps=epsilon, alpha=step_size, steps=steps)
        for first in range(0, n, size):
            x, y = self._x[first : min(first + size, n)], self._y[first : min(first + size, n)]
            if self._library == 'foolbox':
                stands.append(~attack(model, x, y, epsilons=epsilon)[2])
                continue
            x_adv = attack(x, y)
            with torch.no_grad():
                stands.append(network(x_adv).argmax(1) == y)
        return torch.cat(stands).cpu().numpy()

    def choose(self, sizes):
        """Picks size, then compiled or eager, with the least time per image."""
        found = _fitting(lambda size: (*self._trial(self._eager, size), size, False), sizes)
        size = min(found)[2]
        # For exactly these sizes, which is faster than for any.
        compiled = torch.compile(self._eager, dynamic=False)
        try:
            if self._compile_it:
                found.append((*self._trial(compiled, size), size, True))
        except Exception as error:  # compilers fail in every way
            if adversarial_step.is_out_of_memory(error):
                raise
            print(f'{self._library}: not compiled: {type(error).__name__}', file=sys.stderr)
        _, self.first, self.batch, self.compiled = min(found)
        self._network = compiled if self.compiled else self._eager

    def _trial(self, network, size):
        """Returns seconds per image, and seconds before that."""
        # The last batch may be smaller, and may be another compilation.
        n = len(self._run.y)
        sizes = {size, n % size or size}
        first = timed(lambda: [self._verdicts(network, TRIAL_STEPS, m, m) for m in sizes])
        run = lambda: self._verdicts(network, TRIAL_STEPS, size, size)
        return min(timed(run) for _ in range(3)) / size, first

    def __call__(self):
        n = len(self._run.y)
        self.correct = self._verdicts(self._network, self._settings['steps'], n, self.batch)
