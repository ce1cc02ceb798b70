"""Whether AutoAttack's parts do what the reference's do, step by step, where nothing is random.

    pip install -r requirements-benchmark.txt
    python benchmarks/autoattack_units.py [--n=100] [--queries=1000]

`pyautoattack` 0.2.0 has the reference's code. Both attack n images of 8 x 8 x 3 and two small
networks, one smooth (tanh) and one with ReLU, with random weights, in each norm. All is computed in
float64, so that nothing but the attacks can make a difference; FAB, which the reference makes in
float32 only, is so on both sides. The reference runs as it is, with its own random numbers, and
ours is given what it drew.

- APGD (cross-entropy, DLR, targeted DLR), 100 iterations from the reference's start, of each image
  until it is fooled: all points, and at each checkpoint the step sizes and the best losses.
- FAB-T, 100 iterations for the second target, from the image: the distances found.
- Square, from the reference's start and windows: each proposal, and whether it was taken.

The report in Markdown has for each of these the images that are alike throughout, and the largest
difference among these. The exit code is 1 where fewer than 80 % are. A fault makes all differ. A
few images meet something that rounding decides: in l2 Square's change has the length of what is
left of epsilon, which may be nothing but rounding, and its direction counts later.
"""

import argparse
import itertools
import os
import pathlib
import sys
from unittest import mock

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import jax
import jax.numpy as jnp
import numpy as np
import torch
from pyautoattack.autopgd_base import APGDAttack, APGDAttack_targeted
from pyautoattack.fab_pt import FABAttack_PT
from pyautoattack.square import SquareAttack

from benchmarks import machine
from benchmarks.speed_tables import markdown
from ensadv import prng
from ensadv.attacks import square
from ensadv.attacks.apgd import APGD
from ensadv.attacks.fab import FAB
from ensadv.attacks.square import Square
from ensadv.attacks.threat_model import ThreatModel

SHAPE, CLASSES, HIDDEN, RANK = (8, 8, 3), 10, 32, 2
EPSILONS = {'linf': 0.01, 'l2': 0.1}
NORMS = {'linf': 'Linf', 'l2': 'L2'}  # the reference's words
LOSSES = {'cross_entropy': 'ce', 'dlr': 'dlr', 'targeted_dlr': 'dlr-targeted'}
TOLERANCE = 1e-3  # of points in shares of epsilon, of distances and of losses in shares of them
SHARE_ALIKE = 0.8


class Threat(ThreatModel):
    """A threat model whose l2 balls have the reference's radius.

    Ours is shorter by a millionth, so that float32 leaves no point outside, and a hundred
    iterations magnify that.
    """

    def project(self, x_adv, x):
        if self.norm == 'linf':
            return super().project(x_adv, x)
        move = x_adv - x
        length = self.distance(x_adv, x)[:, None, None, None]
        return jnp.clip(x + move / (length + 1e-12) * jnp.minimum(self.epsilon, length), 0, 1)


class Subject:
    """A small network in JAX and in PyTorch, images, and what it says of them as labels."""

    def __init__(self, kind, n):
        rng = np.random.default_rng(0)
        sizes = [int(np.prod(SHAPE)), HIDDEN, HIDDEN, CLASSES]
        layers = [rng.normal(size=(m, k)) / np.sqrt(m / 3) for m, k in itertools.pairwise(sizes)]
        self.kind, self.x = kind, rng.uniform(size=(n, *SHAPE))

        def network(x, matrix, activation):
            for number, layer in enumerate(layers):
                x = (activation(x) if number else x - 0.5) @ matrix(layer)
            return x

        of_jax, of_torch = {
            'tanh': (jnp.tanh, torch.tanh),
            'ReLU': (jax.nn.relu, torch.relu),
        }[kind]
        self.predict = lambda x: network(x.reshape(len(x), -1), jnp.asarray, of_jax)
        flat = lambda x: x.permute(0, 2, 3, 1).reshape(len(x), -1)
        self.peer = lambda x: network(flat(x), torch.tensor, of_torch)
        self.y = np.asarray(jnp.argmax(self.predict(self.x), axis=-1), np.int32)
        self.keys = jax.random.split(prng.key(0), n)
        self.of_torch = (
            torch.tensor(self.x).permute(0, 3, 1, 2).contiguous(),
            torch.tensor(self.y).long(),
        )


def of_images(tensors):
    """Returns images of PyTorch [..., C, H, W] as NumPy [..., H, W, C], a copy."""
    return np.moveaxis(tensors.detach().numpy(), -3, -1).copy()


