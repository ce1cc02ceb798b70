"""Whether a robust accuracy can be believed: checks of a network and of what attacks did to it.

Each check looks for one cause that makes robustness look greater than it is; see Athalye et al.
(2018), Carlini et al. (2019) and Croce et al. (2022) for these causes.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from ensadv.attacks import registry
from ensadv.attacks.attack import LEAST_GRADIENT
from ensadv.attacks.threat_model import ThreatModel
from ensadv.data import batches
from ensadv.evaluation import on_device
from ensadv.evaluation.evaluator import Evaluator
from ensadv.storage.audits import FAILED, NOT_MADE, PASSED

SHARE_WITHOUT_GRADIENT = 0.05
SHARE_WITH_FEW_PIXELS = 0.5  # of images whose gradient is in few pixels alone
LOGIT_GAPS = (0.02, 100)  # the median difference of the two largest logits of a sound network
SLOPES = (0.5, 2)  # the median of a loss's change by the change that its gradient foretells
ROUNDING = 1e-3  # relative, of log-probabilities


@dataclasses.dataclass(frozen=True)
class Check:
    """What a check found.

    Attributes:
      name: the cause that it looks for.
      verdict: of `audits.VERDICTS`.
      evidence: one sentence.
      n: images that it looked at.
      remedy: what to do where it failed.
    """

    name: str
    verdict: str
    evidence: str
    n: int
    remedy: str


@dataclasses.dataclass(frozen=True, eq=False)
class Subject:
    """What is audited: a network, test images, and what is reported of them.

    Attributes:
      evaluator: of the network.
      variables: the network's, replicated.
      images: uint8 [n, H, W, C].
      labels: int32 [n].
      places: int32 [n], of the images in the test split.
      threat: the threat model that is stated.
      results: as eval/<step>.json has them, of the attacks that were made.
      stands: bool [attacks, n], what each of them left standing, in their order.
      seed: of the audit's attacks.
    """

    evaluator: Evaluator
    variables: Any
    images: np.ndarray
    labels: np.ndarray
    places: np.ndarray
    threat: ThreatModel
    results: Sequence[Mapping[str, Any]]
    stands: np.ndarray
    seed: int = 0

    @property
    def n(self) -> int:
        return len(self.labels)

    @property
    def standing(self) -> np.ndarray:
        """bool [n]: no attack that was made felled it."""
        return np.all(self.stands, axis=0)

    @property
    def reported(self) -> Mapping[str, Any]:
        """The settings of the attack with the most gradient steps among those that were made.

        Of attacks in stages, APGD's on cross-entropy with as many.
        """
        # Of Square the steps are queries.
        found = [r['settings'] for r in self.results if r['settings']['attack'] != 'square']
        steps = lambda settings: settings.get('steps', settings.get('gradient_steps', 0))
        single = [s for s in found if 'steps' in s and not registry.KINDS[s['attack']].stages]
        if single:
            return max(single, key=steps)
        most = max(map(steps, found), default=0)
        return self.settings(attack='apgd', loss='cross_entropy', steps=most or 100, restarts=1)

    def settings(self, **changes: Any) -> dict[str, Any]:
        """Returns settings of an attack in the stated threat model."""
        return {**self.threat.to_json(), 'seed': self.seed, **changes}

    def log_probs(self, x: np.ndarray, evaluator: Evaluator | None = None) -> np.ndarray:
        """Returns log-probabilities float32 [m, classes] of pixels float32 [m, H, W, C]."""
        return (evaluator or self.evaluator).log_probs(self.variables, x, 'audit')


def pixels(subject: Subject) -> np.ndarray:
    """Returns the images' pixels, float32 [n, H, W, C]."""
    return np.asarray(batches.to_pixels(subject.images))


def check(
    subject: Subject,
    name: str,
    fails: bool | None,
    evidence: str,
    remedy: str,
    n: int | None = None,
) -> Check:
    """Returns a check; `fails` is None where it could not be made."""
    verdict = NOT_MADE if fails is None else FAILED if fails else PASSED
    return Check(name, verdict, evidence, subject.n if n is None else n, remedy if fails else '')


def check_network(subject: Subject) -> Iterator[Check]:
    """Makes the checks that need no attack."""
    yield check_threat_model(subject)
    yield check_precision(subject)
    yield check_randomness(subject)
    yield check_batch(subject)
    yield check_scale(subject)
    yield from check_gradients(subject)


def check_threat_model(subject: Subject) -> Check:
    """The attacks that are reported were made in the threat model that is stated."""
    others = [
        f'{result["name"]} ({threat})'
        for result in subject.results
        if 'epsilon' in result['settings']
        and (threat := ThreatModel.of(result['settings'])) != subject.threat
    ]
    evidence = f'All attacks are of {subject.threat}.'
    if others:
        evidence = f'Stated is {subject.threat}, but made were {", ".join(others)}.'
    return check(
        subject, 'threat model', bool(others), evidence, 'Attack within the stated threat model.'
    )


