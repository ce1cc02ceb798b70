"""What an ensemble's members do, image by image: under attack, and around the images.

A part is a member by itself, or the whole ensemble. Where parts are counted the members come
first, in their order, and the whole is the last of k + 1.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from ensadv import losses
from ensadv.attacks.threat_model import ThreatModel
from ensadv.data import batches
from ensadv.evaluation import on_device
from ensadv.evaluation.evaluator import Evaluator
from ensadv.models import ensemble
from ensadv.runtime import distributed

STEPS_OF_EPSILON = 4  # that a boundary is looked for in


class Part(NamedTuple):
    """A member, the whole, or the ensemble without a member."""

    name: str
    evaluator: Evaluator
    variables: Any


@dataclasses.dataclass(frozen=True, eq=False)
class Subject:
    """An ensemble, and what is done to it.

    Attributes:
      parts: the members, and the whole.
      without: the ensemble without each of its members; of two members empty, as what is left is
        the other one.
      images: uint8 [n, H, W, C].
      labels: int32 [n].
      places: int32 [n], of the images in the test split.
      threat: the threat model.
      attacks: settings of attacks by steps, by name; at least one. Gradients are compared along the
        first one on the whole, and boundaries looked for towards its examples.
      directions: random ones, for each image.
      radius: up to which boundaries are looked for, in epsilons.
      seed: of the random directions.
    """

    parts: Sequence[Part]
    without: Sequence[Part]
    images: np.ndarray
    labels: np.ndarray
    places: np.ndarray
    threat: ThreatModel
    attacks: Mapping[str, Mapping[str, Any]]
    directions: int
    radius: float
    seed: int

    @property
    def whole(self) -> Part:
        return self.parts[-1]

    @property
    def k(self) -> int:
        """The number of members."""
        return len(self.parts) - 1


def parts_of(
    network: ensemble.Network, variables: Any, k: int, batch_size: int
) -> tuple[list[Part], list[Part]]:
    """Returns `Subject.parts` and `Subject.without` of a network with k members."""
    evaluators: dict[Any, Evaluator] = {}

    def part(name: str, members: Sequence[int]) -> Part:
        found, weights = ensemble.part(network, variables, members)
        # Stacked members are one program of different weights.
        program = tuple(members) if network.members is not None else len(members)
        evaluator = evaluators.setdefault(program, Evaluator(found, batch_size))
        return Part(name, evaluator, distributed.replicate(weights))

    members = [part(f'member {i + 1}', [i]) for i in range(k)]
    whole = Part('the ensemble', Evaluator(network, batch_size), variables)
    others = [[j for j in range(k) if j != i] for i in range(k)] if k > 2 else []
    without = [part(f'all but member {i + 1}', left) for i, left in enumerate(others)]
    return [*members, whole], without


def measure(subject: Subject) -> dict[str, np.ndarray]:
    """Returns all that is measured, by image; docs/members.md lists the arrays."""
    x = np.asarray(batches.to_pixels(subject.images))
    found = {'label': subject.labels, 'index': subject.places}
    distributed.tell(f'members: the clean images, n {len(x):,}')
    clean = _log_probs(subject, x)
    found['clean_margin'] = _margins(clean, subject.labels)
    found |= _diversity('clean', clean)
    found |= _agreement(subject, 'clean', x)
    right, rows = found['clean_margin'] > 0, []
    for number, name in enumerate(subject.attacks):
        found |= _under_attack(subject, name, x, right, is_first=number == 0)
    for part, mine in zip(subject.parts, right, strict=True):
        moves = (
            np.asarray(on_device.directions(subject.threat, subject.seed + i, subject.places, x))
            for i in range(subject.directions)
        )
        rows.append([_first_errors(subject, part, x, move, mine) for move in moves])
    found['distance_random'] = np.array(rows, np.float32)
    return found


def _under_attack(
    subject: Subject, name: str, x: np.ndarray, right: np.ndarray, *, is_first: bool
) -> dict[str, np.ndarray]:
    """Returns what examples of an attack on each part do to all of them.

    Args:
      subject, name: whose attack, and which.
      x: the pixels, float32 [n, H, W, C].
      right: bool [k + 1, n], what each part predicts right without an attack.
      is_first: whether it is the first attack.
    """
    settings, labels = subject.attacks[name], subject.labels
    given = subject.images, labels
    margins, has_gradient, distances, found = [], [], [], {}
    total = len(subject.parts) + len(subject.without)
    for number, part in enumerate(subject.parts, 1):
        is_whole, stops = part is subject.whole, ()
        if is_whole and is_first:
            steps = settings['steps']
            stops = sorted({1, max(steps // 2, 1), steps})
        points = part.evaluator.points(
            part.variables, settings, *given, f'members: {name} on {part.name} ({number}/{total})',
            split_places=subject.places, stops=stops,
        )  # fmt: skip
        log_probs = _log_probs(subject, points.worst)
        margins.append(_margins(log_probs, labels))
        has_gradient.append(points.has_gradient)
        if is_whole:
            found |= _diversity(name, log_probs)
        for stop, iterate in zip(stops, points.iterates, strict=True):
            found |= _agreement(subject, f'step_{stop}', iterate)
        if is_first:
            length = np.asarray(subject.threat.distance(points.worst, x))
            moves = (points.worst - x) / np.where(length > 0, length, 1)[:, None, None, None]
            # What did not move may differ by its rounding.
            there = right[number - 1] & (length > 1e-3 * subject.threat.epsilon)
            distances.append(_first_errors(subject, part, x, moves, there))
    found[f'{name}_transfer'] = np.stack(margins)
    found[f'{name}_has_gradient'] = np.stack(has_gradient)
    without = []
    for number, part in enumerate(subject.without, len(subject.parts) + 1):
        verdicts = part.evaluator.evaluate(
            part.variables, settings, *given, f'members: {name} on {part.name} ({number}/{total})',
            split_places=subject.places,
        )  # fmt: skip
        without.append(verdicts.margin)
    # Of two members the other is left, which was attacked by itself.
    found[f'{name}_without'] = np.stack(without or [margins[1][1], margins[0][0]])
    if is_first:
        found['distance_adversarial'] = np.stack(distances)
    return found


def _log_probs(subject: Subject, x: np.ndarray) -> np.ndarray:
    """Returns each part's log-probabilities, float32 [k + 1, n, classes], of pixels."""
    return np.stack(
        [
            part.evaluator.log_probs(part.variables, x, f'members: {part.name} predicts')
            for part in subject.parts
        ]
    )