def reference_apgd(subject, norm, loss):
    """Returns what the reference's APGD met.

    Returns:
      Points [101, n, H, W, C]; and of each checkpoint {iteration: (step sizes, best losses)}.
    """
    points, checkpoints = [], {}
    x, y = subject.of_torch

    def peer(point):
        points.append(of_images(point))
        return subject.peer(point)

    class Recorder(APGDAttack_targeted if loss == 'targeted_dlr' else APGDAttack):
        def check_oscillation(self, losses, iteration, window, best_loss, k3=0.75):
            step_size = sys._getframe(1).f_locals['step_size']
            checkpoints[iteration + 1] = (
                step_size.flatten().numpy().copy(),
                best_loss.numpy().copy(),
            )
            return super().check_oscillation(losses, iteration, window, best_loss, k3)

    attack = Recorder(peer, n_iter=100, norm=NORMS[norm], eps=EPSILONS[norm], seed=0, device='cpu')
    attack.loss = LOSSES[loss]
    attack.init_hyperparam(x)
    attack.y_target = subject.peer(x).sort(dim=1)[1][:, -1 - RANK]
    torch.manual_seed(0)
    attack.attack_single_run(x, y)
    return np.array(points), checkpoints


def compare_apgd(subject, norm, loss):
    """Returns the rows of APGD on a loss, from the reference's start."""
    threat, y = Threat(norm, EPSILONS[norm]), subject.y
    points, checkpoints = reference_apgd(subject, norm, loss)
    attack = APGD(loss=loss, rank=RANK)
    state = attack.init(subject.predict, threat, subject.keys, subject.x, y)
    state = state._replace(x=points[0], previous=points[0], best_x=points[0])
    step = jax.jit(lambda state: attack.step(subject.predict, threat, state, subject.x, y)[0])
    of_points, of_steps, of_losses = [], [], []
    stands = np.full(len(y), True)
    for iteration, expected in enumerate(points):
        found = np.asarray(state.x)
        difference = np.max(np.abs(found - expected), axis=(1, 2, 3)) / threat.epsilon
        # What is fooled leaves. DLR is constant there, and its gradient nothing but rounding.
        of_points.append(np.where(stands, difference, 0))
        before, state = state, step(state)
        if iteration in checkpoints:
            step_size, best_loss = checkpoints[iteration]
            difference = np.abs(np.asarray(before.step_size) / step_size - 1)
            of_steps.append(np.where(stands, difference, 0))
            difference = np.abs(np.asarray(state.best_loss) - best_loss) / (1e-3 + abs(best_loss))
            of_losses.append(np.where(stands, difference, 0))
        stands &= np.argmax(subject.predict(expected), axis=-1) == y
    assert len(of_losses) == len(checkpoints) == 8
    title = f'APGD, {loss.replace("_", " ")} ({np.sum(stands)} stand to the end)'
    return [
        row(f'{title}: points of 101 iterations, / epsilon', subject, norm, of_points),
        row(f'{title}: step sizes at 8 checkpoints', subject, norm, of_steps),
        row(f'{title}: best losses at 8 checkpoints', subject, norm, of_losses),
    ]


def compare_fab(subject, norm):
    """Returns the row of FAB-T's distances."""
    threat, (x, y) = ThreatModel(norm, EPSILONS[norm]), subject.of_torch
    peer = lambda x: subject.peer(x.double()).float()
    predict = lambda x: subject.predict(x.astype(jnp.float64)).astype(jnp.float32)
    images = subject.x.astype(np.float32)
    attack = FABAttack_PT(peer, norm=NORMS[norm], n_iter=100, eps=threat.epsilon)
    attack.target_class = RANK + 1
    torch.set_default_dtype(torch.float32)
    found = of_images(attack.attack_single_run(x, y, is_targeted=True))
    torch.set_default_dtype(torch.float64)
    expected = np.asarray(threat.distance(found, images))
    expected = np.where(expected > 0, expected, np.inf)
    attack = FAB(targeted=True, rank=RANK)
    state = attack.init(predict, threat, subject.keys, images, subject.y)
    step = jax.jit(lambda s: attack.step(predict, threat, s, images, subject.y)[0])
    for _ in range(100):
        state = step(state)
    nearest = np.asarray(state.nearest)
    both = np.isfinite(nearest) & np.isfinite(expected)
    neither = ~np.isfinite(nearest) & ~np.isfinite(expected)
    difference = np.where(neither, 0, np.inf)
    difference[both] = np.abs(nearest[both] / expected[both] - 1)
    return row('FAB-T: distances after 100 iterations', subject, norm, [difference])


