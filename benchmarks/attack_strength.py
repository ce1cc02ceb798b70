"""Whether our attacks are as strong as foolbox's and torchattacks', on the same trained weights.

    pip install -r requirements-benchmark.txt
    pip install --no-deps torchattacks==3.5.1
    python benchmarks/attack_strength.py --workdir=DIR [--n=1000] [--steps 5 20 100] [--out=FILE]

DIR is a finished run of Wide ResNets. The script rebuilds its last snapshot in PyTorch, and ends
with one line and exit code 1 unless both networks give the same log-probabilities. Then it attacks
the first n test images with ensadv and with both libraries, at equal epsilon, step size, number of
steps and start, and judges what each returns in the same way. Where the images left standing by
ours are over 0.5 points more than by the best of theirs it prints FAIL, with exit code 1. It prints
a report in Markdown; --out writes it to a file, too. Nothing in DIR changes.

ensadv and the libraries run their own code, whole. Only the noise that a random start begins with
is the same for all: ensadv draws it, and the libraries get it in place of their own.
"""

import argparse
import dataclasses
import os
import pathlib
import platform
import sys
import time
from collections.abc import Callable
from functools import partial
from unittest import mock

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

try:
    import eagerpy
    import foolbox
    import optax
    import torch
    import torchattacks
except ImportError as error:
    print(
        f'{error.name} is missing: pip install -r requirements-benchmark.txt; '
        'pip install --no-deps torchattacks==3.5.1',
        file=sys.stderr,
    )
    sys.exit(2)

import jax
import jax.numpy as jnp
import jaxlib
import numpy as np
from etils import epath

from benchmarks import machine, peer_pytorch
from configs import default
from ensadv import build, losses, prng
from ensadv.attacks import driver
from ensadv.attacks.first_order import IFGSM, PGD
from ensadv.attacks.threat_model import ThreatModel
from ensadv.errors import UserError
from ensadv.models import ensemble
from ensadv.storage import checkpoints, workdir

ALLOWED_POINTS = 0.5  # our robust accuracy over the best of theirs, at most
ALLOWED_DIFFERENCE = 1e-4  # between the two networks' log-probabilities
ALLOWED_OUTSIDE = 1e-6  # of the ball and the box, in pixels: rounding
LIBRARY_EPSILON = 1e-8  # of Adam, in foolbox; ours is 1e-16
LIBRARY_ADAM = optax.scale_by_adam(eps=LIBRARY_EPSILON)
STARTS = ('none', 'uniform')
# What is run, in the order of the report's columns. The verdict is on OURS against THEIRS.
OURS, WORST, FOOLBOX, TORCHATTACKS = 'ensadv', 'ensadv worst', 'foolbox', 'torchattacks'
FOOLBOX_RAW, OURS_LARGE, OURS_SIGNS = 'foolbox raw', 'ensadv 1e-8', 'ensadv signs'
KINDS = {
    'ifgsm': (OURS, FOOLBOX, TORCHATTACKS, WORST),
    'pgd': (OURS, FOOLBOX, FOOLBOX_RAW, WORST, OURS_LARGE, OURS_SIGNS),
}
THEIRS = (FOOLBOX, FOOLBOX_RAW, TORCHATTACKS)


@dataclasses.dataclass
class Run:
    """A run's network, ours and PyTorch's, and the images to attack.

    Attributes:
      log_probs: (variables, images [B, H, W, C]) -> log-probabilities [B, classes], in JAX.
      variables: the weights.
      peer: the same in PyTorch: [B, C, H, W] -> [B, classes].
      x, y: float32 [n, H, W, C] in [0, 1], int32 [n].
      epsilon: of the run's threat model.
      batch_size: at which images are attacked, so that few are padding.
      title: says in the report what was attacked.
    """

    log_probs: Callable[..., jax.Array]
    variables: ensemble.Variables
    peer: torch.nn.Module
    x: np.ndarray
    y: np.ndarray
    epsilon: float
    batch_size: int
    title: str


