"""How many steps a call of the compiled loop makes, and what is known of those it made."""

import math
import time
from collections.abc import Mapping

import jax
import numpy as np
from jax import Array
from ml_collections import ConfigDict

from ensadv.training import nans

CALL_SECONDS = 5.0  # a call of several steps should not take longer


def next_stop(step: int, config: ConfigDict, most: int) -> int:
    """Returns the step at which the call that starts at `step` has to end.

    Args:
      step: where it starts.
      config: the run's.
      most: steps that it may have.
    """
    train = config.train
    stops = [train.steps, step + most]
    for period in (train.log_every, train.checkpoint_every, train.snapshot_every):
        stops.append((step // period + 1) * period)
    if step < train.profile_step:
        stops.append(train.profile_step)
    return min(stops)


class CallLength:
    """How many steps a call may have, so that a signal is not waited with for long."""

    def __init__(self, steps_per_call: int):
        self._steps_per_call = steps_per_call
        self._calls = 0
        self.most = 1

    @property
    def compiles(self) -> bool:
        """Whether the next call, the first, compiles."""
        return not self._calls

    def add(self, num_steps: int, seconds: float) -> None:
        """Takes in what a call took."""
        self._calls += 1
        if self._calls > 1:
            affordable = max(1, int(CALL_SECONDS * num_steps / seconds))
            self.most = min(self._steps_per_call, affordable)


class Interval:
    """Sums of metrics since they were last written, and the time of the calls that gave them."""

    def __init__(self, step: int):
        self.first_step = step
        self._sums: list[Mapping[str, Array]] = []
        self._start_timing(step)

    def _start_timing(self, step: int) -> None:
        self._timed_from, self._start = step, time.monotonic()

    def add(self, step: int, sums: Mapping[str, Array], *, compiled: bool) -> None:
        """Takes in a call that reached `step`; of one that compiled the time does not count."""
        self._sums.append(sums)
        if compiled:
            self._start_timing(step)

    def means(self, step: int, batch_size: int) -> dict[str, float]:
        """Returns the averages over the interval's steps, and the rate if some were timed.

        Raises:
          nans.NotFiniteError: if one of them is not finite.
        """
        sums = jax.tree.map(lambda *leaves: float(np.sum(leaves)), *jax.device_get(self._sums))
        means = {name: value / (step - self.first_step) for name, value in sums.items()}
        if not all(map(math.isfinite, means.values())):
            raise nans.NotFiniteError(self.first_step, step)
        if timed := step - self._timed_from:
            means['examples_per_second'] = timed * batch_size / (time.monotonic() - self._start)
        return means
