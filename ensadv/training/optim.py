"""The optimizer, its schedule, and the state of training."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array


@jax.tree_util.register_pytree_with_keys_class
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything that training changes, and so everything that a checkpoint holds.

    Attributes:
      step: int32 [], updates made so far.
      params: the members' weights, float32 [k, ...].
      batch_stats: the members' batch-norm running averages, float32 [k, ...].
      opt_state: the optimizer's.
      averaged: averages over the steps of {'params', 'batch_stats'}, or None: none are kept.
    """

    step: Array
    params: Any
    batch_stats: Any
    opt_state: Any
    averaged: Any = None

    replace = dataclasses.replace

    def tree_flatten_with_keys(self):
        names = [field.name for field in dataclasses.fields(self)]
        if self.averaged is None:
            # Or a checkpoint would say that it is None, and older checkpoints could not be read.
            names.remove('averaged')
        children = [(jax.tree_util.GetAttrKey(name), getattr(self, name)) for name in names]
        return children, tuple(names)

    @classmethod
    def tree_unflatten(cls, names, children):
        return cls(**dict(zip(names, children, strict=True)))


def moving_average(averaged: Any, new: Any, step: Array, decay: float) -> Any:
    """Returns the exponential moving average of a tree's values after a step.

    Early averages are corrected as `optax.ema` does it (Kingma & Ba, 2015, section 3): they weigh
    the values so far alone, and none of those before the first step.

    Args:
      averaged: after the step before; at the first step its values make no difference.
      new: the values after this step.
      step: int32 [], from 1.
      decay: of the weight of a value with each step, in (0, 1).

    >>> after_one = moving_average(0.0, 1.0, jnp.int32(1), decay=0.5)
    >>> round(float(moving_average(after_one, 4.0, jnp.int32(2), decay=0.5)), 5)  # (1 + 2 * 4) / 3
    3.0
    """
    weight = (1 - decay) / -jnp.expm1(step * math.log(decay))
    return optax.incremental_update(new, averaged, jnp.minimum(weight, 1))


def learning_rate(initial: float, steps: tuple[int, ...], factor: float) -> optax.Schedule:
    """Returns the schedule from `initial` on, multiplied by `factor` at each of `steps`.

    The update with number s (from 0) uses the value at s, so it is the first with the new rate
    where s is one of `steps`.
    """
    return optax.piecewise_constant_schedule(initial, dict.fromkeys(steps, factor))


def sgd(
    schedule: optax.Schedule, *, momentum: float, nesterov: bool, weight_decay: float
) -> optax.GradientTransformation:
    """Momentum SGD with coupled weight decay on all parameters, as Zagoruyko & Komodakis (2016).

    Coupled: g <- g + weight_decay * w before the momentum, and so scaled by the learning rate.
    """
    return optax.chain(
        optax.add_decayed_weights(weight_decay),
        optax.sgd(schedule, momentum=momentum, nesterov=nesterov),
    )