def load(args):
    """Returns the last snapshot of the workdir, as a `Run`; raises UserError."""
    path = epath.Path(pathlib.Path(args.workdir).absolute())
    record = workdir.read_record(path)
    if record is None:
        raise UserError(f'--workdir={args.workdir}: no run is here (no config.json)')
    run = default.get_config()
    for group in ('data', 'model', 'batch_norm', 'ensemble'):
        # Only what decides the network and the images: the rest may be another version's.
        found = record['config'][group].items()
        run[group].update({name: value for name, value in found if name in run[group]})
    if run.model.name != 'wide_resnet' or run.ensemble.combine not in ('probs', 'logits'):
        raise UserError(
            f'--workdir={args.workdir}: expected Wide ResNets combined by probs or logits, found '
            f'{run.model.name} and {run.ensemble.combine}'
        )
    dataset, facts = build.dataset(run), record['dataset']
    if dataset.fingerprint != facts['fingerprint']:
        raise UserError(f'--workdir={args.workdir}: its run was made on other data (fingerprint)')
    model, k = build.model(run, facts, dtype='float32'), run.ensemble.size
    shape = tuple(facts['image_shape'])
    snapshots = checkpoints.open_snapshots(path)
    if not snapshots.steps():
        raise UserError(f'--workdir={args.workdir}: no snapshot yet')
    step = snapshots.steps()[-1]
    like = jax.eval_shape(lambda: ensemble.init(model, prng.key(0), k, shape))
    variables = jax.tree.map(jnp.asarray, jax.device_get(snapshots.restore(step, like)))
    snapshots.close()
    n = min(args.n, len(dataset.label_test))
    system, name = record['config']['system'], args.data_label or run.data.name
    return Run(
        log_probs=lambda variables, x: ensemble.combine(
            ensemble.apply(model, variables, x), run.ensemble.combine
        ),
        variables=variables,
        peer=_peer(run, facts, variables),
        x=dataset.image_test[:n].astype(np.float32) / 255,
        y=dataset.label_test[:n],
        epsilon=record['config']['epsilon'],
        batch_size=-(-n // -(-n // args.batch)),
        title=f'{system} on {name}: {k} x WRN-{run.model.depth}-{run.model.width}, '
        f'combine {run.ensemble.combine}, snapshot of step {step}',
    )


def _peer(run, facts, variables):
    """Returns our network in PyTorch."""
    peer = peer_pytorch.Ensemble(
        run.model.depth, run.model.width, run.ensemble.size, facts['num_classes'],
        facts['mean'], facts['std'], combine=run.ensemble.combine,
    )  # fmt: skip
    for module in peer.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eps = run.batch_norm.epsilon
    peer_pytorch.load(peer, variables['params'], variables['batch_stats'])
    # Without gradients of the weights, which no attack needs.
    return peer.eval().requires_grad_(False)


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

    def _call(self, name, compute, num_steps):
        """Returns compute(variables, keys, x, y, num_steps) of all images, compiled once a name."""
        compiled = self._compiled.setdefault(name, jax.jit(compute))
        run = self._run
        call = lambda keys, x, y: compiled(run.variables, keys, x, y, np.int32(num_steps))
        return in_batches(call, run.batch_size, self._keys, run.x, run.y)

    def last(self, attack, start, num_steps, name):
        """Returns the last iterates, [n, H, W, C]."""
        run = self._run

        def compute(variables, keys, x, y, num_steps):
            # `worst_case` folds in the number of the restart, so that both start at one point.
            keys = jax.vmap(lambda key: jax.random.fold_in(key, 0))(keys)
            one = dataclasses.replace(attack, steps=num_steps, start=start)
            threat = ThreatModel('linf', run.epsilon)
            return driver.last_iterate(one, partial(run.log_probs, variables), threat, keys, x, y)

        return self._call(('last', name, start), compute, num_steps)

    def worst(self, attack, start, num_steps, name):
        """Returns the worst iterates, [n, H, W, C]."""
        run = self._run

        def compute(variables, keys, x, y, num_steps):
            one = dataclasses.replace(attack, steps=num_steps, start=start)
            threat = ThreatModel('linf', run.epsilon)
            predict = partial(run.log_probs, variables)
            return driver.worst_case(one, predict, threat, keys, x, y).x_adv

        return self._call(('worst', name, start), compute, num_steps)


@dataclasses.dataclass(frozen=True)
class LibraryAdam(PGD):
    """PGD with Adam's epsilon as the libraries have it."""

    def memory(self, x):
        return jax.vmap(LIBRARY_ADAM.init)(x)

    def move(self, threat, gradient, memory):
        return jax.vmap(LIBRARY_ADAM.update)(gradient, memory)


@dataclasses.dataclass(frozen=True)
class AdamOfSigns(LibraryAdam):
    """The same on the gradient's signs, as foolbox's."""

    def move(self, threat, gradient, memory):
        return super().move(threat, jnp.sign(gradient), memory)


def on_peer(attack):
    """Makes of attack(x, y, x_start), tensors NCHW, the same for a batch of arrays NHWC."""

    def call(x, y, x_start):
        images = peer_pytorch.images
        x_adv = attack(images(x), torch.tensor(y).long(), images(x_start))
        return x_adv.permute(0, 2, 3, 1).numpy()

    return call


def foolbox_attack(run, kind, start, num_steps, step_size, *, raw_gradient=False):
    """Returns foolbox's last iterate as a function of (x, y, x_start).

    `raw_gradient`: its Adam as published takes the gradient's *sign*; whether to leave that out.
    """
    base = {'ifgsm': foolbox.attacks.LinfPGD, 'pgd': foolbox.attacks.LinfAdamPGD}[kind]
    model = foolbox.PyTorchModel(run.peer, bounds=(0, 1), device='cpu')

    def attack(x, y, x_start):
        class Attack(base):
            def get_random_start(self, x0, epsilon):
                return eagerpy.astensor(x_start)

            def normalize(self, gradients, *, x, bounds):
                if raw_gradient:
                    return gradients
                return super().normalize(gradients, x=x, bounds=bounds)

        attack = Attack(abs_stepsize=step_size, steps=num_steps, random_start=start != 'none')
        _, x_adv, _ = attack(model, x, y, epsilons=run.epsilon)
        return x_adv

    return on_peer(attack)


def torchattacks_attack(run, start, num_steps, step_size):
    """Returns torchattacks' last iterate as a function of (x, y, x_start)."""
    settings = {'eps': run.epsilon, 'alpha': step_size, 'steps': num_steps}
    if start == 'none':
        bim = torchattacks.BIM(run.peer, **settings)
        return on_peer(lambda x, y, _: bim(x, y))
    pgd = torchattacks.PGD(run.peer, **settings, random_start=True)

    def attack(x, y, x_start):
        # It draws its noise in the middle of its only method, with this call and no other.
        draw = mock.Mock(side_effect=lambda low, high: x_start - x)
        with mock.patch.object(torch.Tensor, 'uniform_', draw):
            x_adv = pgd(x, y)
        draw.assert_called_once_with(-run.epsilon, run.epsilon)
        return x_adv

    return on_peer(attack)


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
        self._log_probs = jax.jit(run.log_probs)
        self.difference = 0.0  # of the networks' log-probabilities
        self.clean_difference = 0.0  # of them on the clean images alone
        self.disagreements = 0  # of the networks about an example, in one set of x_adv
        self.outside = 0.0  # of ball or box, in pixels

    def log_probs(self, x):
        """Returns log-probabilities [n, classes] by our network and by PyTorch's."""
        peer = lambda x: self._run.peer(peer_pytorch.images(x)).numpy()
        size = self._run.batch_size
        ours = partial(self._log_probs, self._run.variables)
        return in_batches(ours, size, x), in_batches(peer, size, x)

    def judge(self, x_adv):
        """Returns what stands, once x_adv is seen to be in the ball and the box."""
        run = self._run
        # NumPy's maximum is NaN where one of its arguments is, and so fails what is required.
        outside = (np.abs(x_adv - run.x) - run.epsilon, -x_adv, x_adv - 1)
        self.outside = float(np.max([self.outside, *map(np.max, outside)]))
        both = self.log_probs(x_adv)
        self.difference = float(np.maximum(self.difference, np.abs(both[0] - both[1]).max()))
        judged = Judged(*(np.asarray(losses.margin(lp, run.y)) > 0 for lp in both))
        disagreements = int(np.sum(judged.ours != judged.peer))
        self.disagreements = max(self.disagreements, disagreements)
        return judged


def implementations(run, ours, x_start, kind, start, num_steps, step_size):
    """Returns everybody's attack of one kind: {name: function of nothing -> x_adv [n, H, W, C]}."""
    on_all = lambda attack: lambda: in_batches(attack, run.batch_size, run.x, run.y, x_start)
    from_foolbox = partial(foolbox_attack, run, kind, start, num_steps, step_size)
    of = lambda made: made(steps=num_steps, step_size=step_size, start='none')
    attack = of({'ifgsm': IFGSM, 'pgd': PGD}[kind])
    made = {
        OURS: lambda: ours.last(attack, start, num_steps, kind),
        WORST: lambda: ours.worst(attack, start, num_steps, kind),
        FOOLBOX: on_all(from_foolbox()),
        FOOLBOX_RAW: on_all(from_foolbox(raw_gradient=True)),
        TORCHATTACKS: on_all(torchattacks_attack(run, start, num_steps, step_size)),
        OURS_LARGE: lambda: ours.last(of(LibraryAdam), start, num_steps, OURS_LARGE),
        OURS_SIGNS: lambda: ours.last(of(AdamOfSigns), start, num_steps, OURS_SIGNS),
    }
    return {name: made[name] for name in KINDS[kind]}


def measure(run, ours, judge, args):
    """Returns what every attack left standing: {(kind, steps, start): {name: Judged}}."""
    results, begin = {}, time.monotonic()
    # No step is taken: this is where the attacks start.
    x_starts = {
        start: ours.last(IFGSM(steps=0, step_size=0.0, start='none'), start, 0, 'no step')
        for start in STARTS
    }
    groups = [(k, n, start) for k in KINDS for n in args.steps for start in STARTS]
    for i, (kind, num_steps, start) in enumerate(groups):
        step_size = {'ifgsm': args.ifgsm_step_size, 'pgd': args.pgd_step_size}[kind]
        attack_all = implementations(run, ours, x_starts[start], kind, start, num_steps, step_size)
        results[kind, num_steps, start] = judged = {}
        for name, attack in attack_all.items():
            judged[name] = judge.judge(attack())
            print(
                f'{time.monotonic() - begin:6.0f} s, group {i + 1} of {len(groups)}: '
                f'{kind}{num_steps}, start {start}: {name}: {judged[name].percent():.1f} %',
                file=sys.stderr,
                flush=True,
            )
    return results


def points(judged):
    """Returns by how many points more ours leaves standing than the best of theirs.

    The larger one of what the two networks say.
    """
    theirs = [judged[name] for name in THEIRS if name in judged]
    by_ours = judged[OURS].ours.mean() - min(other.ours.mean() for other in theirs)
    by_peer = judged[OURS].peer.mean() - min(other.peer.mean() for other in theirs)
    return 100 * float(max(by_ours, by_peer))


def passes(judged):
    """Whether ours is as strong as the best of theirs."""
    return points(judged) <= ALLOWED_POINTS + 1e-9  # 5 of 1000 is 0.5, however it is rounded


def table(results, kind):
    """Returns what one kind of attack left standing, Markdown."""
    names = KINDS[kind]
    theirs = [name for name in names if name in THEIRS]
    columns = ('steps', 'start', *names, 'differ', 'ensadv - best', 'verdict')
    lines = [f'| {" | ".join(columns)} |', f'| --: | --- |{" --: |" * (len(columns) - 3)} --- |']
    for (found, num_steps, start), judged in results.items():
        if found != kind:
            continue
        differ = [int(np.sum(judged[OURS].ours != judged[name].ours)) for name in theirs]
        cells = (
            str(num_steps),
            start,
            *(f'{judged[name].percent():.1f}' for name in names),
            ', '.join(map(str, differ)),
            f'{points(judged):+.2f}',
            'ok' if passes(judged) else 'FAIL',
        )
        lines.append(f'| {" | ".join(cells)} |')
    return lines


def report(args, run, judge, clean, results):
    """Returns the report, Markdown."""
    n, failed = len(run.y), [group for group, judged in results.items() if not passes(judged)]
    largest = max(map(points, results.values()))
    if failed:
        named = ', '.join(f'{kind}{steps} from {start}' for kind, steps, start in failed)
        verdict = f'FAIL: {named}'
    else:
        verdict = 'ok in every row'
    label = f" --data_label='{args.data_label}'" if args.data_label else ''
    steps = ' '.join(map(str, args.steps))
    lines = [
        f'# Strength of the attacks: {run.title}',
        '',
        f'    python benchmarks/attack_strength.py --workdir=DIR --n={args.n} --steps {steps} '
        f'--seed={args.seed}{label}',
        '',
        f'Robust accuracy in %, lower is stronger; n = {n}, the first test images (one is '
        f'{100 / n:.2f} points), {clean:.1f} % right when clean; epsilon {run.epsilon:.5g}, '
        f'seed {args.seed}, loss cross-entropy, one start. Everybody has the same weights, '
        'images, epsilon, step size, number of steps and start.',
        '',
        f'ensadv leaves at most {largest:+.2f} points more standing than the best of theirs '
        f'(allowed: {ALLOWED_POINTS:+.1f}): **{verdict}**.',
        '',
        f'## Sign of the gradient, step size {args.ifgsm_step_size:.5g}',
        '',
        *table(results, 'ifgsm'),
        '',
        f'## Adam, rate {args.pgd_step_size:.5g}',
        '',
        *table(results, 'pgd'),
        '',
        *_legend(),
        '',
        *_checks(judge),
        '',
        *_environment(),
    ]
    return '\n'.join(lines) + '\n'


def _legend():
    return [
        f'- {OURS}: `driver.last_iterate` of `IFGSM` or `PGD` (Adam, epsilon 1e-16): '
        'the last iterate, which is also what the libraries return. Judged against the best of '
        f'{", ".join(THEIRS)} in its row.',
        f'- {WORST}: `driver.worst_case`, the worst iterate, which `accuracy` in eval/STEP.json '
        'means. Not in the verdict.',
        f'- {FOOLBOX}: `LinfPGD` and `LinfAdamPGD`, clipped. Its Adam (betas 0.9 and 0.999, as '
        'ours; epsilon 1e-8) takes the *sign* of the gradient, and so is momentum on signs and not '
        "Adam's update of the gradient.",
        f'- {FOOLBOX_RAW}: `LinfAdamPGD` with `normalize` overridden to leave the gradient as it '
        "is: the paper's PGD, but for epsilon 1e-8.",
        f'- {TORCHATTACKS}: `BIM` without a random start, `PGD` with one. It has no PGD with Adam.',
        f"- {OURS_LARGE}: ours with foolbox's epsilon for Adam. {OURS_SIGNS}: ours as foolbox does "
        'it, on signs, with its epsilon. Not in the verdict.',
        f'- differ: on how many images {OURS} and each of theirs, in the order of the columns, '
        'come to different verdicts.',
        '- start uniform: one draw from the ball, cut to [0, 1], by ensadv and the same for all. '
        "foolbox gets it through its `get_random_start`; torchattacks' `PGD.forward` runs whole, "
        'with the one `Tensor.uniform_` that it calls replaced.',
        '- The peer returns log-probabilities. The libraries take cross-entropy of '
        'them, which is that of the ensemble: log_softmax leaves them as they are.',
    ]


def _checks(judge):
    return [
        "Every x_adv is judged by the ensemble in JAX and in PyTorch; above is JAX's verdict, and "
        '"ensadv - best" is the larger of the two differences. Their log-probabilities '
        f'differ by at most {judge.clean_difference:.1e} on the clean images (allowed: '
        f'{ALLOWED_DIFFERENCE:.0e}) and {judge.difference:.1e} on all x_adv, their verdicts on '
        f'at most {judge.disagreements} images of an attack. No x_adv lies more than '
        f'{max(judge.outside, 0):.1e} outside of the ball or of [0, 1] '
        f'(allowed: {ALLOWED_OUTSIDE:.0e}).',
    ]


def _environment():
    device = jax.devices()[0]
    return [
        f'- CPU: {machine.cpu()}, {os.cpu_count()} cores. JAX on '
        f'{device.platform} ({device.device_kind}), PyTorch on the CPU; float32.',
        f'- Python {platform.python_version()}, jax {jax.__version__}, jaxlib '
        f'{jaxlib.__version__}, torch {torch.__version__}, foolbox {foolbox.__version__}, '
        f'torchattacks {torchattacks.__version__}',
    ]


def parse_args():
    """Returns the flags."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--workdir', required=True, metavar='DIR', help='a finished run')
    parser.add_argument('--n', type=int, default=1000, help='test images (1000, or all)')
    parser.add_argument(
        '--steps', type=int, nargs='+', default=[5, 20, 100], help='numbers of steps (5 20 100)'
    )
    parser.add_argument('--seed', type=int, default=0, help='of the random start (0)')
    parser.add_argument('--batch', type=int, default=250, help='images at a time, at most (250)')
    for kind, share in (('ifgsm', 4), ('pgd', 2)):
        parser.add_argument(
            f'--{kind}_step_size', type=float, help=f"in pixels (the run's epsilon / {share})"
        )
    parser.add_argument('--data_label', metavar='NAME', help='what the report calls the images')
    parser.add_argument('--out', type=pathlib.Path, metavar='FILE', help='write the report there')
    args = parser.parse_args()
    for name, value in (('n', args.n), ('batch', args.batch), ('steps', min(args.steps))):
        if value < 1:
            parser.error(f'--{name}: expected at least 1, found {value}')
    return args


def main():
    args = parse_args()
    try:
        run = load(args)
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    if args.ifgsm_step_size is None:
        args.ifgsm_step_size = run.epsilon / 4
    if args.pgd_step_size is None:
        args.pgd_step_size = run.epsilon / 2
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
    text = report(args, run, judge, clean, results)
    print(text, end='')
    if args.out:
        args.out.write_text(text)
    sys.exit(not all(map(passes, results.values())))


if __name__ == '__main__':
    main()
