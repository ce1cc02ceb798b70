"""The training job: the loop around one pure step."""

import contextlib
import dataclasses
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from etils import epath
from jax import Array
from ml_collections import ConfigDict

from ensadv import build
from ensadv import config as config_lib
from ensadv.cpu import order
from ensadv.data import checks, datasets
from ensadv.data import extra as extra_data
from ensadv.errors import ConfigError, TrainingError, UserError
from ensadv.runtime import distributed, progress, stopping
from ensadv.storage import checkpoints, environments, leases, metrics, workdir
from ensadv.training import (
    costs,
    feeds,
    from_config,
    imported,
    nans,
    overfitting,
    pace,
    streams,
)  # fmt: skip
from ensadv.training.optim import TrainState
from ensadv.training.step import initial_state, train_step

LOCK = 'train'  # name of the lease that one process at a time holds on a workdir, to train in it


def init_state(
    config: ConfigDict, model: Any, image_shape: tuple[int, ...], keys: streams.Keys
) -> TrainState:
    """Returns the state before the first step.

    Every leaf has a leading [k] axis of members; in separate training there is one more in front,
    [k, 1, ...], since each member is an ensemble of its own.
    """
    optimizer, averages = from_config.optimizer(config), bool(config.train.ema_decay)

    def of_members(key, k):
        return initial_state(model, key, k, image_shape, optimizer, averages)

    if config.ensemble.training == 'joint':
        return of_members(keys.init, config.ensemble.size)
    return jax.vmap(lambda key: of_members(key, 1))(keys.init)


def snapshot_of(config: ConfigDict, state: TrainState) -> dict[str, Any]:
    """Returns what evaluation needs of a state, see `checkpoints.open_snapshots`."""
    variables = {'params': state.params, 'batch_stats': state.batch_stats}
    if state.averaged is not None:
        variables['averaged'] = state.averaged
    if config.ensemble.training == 'joint':
        return variables
    return jax.tree.map(lambda leaf: leaf[:, 0], variables)


def make_train_steps(config: ConfigDict, model: Any, draw: feeds.Draw) -> Callable[..., Any]:
    """Returns the compiled `(state, examples, keys, num_steps, chosen) -> (state, metric sums)`.

    The state's memory is reused. `examples` and `chosen` are what a feed's `take` gives to a call,
    and `draw` takes; `num_steps` is traced, so that a call of any length runs the same compiled
    code.
    """
    make_step = partial(
        train_step,
        **from_config.step_settings(config, model),
        mean_over_devices=distributed.mean_over_devices,
    )

    def one_step(state: TrainState, keys: streams.Keys, number: Array, examples: Any, chosen: Any):
        batch, rng = draw(state.step, number, examples, chosen, keys)
        return make_step(state, batch, rng)

    if config.ensemble.training == 'separate':
        one_member = one_step

        def one_step(state, keys, number, examples, chosen):
            train_one = lambda state, keys, chosen: one_member(
                state, keys, number, examples, chosen
            )
            state, values = order.each_learner(train_one, state, keys, chosen)
            return state, jax.tree.map(jnp.mean, values)

    # Traced once, and not again for the shapes of its metrics.
    one_step = jax.jit(one_step, inline=True)

    def train_steps(state, examples, keys, num_steps, chosen):
        of_step = jax.eval_shape(one_step, state, keys, num_steps, examples, chosen)[1]
        zeros = jax.tree.map(jnp.zeros_like, of_step)

        def body(number, carry):
            state, sums = carry
            state, values = one_step(state, keys, number, examples, chosen)
            return state, jax.tree.map(jnp.add, sums, values)

        return jax.lax.fori_loop(0, num_steps, body, (state, zeros))

    return distributed.run_on_devices(train_steps, 4, donate_first=True, divided=True)


