"""Attacks by steps along the loss's gradient: IFGSM, PGD, and one step after noise."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from ensadv import losses
from ensadv.attacks import registry
from ensadv.attacks.attack import Predict, Query, informs
from ensadv.attacks.threat_model import ThreatModel, each


class State(NamedTuple):
    """A gradient attack between two steps.

    Attributes:
      x: [B, H, W, C], the current iterate.
      taken: int32 [B], steps of this restart.
      memory: whatever else the direction is made from, every leaf [B, ...].
    """

    x: Array
    taken: Array
    memory: Any


@dataclasses.dataclass(frozen=True)
class IFGSM(registry.IFGSMSettings):
    """Steps along the steepest direction (Kurakin et al., 2016): for linf the gradient's signs.

    >>> attack = IFGSM(steps=7, step_size=2 / 255, start='uniform')
    >>> attack.restarts
    1

    Attributes: see `registry.IFGSMSettings`. `steps` may be traced, so that one compilation serves
    all numbers of them.

    Raises:
      ValueError: for settings that cannot be meant, as far as they are known.
    """

    def __post_init__(self):
        if isinstance(self.restarts, int) and self.restarts < 1:
            raise ValueError(f'restarts: expected at least 1, found {self.restarts}')
        if self.start == 'gaussian' and self.sigma is None:
            raise ValueError("sigma: needed for start='gaussian', a length, as epsilon / 2")
        for field, allowed in (('start', registry.STARTS), ('schedule', registry.SCHEDULES)):
            if (found := getattr(self, field)) not in allowed:
                raise ValueError(f'{field}: expected one of {", ".join(allowed)}, found {found!r}')
        if isinstance(self.loss, str) and self.loss not in losses.LOSSES:
            known = ', '.join(losses.LOSSES)
            raise ValueError(f'loss: expected one of {known}, found {self.loss!r}')
        differ = registry.starts_differ(self.start, self.sigma)
        if isinstance(self.restarts, int) and self.restarts > 1 and not differ:
            raise ValueError(
                f'restarts: {self.restarts} equal ones with start={self.start!r}, '
                f"sigma={self.sigma}; expected 1, or start='uniform', or 'gaussian' with sigma > 0"
            )

    def init(self, predict: Predict, threat: ThreatModel, rng: Array, x: Array, y: Array) -> State:
        """See `attack.Attack`."""
        del predict, y
        for field in ('step_size', 'sigma'):
            threat.check_length(field, getattr(self, field))
        if self.start == 'gaussian':
            x = threat.gaussian_start(rng, x, self.sigma)
        elif self.start == 'uniform':
            x = threat.uniform_start(rng, x)
        return State(x, jnp.zeros(len(x), jnp.int32), self.memory(x))

    def step(
        self, predict: Predict, threat: ThreatModel, state: State, x: Array, y: Array
    ) -> tuple[State, Query]:
        """See `attack.Attack`."""
        gradient, outputs = _gradient(self.loss, predict, state.x, y)
        move, memory = self.move(threat, gradient, state.memory)
        point = threat.project(state.x + self._sizes(state.taken, x) * move, x)
        return State(point, state.taken + 1, memory), Query(outputs, informs(gradient))

    def memory(self, x: Array) -> Any:
        """Returns what `move` remembers before the first step."""
        del x

    def move(self, threat: ThreatModel, gradient: Array, memory: Any) -> tuple[Array, Any]:
        """Returns the direction [B, H, W, C] of a step, of length 1, and what is remembered."""
        return threat.steepest(gradient), memory

    def _sizes(self, taken: Array, x: Array) -> float | Array:
        """Returns the step size: one number, or each example's, [B, 1, 1, 1]."""
        if self.schedule == 'constant':
            return self.step_size
        if self.schedule == 'linear':
            sizes = self.step_size * (1 - taken / self.steps)
        else:
            sizes = self.step_size * (1 + jnp.cos(math.pi * taken / self.steps)) / 2
        return each(sizes, x).astype(x.dtype)


@dataclasses.dataclass(frozen=True)
class PGD(registry.PGDSettings, IFGSM):
    """The paper's PGD: Adam's updates of the gradient, with the step size as its rate.

    Adam's epsilon is far below its usual 1e-8, since a confident network's input gradients are
    not: with 1e-8 the attack would stall where it is needed most. Nor would the squares of such
    gradients be float32 numbers, so they are scaled first, which Adam's update does not show.
    """

    def memory(self, x: Array) -> Any:
        """Returns Adam's state of each example."""
        return jax.vmap(_ADAM.init)(x)

    def move(self, threat: ThreatModel, gradient: Array, memory: Any) -> tuple[Array, Any]:
        """Returns Adam's update, for l2 scaled to length 1, and its state."""
        update, memory = jax.vmap(lambda g, state: _ADAM.update(g, state))(gradient, memory)
        return threat.unit(update), memory


_ADAM = optax.chain(optax.scale(2.0**40), optax.scale_by_adam(eps=1e-16))


@dataclasses.dataclass(frozen=True, kw_only=True)
class NFGSM(registry.NFGSMSettings):
    """Noise-FGSM (de Jorge et al., 2022): uniform noise, and a step from there, for training.

    What the paper has against a network that learns to resist one step alone: the noise reaches
    beyond the ball, and neither it nor the step's end is projected into it, but into the box.

    Attributes: see `registry.NFGSMSettings`; `steps` is 1, and may be traced, for 0: the noise.
    """

    loss: str | Callable[..., Any] = 'cross_entropy'
    steps: int = 1

    bounded = False

    def init(self, predict: Predict, threat: ThreatModel, rng: Array, x: Array, y: Array) -> State:
        """See `attack.Attack`."""
        del predict, y
        if threat.norm != 'linf':
            raise ValueError(f'norm: N-FGSM is defined for linf, found {threat.norm}')
        for field in ('step_size', 'noise'):
            threat.check_length(field, getattr(self, field))
        x = jnp.clip(x + self.noise * threat.uniform_moves(rng, x), 0, 1)
        return State(x, jnp.zeros(len(x), jnp.int32), None)

    def step(
        self, predict: Predict, threat: ThreatModel, state: State, x: Array, y: Array
    ) -> tuple[State, Query]:
        """See `attack.Attack`."""
        del x
        gradient, outputs = _gradient(self.loss, predict, state.x, y)
        point = jnp.clip(state.x + self.step_size * threat.steepest(gradient), 0, 1)
        return State(point, state.taken + 1, None), Query(outputs, informs(gradient))


def _gradient(
    loss: str | Callable[..., Any], predict: Predict, x: Array, y: Array
) -> tuple[Array, Any]:
    """Returns the loss's gradient at each image, and the outputs there."""
    function = losses.LOSSES_OF_LOGITS[loss] if isinstance(loss, str) else loss

    def objective(x):
        outputs = predict(x)
        return jnp.sum(function(outputs, y)), outputs

    return jax.grad(objective, has_aux=True)(x)