class RecordedSquare(SquareAttack):
    """The reference's Square, which keeps what it drew and did.

    Attributes:
      queries: of each (places [m] of the images that stood, points [m, C, H, W], margins [m]).
      corners, signs, turned: what each call of random_int, random_choice and eta returned.
    """

    def attack_single_run(self, x, y):
        self.queries, self.corners, self.signs, self.turned = [], [], [], []
        self._stands = torch.arange(len(x))
        return super().attack_single_run(x, y)

    def margin_and_loss(self, x, y):
        margin, loss = super().margin_and_loss(x, y)
        self.queries.append((self._stands.numpy(), of_images(x), margin.numpy().copy()))
        self._stands = self._stands[margin > 0]
        return margin, loss

    def random_int(self, low=0, high=1, shape=(1,)):
        self.corners.append(super().random_int(low, high, shape))
        return self.corners[-1]

    def random_choice(self, shape):
        self.signs.append(super().random_choice(shape))
        return self.signs[-1]

    def eta(self, side):
        pattern = super().eta(side)
        upright = np.allclose(pattern.numpy(), square.pattern(side), atol=1e-6)
        assert upright or np.allclose(pattern.numpy().T, square.pattern(side), atol=1e-6)
        self.turned.append(not upright)
        return pattern


def compare_square(subject, norm, queries):
    """Returns the rows of Square from the reference's start and windows."""
    threat, (x, y), n = ThreatModel(norm, EPSILONS[norm]), subject.of_torch, len(subject.x)
    reference = RecordedSquare(
        subject.peer, norm=NORMS[norm], n_queries=queries, eps=threat.epsilon, seed=0,
        resc_schedule=False,
    )  # fmt: skip
    reference.perturb(x, y)
    # A window's first row and column, or of l2 those of two windows; what is left is the start's.
    windows = 1 if norm == 'linf' else 2
    corners = np.array(reference.corners).reshape(-1, windows, 2)
    signs, turned = reference.signs[-len(corners) :], reference.turned[-len(corners) :]
    attack = Square()

    @jax.jit
    def step(state, corners, signs, turned):
        given = lambda _, __, phase, ___: square.Draws(phase, corners, signs, turned)
        with mock.patch.object(square, 'draw', given):
            return attack.step(subject.predict, threat, state, subject.x, subject.y)[0]

    state = attack.init(subject.predict, threat, subject.keys, subject.x, subject.y)
    start = reference.queries[0][1]
    state = state._replace(x=start, best=start)
    lowest, of_points, of_decisions = np.full(n, np.inf), [], []
    for number, (places, points, margins) in enumerate(reference.queries):
        difference, decided_otherwise = np.zeros(n), np.zeros(n)
        proposals = np.asarray(state.x)[places]
        difference[places] = np.max(np.abs(proposals - points), axis=(1, 2, 3)) / threat.epsilon
        of_points.append(difference)
        if number == len(corners):
            break
        # The reference draws l2's signs for each image that stands, and linf's for all at once.
        drawn = np.zeros((n, SHAPE[2]))
        drawn[reference.queries[number + 1][0]] = signs[number].reshape(-1, SHAPE[2])
        of_windows = np.broadcast_to(corners[number], (n, windows, 2))
        before = state
        state = step(state, of_windows, drawn, np.full(n, turned[number] if turned else False))
        taken = (margins < lowest[places]) | (margins <= 0)
        # A proposal that changes nothing may be taken or not: its margin differs by rounding.
        changes = np.abs(margins - lowest[places]) > 1e-12
        differs = np.asarray(state.margin != before.margin)[places] != taken
        decided_otherwise[places] = changes & differs
        lowest[places] = np.where(taken, margins, lowest[places])
        of_decisions.append(decided_otherwise)
    title = f'Square, {len(corners)} queries'
    return [
        row(f'{title}: proposals, / epsilon', subject, norm, of_points),
        row(f'{title}: decisions', subject, norm, of_decisions),
    ]


def row(title, subject, norm, differences):
    """Returns a row of the report; differences [steps, n] count as none up to TOLERANCE."""
    largest = np.max(np.array(differences), axis=0)
    alike = largest <= TOLERANCE
    shown = f'{np.max(largest[alike], initial=0):.1e}'
    print(title, subject.kind, norm, np.sum(alike), shown, file=sys.stderr, flush=True)
    return [title, subject.kind, norm, f'{np.sum(alike)} of {len(alike)}', shown]


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--n', type=int, default=100, help='images (100)')
    parser.add_argument('--queries', type=int, default=1000, help='of Square (1000)')
    args = parser.parse_args()
    jax.config.update('jax_enable_x64', True)
    torch.set_default_dtype(torch.float64)
    described = machine.describe(os.getloadavg()[0], ('jax', 'torch', 'pyautoattack'))
    rows = []
    for kind in ('tanh', 'ReLU'):
        subject = Subject(kind, args.n)
        for norm in EPSILONS:
            for loss in LOSSES:
                rows += compare_apgd(subject, norm, loss)
            rows.append(compare_fab(subject, norm))
            rows += compare_square(subject, norm, args.queries)
    print('## AutoAttack without randomness, beside the reference\n')
    print('\n'.join(described), end='\n\n')
    header = ['', 'network', 'norm', 'images alike', 'their largest difference']
    print('\n'.join(markdown(header, rows)))
    sys.exit(any(int(row[3].split()[0]) < SHARE_ALIKE * args.n for row in rows))


if __name__ == '__main__':
    main()