def check_fits(config: ConfigDict, dataset: Mapping[str, Any]) -> None:
    """Checks what depends on the data and the devices.

    Args:
      config: a validated config.
      dataset: 'num_train', 'num_classes' and 'image_shape', as `data.Dataset.describe` gives them,
        and 'extra' as `data.Extra.describe` gives it, or None.

    Raises:
      ConfigError: naming the field.
    """
    devices, batch_size = distributed.num_devices(), config.train.batch_size
    if batch_size % devices:
        raise ConfigError(
            f'train.batch_size: expected a multiple of the {devices} devices, found {batch_size}'
        )
    method, share = config.train.diversity, batch_size // devices
    if method in ('trs', 'dverge') and share % 2:
        raise ConfigError(
            f'train.batch_size: expected an even number of examples on each device with '
            f'train.diversity={method}, found {share}'
        )
    if method == 'adp' and config.ensemble.size >= dataset['num_classes']:
        raise ConfigError(
            f'ensemble.size: expected fewer members than the {dataset["num_classes"]} classes with '
            f'train.diversity=adp, found {config.ensemble.size}'
        )
    extra, num_extra = dataset.get('extra'), streams.num_extra(config)
    if batch_size - num_extra > dataset['num_train']:
        raise ConfigError(
            f'train.batch_size: expected at most the {dataset["num_train"]} training examples, '
            f'found {batch_size - num_extra}'
        )
    if extra and not 1 <= num_extra <= min(batch_size - 1, extra['num']):
        raise ConfigError(
            f'data.extra_fraction: expected from 1 to {min(batch_size - 1, extra["num"])} extra '
            f'examples in a batch of {batch_size}, found {num_extra}'
        )
    side = min(dataset['image_shape'][:2])
    if config.data.pad >= side:
        raise ConfigError(
            f"data.pad: expected less than the images' {side} pixels, found {config.data.pad}"
        )
    if config.data.cutout > side:
        raise ConfigError(
            f"data.cutout: expected at most the images' {side} pixels, found {config.data.cutout}"
        )


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
    has_trained = bool(saved.steps())
    for opened in (saved, snapshots):
        opened.close()
    # A finished run is looked at on any machine, whatever type it would train in there.
    ignore = ('model.dtype',) if is_finished else ()
    if not has_trained:
        ignore += imported.free_fields(config, workdir_path)
    workdir.check_config(workdir_path, config, ignore)
    if not is_finished:
        _train(config, workdir_path, on_snapshot, label)
    if on_snapshot:
        on_snapshot()


def _train(config, workdir_path, on_snapshot, label) -> None:
    """Trains from the newest checkpoint, or from step 0, to the last step."""
    dataset, extra, description = _read_data(config, workdir_path)
    group = config.model
    model = build.model(config, description, dtype=group.dtype, remat=group.remat)
    from_config.check_layer(config, model, dataset.image_shape)
    keys = streams.learner_keys(config)
    make_state = partial(init_state, config, model, dataset.image_shape)
    abstract = jax.eval_shape(make_state, keys)
    draw_state = partial(jax.jit(make_state), keys)
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
        first_step = imported.step_of(workdir_path)
        if first_step:
            begin = partial(imported.state_at, config, snapshots, first_step)
            draw_state = lambda draw=draw_state: begin(draw())
        step, state = saved.restore_newest(abstract) or (first_step, None)
        _begin_session(config, workdir_path, facts, step)
        distributed.tell(f'{label}: training {build.computation(config, group.dtype)}')
        if state is None:
            what = 'reading the imported weights' if step else 'drawing the first weights'
            with progress.waiting(f'{label}: {what}'):
                state = draw_state()
            _log_parameters(abstract.params)
        else:
            logging.info('%s: going on from the checkpoint of step %d', label, step)
        sampling = streams.sampling(config, description)
        draw = partial(feeds.draw, sampling)
        train_steps = make_train_steps(config, model, draw)
        feed = feeds.open_feed(config, sampling, keys, dataset, extra)
        stack.callback(feed.close)
        state, keys = distributed.replicate((state, keys))

        def advance(state: TrainState, num_steps: int) -> tuple[TrainState, Mapping[str, Array]]:
            examples, chosen = feed.take(state.updates, num_steps)
            done = train_steps(state, examples, keys, np.int32(num_steps), chosen)
            return jax.block_until_ready(done)

        look = overfitting.make_look(config, model, draw, feed.take, keys)
        log = metrics.TrainingLog(
            workdir_path,
            label=label,
            steps=config.train.steps,
            first_step=step,
            profile_step=config.train.profile_step,
            profile_steps=config.train.profile_steps,
        )
        stack.callback(log.close)
        settings = config_lib.flatten(config_lib.to_dict(config))
        del settings['model.source']  # a whole file
        log.hyperparameters(settings)
        writer = _Writer(config, workdir_path, lock, saved, snapshots, on_snapshot)
        try:
            _loop(config, state, step, advance, look, feed.most_steps, log, writer)
        except overfitting.OverfittingError as error:
            saved.close()  # and so whole
            step, state = saved.restore_newest(abstract) or (0, None)
            if 0 < step < error.step and step not in snapshots.steps():
                snapshots.save(step, snapshot_of(config, state), wait=True)
            raise overfitting.error_with_advice(error, step) from None
        except nans.NotFiniteError as error:
            saved.close()  # and so whole
            start = max(saved.steps(), default=0)
            if not config.debug.nans:
                raise nans.error_with_advice(error, start) from None
            newest = saved.restore_newest(abstract)
            start, state = newest or (first_step, distributed.replicate(draw_state()))
            finder = nans.Finder(config, dataset, draw, feed.take, keys)
            raise nans.error_with_place(error, start, state, advance, finder.find) from None


