"""Runs that are there already: their snapshots, read as what can be evaluated."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from etils import epath
from ml_collections import ConfigDict

from ensadv import build
from ensadv import config as config_lib
from ensadv.attacks import registry
from ensadv.errors import UserError
from ensadv.models import ensemble
from ensadv.runtime import distributed
from ensadv.storage import checkpoints, selection, workdir


class Opened(NamedTuple):
    """What a workdir is about, ready to be evaluated.

    Attributes:
      network: of a run, or of an ensemble of runs.
      variables: its weights, replicated.
      step: of the snapshot; of an ensemble the last of its members'.
      images, labels, places: of the test split, see `build.test_split` and `test_places`.
    """

    network: ensemble.Network
    variables: Any
    step: int
    images: np.ndarray
    labels: np.ndarray
    places: np.ndarray


class Run(NamedTuple):
    """A finished run and one of its snapshots.

    Attributes:
      path: its workdir.
      config: its own, resolved.
      record: its config.json.
      step: the snapshot's.
    """

    path: epath.Path
    config: ConfigDict
    record: Mapping[str, Any]
    step: int

    def describe(self) -> dict[str, Any]:
        """Returns what an ensemble of runs, or a transfer set, writes down about this one."""
        return {
            'workdir': str(self.path),
            'system': self.config.system,
            'seed': self.config.seed,
            'step': self.step,
            'parameters': self.record['parameters'],
            'operations': self.record.get('operations'),  # older runs have none
            'config': self.record['config'],
        }


def find(path: epath.Path, field: str, base: ConfigDict, snapshot: str = 'last') -> Run:
    """Returns the finished run in a workdir.

    Args:
      path: the workdir.
      field: that named it, for errors.
      base: has all fields that a config has.
      snapshot: 'last', or 'best' by the run's own eval.select_on.

    Raises:
      UserError: if no run is there, it is not finished, or the snapshot is not there any more.
    """
    record = workdir.read_record(path)
    if record is None:
        raise UserError(f'{field}: {path}: {workdir.no_run(path)}')
    config = config_lib.from_dict(record['config'], base.copy_and_resolve_references())
    snapshots = checkpoints.open_snapshots(path)
    steps = snapshots.steps()
    snapshots.close()
    if config.train.steps not in steps:
        found = f'found snapshots at {steps}' if steps else 'found no snapshot'
        raise UserError(
            f'{field}: {path}: expected a finished run, with a snapshot at step '
            f'{config.train.steps}, {found}'
        )
    step = config.train.steps
    if snapshot == 'best':
        chosen = selection.selection_attack(registry.names(config.eval))
        evaluations = workdir.read_evaluations(path)
        step = distributed.agree(selection.best_step(evaluations, chosen, record['config']))
        if step not in steps:
            which = 'was never evaluated' if step is None else f'is of step {step}'
            raise UserError(
                f'{field}: {path}: the best snapshot, by {chosen} on {config.eval.select_on}, '
                f'{which}; found those of {steps}. Evaluate the run, or take the last snapshot'
            )
    return Run(path, config, record, step)


def open_workdir(config: ConfigDict, path: epath.Path) -> Opened:
    """Returns the last snapshot of a finished run, or an ensemble of runs, and what judges it.

    Args:
      config: the run's, resolved, with this command's changes.
      path: the workdir.

    Raises:
      UserError: if there is none, or the data are others.
    """
    record = workdir.read_record(path)
    if record is None:
        raise UserError(f'--workdir={path}: {workdir.no_run(path)}')
    workdir.check_config(path, config, ignore=('model.dtype',))
    network, variables, step = _of_record(config, path, record)
    dataset = build.dataset(config)
    workdir.check_data(workdir.weights_folder(path, config), build.describe_data(config, dataset))
    distributed.check_same('the data', dataset.fingerprint)
    split = build.test_split(config, dataset)
    places = build.test_places(config, len(dataset.label_test))
    return Opened(network, variables, step, *split, places)


def _of_record(
    config: ConfigDict, path: epath.Path, record: Mapping[str, Any]
) -> tuple[ensemble.Network, Any, int]:
    """Returns a network, its weights, and the number of its last step."""
    if not record.get('members'):
        found = find(path, '--workdir', config)
        found.config.eval.weights = config.eval.weights
        return *load_one(found, config.eval.dtype), found.step
    members = [
        find(epath.Path(member['workdir']), '--workdir', config, config.ensemble.members_snapshot)
        for member in record['members']
    ]
    network, variables = load(members, combine=config.ensemble.combine, dtype=config.eval.dtype)
    return network, variables, max(member.step for member in members)


def load(runs: Sequence[Run], *, combine: str, dtype: str) -> tuple[ensemble.Network, Any]:
    """Returns the ensemble whose members are these runs, and its weights, replicated.

    Args:
      runs: at least one, all of the same data.
      combine: how their predictions become one.
      dtype: compute type: float32 or bfloat16.
    """
    networks, variables = zip(*(load_one(run, dtype) for run in runs), strict=True)
    return ensemble.of_networks(networks, combine), list(variables)


def load_one(run: Run, dtype: str) -> tuple[ensemble.Network, Any]:
    """Returns a run's network, and its weights, replicated; `dtype` as in `load`."""
    run.config.eval.dtype = dtype
    network = build.network(run.config, run.record['dataset'])
    snapshots = checkpoints.open_snapshots(run.path)
    variables = restore(snapshots, run.step, run.config, network)
    snapshots.close()
    return network, variables


def restore(
    snapshots: checkpoints.Checkpoints, step: int, config: ConfigDict, network: ensemble.Network
) -> Any:
    """Returns the weights of a run's snapshot that its config has evaluated, replicated.

    Args:
      snapshots: the run's.
      step: of the snapshot.
      config: the run's; eval.weights picks.
      network: as it is evaluated.

    Raises:
      DamagedError: see `Checkpoints.restore`.
    """
    like = network.variables
    if not config.train.ema_decay:
        return snapshots.restore(step, like)
    found = snapshots.restore(step, {**like, 'averaged': like})
    averaged = found.pop('averaged')
    return averaged if config_lib.weights(config) == 'averaged' else found


def refuse_sources(config: Mapping[str, Any], set_record: Mapping[str, Any]) -> None:
    """Refuses to judge a source of the transfer set by it: that would be no black box.

    Args:
      config: of the run that is judged, as JSON has it.
      set_record: of the transfer set.

    Raises:
      UserError: if they are trained alike, with the same seed.
    """
    # Runs that differ in these alone begin with the same weights, and train much alike.
    ignore = (
        'system',
        'norm',
        'epsilon',
        'attack',
        'eval',
        'model.dtype',
        'data.validation_examples',
    )
    seeds = [config['seed']]
    if config['ensemble']['training'] == 'separate':
        # Its members are runs of their own, see `streams.learner_keys`.
        k = config['ensemble']['size']
        seeds = [k * config['seed'] + i for i in range(k)]
        config = {**config, 'ensemble': config['ensemble'] | {'size': 1, 'training': 'joint'}}
    for source, seed in itertools.product(set_record['sources'], seeds):
        if not config_lib.changed_fields(source['config'], {**config, 'seed': seed}, ignore):
            raise UserError(
                f'eval.blackbox_path: the run is one of the sources of this transfer set '
                f'({source["system"]}, seed {source["seed"]}), which the set was made to fool; '
                'judge a run with another seed'
            )
