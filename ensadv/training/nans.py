"""NaN and infinity in training: the error, the step that makes the first, and words for the place.

Nothing here takes time before the loss, its gradient or the weights are not finite. Then `replay`
finds the step, `inspection` computes it part by part, and `explain` says what was found.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax import Array
from ml_collections import ConfigDict

from ensadv import build
from ensadv.data import datasets
from ensadv.errors import TrainingError
from ensadv.runtime import progress
from ensadv.training import from_config, inspection
from ensadv.training.inspection import Place, Rows, first_not_finite
from ensadv.training.optim import TrainState

# (state, number of steps) -> (state, sums of metrics)
Advance = Callable[[TrainState, int], tuple[TrainState, Mapping[str, Array]]]

ADVICE = (
    'A lower train.learning_rate helps most often (in a new workdir: the config of a run cannot '
    'change)'
)


class NotFiniteError(TrainingError):
    """The loss, its gradient, the weights or the running averages became NaN or infinite.

    Attributes:
      first, last: it was between these steps.
    """

    def __init__(self, first: int, last: int):
        super().__init__(
            'the loss, its gradient, the weights or the running averages are not finite between '
            f'steps {first} and {last}; the checkpoints before that are good. {ADVICE}'
        )
        self.first, self.last = first, last


def unexplained(error: NotFiniteError, start: int) -> TrainingError:
    """Returns the error together with how to find out more.

    Args:
      error: as it was raised.
      start: step of the newest checkpoint, or 0 if there is none.
    """
    return TrainingError(
        f'{error}. The same command with --config.debug.nans=True goes on from '
        f'{_named(start)} and finds the layer'
    )


def explained(
    error: NotFiniteError,
    config: ConfigDict,
    start: int,
    state: TrainState,
    advance: Advance,
    examine: Callable[[TrainState], Rows],
) -> TrainingError:
    """Returns an error that says at which step, member and layer the arithmetic went wrong.

    Args:
      error: as it was raised.
      config: the run's.
      start, state: from which steps are made once more; the state's memory is reused.
      advance: see `replay`.
      examine: see `make_examine`.
    """
    logging.warning('%s. Once more from %s, step by step', error, _named(start))
    found = replay(state, advance, start, error.last)
    if found is None:
        return TrainingError(
            f'{error}. Made once more from {_named(start)}, all steps to {error.last} were finite'
        )
    step, before = found
    separate = config.ensemble.training == 'separate'
    params = jax.tree.map(lambda leaf: leaf[:, 0] if separate else leaf, before.params)
    return TrainingError(explain(step, examine(before), params))


def _named(start: int) -> str:
    return f'the checkpoint of step {start}' if start else 'the beginning'


@jax.jit
def all_finite(tree: Any) -> Array:
    """Returns whether every value of every array is finite, bool []."""
    return jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree)]).all()


def replay(
    state: TrainState,
    advance: Advance,
    first: int,
    last: int,
) -> tuple[int, TrainState] | None:
    """Makes steps one by one until the metrics, or the state before or after, are not finite.

    Args:
      state: that of step `first`; its memory is reused.
      advance: makes a number of steps.
      first: where to begin.
      last: where to give up.

    Returns:
      The step that begins there, and the state before it; None if all steps to `last` are finite.
    """
    finite = bool(all_finite(state))
    with progress.Bar(total=last - first, label='replay', unit='step') as bar:
        for step in range(first, last):
            before = jax.tree.map(jnp.copy, state)  # advancing reuses the state's memory
            state, sums = advance(state, 1)
            finite &= all(map(np.isfinite, jax.device_get(sums).values()))
            if not finite or not all_finite(state):
                return step, before
            bar.update()
    return None


def make_examine(
    config: ConfigDict, dataset: datasets.Dataset, draw: Callable[..., Any], arrays: Any, keys: Any
) -> Callable[[TrainState], Rows]:
    """Returns what looks at every layer in the step from a state.

    In separate training it looks at one member after the other, up to the first that is not finite.

    Args:
      config: the run's.
      dataset: the run's.
      draw: see `inspection.make_examine`, as are `arrays` and `keys`.
    """
    # Without remat, inside which nothing can be looked at; it alters rounding at most.
    model = build.model(config, dataset.describe(), dtype=config.model.dtype)
    settings = from_config.step_settings(config, model)
    del settings['objective']
    examine = inspection.make_examine(
        draw,
        attack_steps=config.attack.steps,
        attack_loss=config.attack.loss,
        adversarial_weight=config.train.adversarial_weight,
        **settings,
    )
    if config.ensemble.training == 'joint':
        return lambda state: examine(state, arrays, keys)

    def examine_members(state: TrainState) -> Rows:
        for i in range(config.ensemble.size):
            own_state, own_keys = jax.tree.map(lambda leaf, i=i: leaf[i], (state, keys))
            rows = examine(own_state, arrays, own_keys)
            rows = Rows((place._replace(member=i), seen) for place, seen in rows.items())
            if first_not_finite(rows):
                break
        return rows

    return examine_members


def explain(step: int, rows: Rows, params: Any) -> str:
    """Returns in one line where a step stopped being finite; logs the largest values there.

    Args:
      step: before the step that is not finite.
      rows: as `inspection.make_examine` gives them.
      params: the weights before that step, [k, ...].
    """
    when = f'the step from {step} to {step + 1}'
    place = first_not_finite(rows)
    if place is None:
        place = max(rows, key=lambda place: rows[place].largest)
        return (
            f'{when} is not finite, but computed once more, layer by layer, it is: rounding '
            f'decides. The largest value there is {rows[place].largest:.2g}: {place.stage}, '
            f'{_name(place, [place.member])}. {ADVICE}'
        )
    alike = [other for other in rows if other._replace(member=place.member) == place]
    members = [other.member for other in alike if not rows[other].finite]
    seen = rows[place]
    found = f'{seen.nan:,} NaN and {seen.infinite:,} infinite of {seen.size:,} values'
    if place.stage == 'state':
        return f'the state of step {step} itself is not finite: {_name(place, members)}: {found}'
    _log_table(f'largest finite values in {when}, {place.stage}', rows, place)
    before = _before(rows, place)
    if before is not None:
        found += f'; before it at most {rows[before].largest:.2g} in {_name_beside(before, place)}'
    return (
        f'{when} is the first that is not finite. {place.stage}, {_name(place, members)}: {found}. '
        f'{_weights(params, place.member)}. {ADVICE}'
    )


def _name(place: Place, members: list[int | None]) -> str:
    if place.member is None:
        return place.what
    who = f'member{"s" if len(members) > 1 else ""} {" and ".join(map(str, members))}'
    return f'{who}, {place.layer or "the whole network"}, {place.what}'


def _name_beside(place: Place, other: Place) -> str:
    """Returns a place's name without what it shares with the other."""
    if place[:3] == other[:3]:
        return place.what
    name = _name(place, [place.member])
    return name.partition(', ')[2] if place.member == other.member is not None else name


