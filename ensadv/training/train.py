"""The training job: the loop around one pure step."""

import contextlib
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

from ensadv import build, prng
from ensadv import config as config_lib
from ensadv.data import batches, datasets
from ensadv.errors import ConfigError, TrainingError, UserError
from ensadv.models import ensemble
from ensadv.runtime import distributed, progress, stopping
from ensadv.storage import checkpoints, environments, leases, metrics, workdir
from ensadv.training import costs, from_config, nans, steps
from ensadv.training.optim import TrainState

LOCK = 'train'  # name of the lease that one process at a time holds on a workdir, to train in it
CALL_SECONDS = 5.0  # a call of several steps should not take longer


class Keys(NamedTuple):
    """The run's independent streams of randomness; a step folds in its number where it draws."""

    init: Array
    batches: Array
    augmentation: Array
    attack: Array


def run_keys(seed: int) -> Keys:
    """Returns the keys of the run with this seed."""
    return Keys(*jax.random.split(prng.key(seed), len(Keys._fields)))


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
    optimizer = from_config.optimizer(config)
    if config.ensemble.training == 'joint':
        return steps.init_state(model, keys.init, config.ensemble.size, image_shape, optimizer)
    return jax.vmap(lambda key: steps.init_state(model, key, 1, image_shape, optimizer))(keys.init)


def snapshot_of(config: ConfigDict, state: TrainState) -> dict[str, Any]:
    """Returns what evaluation needs of a state: {'params', 'batch_stats'}, every leaf [k, ...]."""
    variables = {'params': state.params, 'batch_stats': state.batch_stats}
    if config.ensemble.training == 'joint':
        return variables
    return jax.tree.map(lambda leaf: leaf[:, 0], variables)


def draw_batch(
    config: ConfigDict, step: Array, arrays: tuple[Array, Array], keys: Keys
) -> tuple[steps.Batch, Array]:
    """Returns this device's share of a step's batch, and a key for each example's attack.

    Inside `distributed.run_on_devices` only. `arrays` are the whole training split.
    """
    images, labels = arrays
    batch_size = config.train.batch_size
    flip = config.data.flip
    if flip is None:
        flip = datasets.flips_by_default(config.data.name)
    places = distributed.my_share(batch_size)
    indices = batches.batch_indices(
        keys.batches, step, places, batch_size=batch_size, num_examples=len(labels)
    )

    def example_keys(key):
        key = jax.random.fold_in(key, step)
        return jax.vmap(lambda place: jax.random.fold_in(key, place))(places)

    x = batches.augment(
        example_keys(keys.augmentation), images[indices], pad=config.data.pad, flip=flip
    )
    return (batches.to_pixels(x), labels[indices]), example_keys(keys.attack)


def make_train_steps(
    config: ConfigDict, model: Any, dataset: datasets.Dataset
) -> Callable[..., Any]:
    """Returns the compiled `(state, arrays, keys, num_steps) -> (state, sums of metrics)`.

    The state's memory is reused. `arrays` are the whole training split, uint8 images and int32
    labels; `num_steps` is traced, so that a call of any length runs the same compiled code.
    """
    train_step = partial(
        steps.train_step,
        **from_config.step_settings(config, model),
        mean_over_devices=distributed.mean_over_devices,
    )

    def one_step(state: TrainState, keys: Keys, arrays: tuple[Array, Array]):
        batch, rng = draw_batch(config, state.step, arrays, keys)
        return train_step(state, batch, rng)

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

    return distributed.run_on_devices(train_steps, 4, donate_first=True)


def check_fits(config: ConfigDict, dataset: Mapping[str, Any]) -> None:
    """Checks what depends on the data and the devices.

    Args:
      config: a validated config.
      dataset: 'num_train' and 'image_shape', as `data.Dataset.describe` gives them.

    Raises:
      ConfigError: naming the field.
    """
    devices, batch_size = distributed.num_devices(), config.train.batch_size
    if batch_size % devices:
        raise ConfigError(
            f'train.batch_size: expected a multiple of the {devices} devices, found {batch_size}'
        )
    if batch_size > dataset['num_train']:
        raise ConfigError(
            f'train.batch_size: expected at most the {dataset["num_train"]} training examples, '
            f'found {batch_size}'
        )
    side = min(dataset['image_shape'][:2])
    if config.data.pad >= side:
        raise ConfigError(
            f"data.pad: expected less than the images' {side} pixels, found {config.data.pad}"
        )


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


class _CallLength:
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


class _Interval:
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


