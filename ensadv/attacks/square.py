"""Square: random search with windows of changed pixels, without gradients (arXiv 1912.00049)."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from ensadv import losses, prng
from ensadv.attacks.attack import Predict, Query
from ensadv.attacks.threat_model import ThreatModel, each

# A window covers this share of the pixels; it is halved after these iterations, as in AutoAttack.
SHARE = 0.8
HALVED_AFTER = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)


class State(NamedTuple):
    """Square between two queries.

    Attributes:
      x: [B, H, W, C], the proposal, which is judged next.
      best: [B, H, W, C], the point that proposals change.
      margin: float [B], at `best`.
      taken: int32 [B], queries so far.
      rng: keys [B].
    """

    x: Array
    best: Array
    margin: Array
    taken: Array
    rng: Array


@dataclasses.dataclass(frozen=True)
class Square:
    """Square for linf and l2, with a window of its own for each image.

    >>> Square(steps=5000).restarts
    1

    Attributes:
      steps: queries of each restart, but for the start's.
      restarts: independent ones.
      scores: from what predict returns to the logits [B, classes] that are judged.
    """

    steps: int | Array = 5000
    restarts: int = 1
    scores: Callable[[Any], Array] = lambda outputs: outputs

    def init(self, predict: Predict, threat: ThreatModel, rng: Array, x: Array, y: Array) -> State:
        """See `attack.Attack`."""
        del predict, y
        start = _stripes if threat.norm == 'linf' else _tiles
        keys = jax.vmap(lambda key: jax.random.fold_in(key, 0))(prng.of_examples(rng))
        point = start(threat, keys, x)
        margin = jnp.full(len(x), jnp.inf, x.dtype)
        return State(point, point, margin, jnp.zeros(len(x), jnp.int32), rng)

    def step(
        self, predict: Predict, threat: ThreatModel, state: State, x: Array, y: Array
    ) -> tuple[State, Query]:
        """See `attack.Attack`."""
        outputs = predict(state.x)
        margin = losses.margin(self.scores(outputs), y).astype(x.dtype)
        taken = (margin < state.margin) | (margin <= 0)
        best = jnp.where(each(taken, x), state.x, state.best)
        propose = linf_proposal if threat.norm == 'linf' else l2_proposal
        phase = jnp.sum(state.taken[:, None] > np.array(HALVED_AFTER), axis=1)
        # Number 0 is the start's.
        keys = jax.vmap(jax.random.fold_in)(prng.of_examples(state.rng), state.taken + 1)
        point = propose(threat, best, x, draw(threat, keys, phase, x.shape[1:]))
        state = State(
            point, best, jnp.where(taken, margin, state.margin), state.taken + 1, state.rng
        )
        return state, Query(outputs, jnp.ones(len(x), bool))


def sides(threat: ThreatModel, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Returns the side of the window in each phase, for images of a shape (H, W, C)."""
    height, width, _ = shape
    found = []
    for phase in range(len(HALVED_AFTER) + 1):
        side = round(math.sqrt(SHARE / 2**phase * height * width))
        if threat.norm == 'l2':
            side = max(side, 3)
            side += side % 2 == 0
        found.append(min(max(side, 1), height, width))
    return tuple(found)


class Draws(NamedTuple):
    """What is random in a proposal.

    Attributes:
      phase: int32 [B], of the schedule.
      corners: int32 [B, windows, 2], the windows' first rows and columns.
      signs: float [B, C], -1 or 1.
      turned: bool [B], whether the pattern of l2 is transposed.
    """

    phase: Array
    corners: Array
    signs: Array
    turned: Array


def draw(threat: ThreatModel, rng: Array, phase: Array, shape: tuple[int, ...]) -> Draws:
    """Draws for each example by its own key what a proposal needs."""
    height, width, channels = shape
    side = jnp.array(sides(threat, shape))[phase]

    def of_example(key, side):
        corner, sign, turn = jax.random.split(key, 3)
        room = jnp.array([height, width]) - side
        # As in the reference the last row and column are never reached.
        corners = jnp.floor(jax.random.uniform(corner, (2, 2)) * room).astype(jnp.int32)
        return corners, _signs(sign, (channels,)), jax.random.bernoulli(turn)

    return Draws(phase, *jax.vmap(of_example)(rng, side))


def _signs(key: Array, shape: tuple[int, ...]) -> Array:
    return jnp.where(jax.random.bernoulli(key, shape=shape), 1.0, -1.0)


def _window(corner: Array, side: Array, shape: tuple[int, ...]) -> Array:
    """Returns which pixels a window covers, bool [H, W]."""
    inside = lambda first, size: (jnp.arange(size) >= first) & (jnp.arange(size) < first + side)
    return inside(corner[0], shape[0])[:, None] & inside(corner[1], shape[1])


def _stripes(threat: ThreatModel, rng: Array, x: Array) -> Array:
    _, _, width, channels = x.shape
    signs = jax.vmap(lambda key: _signs(key, (1, width, channels)))(rng)
    return jnp.clip(x + threat.epsilon * signs, 0, 1)


