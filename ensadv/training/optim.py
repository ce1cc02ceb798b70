"""The optimizer, its schedule, and the state of training."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
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

    @property
    def updates(self) -> int:
        """Updates made so far, as a Python number; of members trained separately of each."""
        return int(np.ravel(jax.device_get(self.step))[0])

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


def learning_rate(
    schedule: str,
    peak: float,
    *,
    num_steps: int,
    warmup_steps: int = 0,
    steps: tuple[int, ...] = (),
    factor: float = 1.0,
) -> optax.Schedule:
    """Returns the learning rate as a function of the step; the update number s, from 0, uses s's.

    Over the first `warmup_steps` it rises from 0, linearly, to the peak, which the step with that
    number has. Of 'one_cycle' that is all of its rise, along a cosine from peak / 25; 0 stands for
    the first 30 % of all steps.

    Args:
      schedule: after that: 'steps', multiplied by `factor` at each of `steps`, the first ones with
        a new rate; 'cosine' (Loshchilov & Hutter, 2017, without restarts) or 'linear', down to 0 at
        `num_steps`; 'one_cycle' (Smith & Topin, 2017), along a cosine down to peak / 250,000 there.
      peak: the highest rate.
      num_steps: all of training's, of every schedule but 'steps'.
      warmup_steps: less than num_steps, and than each of `steps`.
      steps, factor: see 'steps'.

    Raises:
      ValueError: for any other schedule.
    """
    if schedule == 'one_cycle':
        # As optax.cosine_onecycle_schedule, which takes the rise as a share and may round it off.
        top = warmup_steps or int(0.3 * num_steps)
        scales = {top: 25.0, num_steps: 1 / 250_000}
        return optax.schedules.piecewise_interpolate_schedule('cosine', peak / 25, scales)
    left = num_steps - warmup_steps
    if schedule == 'steps':
        places = (step - warmup_steps for step in steps)
        after = optax.piecewise_constant_schedule(peak, dict.fromkeys(places, factor))
    elif schedule == 'cosine':
        after = optax.cosine_decay_schedule(peak, left)
    elif schedule == 'linear':
        after = optax.linear_schedule(peak, 0.0, left)
    else:
        raise ValueError(f'schedule: unknown {schedule!r}')
    if not warmup_steps:
        return after
    rise = optax.linear_schedule(0.0, peak, warmup_steps)
    return optax.join_schedules([rise, after], [warmup_steps])


def are_kernels(params: Any) -> Any:
    """Returns for each parameter whether it is a kernel, by its name, as a tree of bools.

    Those are what convolutions and linear layers multiply by, and no biases and none of batch
    norm's parameters.
    """
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key == 'kernel', params)


def sgd(
    schedule: optax.Schedule,
    *,
    momentum: float,
    nesterov: bool,
    weight_decay: float,
    decays: Callable[[Any], Any] | None = None,
) -> optax.GradientTransformation:
    """Momentum SGD with coupled weight decay, as Zagoruyko & Komodakis (2016).

    Coupled: g <- g + weight_decay * w before the momentum, and so scaled by the learning rate.

    Args:
      schedule: the learning rate.
      momentum, nesterov, weight_decay: numbers, and whether the momentum is Nesterov's.
      decays: from parameters to whether each decays, as `are_kernels`; None: all do.
    """
    return optax.chain(
        optax.add_decayed_weights(weight_decay, decays),
        optax.sgd(schedule, momentum=momentum, nesterov=nesterov),
    )