def _read_data(
    config: ConfigDict, workdir_path: epath.Path
) -> tuple[datasets.Dataset, extra_data.Extra | None, dict[str, Any]]:
    """Returns what a run trains on, and what it writes down of that, all of it checked."""
    dataset = build.dataset(config)
    extra = build.extra(config, dataset.image_shape, dataset.num_classes)
    description = build.describe_data(config, dataset)
    if extra:
        description |= {'extra': extra.describe()}
        if distributed.is_main():
            checks.tell_extra(dataset, extra)
    check_fits(config, description)
    workdir.check_data(workdir_path, description)
    distributed.check_same('the data', [dataset.fingerprint, description.get('extra')])
    return dataset, extra, description


def _begin_session(
    config: ConfigDict, workdir_path: epath.Path, facts: Mapping[str, Any], step: int
) -> None:
    """Writes down that a run begins, or goes on from a step, and in which environment."""
    if distributed.is_main():
        session = {'step': step, **build.environment(), 'command': sys.argv}
        record = workdir.read_record(workdir_path) if step else None
        if record and (changes := environments.changes(record['sessions'][-1], session)):
            logging.warning(
                '%s: goes on in another environment (%s): its numbers will differ from those of a '
                'run that was not interrupted',
                workdir_path,
                '; '.join(changes),
            )
        workdir.write_record(workdir_path, config, facts, session)
    distributed.check_shared(workdir_path / 'config.json')


@dataclasses.dataclass
class _Writer:
    """What training writes beside its metrics."""

    config: ConfigDict
    workdir: epath.Path
    lock: leases.Leases
    saved: checkpoints.Checkpoints
    snapshots: checkpoints.Checkpoints
    on_snapshot: Callable[[], None] | None

    def write(
        self, step: int, state: TrainState, *, snapshot: bool, checkpoint: bool,
        seconds_per_step: list[float],
    ) -> None:  # fmt: skip
        """Writes what is due, and has a new snapshot evaluated."""
        snapshot = snapshot and step not in self.snapshots.steps()
        # Evaluation may take long, and be interrupted: what training needs is safe by then.
        evaluated = snapshot and self.on_snapshot is not None
        checkpoint = checkpoint or (evaluated and step not in self.saved.steps())
        lost = distributed.is_main() and not self.lock.still_held(LOCK)
        if (snapshot or checkpoint) and distributed.agree(lost):
            raise TrainingError(
                f'{self.workdir}: another process trains here since this one was paused, or cut '
                f'off from its storage, for long; ended at step {step}'
            )
        if snapshot:
            self.snapshots.save(step, snapshot_of(self.config, state), wait=True)
        if checkpoint:
            self.saved.save(step, state)
            if seconds_per_step and distributed.is_main():
                timing = {'seconds_per_step': statistics.median(seconds_per_step)}
                workdir.add_to_session(self.workdir, timing)
        if evaluated:
            with stopping.deferred(False):
                self.on_snapshot()


def _loop(config, state, step, advance, look, most_steps, log, writer) -> None:
    """Advances from `step` to the last, looking at it and writing what is due on the way."""
    train, schedule = config.train, from_config.schedule(config)
    interval = pace.Interval(step)
    seconds_per_step: list[float] = []
    length = pace.CallLength(most_steps)
    log.step(step)
    if step == train.steps:  # its snapshot was lost, and the checkpoint is there
        writer.write(step, state, snapshot=True, checkpoint=False, seconds_per_step=[])
    with stopping.deferred():
        if train.stop_on_overfitting and 0 < step < train.steps:
            look(step, state)  # nobody may have, when this checkpoint was written
        while step < train.steps:
            stop = pace.next_stop(step, config, distributed.agree(length.most))
            compiles = length.compiles
            start = time.monotonic()
            with log.bar.compiling() if compiles else contextlib.nullcontext():
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
                # Before anything of this step is written.
                with log.bar.untimed():
                    means |= look(step, state)
                log.scalars(step, means | {'learning_rate': float(schedule(step - 1))})
                if rate := means.get('examples_per_second'):
                    seconds_per_step.append(train.batch_size / rate)
            log.step(step)
            if due['snapshot'] or due['checkpoint']:
                log.flush()  # what is before a checkpoint is not written again
            with log.bar.untimed():
                writer.write(
                    step, state, snapshot=due['snapshot'], checkpoint=due['checkpoint'],
                    seconds_per_step=seconds_per_step,
                )  # fmt: skip
            if stops:
                stopping.stop()
            if any(due.values()):
                interval = pace.Interval(step)


def _log_parameters(params: Any) -> None:
    try:
        from clu import parameter_overview
    except ImportError:
        return
    parameter_overview.log_parameter_overview(
        params, include_stats=False, msg='members are stacked on the first axis'
    )
