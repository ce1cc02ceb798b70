"""The audit's attacks: do they find what those that are reported did not?"""

import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

from ensadv.attacks import registry
from ensadv.attacks.threat_model import ThreatModel
from ensadv.evaluation import on_device
from ensadv.evaluation.audit_checks import Check, Subject, check, pixels
from ensadv.evaluation.evaluator import StagedVerdicts

# Points of all images, and images: where more fall, it is an alarm. That for attacks without
# gradients is AutoAttack's own.
ALARM, ALARM_WITHOUT_GRADIENTS = (2.0, 3), (0.2, 2)
# These attacks find a little more than AutoAttack of ensembles that hide nothing, too.
ALARM_OF_MEMBERS = (5.0, 3)
SHARE_AT_LARGE_EPSILON = 0.05  # of images that may stand where every image can become any other
SHARE_ROUNDED = 0.5  # of adversarial examples that have to fool as 8-bit images, too
SHARE_BY_NOISE = 0.5  # of what the attack fells, that noise may fell
MORE = 5  # times as many steps, and restarts, as the reported attack has
NORMALISED = {'attack': 'apgd', 'loss': 'normalised_cross_entropy', 'restarts': 1}


class FurtherAttacks:
    """What further attacks find, one after another, each on what the ones before left standing."""

    def __init__(self, subject: Subject, standing: np.ndarray):
        self._subject = subject
        self._verdicts = StagedVerdicts(
            np.where(standing, np.inf, -np.inf).astype(np.float32),
            np.ones(subject.n, bool),
            np.where(standing, -1, 0).astype(np.int32),
            (),
        )
        self._made: list[registry.Stage] = []

    @property
    def standing(self) -> np.ndarray:
        return self._verdicts.margin > 0

    def attack(self, name: str, settings: Mapping[str, Any], **changes: Any) -> int:
        """Makes an attack, and returns how many images it fooled."""
        subject = self._subject
        stated = {**settings, **subject.settings(), **changes}
        self._made.append(registry.Stage(name, stated))
        self._verdicts = subject.evaluator.staged_attack(
            subject.variables,
            subject.settings(),
            subject.images,
            subject.labels,
            'audit',
            stages=self._made,
            split_places=subject.places,
            done=self._verdicts,
        )
        return int(self._verdicts.stages[-1]['felled'])


def check_noise(subject: Subject, clean: np.ndarray) -> Check:
    """Noise of the size of the attack does nothing comparable."""
    noisy = np.asarray(
        on_device.noisy(subject.threat, subject.seed, subject.places, pixels(subject))
    )
    stands = (subject.log_probs(noisy).argmax(-1) == subject.labels) & clean
    by_noise, by_attack = (int(np.sum(clean & ~found)) for found in (stands, subject.standing))
    return check(
        subject,
        'noise',
        by_noise >= ALARM[1] and by_noise > SHARE_BY_NOISE * by_attack,
        f'Noise of length epsilon fools {by_noise} of {int(np.sum(clean))} images, and the attacks '
        f'fool {by_attack}.',
        'The attacks are hardly better than noise: take stronger ones.',
    )


def check_rounding(subject: Subject, clean: np.ndarray) -> Check:
    """Adversarial examples still fool as images of 8 bits."""
    places = np.flatnonzero(clean)
    count = 0
    if len(places):
        worst = subject.evaluator.points(
            subject.variables,
            {**subject.reported, **subject.settings()},
            subject.images,
            subject.labels,
            'audit 8 bits',
            places=places,
            split_places=subject.places,
        ).worst
        labels, x = subject.labels[places], pixels(subject)[places]
        fools = subject.log_probs(worst).argmax(-1) != labels
        moves = np.round((worst - x) * 255)
        if subject.threat.norm == 'linf':  # the ball is not to be left
            largest = np.floor(255 * subject.threat.epsilon + 1e-3)
            moves = np.clip(moves, -largest, largest)
        rounded = x + moves / np.float32(255)
        still = subject.log_probs(rounded.astype(np.float32)).argmax(-1) != labels
        count, kept = int(np.sum(fools)), int(np.sum(fools & still))
    if not count:
        return check(
            subject, '8 bits', None, 'The reported attack fools no image.', '', len(places)
        )
    return check(
        subject,
        '8 bits',
        kept < SHARE_ROUNDED * count,
        f'{kept} of {count} adversarial examples still fool when rounded to 8 bits.',
        'Verdicts hang on differences that no image file has; report the attack on rounded images.',
        count,
    )


def check_attacks(subject: Subject, further: FurtherAttacks) -> Iterator[Check]:
    """Further attacks, one after another, find nothing that those that were made did not."""
    for name, make in (
        ('steps', check_steps),
        ('restarts', check_restarts),
        ('loss', check_loss),
        ('members', check_members),
        ('queries', check_queries),
    ):
        if np.any(further.standing):
            yield make(subject, further)
        else:
            yield check(subject, name, None, 'No image stands any more.', '')
    yield check_transfer(subject)


def check_steps(subject: Subject, further: FurtherAttacks) -> Check:
    """More steps of the reported attack find nothing more."""
    reported, standing = subject.reported, int(np.sum(further.standing))
    steps = reported['steps']
    found = further.attack('more steps', reported, steps=MORE * steps, restarts=1)
    return _finding(
        subject,
        'steps',
        found,
        f'{MORE * steps} steps in place of {steps} fooled {found} of the {standing} images that '
        'stood under all attacks made.',
        'The attack was stopped too early: take more steps.',
    )