def _margins(log_probs: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Returns each part's margins, float32 [parts, n]."""
    return np.asarray(jax.vmap(losses.margin, (0, None))(log_probs, labels))


def _diversity(where: str, log_probs: np.ndarray) -> dict[str, np.ndarray]:
    """Returns each part's prediction, and how far apart the members' distributions are.

    Returns:
      <where>_class int32 [k + 1, n], and <where>_kl float32 [k, k, n]: KL(member i || member j).
    """
    members = log_probs[:-1].astype(np.float64)
    p = np.exp(members)[:, None]
    # A class whose p is 0 adds nothing.
    terms = np.where(p > 0, p * (members[:, None] - members[None]), 0)
    return {
        f'{where}_class': np.argmax(log_probs, axis=-1).astype(np.int32),
        f'{where}_kl': np.sum(terms, axis=-1).astype(np.float32),
    }


def _agreement(subject: Subject, where: str, x: np.ndarray) -> dict[str, np.ndarray]:
    """Returns how alike the members' gradients are at points, float32 [k, k, n] each."""
    _, evaluator, variables = subject.whole
    cosine, sign = evaluator.map_batches(
        on_device.agreement_batch, variables, (x, subject.labels), f'members: gradients, {where}'
    )
    return {f'cosine_{where}': cosine.transpose(1, 2, 0), f'sign_{where}': sign.transpose(1, 2, 0)}


def _first_errors(
    subject: Subject, part: Part, x: np.ndarray, moves: np.ndarray, there: np.ndarray
) -> np.ndarray:
    """Returns how far a part's boundary is along moves of length 1, float32 [n].

    Infinity where it is not reached within the radius, NaN where `there` is False: the clean image
    is an error, or there is no direction.
    """
    epsilon = subject.threat.epsilon
    settings = {'step': epsilon / STEPS_OF_EPSILON, 'radius': subject.radius * epsilon}
    found = part.evaluator.map_batches(
        on_device.first_errors_batch, part.variables, (x, moves, subject.labels),
        f'members: the boundary of {part.name}', settings=settings,
    )  # fmt: skip
    return np.where(there, found, np.nan)
