"""What an attack is: its settings, where it begins, and one unit of its work.

A new attack is a frozen dataclass with the two methods of `Attack`, in a file of its own. Its
fields are its settings; `registry.register` gives it a name that configs can ask for. What is the
same for every attack is the driver's: the worst point, restarts, curves, and which examples still
stand.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax.numpy as jnp
from jax import Array

from ensadv.attacks.threat_model import ThreatModel

# What is attacked: images [B, H, W, C] in [0, 1] -> logits or log-probabilities [B, classes]; or
# whatever else the attack's loss and the driver's `judge` take.
Predict = Callable[[Array], Any]

LEAST_GRADIENT = 1e-30  # below it squares underflow, and what is made of them hardly moves


class Query(NamedTuple):
    """What a unit of work saw.

    Attributes:
      outputs: of predict.
      informed: bool [B], whether it learned what to do: for a gradient step, whether the gradient
        is not zero. Where an example stands and no step of it was, nobody attacked it.
      x: [B, H, W, C], the points that `outputs` are of; None: state.x, of the state before it.
    """

    outputs: Any
    informed: Array
    x: Array | None = None


def informs(gradient: Array) -> Array:
    """Returns where a gradient [B, ...] tells a direction, bool [B]."""
    return jnp.any(jnp.abs(gradient) >= LEAST_GRADIENT, axis=tuple(range(1, gradient.ndim)))


class Attack(Protocol):
    """An attack on each example of a batch by itself.

    Every leaf of its state is an array [B, ...]. An example's part of it depends on its own key,
    image and label alone, since examples are packed into new batches as others fall.

    Attributes of settings that the driver knows: `steps`, units of work of a restart; `restarts`,
    1 where there is none. An attack whose points may be outside the ball has `bounded = False`:
    only those inside count.
    """

    def init(self, predict: Predict, threat: ThreatModel, rng: Array, x: Array, y: Array) -> Any:
        """Returns the state of a restart, whose `x` [B, H, W, C] is the first point.

        Args:
          predict: what is attacked.
          threat: where points may be.
          rng: keys [B], one per example, others in each restart.
          x: images [B, H, W, C] in [0, 1].
          y: labels int [B]; or any other target that the loss takes.
        """

    def step(
        self, predict: Predict, threat: ThreatModel, state: Any, x: Array, y: Array
    ) -> tuple[Any, Query]:
        """Does a unit of work, and returns the state with the next point.

        It calls predict at state.x; or elsewhere, if the query tells where.

        Args:
          state: as `init` or this gave it.
          predict, threat, x, y: as in `init`.
        """
