"""The training job: the loop around one pure step."""

import math
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from etils import epath
from jax import Array
from ml_collections import ConfigDict

from ensadv import build, checkpoints, costs, data, ensemble, metrics, parallel, steps, workdir
from ensadv import config as config_lib
from ensadv.errors import ConfigError, TrainingError
from ensadv.optim import TrainState


class Keys(NamedTuple):
    """The run's independent streams of randomness; a step folds in its number where it draws."""

    init: Array
    batches: Array
    augmentation: Array
    attack: Array


def run_keys(seed: int) -> Keys:
    """Returns the keys of the run with this seed."""
    return Keys(*jax.random.split(jax.random.key(seed), len(Keys._fields)))


def learner_keys(config: ConfigDict) -> Keys:
    """Returns the keys of what is trained by one loss each: the ensemble, or each member.

    Members trained separately are k runs of one member with the seeds k * seed + i, which differ
    for all members of all runs of a study.

    Returns:
      Keys without an axis for joint training, with a leading [k] axis for separate training.
    """
    if config.ensemble.training == 'joint':
        return run_keys(config.seed)
    k = config.ensemble.size
    return jax.tree.map(
        lambda *keys: jnp.stack(keys), *(run_keys(k * config.seed + i) for i in range(k))
    )


def init_state(
    config: ConfigDict, model: Any, image_shape: tuple[int, ...], keys: Keys
) -> TrainState:
    """Returns the state before the first step.

    Every leaf has a leading [k] axis of members; in separate training there is one more in front,
    [k, 1, ...], since each member is an ensemble of its own.
    """
    optimizer = build.optimizer(config)
    if config.ensemble.training == 'joint':
        return steps.init_state(model, keys.init, config.ensemble.size, image_shape, optimizer)
    return jax.vmap(lambda key: steps.init_state(model, key, 1, image_shape, optimizer))(keys.init)


def snapshot_of(config: ConfigDict, state: TrainState) -> dict[str, Any]:
    """Returns what evaluation needs of a state: {'params', 'batch_stats'}, every leaf [k, ...]."""
    variables = {'params': state.params, 'batch_stats': state.batch_stats}
    if config.ensemble.training == 'joint':
        return variables
    return jax.tree.map(lambda leaf: leaf[:, 0], variables)


def make_train_steps(config: ConfigDict, model: Any, dataset: data.Dataset) -> Callable[..., Any]:
    """Returns the compiled `(state, arrays, keys, num_steps) -> (state, sums of metrics)`.

    The state's memory is reused. `arrays` are the whole training split, uint8 images and int32
    labels; `num_steps` is traced, so that a call of any length runs the same compiled code.
    """
    batch_size = config.train.batch_size
    flip = config.data.flip
    if flip is None:
        flip = data.flips_by_default(config.data.name)
    train_step = partial(
        steps.train_step,
        model=model,
        optimizer=build.optimizer(config),
        combine=config.ensemble.combine,
        attack=build.training_attack(config),
        attack_batch_norm=config.attack.batch_norm,
        adversarial_weight=config.train.adversarial_weight,
        mean_over_devices=parallel.mean_over_devices,
    )

    def one_step(state: TrainState, keys: Keys, arrays: tuple[Array, Array]):
        images, labels = arrays
        places = parallel.my_share(batch_size)
        indices = data.batch_indices(
            keys.batches, state.step, places, batch_size=batch_size, num_examples=len(labels)
        )

        def example_keys(key):
            key = jax.random.fold_in(key, state.step)
            return jax.vmap(lambda place: jax.random.fold_in(key, place))(places)

        x = data.augment(
            example_keys(keys.augmentation), images[indices], pad=config.data.pad, flip=flip
        )
        batch = data.to_pixels(x), labels[indices]
        return train_step(state, batch, example_keys(keys.attack))

    if config.ensemble.training == 'separate':
        one_member = one_step

        def one_step(state, keys, arrays):
            train_one = lambda state, keys: one_member(state, keys, arrays)
            if ensemble.stacks_members():
                state, values = jax.vmap(train_one)(state, keys)
            else:
                state, values = jax.lax.map(lambda member: train_one(*member), (state, keys))
            return state, jax.tree.map(jnp.mean, values)

    # Traced once, and not again for the shapes of its metrics.
    one_step = jax.jit(one_step, inline=True)

    def train_steps(state, arrays, keys, num_steps):
        zeros = jax.tree.map(jnp.zeros_like, jax.eval_shape(one_step, state, keys, arrays)[1])

        def body(_, carry):
            state, sums = carry
            state, values = one_step(state, keys, arrays)
            return state, jax.tree.map(jnp.add, sums, values)

        return jax.lax.fori_loop(0, num_steps, body, (state, zeros))

    return parallel.run_on_devices(train_steps, 4, donate_first=True)


