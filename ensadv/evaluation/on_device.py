"""What runs on the devices in an evaluation: functions of one device's share of a batch.

A batch is places int32 [B] in the split, images uint8 [B, H, W, C] and labels int32 [B]; and, of an
attack that goes on, its progress.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from ensadv import losses, prng
from ensadv.attacks import driver, registry
from ensadv.attacks.attack import LEAST_GRADIENT
from ensadv.attacks.threat_model import ThreatModel, each
from ensadv.data import batches
from ensadv.models import ensemble

PRECISION = 1 / 64  # of a first error's distance, in steps


def clean_batch(network, settings, variables, batch):
    del settings
    _, images, labels = batch
    return losses.margin(network.log_probs(variables, batches.to_pixels(images)), labels)


def clean_scores_batch(network, settings, variables, batch):
    del settings
    images, labels = batch
    logits = network.member_logits(variables, batches.to_pixels(images))
    return losses.margin(network.scores(logits), labels)


def point_margins_batch(network, settings, variables, batch):
    """Of points float32 [B, H, W, C] and labels: how far each stands."""
    del settings
    points, labels = batch
    return losses.margin(network.scores(network.member_logits(variables, points)), labels)


def log_probs_batch(network, settings, variables, batch):
    del settings
    (points,) = batch
    return network.log_probs(variables, points)


def member_batch(network, settings, variables, batch):
    del settings
    images, labels = batch
    logits = network.member_logits(variables, batches.to_pixels(images))
    return jax.vmap(losses.margin, (0, None), 1)(logits, labels)


def decisions_batch(network, settings, variables, batch):
    """Classes and margins, [B, 1 + k], of the network and each member at points [B, H, W, C]."""
    del settings
    points, labels = batch
    logits = network.member_logits(variables, points)
    logits = jnp.stack([network.scores(logits), *logits])
    return jnp.argmax(logits, -1).T, jax.vmap(losses.margin, (0, None), 1)(logits, labels)


def logit_gaps_batch(network, settings, variables, batch):
    """By how much the two largest logits differ, of the network and of each member, [B, 1 + k]."""
    del settings
    (images,) = batch
    logits = network.member_logits(variables, batches.to_pixels(images))
    largest, _ = jax.lax.top_k(jnp.stack([network.scores(logits), *logits]), 2)
    return (largest[..., 0] - largest[..., 1]).T


class Agreement(NamedTuple):
    """How alike the input gradients of an ensemble's members are, float32 [B, k, k].

    Attributes:
      cosine: of the angle between two members' gradients.
      sign: the share of the pixel values where neither gradient is 0, that have the same sign in
        both.

    NaN where a gradient tells no direction.
    """

    cosine: Array
    sign: Array


def agreement_batch(network, settings, variables, batch):
    """Of each member's own cross-entropy, at points float32 [B, H, W, C] of labels int32 [B]."""
    del settings
    points, labels = batch
    k = jax.eval_shape(network.member_logits, variables, points).shape[0]

    def entropy(x, weights):
        logits = network.member_logits(variables, x)
        of_each = jax.vmap(losses.LOSSES_OF_LOGITS['cross_entropy'], (0, None))(logits, labels)
        return jnp.sum(weights @ of_each)

    gradients = jax.lax.map(lambda weights: jax.grad(entropy)(points, weights), jnp.eye(k))
    largest = jnp.max(jnp.abs(gradients), axis=(2, 3, 4)).T
    informed = jnp.isfinite(largest) & (largest >= LEAST_GRADIENT)
    both = informed[:, :, None] & informed[:, None, :]
    dot = lambda a: jnp.einsum('ibhwc,jbhwc->bij', a, a, precision='highest')
    units, signs = jax.vmap(ThreatModel('l2', 0).steepest)(gradients), jnp.sign(gradients)
    alike = (1 + dot(signs) / jnp.maximum(dot(jnp.abs(signs)), 1)) / 2
    return Agreement(*(jnp.where(both, found, jnp.nan) for found in (dot(units), alike)))