def check_restarts(subject: Subject, further: FurtherAttacks) -> Check:
    """More starts of the reported attack find nothing more."""
    reported = subject.reported
    if not registry.starts_differ(reported.get('start', 'boundary'), reported.get('sigma')):
        return check(subject, 'restarts', None, 'All starts of the reported attack are equal.', '')
    found = further.attack('more restarts', reported, restarts=MORE)
    return _finding(
        subject,
        'restarts',
        found,
        f'{MORE} restarts fooled {found} more images.',
        'One start is not enough: take more restarts.',
    )


def check_loss(subject: Subject, further: FurtherAttacks) -> Check:
    """A loss that does not depend on the scale of logits finds nothing more."""
    found = further.attack('apgd_nce', NORMALISED, steps=100)
    return _finding(
        subject,
        'loss',
        found,
        f'APGD on a loss that does not depend on the scale of logits fooled {found} more.',
        'Add apgd_nce or autoattack to the attacks that are reported.',
    )


def check_members(subject: Subject, further: FurtherAttacks) -> Check:
    """Examples made on each member, and on all members reweighed, find nothing more."""
    network = subject.evaluator.network
    x = jax.ShapeDtypeStruct((2, *subject.images.shape[1:]), np.float32)
    members, _, classes = jax.eval_shape(network.member_logits, network.variables, x).shape
    if members == 1:
        return check(subject, 'members', None, 'There is one member.', '')
    found = 0
    for kind, targets in (('members', {}), ('mora', {'targets': 3})):
        settings = registry.settings({}, registry.entry(kind), subject.threat.epsilon)
        for stage in registry.stages({'attack': kind, **settings, **targets}, classes, members):
            found += further.attack(stage.name, stage.settings)
    return _finding(
        subject,
        'members',
        found,
        f'Examples made on each of the {members} members, and on members reweighed, fooled {found} '
        'more images.',
        'The ensemble hides its members from attacks on the whole: add members and mora to the '
        'attacks that are reported.',
        alarm=ALARM_OF_MEMBERS,
    )


def check_queries(subject: Subject, further: FurtherAttacks) -> Check:
    """Square, which needs no gradient, finds nothing more."""
    found = further.attack('square', {'attack': 'square', 'steps': 1000, 'restarts': 1})
    return _finding(
        subject,
        'queries',
        found,
        f'Square, which needs no gradient, fooled {found} more images.',
        'Gradients mislead the attacks: find what hides them.',
        alarm=ALARM_WITHOUT_GRADIENTS,
    )


def check_transfer(subject: Subject) -> Check:
    """The transfer set finds nothing that gradients do not."""
    attacks = [result['settings']['attack'] for result in subject.results]
    by_gradient = [i for i, name in enumerate(attacks) if name not in registry.WITHOUT_SETTINGS]
    if 'blackbox' not in attacks or not by_gradient:
        return check(subject, 'transfer', None, 'There is no transfer set.', '')
    others = np.all(subject.stands[by_gradient], axis=0)
    found = int(np.sum(others & ~subject.stands[attacks.index('blackbox')]))
    return _finding(
        subject,
        'transfer',
        found,
        f'The transfer set fools {found} images that all attacks by gradients left standing.',
        'Gradients mislead the attacks: find what hides them.',
        alarm=ALARM_WITHOUT_GRADIENTS,
    )


def _finding(
    subject: Subject,
    name: str,
    found: int,
    evidence: str,
    remedy: str,
    *,
    alarm: tuple[float, int] = ALARM,
) -> Check:
    """Returns the check that fails where an attack fooled more images than the alarm allows."""
    return check(subject, name, _exceeds(subject, found, alarm), evidence, remedy)


def _exceeds(subject: Subject, found: int, alarm: tuple[float, int]) -> bool:
    points, fewest = alarm
    return found >= fewest and 100 * found > points * subject.n


def check_large_epsilon(subject: Subject, clean: np.ndarray) -> Check:
    """Accuracy falls with epsilon, and to nothing where any image can become any other."""
    size = float(np.prod(subject.images.shape[1:]))
    largest = 0.5 if subject.threat.norm == 'linf' else 0.5 * size**0.5
    counts = [int(np.sum(clean)), int(np.sum(subject.standing))]
    for epsilon in (min(2 * subject.threat.epsilon, largest), largest):
        further = FurtherAttacks(subject, clean)
        threat = ThreatModel(subject.threat.norm, epsilon)
        further.attack(f'epsilon {epsilon:.3g}', NORMALISED, steps=50, **threat.to_json())
        counts.append(int(np.sum(further.standing)))
    # One attack alone may leave a few more standing than all those that were made at epsilon.
    rises = any(_exceeds(subject, b - a, ALARM) for a, b in itertools.pairwise(counts[1:]))
    return check(
        subject,
        'larger epsilon',
        rises or counts[3] > SHARE_AT_LARGE_EPSILON * subject.n,
        f'{counts[0]} of {subject.n} images are correct without an attack, {counts[1]} stand at '
        f'epsilon, {counts[2]} at twice that, and {counts[3]} at {largest:.3g}.',
        'Accuracy has to reach 0 for a large epsilon: the attacks do not see the network.',
    )