def check_fits(config: ConfigDict, dataset: data.Dataset) -> None:
    """Checks what depends on the data and the devices.

    Raises:
      ConfigError: naming the field.
    """
    devices, batch_size = parallel.num_devices(), config.train.batch_size
    if batch_size % devices:
        raise ConfigError(
            f'train.batch_size: expected a multiple of the {devices} devices, found {batch_size}'
        )
    if batch_size > len(dataset.label_train):
        raise ConfigError(
            f'train.batch_size: expected at most the {len(dataset.label_train)} training examples, '
            f'found {batch_size}'
        )
    side = min(dataset.image_shape[:2])
    if config.data.pad >= side:
        raise ConfigError(
            f"data.pad: expected less than the images' {side} pixels, found {config.data.pad}"
        )


def next_stop(step: int, config: ConfigDict) -> int:
    """Returns the step at which the call that starts at `step` has to end."""
    train = config.train
    stops = [train.steps, step + train.steps_per_call]
    for period in (train.log_every, train.checkpoint_every, train.snapshot_every):
        stops.append((step // period + 1) * period)
    if step < train.profile_step:
        stops.append(train.profile_step)
    return min(stops)


class _Interval:
    """Sums of metrics since they were last written."""

    def __init__(self, step: int):
        self.first_step = step
        self._sums: list[Mapping[str, Array]] = []
        self._start = time.monotonic()

    def add(self, sums: Mapping[str, Array]) -> None:
        self._sums.append(sums)

    def means(self, step: int, batch_size: int) -> dict[str, float]:
        """Returns the averages over the interval's steps.

        Raises:
          TrainingError: if one of them is not finite.
        """
        sums = jax.tree.map(lambda *leaves: float(np.sum(leaves)), *jax.device_get(self._sums))
        means = {name: value / (step - self.first_step) for name, value in sums.items()}
        if not all(map(math.isfinite, means.values())):
            raise TrainingError(
                'the loss, its gradient or the weights are not finite between steps '
                f'{self.first_step} and {step}; the checkpoints before that are good. A lower '
                'train.learning_rate helps most often (in a new workdir: the config of a run '
                'cannot change)'
            )
        seconds = time.monotonic() - self._start
        means['examples_per_second'] = (step - self.first_step) * batch_size / seconds
        return means


def run(
    config: ConfigDict,
    workdir_path: epath.Path,
    *,
    on_snapshot: Callable[[], None] | None = None,
    label: str = 'train',
) -> None:
    """Trains to config.train.steps, from the newest checkpoint if there is one.

    Args:
      config: a validated config.
      workdir_path: see DESIGN's "what a run writes"; made if missing.
      on_snapshot: called after each snapshot is on disk, and once at the end.
      label: the run's name in its progress.

    Raises:
      UserError: for data, devices or a workdir that do not go with the config.
      TrainingError: if the loss is no longer finite.
    """
    config = build.resolve(config)
    saved = checkpoints.open_checkpoints(workdir_path, config.train.checkpoints_to_keep)
    step = max(saved.steps(), default=0)
    # A finished run is looked at on any machine, whatever type it would train in there.
    ignore = ('model.dtype',) if step >= config.train.steps else ()
    workdir.check_config(workdir_path, config, ignore)
    if step < config.train.steps:
        try:
            _train(config, workdir_path, step, saved, on_snapshot, label)
        finally:
            saved.close()
    if on_snapshot:
        on_snapshot()


def _train(config, workdir_path, step, saved, on_snapshot, label) -> None:
    """Trains from `step`, which is 0 or that of a checkpoint, to the last."""
    dataset = build.dataset(config)
    check_fits(config, dataset)
    description = dataset.describe()
    workdir.check_data(workdir_path, description)
    parallel.check_same('the data', dataset.fingerprint)
    group = config.model
    model = build.model(config, description, dtype=group.dtype, remat=group.remat)
    keys = learner_keys(config)
    make_state = partial(init_state, config, model, dataset.image_shape)
    parameters = jax.eval_shape(make_state, keys).params
    facts = {
        'dataset': description,
        'parameters': costs.size(parameters),
        'operations': costs.operations(config, description)._asdict(),
    }
    session = {'step': step, **build.environment(), 'command': sys.argv}
    if parallel.is_main():
        workdir.write_record(workdir_path, config, facts, session)
    parallel.check_shared(workdir_path / 'config.json')

    state = jax.jit(make_state)(keys)
    if step:
        state = saved.restore(step, state)
        logging.info('%s: going on from the checkpoint of step %d', label, step)
    else:
        _log_parameters(parameters)
    train_steps = make_train_steps(config, model, dataset)
    arrays = parallel.replicate((dataset.image_train, dataset.label_train))
    state, keys = parallel.replicate((state, keys))

    def advance(state: TrainState, num_steps: int) -> tuple[TrainState, Mapping[str, Array]]:
        return train_steps(state, arrays, keys, np.int32(num_steps))

    log = metrics.TrainingLog(
        workdir_path,
        label=label,
        steps=config.train.steps,
        first_step=step,
        profile_step=config.train.profile_step,
        profile_steps=config.train.profile_steps,
    )
    try:
        log.hyperparameters(config_lib.flatten(config_lib.to_dict(config)))
        _loop(config, workdir_path, state, step, advance, log, saved, on_snapshot)
    finally:
        log.close()


def _loop(config, workdir_path, state, step, advance, log, saved, on_snapshot) -> None:
    """Advances from `step` to the last, writing what is due on the way."""
    train, schedule = config.train, build.schedule(config)
    snapshots = checkpoints.open_snapshots(workdir_path)
    interval = _Interval(step)
    seconds_per_step: list[float] = []  # of every interval but the first, which compiles
    first_step = step
    log.step(step)
    while step < train.steps:
        stop = next_stop(step, config)
        state, sums = advance(state, stop - step)
        step = stop
        interval.add(sums)
        last = step == train.steps
        due = {
            name: last or step % train[f'{name}_every'] == 0
            for name in ('log', 'snapshot', 'checkpoint')
        }
        # Before anything is saved the metrics are looked at, so that no NaN is ever saved.
        if any(due.values()):
            means = interval.means(step, train.batch_size)
            log.scalars(step, means | {'learning_rate': float(schedule(step - 1))})
            if interval.first_step > first_step:
                seconds_per_step.append(train.batch_size / means['examples_per_second'])
        log.step(step)
        new_snapshot = due['snapshot'] and step not in snapshots.steps()
        if new_snapshot:
            snapshots.save(step, snapshot_of(config, state), wait=True)
        if due['checkpoint']:
            saved.save(step, state)
            if seconds_per_step and parallel.is_main():
                timing = {'seconds_per_step': statistics.median(seconds_per_step)}
                workdir.add_to_session(workdir_path, timing)
        # Evaluation may take long: what training needs is safe by then.
        if new_snapshot and on_snapshot:
            on_snapshot()
        if any(due.values()):
            interval = _Interval(step)
    snapshots.close()


def _log_parameters(params: Any) -> None:
    try:
        from clu import parameter_overview
    except ImportError:
        return
    parameter_overview.log_parameter_overview(
        params, include_stats=False, msg='members are stacked on the first axis'
    )