def run(
    config: ConfigDict,
    workdir_path: epath.Path,
    *,
    on_snapshot: Callable[[], None] | None = None,
    label: str = 'train',
) -> None:
    """Trains to config.train.steps, from the newest checkpoint that is whole if there is one.

    Args:
      config: a validated config.
      workdir_path: see DESIGN's "what a run writes"; made if missing.
      on_snapshot: called after each snapshot is on disk, and once at the end.
      label: the run's name in its progress.

    Raises:
      UserError: for data, devices or a workdir that do not go with the config, and if another
        process trains there.
      TrainingError: if the loss is no longer finite, or no checkpoint can be read.
      StorageError: if something cannot be written.
      stopping.Stopped: if the program was asked to end; a checkpoint is written by then.
    """
    config = build.resolve(config)
    saved = checkpoints.open_checkpoints(workdir_path, config.train.checkpoints_to_keep)
    snapshots = checkpoints.open_snapshots(workdir_path)
    is_finished = (
        max(saved.steps(), default=0) >= config.train.steps
        and config.train.steps in snapshots.steps()
    )
    for opened in (saved, snapshots):
        opened.close()
    # A finished run is looked at on any machine, whatever type it would train in there.
    workdir.check_config(workdir_path, config, ('model.dtype',) if is_finished else ())
    if not is_finished:
        _train(config, workdir_path, on_snapshot, label)
    if on_snapshot:
        on_snapshot()


def _train(config, workdir_path, on_snapshot, label) -> None:
    """Trains from the newest checkpoint, or from step 0, to the last step."""
    dataset = build.dataset(config)
    description = build.describe_data(config, dataset)
    check_fits(config, description)
    workdir.check_data(workdir_path, description)
    distributed.check_same('the data', dataset.fingerprint)
    group = config.model
    model = build.model(config, description, dtype=group.dtype, remat=group.remat)
    keys = learner_keys(config)
    make_state = partial(init_state, config, model, dataset.image_shape)
    abstract = jax.eval_shape(make_state, keys)
    facts = {
        'dataset': description,
        'parameters': costs.size(abstract.params),
        'operations': costs.operations(config, description)._asdict(),
    }
    keep = config.train.checkpoints_to_keep
    lock = leases.open_leases(workdir_path)
    with contextlib.ExitStack() as stack:
        stack.callback(lock.close)
        if holder := distributed.agree(lock.take_over(LOCK) if distributed.is_main() else None):
            raise UserError(f'--workdir={workdir_path}: is being trained in by {holder}')
        # So what a killed process left half written is nobody's any more.
        saved = checkpoints.open_checkpoints(workdir_path, keep, tidy=True)
        snapshots = checkpoints.open_snapshots(workdir_path, tidy=True)
        stack.callback(saved.close)
        stack.callback(snapshots.close)
        step, state = saved.restore_newest(abstract) or (0, None)
        session = {'step': step, **build.environment(), 'command': sys.argv}
        if distributed.is_main():
            if state is not None:
                _warn_of_changes(workdir_path, session)
            workdir.write_record(workdir_path, config, facts, session)
        distributed.check_shared(workdir_path / 'config.json')
        distributed.tell(f'{label}: training {build.computation(config, group.dtype)}')
        if state is None:
            with progress.waiting(f'{label}: drawing the first weights'):
                state = jax.jit(make_state)(keys)
            _log_parameters(abstract.params)
        else:
            logging.info('%s: going on from the checkpoint of step %d', label, step)
        train_steps = make_train_steps(config, model, dataset)
        arrays = distributed.replicate((dataset.image_train, dataset.label_train))
        state, keys = distributed.replicate((state, keys))

        def advance(state: TrainState, num_steps: int) -> tuple[TrainState, Mapping[str, Array]]:
            return jax.block_until_ready(train_steps(state, arrays, keys, np.int32(num_steps)))

        log = metrics.TrainingLog(
            workdir_path,
            label=label,
            steps=config.train.steps,
            first_step=step,
            profile_step=config.train.profile_step,
            profile_steps=config.train.profile_steps,
        )
        stack.callback(log.close)
        log.hyperparameters(config_lib.flatten(config_lib.to_dict(config)))
        writer = _Writer(config, workdir_path, lock, saved, snapshots, on_snapshot)
        try:
            _loop(config, state, step, advance, log, writer)
        except nans.NotFiniteError as error:
            saved.close()  # and so whole
            start = max(saved.steps(), default=0)
            if not config.debug.nans:
                raise nans.unexplained(error, start) from None
            start, state = saved.restore_newest(abstract) or (0, None)
            if state is None:
                state = distributed.replicate(jax.jit(make_state)(learner_keys(config)))
            find = nans.make_find(config, dataset, partial(draw_batch, config), arrays, keys)
            raise nans.explained(error, start, state, advance, find) from None


