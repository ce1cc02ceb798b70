"""FAB: the nearest adversarial example, by projections on the linearised boundary (1907.02044)."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from ensadv import losses
from ensadv.attacks.attack import Predict, Query, informs
from ensadv.attacks.threat_model import ThreatModel, each

LARGEST_BIAS = 0.1  # towards the clean image: alpha_max
OVERSHOOT = 1.05  # eta
BACK = 0.9  # share of the move that is kept when the boundary is crossed: beta
LEAST_LENGTH = 1e-8
NEWTON_STEPS = 25  # far more than coordinates meet the box in groups
LEAST_WEIGHT = 1e-8  # of the largest: below it a coordinate stays in l2, where it hardly moves


class State(NamedTuple):
    """FAB between two iterations.

    Attributes:
      x: [B, H, W, C], the current iterate, in the box but not always in the ball.
      nearest: float32 [B], the distance of the nearest adversarial example; infinity without one.
      target: int32 [B], the other class of the boundary; of the untargeted attack unused.
    """

    x: Array
    nearest: Array
    target: Array


@dataclasses.dataclass(frozen=True)
class FAB:
    """FAB for linf and l2: an attack that minimises the distance, whatever epsilon is.

    The driver counts only points within epsilon.

    >>> FAB(steps=100).start
    'none'

    Attributes:
      steps: iterations of each restart.
      restarts: independent ones, where `start` is 'boundary'.
      start: 'none' (the image itself), or 'boundary': at distance epsilon / 2.
      targeted: whether it goes for one class, or at each iteration for the nearest one.
      rank: of the targeted attack: as `apgd.APGD.rank`.
      scores: from what predict returns to the logits [B, classes] that are judged.
      bounded: False, since its points may be outside the ball.
    """

    steps: int | Array = 100
    restarts: int = 1
    start: str = 'none'
    targeted: bool = False
    rank: int | Array = 1
    scores: Callable[[Any], Array] = lambda outputs: outputs
    bounded = False

    def init(self, predict: Predict, threat: ThreatModel, rng: Array, x: Array, y: Array) -> State:
        """See `attack.Attack`. Calls predict at the clean image where there is a target."""
        target = jnp.zeros(len(x), jnp.int32)
        if self.targeted:
            target = losses.ranked_class(self.scores(predict(x)), y, self.rank)
        point = x
        if self.start == 'boundary':
            half = dataclasses.replace(threat, epsilon=threat.epsilon / 2)
            point = half.boundary_start(rng, x)
        return State(point, jnp.full(len(x), jnp.inf, jnp.float32), target)

    def step(
        self, predict: Predict, threat: ThreatModel, state: State, x: Array, y: Array
    ) -> tuple[State, Query]:
        """See `attack.Attack`. Calls predict for a gradient, and at the point it leads to."""
        linearise = self._boundary if self.targeted else self._any_boundary
        gap, gradient = linearise(predict, threat, state, y)
        informed = informs(gradient)
        moves = lambda point: _move_to_plane(threat, gradient, gap, point, state.x)
        from_here, from_clean = moves(state.x), moves(x)
        zero = jnp.zeros_like(x)
        a1, a2 = (
            jnp.maximum(threat.distance(m, zero), LEAST_LENGTH) for m in (from_here, from_clean)
        )
        bias = each(jnp.minimum(a1 / (a1 + a2), LARGEST_BIAS), x)
        point = (state.x + OVERSHOOT * from_here) * (1 - bias)
        point = jnp.clip(point + (x + OVERSHOOT * from_clean) * bias, 0, 1)

        outputs = predict(point)
        crossed = losses.margin(self.scores(outputs), y) <= 0
        distance = threat.distance(point, x).astype(jnp.float32)
        nearest = jnp.where(crossed, jnp.minimum(distance, state.nearest), state.nearest)
        next_x = jnp.where(each(crossed, x), x + BACK * (point - x), point)
        return State(next_x, nearest, state.target), Query(outputs, informed, point)

    def _boundary(self, predict, threat, state, y) -> tuple[Array, Array]:
        """Returns how far the target's logit is above the label's, [B], and its gradient."""

        def objective(x):
            gap = losses.gap(self.scores(predict(x)), y, state.target)
            return jnp.sum(gap), gap

        gradient, gap = jax.grad(objective, has_aux=True)(state.x)
        return gap, gradient

    def _any_boundary(self, predict, threat, state, y) -> tuple[Array, Array]:
        """Returns what `_boundary` does for the class whose linearised boundary is the nearest."""
        logits, pull = jax.vjp(lambda x: self.scores(predict(x)), state.x)
        classes = logits.shape[-1]

        def nearer(other, found):
            of_class = jnp.full(len(y), other)
            gap, pull_gap = jax.vjp(lambda z: losses.gap(z, y, of_class), logits)
            (gradient,) = pull(pull_gap(jnp.ones_like(gap))[0])
            distance = jnp.abs(gap) / (1e-12 + threat.dual_length(gradient))
            distance = jnp.where(y == other, jnp.inf, distance)
            better = distance < found[0]
            new = distance, gap, gradient
            return jax.tree.map(lambda n, o: jnp.where(each(better, n), n, o), new, found)

        none = jnp.full(len(y), jnp.inf, logits.dtype), jnp.zeros_like(logits[:, 0])
        _, gap, gradient = jax.lax.fori_loop(0, classes, nearer, (*none, jnp.zeros_like(state.x)))
        return gap, gradient


def _move_to_plane(threat: ThreatModel, w: Array, gap: Array, point: Array, here: Array) -> Array:
    """Returns the shortest moves from points to a plane, within the box.

    The plane is where gap + <w, z - here> = 0. Where the box does not reach it, the move goes to
    the corner of the box that is nearest to it.

    A coordinate moves at a speed (of linf 1, of l2 |w|) until it meets the box, so what <w, move>
    gains over time t is concave and piecewise linear: Newton's method from t = 0 rises to the root,
    and ends there after as many steps as coordinates meet the box in groups.

    Args:
      threat: its norm is what is short.
      w: [B, H, W, C].
      gap: [B].
      point, here: [B, H, W, C] in [0, 1].
    """
    shape = point.shape
    w, point, here = (array.reshape(len(array), -1) for array in (w, point, here))
    # Sums of products lose what matters where the gradient's scale is extreme.
    scale = jnp.max(jnp.abs(w), axis=1, keepdims=True)
    scale = jnp.where(scale > 0, scale, 1)
    w, gap = w / scale, gap / scale[:, 0]
    value = gap + jnp.sum(w * (point - here), axis=1)
    direction = -jnp.sign(value)[:, None] * jnp.sign(w)
    size = jnp.abs(w)
    if threat.norm == 'linf':
        speed = jnp.where(size > 0, 1.0, 0)
    else:
        speed = jnp.where(size < LEAST_WEIGHT, 0, size)
    room = jnp.where(direction > 0, 1 - point, point)
    last = jnp.where(speed > 0, room / jnp.where(speed > 0, speed, 1), 0)  # when it meets the box
    wanted = jnp.abs(value)

    def newton(carry):
        number, time, _ = carry
        moving = last > time[:, None]
        gained = jnp.sum(size * jnp.where(moving, speed * time[:, None], speed * last), axis=1)
        slope = jnp.sum(jnp.where(moving, size * speed, 0), axis=1)
        lacking = wanted - gained
        ahead = jnp.where(slope > 0, lacking / jnp.where(slope > 0, slope, 1), 0)
        later = jnp.where(lacking > 0, time + jnp.maximum(ahead, 0), time)
        return number + 1, later, jnp.any(later > time)

    # Where no time grows any more, none will.
    goes_on = lambda carry: carry[2] & (carry[0] < NEWTON_STEPS)
    _, time, _ = jax.lax.while_loop(goes_on, newton, (0, jnp.zeros_like(wanted), jnp.array(True)))
    # Where nothing moves any more and something is lacking, all of the box is used.
    return (direction * speed * jnp.minimum(time[:, None], last)).reshape(shape)