def _before(rows: Rows, place: Place) -> Place | None:
    """Returns what was seen last before: of the same member, or else the largest in the stage."""
    places = list(rows)
    earlier = [other for other in places[: places.index(place)] if other.stage == place.stage]
    own = [other for other in earlier if other.member == place.member is not None]
    return own[-1] if own else max(earlier, key=lambda other: rows[other].largest, default=None)


def _weights(params: Any, member: int | None) -> str:
    """Returns how large the weights are, of one member or of all."""
    leaves = jax.tree_util.tree_leaves_with_path(jax.device_get(params))
    if member is not None:
        leaves = [(path, leaf[member]) for path, leaf in leaves]
    norm = math.hypot(*(np.linalg.norm(leaf.astype(np.float64).ravel()) for _, leaf in leaves))
    path, leaf = max(leaves, key=lambda item: np.max(np.abs(item[1])))
    name = '/'.join(key.key for key in path)
    return f'The weights before: norm {norm:.2g}, largest {np.max(np.abs(leaf)):.2g} in {name}'


def _log_table(title: str, rows: Rows, place: Place) -> None:
    """Logs what was seen in a place's stage, of its member."""
    lines = [f'{title}:', f'{"member":>6}  {"largest":>8}  {"NaN":>9}  {"infinite":>9}  where']
    for other, seen in rows.items():
        if other.stage != place.stage or (
            place.member is not None and other.member != place.member
        ):
            continue
        # What goes into a layer has mostly come out of the one before.
        if other != place and other.what.endswith('its input'):
            continue
        member, where = other.member, f'{other.layer or "the whole network"}: {other.what}'
        if member is None:
            member, where = '', other.what
        numbers = f'{seen.largest:>8.2g}  {seen.nan:>9,}  {seen.infinite:>9,}'
        lines.append(f'{member:>6}  {numbers}  {where}')
    logging.warning('%s', '\n'.join(lines))