class _Writer:
    """What training writes beside its metrics."""

    def __init__(self, config, workdir_path, lock, saved, snapshots, on_snapshot):
        self._config = config
        self._workdir = workdir_path
        self._lock = lock
        self._saved = saved
        self._snapshots = snapshots
        self._on_snapshot = on_snapshot

    def write(
        self, step: int, state: TrainState, *, snapshot: bool, checkpoint: bool,
        seconds_per_step: list[float],
    ) -> None:  # fmt: skip
        """Writes what is due, and has a new snapshot evaluated."""
        snapshot = snapshot and step not in self._snapshots.steps()
        # Evaluation may take long, and be interrupted: what training needs is safe by then.
        evaluated = snapshot and self._on_snapshot is not None
        checkpoint = checkpoint or (evaluated and step not in self._saved.steps())
        lost = distributed.is_main() and not self._lock.still_held(LOCK)
        if (snapshot or checkpoint) and distributed.agree(lost):
            raise TrainingError(
                f'{self._workdir}: another process trains here since this one was paused, or cut '
                f'off from its storage, for long; ended at step {step}'
            )
        if snapshot:
            self._snapshots.save(step, snapshot_of(self._config, state), wait=True)
        if checkpoint:
            self._saved.save(step, state)
            if seconds_per_step and distributed.is_main():
                timing = {'seconds_per_step': statistics.median(seconds_per_step)}
                workdir.add_to_session(self._workdir, timing)
        if evaluated:
            with stopping.deferred(False):
                self._on_snapshot()


def _loop(config, state, step, advance, log, writer) -> None:
    """Advances from `step` to the last, writing what is due on the way."""
    train, schedule = config.train, from_config.schedule(config)
    interval = _Interval(step)
    seconds_per_step: list[float] = []
    length = _CallLength(train.steps_per_call)
    log.step(step)
    if step == train.steps:  # its snapshot was lost, and the checkpoint is there
        writer.write(step, state, snapshot=True, checkpoint=False, seconds_per_step=[])
    with stopping.deferred():
        while step < train.steps:
            stop = next_stop(step, config, distributed.agree(length.most))
            compiles = length.compiles
            start = time.monotonic()
            with log.compiling() if compiles else contextlib.nullcontext():
                state, sums = advance(state, stop - step)
            length.add(stop - step, time.monotonic() - start)
            step = stop
            interval.add(step, sums, compiled=compiles)
            last = step == train.steps
            stops = distributed.any_process(stopping.requested())
            due = {
                name: last or step % train[f'{name}_every'] == 0
                for name in ('log', 'snapshot', 'checkpoint')
            }
            due['checkpoint'] |= stops
            if any(due.values()):
                means = interval.means(step, train.batch_size)
                # A running variance may be infinite where no metric is: that layer's outputs are 0.
                if not nans.all_finite(state):
                    raise nans.NotFiniteError(interval.first_step, step)
                log.scalars(step, means | {'learning_rate': float(schedule(step - 1))})
                if rate := means.get('examples_per_second'):
                    seconds_per_step.append(train.batch_size / rate)
            log.step(step)
            if due['snapshot'] or due['checkpoint']:
                log.flush()  # what is before a checkpoint is not written again
            with log.untimed():
                writer.write(
                    step, state, snapshot=due['snapshot'], checkpoint=due['checkpoint'],
                    seconds_per_step=seconds_per_step,
                )  # fmt: skip
            if stops:
                stopping.stop()
            if any(due.values()):
                interval = _Interval(step)


def _warn_of_changes(workdir_path: epath.Path, session: Mapping[str, Any]) -> None:
    """Warns if a run goes on in another environment than that of its last session."""
    record = workdir.read_record(workdir_path)
    if record and (changes := environments.changes(record['sessions'][-1], session)):
        logging.warning(
            '%s: goes on in another environment (%s): its numbers will differ from those of a run '
            'that was not interrupted',
            workdir_path,
            '; '.join(changes),
        )


def _log_parameters(params: Any) -> None:
    try:
        from clu import parameter_overview
    except ImportError:
        return
    parameter_overview.log_parameter_overview(
        params, include_stats=False, msg='members are stacked on the first axis'
    )