class Slopes(NamedTuple):
    """Gradients at random points of the ball, and what a small step along them does.

    Attributes:
      largest: float32 [B], the largest absolute value of the gradient of cross-entropy.
      share: float32 [B], of the pixel values that have a thousandth of that or more.
      foretold, change: float32 [B], of the loss, which is cross-entropy with the logits scaled: by
        the gradient, and as it is.
    """

    largest: Array
    share: Array
    foretold: Array
    change: Array


def slopes_batch(network, settings, variables, seed, batch):
    places, images, labels = batch
    threat = ThreatModel.of(settings)
    x = threat.uniform_start(keys(seed, places), batches.to_pixels(images))
    scores = lambda x: network.scores(network.member_logits(variables, x))
    entropy = lambda x: jnp.sum(losses.LOSSES_OF_LOGITS['cross_entropy'](scores(x), labels))
    size = jnp.abs(jax.grad(entropy)(x)).reshape(len(x), -1)
    largest = jnp.max(size, axis=-1)
    # At the scale of these logits, which both ends of the step share.
    scale = losses.logit_scale(scores(x))[:, None]
    loss = lambda x: losses.LOSSES_OF_LOGITS['cross_entropy'](scores(x) / scale, labels)
    gradient = jax.grad(lambda x: jnp.sum(loss(x)))(x)
    step = threat.epsilon / 50 * threat.steepest(gradient)
    of_each = tuple(range(1, x.ndim))
    return Slopes(
        largest,
        jnp.mean(size >= 1e-3 * largest[:, None], axis=-1),
        2 * jnp.sum(gradient * step, axis=of_each),
        loss(x + step) - loss(x - step),
    )


def noisy(threat, seed, places, x):
    """Returns images [B, H, W, C] moved by noise of the length epsilon, within the box."""
    return jnp.clip(x + threat.epsilon * directions(threat, seed, places, x), 0, 1)


def directions(threat, seed, places, x):
    """Returns a random move of length 1 for each image of x, [B, H, W, C]; for linf of signs."""
    draws = jax.vmap(lambda key: jax.random.normal(key, x.shape[1:]))(keys(seed, places))
    return threat.steepest(draws)


def first_errors_batch(network, settings, variables, batch):
    """How far points float32 [B, H, W, C] can be moved before they are errors, float32 [B].

    They are on straight lines, which may leave the box. The first error is looked for in steps of
    settings['step'] up to settings['radius'], and then between two of these by halving. Infinity
    where there is none.

    Args:
      batch: images that are no errors, moves of length 1, and labels.
    """
    points, moves, labels = batch
    step, radius = settings['step'], settings['radius']

    def stands(distance):
        logits = network.member_logits(variables, points + each(distance, points) * moves)
        return losses.margin(network.scores(logits), labels) > 0

    def is_open(low, high):
        found = jnp.isfinite(high)
        return jnp.where(found, high - low > step * PRECISION, low < radius * (1 - 1e-5))

    def look(state):
        low, high = state
        here = jnp.where(jnp.isfinite(high), (low + high) / 2, low + step)
        stands_here, unknown = stands(here), is_open(low, high)
        return (
            jnp.where(unknown & stands_here, here, low),
            jnp.where(unknown & ~stands_here, here, high),
        )

    start = jnp.zeros(len(points)), jnp.full(len(points), jnp.inf)
    low, high = jax.lax.while_loop(lambda state: jnp.any(is_open(*state)), look, start)
    return (low + high) / 2


def keys(seed, places):
    """Returns each example's key: its place's in its split, whatever the batch."""
    key = prng.key(seed)
    return jax.vmap(lambda place: jax.random.fold_in(key, place))(places)