def check_precision(subject: Subject) -> Check:
    """The network computes in float32, in which differences of near logits are not lost."""
    network = subject.evaluator.network
    x = jax.ShapeDtypeStruct((2, *subject.images.shape[1:]), np.float32)
    program = str(jax.make_jaxpr(network.log_probs)(network.variables, x))
    found = [name for name in ('bf16', 'f16') if f':{name}[' in program]
    evidence = 'The network computes in float32.'
    if found:
        evidence = f'The network computes in {" and ".join(found)}, which rounds gradients away.'
    return check(
        subject, 'precision', bool(found), evidence, 'Evaluate in float32 (eval.dtype=float32).'
    )


def check_randomness(subject: Subject) -> Check:
    """The prediction is a function of the image."""
    draws = subject.evaluator.network.draws
    x = pixels(subject)
    moved = _moved(subject.log_probs(x), subject.log_probs(x))
    differ = int(np.sum(moved > ROUNDING))
    evidence = f'Two passes differ beyond rounding on {differ} of {subject.n} images.'
    if draws is not None:
        evidence = 'The model draws at random.'
    return check(
        subject,
        'randomness',
        draws is not None or differ > 0,
        evidence,
        'Attack the expectation over the draws (autoattack_rand), and judge by more than one.',
    )


def check_batch(subject: Subject) -> Check:
    """No verdict depends on the other images of a batch, or on their order."""
    x, half = pixels(subject), -(-subject.n // 2)
    whole = subject.log_probs(x)
    others = np.concatenate([subject.log_probs(x[half:]), subject.log_probs(x[:half])])
    others = np.roll(others, half, axis=0)
    smaller = Evaluator(subject.evaluator.network, max(1, subject.n // 5))
    moved = np.maximum(_moved(others, whole), _moved(subject.log_probs(x, smaller), whole))
    altered = int(np.sum(moved > ROUNDING))
    return check(
        subject,
        'batch',
        altered > 0,
        f'Other batch mates, another order and another batch size alter {altered} of {subject.n} '
        f'predictions beyond rounding (at most by {np.max(moved):.2g}).',
        "Evaluate with running averages, not with the batch's statistics.",
    )


def _moved(found: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """Returns the largest relative difference of each image's log-probabilities, [n]."""
    return np.max(np.abs(found - expected) / (1 + np.abs(expected)), axis=-1)


def check_scale(subject: Subject) -> Check:
    """Logits are of a size at which cross-entropy has gradients that tell something."""
    found = subject.evaluator.map_batches(
        on_device.logit_gaps_batch, subject.variables, (subject.images,), 'audit logits'
    )
    whole, *members = np.median(found, axis=0)
    low, high = LOGIT_GAPS
    medians = {'the network': whole}
    if len(members) > 1:
        medians |= {f'member {i}': median for i, median in enumerate(members, start=1)}
    off = {name: median for name, median in medians.items() if not low <= median <= high}
    shown = off or {'the network': whole}
    parts = ', '.join(f'{median:.3g} for {name}' for name, median in shown.items())
    return check(
        subject,
        'scale',
        bool(off),
        f'The two largest logits differ by {parts} (median; {low:g} to {high:g} is usual).',
        'Believe attacks alone whose loss does not depend on the scale: apgd_nce, apgd_t, mora, '
        'members.',
    )


def check_gradients(subject: Subject) -> Iterator[Check]:
    """Gradients are there, in most pixels, and foretell how the loss changes."""
    n, evaluator = subject.n, subject.evaluator
    settings = subject.settings()
    step = evaluator.compile(n, 'slopes', settings, on_device.slopes_batch, 2)
    columns = []
    for batch in evaluator.batches(np.arange(n), n):
        given = subject.places[batch], subject.images[batch], subject.labels[batch]
        columns.append(step(subject.variables, np.int32(subject.seed), given))
    found = on_device.Slopes(*map(np.concatenate, zip(*columns, strict=True)))
    absent = ~(np.isfinite(found.largest) & (found.largest >= LEAST_GRADIENT))
    share = float(np.mean(absent))
    yield check(
        subject,
        'gradients',
        share > SHARE_WITHOUT_GRADIENT,
        f'The gradient of cross-entropy is zero or not finite on {int(np.sum(absent))} of {n} '
        'images.',
        'Let gradients pass (a differentiable stand-in for what stops or rounds them), and attack '
        'by transfer and by queries.',
    )
    there = found.share[~absent]
    few = float(np.mean(there < 0.05)) if len(there) else 0.0
    yield check(
        subject,
        'pixels with gradients',
        None if not len(there) else few > SHARE_WITH_FEW_PIXELS,
        f'On {100 * few:.0f} % of {len(there)} images fewer than 5 % of the pixels have a '
        'gradient.',
        'Find what stops the gradient of the other pixels.',
        len(there),
    )
    known = ~absent & (np.abs(found.foretold) > 1e-5)
    ratio = float(np.median(found.change[known] / found.foretold[known])) if any(known) else 0.0
    low, high = SLOPES
    yield check(
        subject,
        'finite differences',
        None if not any(known) else not low <= ratio <= high,
        f'A small step along the gradient changes the loss by {ratio:.2f} times what the gradient '
        f'foretells (median of {int(np.sum(known))} images).'
        if any(known)
        else 'No image has a gradient to compare with.',
        'The gradient is not that of the prediction (rounding, or a stand-in in the backward '
        'pass): attack by transfer and by queries, too.',
        int(np.sum(known)),
    )
