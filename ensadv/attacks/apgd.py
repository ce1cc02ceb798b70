"""Auto-PGD: steps along the gradient whose size the attack finds by itself (arXiv 2003.01690)."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from ensadv import losses
from ensadv.attacks.attack import Predict, Query, informs
from ensadv.attacks.threat_model import ThreatModel, each

SHARE_OF_RISES = 0.75  # the step is halved where the loss rose in no more of the iterations
WEIGHT_OF_STEP = 0.75  # of a step; the rest is momentum


class State(NamedTuple):
    """APGD between two iterations.

    Attributes:
      x: [B, H, W, C], the current iterate.
      previous: [B, H, W, C], the iterate before it.
      best_x, best_gradient: [B, H, W, C], where the loss was highest, and its gradient there.
      best_loss: float [B], of the images' dtype, as all that follow are.
      checked_loss: float [B], the best loss at the last checkpoint.
      loss: float [B], at the iterate before.
      step_size: float [B].
      rises: int32 [B], iterations since the last checkpoint in which the loss rose.
      waited: int32 [B], iterations since the last checkpoint.
      window: int32 [B], iterations from the last checkpoint to the next.
      halved: bool [B], whether the step was halved at the last checkpoint.
      taken: int32 [B], iterations of this restart.
      target: int32 [B], the class that a targeted loss goes for.
    """

    x: Array
    previous: Array
    best_x: Array
    best_gradient: Array
    best_loss: Array
    checked_loss: Array
    loss: Array
    step_size: Array
    rises: Array
    waited: Array
    window: Array
    halved: Array
    taken: Array
    target: Array


@dataclasses.dataclass(frozen=True)
class APGD:
    """APGD with any loss. The reference's behaviour decides where it and the paper differ.

    >>> APGD(steps=100, loss='dlr').restarts
    1

    Attributes:
      steps: iterations of each restart, from which the checkpoints follow; may be traced.
      restarts: independent starts.
      loss: what is climbed, of `losses.ATTACK_LOSSES`; or a function (outputs, labels, targets) ->
        [B], which is given the outputs as they are.
      rank: for a targeted loss: which class is the target, by the clean image's logits; 1 is the
        likeliest that is not the label; may be traced.
      scores: from what predict returns to the logits [B, classes] that are judged.
    """

    steps: int | Array = 100
    restarts: int = 1
    loss: str | Callable[..., Array] = 'cross_entropy'
    rank: int | Array | None = None
    scores: Callable[[Any], Array] = lambda outputs: outputs

    def init(self, predict: Predict, threat: ThreatModel, rng: Array, x: Array, y: Array) -> State:
        """See `attack.Attack`. Calls predict at the clean image where there is a target."""
        point, n = threat.boundary_start(rng, x), len(x)
        number = lambda value, dtype: jnp.full(n, value, dtype)
        target = number(0, jnp.int32)
        if self.rank is not None:
            target = losses.ranked_class(self.scores(predict(x)), y, self.rank)
        return State(
            x=point,
            previous=point,
            best_x=point,
            best_gradient=jnp.zeros_like(point),
            best_loss=number(-jnp.inf, x.dtype),
            checked_loss=number(-jnp.inf, x.dtype),
            loss=number(0, x.dtype),
            step_size=number(2 * threat.epsilon, x.dtype),
            rises=number(0, jnp.int32),
            waited=number(0, jnp.int32),
            window=number(_share(self.steps, 22), jnp.int32),
            # So the best loss counts only from the second checkpoint on.
            halved=number(True, bool),
            taken=number(0, jnp.int32),
            target=target,
        )

    def step(
        self, predict: Predict, threat: ThreatModel, state: State, x: Array, y: Array
    ) -> tuple[State, Query]:
        """See `attack.Attack`."""
        gradient, loss, outputs = self._gradient(predict, state, y)
        informed = informs(gradient)
        state = _remember(state, loss, gradient)
        at_checkpoint = state.waited == state.window
        stalls = ~state.halved & (state.checked_loss >= state.best_loss)
        halved = at_checkpoint & ((state.rises <= SHARE_OF_RISES * state.window) | stalls)
        here = jnp.where(each(halved, x), state.best_x, state.x)
        gradient = jnp.where(each(halved, x), state.best_gradient, gradient)
        step_size = jnp.where(halved, state.step_size / 2, state.step_size)

        forward = threat.project(here + each(step_size, x) * threat.steepest(gradient), x)
        weight = each(jnp.where(state.taken == 0, 1, WEIGHT_OF_STEP), x)
        momentum = here - state.previous
        point = threat.project(here + weight * (forward - here) + (1 - weight) * momentum, x)
        reset = lambda value, old: jnp.where(at_checkpoint, value, old)
        shorter = jnp.maximum(state.window - _share(self.steps, 3), _share(self.steps, 6))
        state = state._replace(
            x=point,
            previous=here,
            step_size=step_size,
            checked_loss=reset(state.best_loss, state.checked_loss),
            halved=reset(halved, state.halved),
            rises=reset(0, state.rises),
            waited=reset(0, state.waited),
            window=reset(shorter, state.window),
            taken=state.taken + 1,
        )
        return state, Query(outputs, informed)

    def _gradient(self, predict: Predict, state: State, y: Array) -> tuple[Array, Array, Any]:
        """Returns the loss's gradient at each image, the loss there, and what predict returned."""
        loss = losses.ATTACK_LOSSES[self.loss] if isinstance(self.loss, str) else self.loss

        def objective(x):
            outputs = predict(x)
            logits = self.scores(outputs) if isinstance(self.loss, str) else outputs
            of_each = loss(logits, y, state.target)
            return jnp.sum(of_each), (of_each, outputs)

        gradient, (of_each, outputs) = jax.grad(objective, has_aux=True)(state.x)
        return gradient, of_each.astype(state.x.dtype), outputs


def _share(steps: int | Array, percent: int) -> int | Array:
    """Returns so many percent of the steps, rounded down, but at least 1; steps may be traced."""
    share = percent * steps // 100
    return max(share, 1) if isinstance(share, int) else jnp.maximum(share, 1)


def _remember(state: State, loss: Array, gradient: Array) -> State:
    """Takes the loss and gradient at the current iterate into account."""
    is_start = state.taken == 0
    better = is_start | (loss > state.best_loss)
    keep = lambda new, old: jnp.where(each(better, new), new, old)
    best_loss = jnp.where(better, loss, state.best_loss)
    return state._replace(
        best_x=keep(state.x, state.best_x),
        best_gradient=keep(gradient, state.best_gradient),
        best_loss=best_loss,
        checked_loss=jnp.where(is_start, best_loss, state.checked_loss),
        # The reference compares the first iterate's loss with 0 and not with the start's.
        loss=jnp.where(is_start, 0, loss),
        rises=state.rises + (~is_start & (loss > state.loss)),
        waited=state.waited + ~is_start,
    )