def _attacked(network, settings, variables, varied):
    """Returns an attack, what it attacks, the threat model, and who judges its points.

    Args:
      network, settings, variables: of the evaluation.
      varied: settings that one compilation serves all values of.
    """
    threat = ThreatModel.of(settings)
    if settings.get('draws') and network.draws:
        return _attacked_in_expectation(network, settings, variables, varied, threat)
    if settings['attack'] in registry.STAGE_ATTACKS:
        scores, changes = network.scores, {}
        if 'member' in varied:  # which is attacked alone
            scores = lambda logits: logits[varied['member']]
        if settings.get('loss') == 'reweighed_gap':
            changes['loss'] = partial(losses.reweighed_gap, scores=network.scores)
        attack = registry.make(settings, **varied, **changes, scores=scores)
        judge = lambda logits, y: losses.margin(network.scores(logits), y)
        return attack, lambda x: network.member_logits(variables, x), threat, judge
    loss, predict, judge = settings.get('loss'), network.log_probs, losses.margin
    if loss in MEMBER_LOSSES:
        predict, judge = network.member_logits, _best_margin
    # The network gives log-probabilities.
    loss = (MEMBER_LOSSES | losses.LOSSES).get(loss)
    attack = registry.make(settings, **varied, loss=loss)
    return attack, lambda x: predict(variables, x), threat, judge


def _attacked_in_expectation(network, settings, variables, varied, threat):
    """As `_attacked`, of a random network: the mean loss over its draws is climbed.

    A point is judged by the mean of the draws' probabilities, so that none counts by good luck.
    """
    of_draw = losses.ATTACK_LOSSES[settings['loss']]

    def loss(logits, labels, targets):
        return jnp.mean(jax.vmap(lambda each: of_draw(each, labels, targets))(logits), axis=0)

    scores = lambda logits: ensemble.scores(logits, 'probs')
    attack = registry.make(settings, **varied, loss=loss, scores=scores)
    predict = lambda x: network.draws(variables, x, settings['draws'])
    return attack, predict, threat, lambda logits, y: losses.margin(scores(logits), y)


def begin_batch(network, settings, variables, varied, seed, number, batch):
    places, images, labels = batch
    attack, predict, threat, judge = _attacked(network, settings, variables, varied)
    x, rng = batches.to_pixels(images), keys(seed, places)
    progress = driver.begin(attack, predict, threat, rng, x, labels, judge=judge, number=number)
    return prng.to_words(progress)


def restart_batch(network, settings, variables, varied, seed, number, batch):
    places, images, labels, progress = prng.from_words(batch)
    attack, predict, threat, _ = _attacked(network, settings, variables, varied)
    x, rng = batches.to_pixels(images), keys(seed, places)
    progress = driver.restart(attack, predict, threat, progress, rng, x, labels, number)
    return prng.to_words(progress)


def advance_batch(network, settings, variables, varied, count, batch):
    _, images, labels, progress = prng.from_words(batch)
    attack, predict, threat, judge = _attacked(network, settings, variables, varied)
    x = batches.to_pixels(images)
    progress = driver.advance(
        attack, predict, threat, progress, x, labels, num_steps=count, judge=judge
    )
    return prng.to_words(progress)


def _best_margin(member_logits, labels):
    """Returns the margin of whichever member is the furthest from an error, float32 [B]."""
    margins = jax.vmap(losses.margin, (0, None))(member_logits, labels)
    # As in losses.margin: the gradient of max is not to be trusted.
    furthest = jnp.argmax(jax.lax.stop_gradient(margins), axis=0)
    return jnp.take_along_axis(margins, furthest[None], axis=0)[0]


# What an attack on all members climbs, as a transfer set's does: functions of the members' logits
# [k, B, classes] and labels [B].
MEMBER_LOSSES = {
    # The cross-entropy of the members' mean logits, as in the paper.
    'mean_logits': lambda logits, labels: losses.cross_entropy(
        ensemble.combine(logits, 'logits'), labels
    ),
    # The margin of the member that still stands: what is left when the mean is fooled already.
    'best_margin': lambda logits, labels: -_best_margin(logits, labels),
}