def linf_proposal(threat: ThreatModel, best: Array, x: Array, draws: Draws) -> Array:
    """Returns points with a window moved by 2 epsilon in each channel, projected.

    Args:
      threat: the threat model, linf.
      best: [B, H, W, C], what is changed.
      x: images [B, H, W, C].
      draws: of which the first corner counts.
    """
    side = jnp.array(sides(threat, x.shape[1:]))[draws.phase]
    covers = jax.vmap(lambda corner, s: _window(corner, s, x.shape[1:]))(draws.corners[:, 0], side)
    change = 2 * threat.epsilon * draws.signs[:, None, None, :]
    return threat.project(best + jnp.where(covers[..., None], change, 0), x)


def _peaks(height: int, width: int) -> np.ndarray:
    """Returns a pattern with one peak that falls off in rectangles, of length 1."""
    pattern = np.zeros((height, width))
    row, column = height // 2, width // 2
    for size in range(max(row, column) + 1):
        low, left = row - size, column - size
        span = 2 * size + 1
        pattern[max(low, 0) : min(low + span, height), max(left, 0) : min(left + span, width)] += (
            1 / (size + 1) ** 2
        )
    return pattern / max(math.sqrt(np.sum(pattern**2)), 1e-12)


@functools.cache
def pattern(side: int) -> np.ndarray:
    """Returns l2's change of a window, [side, side] of length 1: a peak above its negative."""
    above = side // 2
    both = np.concatenate([_peaks(above, side), -_peaks(side - above, side)])
    return both / math.sqrt(np.sum(both**2))


def _placed(patterns: Array, corner: Array, shape: tuple[int, ...]) -> Array:
    """Returns zeros [H, W] with a pattern [S, S] at a corner; what sticks out is lost."""
    largest = patterns.shape[0]
    canvas = jnp.zeros((shape[0] + largest, shape[1] + largest), patterns.dtype)
    placed = jax.lax.dynamic_update_slice(canvas, patterns, (corner[0], corner[1]))
    return placed[: shape[0], : shape[1]]


def _tiles(threat: ThreatModel, rng: Array, x: Array) -> Array:
    """Returns starts of tiles with a pattern each, at distance epsilon before they meet the box."""
    height, width, channels = x.shape[1:]
    side = max(height // 5, 1)
    first = (height - 5 * side) // 2
    tile = jnp.array(pattern(side), x.dtype)
    corners = [
        (first + row * side, first + column * side)
        for row in range(height // side)
        for column in range(width // side)
    ]

    def of_example(key):
        delta = jnp.zeros((height, width, channels), x.dtype)
        for place, corner in enumerate(corners):
            sign, turn = jax.random.split(jax.random.fold_in(key, place))
            turned = jnp.where(jax.random.bernoulli(turn), tile.T, tile)
            rows, columns = height - corner[0], width - corner[1]
            if rows > 0 and columns > 0:
                signs = _signs(sign, (channels,))
                part = (turned[:rows, :columns, None] * signs).astype(x.dtype)
                where = (slice(corner[0], corner[0] + side), slice(corner[1], corner[1] + side))
                delta = delta.at[where].add(part)
        return delta

    moves = threat.unit(jax.vmap(of_example)(rng))
    return jnp.clip(x + threat.epsilon * moves, 0, 1)


def l2_proposal(threat: ThreatModel, best: Array, x: Array, draws: Draws) -> Array:
    """Returns points at distance epsilon: the change in one window is moved to another.

    Args:
      threat: the threat model, l2.
      best: [B, H, W, C], what is changed.
      x: images [B, H, W, C].
      draws: the first window is filled, the second emptied.
    """
    shape = x.shape[1:]
    channels = shape[2]
    found = sides(threat, shape)
    largest = max(found)
    table = np.zeros((len(found), largest, largest))
    for phase, side in enumerate(found):
        table[phase, :side, :side] = pattern(side)
    table, side_of = jnp.array(table, best.dtype), jnp.array(found)

    def of_example(best, x, draws):
        shape_of = table[draws.phase]
        shape_of = jnp.where(draws.turned, shape_of.T, shape_of)
        side = side_of[draws.phase]
        filled, emptied = (_window(corner, side, shape)[..., None] for corner in draws.corners)
        delta = best - x
        length = lambda values: jnp.sqrt(jnp.sum(values**2, axis=(0, 1), keepdims=True))
        new = _placed(shape_of, draws.corners[0], shape)[..., None] * draws.signs
        new = new + jnp.where(filled, delta, 0) / (1e-12 + length(jnp.where(filled, delta, 0)))
        unused = jnp.maximum(threat.epsilon**2 - jnp.sum(delta**2), 0)
        freed = length(jnp.where(filled | emptied, delta, 0))
        new = new / (1e-12 + length(new)) * jnp.sqrt(unused / channels + freed**2)
        return jnp.where(filled, new, jnp.where(emptied, 0, delta))

    moves = threat.unit(jax.vmap(of_example)(best, x, draws))
    return jnp.clip(x + threat.epsilon * moves, 0, 1)
