"""An attack on a trained run, ours and the libraries', timed to a verdict: table 2 of speed.py."""

import dataclasses
import time
from functools import partial

import numpy as np
import torch

from benchmarks import adversarial_step, attack_strength
from benchmarks.attack_strength import foolbox_attack, in_batches, torchattacks_attack
from benchmarks.speed_tables import OURS
from ensadv.evaluation import attack_settings
from ensadv.evaluation.evaluator import Evaluator


def timed(function, *args):
    """Returns the seconds that function(*args) takes."""
    start = time.perf_counter()
    function(*args)
    return time.perf_counter() - start


def attack(workdir, name, n, repeats, compiled=True, device='cpu'):
    """Times an attack on a trained run, ours and the libraries' in turns, to a verdict on each.

    All attack the first n test images, with the run's epsilon and step size, from the images
    themselves, with one start and the cross-entropy, in float32, in batches of one size.

    Args:
      workdir: of a finished run of Wide ResNets.
      name: pgdN or ifgsmN.
      n: images, or all if fewer.
      repeats: turns of each side.
      compiled: whether torch.compile has its turns, too.
      device: PyTorch's name of what it runs on.

    Returns:
      'title', 'n', 'batch', 'epsilon', 'step_size', 'difference' (of log-probabilities), and
      'sides': {side: {'seconds': [...], 'accuracy': robust}}.
    """
    run = attack_strength.load(workdir, n, batch=100)
    run.peer.to(device)
    both = attack_strength.Judge(run).log_probs(run.x)
    difference = float(np.abs(both[0] - both[1]).max())
    allowed = attack_strength.ALLOWED_DIFFERENCE
    adversarial_step.require([('log-probabilities', difference, allowed)])
    settings, ours = _ours(run, name)
    sides = {OURS: ours}
    peers = {'': run.peer}
    if compiled:
        # For exactly these sizes, which is faster than for any.
        peers[', torch.compile'] = torch.compile(run.peer, dynamic=False)
    for how, peer in peers.items():
        made = _theirs(dataclasses.replace(run, peer=peer), settings)
        sides |= {f'{library}{how}': side for library, side in made.items()}
    correct = {side: function() for side, function in sides.items()}  # compiles
    seconds = {side: [] for side in sides}
    for _ in range(repeats):
        for side, function in sides.items():
            seconds[side].append(timed(function))
    return {
        'title': run.title,
        'n': len(run.y),
        'batch': run.batch_size,
        'epsilon': run.config.epsilon,
        'step_size': settings['step_size'],
        'difference': difference,
        'sides': {
            side: {'seconds': times, 'accuracy': float(np.mean(correct[side]))}
            for side, times in seconds.items()
        },
    }


def _ours(run, name):
    """Returns the attack's settings, and the attack as evaluation runs it: () -> bool [n]."""
    config = run.config
    fields = {'start': 'none', 'schedule': 'constant', 'restarts': 1, 'loss': 'cross_entropy'}
    config.eval[name.rstrip('0123456789')].update(fields)
    config.eval.long_attacks = ()
    settings = attack_settings.evaluation_settings(config, name)
    evaluator = Evaluator(run.network, run.batch_size)
    attack_all = evaluator.evaluate
    if settings['steps'] >= 100:
        attack_all = evaluator.long_attack
        # The share that stays to the end by default: 1,000 of CIFAR-10's 10,000.
        settings['iterate_examples'] = len(run.y) // 10

    def stands():
        verdicts = attack_all(run.variables, settings, run.images, run.y, 'benchmark')
        return (verdicts.margin > 0) & verdicts.has_gradient

    return settings, stands


def _theirs(run, settings):
    """Returns the libraries' attacks, {library: () -> which images stand, bool [n]}."""
    kind, steps, step_size = (settings[name] for name in ('attack', 'steps', 'step_size'))
    made = {'foolbox': foolbox_attack(run, kind, 'none', steps, step_size)}
    if kind == 'ifgsm':
        made['torchattacks'] = torchattacks_attack(run, 'none', steps, step_size)
    judge = attack_strength.Judge(run)

    def stands(attack_batch):
        x_adv = in_batches(attack_batch, run.batch_size, run.x, run.y, run.x)
        return in_batches(judge.peer_log_probs, run.batch_size, x_adv).argmax(1) == run.y

    return {library: partial(stands, attack_batch) for library, attack_batch in made.items()}
