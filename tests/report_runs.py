"""Writes the files of runs that were never trained, for tests of the report."""

import importlib
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from conftest import tiny_config
from etils import epath
from ml_collections import ConfigDict

from ensadv import config as config_lib
from ensadv.attacks import registry
from ensadv.storage import files, workdir
from ensadv.storage import ledgers as ledgers_lib

N = 100  # test examples, so that an accuracy of 0.01 is one of them
DIGITS = {
    'name': 'digits', 'fingerprint': 'fa690bd4' + 56 * '0', 'num_classes': 10, 'class_names': None,
    'image_shape': [8, 8, 1], 'mean': [0.3], 'std': [0.4], 'num_train': 1437, 'num_validation': 0,
    'num_test': 360,
}  # fmt: skip
CIFAR10 = DIGITS | {
    'name': 'cifar10', 'fingerprint': 64 * 'c', 'image_shape': [32, 32, 3], 'mean': [0.5] * 3,
    'std': [0.2] * 3, 'num_train': 50_000, 'num_test': 10_000,
}  # fmt: skip
PAPER_STEPS = 500_000
OPERATIONS = {'forward': 2e6, 'attack_step': 6e6, 'update': 6e6, 'train_step': 5e7}
ENVIRONMENT = {
    'devices': {'count': 1, 'kind': 'cpu'},
    'versions': {'ensadv': '0.1.0', 'jax': '0.10.2'},
    'xla_flags': '',
    'switches': {},
}
CURVE_STEPS = (1, 2, 5, 10)


def run_config(system: str = 'singleadv', **changes) -> ConfigDict:
    """Returns the config of a run of 40 steps on `N` examples; see `conftest.tiny_config`."""
    attacks = {'eval__attacks': ('clean', 'ifgsm5', 'pgd20'), 'eval__long_attacks': ('pgd500',)}
    sizes = {'train__steps': 40, 'eval__num_examples': N, 'eval__iterate_examples': 10}
    return tiny_config(system, **(attacks | sizes | changes))


def paper_config(system: str = 'singleadv', **changes) -> ConfigDict:
    """Returns the config of a run of the paper's system, judged on `N` examples; see `run_config`.

    It goes with the data set `CIFAR10` and ends at `PAPER_STEPS`.
    """
    config = importlib.import_module(f'configs.{system}').get_config()
    config.eval.attacks, config.eval.long_attacks = ('clean', 'ifgsm5', 'pgd20'), ('pgd500',)
    config.eval.num_examples, config.eval.iterate_examples = N, 10
    changes = {field.replace('__', '.'): value for field, value in changes.items()}
    config.update_from_flattened_dict(changes)
    return config.copy_and_resolve_references()


def write_run(
    path: pathlib.Path,
    config: ConfigDict,
    evaluations: Mapping[int, Mapping[str, Any]],
    *,
    dataset: Mapping[str, Any] = DIGITS,
    parameters: int = 1000,
    operations: Mapping[str, float] | None = OPERATIONS,
    session: Mapping[str, Any] = {'seconds_per_step': 0.5},
    members: Sequence[Mapping[str, Any]] = (),
    ledgers: Sequence[int] = (),
) -> pathlib.Path:
    """Writes a run as train.py and results.py write it.

    Args:
      path: its workdir.
      config: its resolved config.
      evaluations: by step and attack an accuracy, or which examples are correct as bool [n], or
        what to change in the result, with one of them as 'correct'. 'validation_<attack>' is of
        the validation split, and '<attack>_<suffix>' another result of the attack.
      dataset: as config.json has it.
      parameters, operations: as config.json has them; None: an older run.
      session: what to add to the session of training.
      members: for an ensemble of runs, see `member`.
      ledgers: the steps that get one; the last step always does.

    Returns:
      The workdir.
    """
    facts = {'dataset': dict(dataset), 'parameters': parameters}
    if members:
        facts['members'] = list(members)
    elif operations is not None:
        facts['operations'] = dict(operations)
    path = epath.Path(path)
    session = {'step': 0, **ENVIRONMENT, 'command': ['main.py'], **session}
    workdir.write_record(path, config, facts, session)
    for step, outcomes in evaluations.items():
        split_of = {key: key.startswith('validation_') for key in outcomes}
        results = {key: _result(config, key, outcome) for key, outcome in outcomes.items()}
        tested = [results[key] for key in outcomes if not split_of[key]]
        robust = ledgers_lib.robust(tested, _arrays(config, outcomes))
        content = {
            'system': config.system,
            'seed': config.seed,
            'step': step,
            'dataset': dataset['name'],
            'fingerprint': dataset['fingerprint'],
            'test_examples': dataset['num_test'],
            'select_on': config.eval.select_on,
            **({'robust': robust} if robust else {}),
            'attacks': tested,
            'validation': [results[key] for key in outcomes if split_of[key]],
        }
        files.write_json(workdir.evaluation_path(path, step, '.json'), content)
        if step == max(evaluations) or step in ledgers:
            write_ledger(path, config, step, outcomes, dataset)
    return pathlib.Path(path)


def write_ledger(path, config, step, outcomes, dataset=DIGITS) -> None:
    """Writes eval/<step>.npz; see `write_run`."""
    arrays = _arrays(config, outcomes) | {'fingerprint': np.array(dataset['fingerprint'])}
    files.write_arrays(workdir.evaluation_path(epath.Path(path), step, '.npz'), arrays)


def _arrays(config, outcomes) -> dict[str, np.ndarray]:
    arrays = {}
    # An attack may have been made on the first few examples.
    for key, outcome in sorted(outcomes.items(), key=lambda each: len(_correct(config, each[1]))):
        correct, name = _correct(config, outcome), _name(key)
        prefix = 'validation_' if key.startswith('validation_') else ''
        arrays[f'{prefix}label'] = np.arange(len(correct), dtype=np.int32) % 10
        if not prefix:
            arrays['index'] = np.arange(len(correct), dtype=np.int32)
        arrays[f'{key}_correct'] = correct
        arrays[f'{key}_margin'] = np.where(correct, 1, -1).astype(np.float32)
        settings = json.dumps(_result(config, key, outcome)['settings'], sort_keys=True)
        arrays[f'{key}_settings'] = np.array(settings)
        if name in config.eval.long_attacks:
            last = 'felled_by' if registry.is_staged(name) else 'fooled_at'
            arrays[f'{key}_{last}'] = np.where(correct, -1, 0).astype(np.int32)
    return arrays


def member(path: pathlib.Path, step: int | None = None) -> dict[str, Any]:
    """Returns what an ensemble of runs says of this one, as `finished_runs.Run.describe` does."""
    record = workdir.read_record(epath.Path(path))
    config = record['config']
    return {
        'workdir': str(path),
        'system': config['system'],
        'seed': config['seed'],
        'step': step or config['train']['steps'],
        'parameters': record['parameters'],
        'operations': record.get('operations'),
        'config': config,
    }


def write_ensemble(
    path: pathlib.Path,
    of: Sequence[pathlib.Path],
    outcomes: Mapping[str, Any],
    *,
    steps: Sequence[int | None] | None = None,
    **changes,
) -> pathlib.Path:
    """Writes an ensemble of runs, as `evaluate.run_members` does.

    Args:
      path: its workdir.
      of: its members' workdirs.
      outcomes: by attack, see `write_run`.
      steps: the members' snapshots; None: their last.
      changes: of the config.
    """
    members = [member(run, step) for run, step in zip(of, steps or [None] * len(of), strict=True)]
    from_ = {'ensemble__members_from': ','.join(map(str, of)), 'ensemble__size': len(of)}
    config = run_config('separate2adv', **(from_ | changes))
    evaluations = {max(each['step'] for each in members): outcomes}
    parameters = sum(each['parameters'] for each in members)
    return write_run(path, config, evaluations, members=members, session={}, parameters=parameters)


def write_examples(path, config, step, *, shift: float = 0.1, count: int = 2, channels=1) -> None:
    """Writes eval/<step>_examples.npz with gray images, all made lighter."""
    log_probs = np.log(np.full((count, 10), 0.1, np.float32))
    image = np.full((count, 8, 8, channels), 100, np.uint8)
    workdir.write_examples(
        epath.Path(path),
        step,
        {
            'label': np.arange(count, dtype=np.int32),
            'image': image,
            'adversarial': (image / np.float32(255) + np.float32(shift)).astype(np.float32),
            'clean_log_probs': log_probs,
            'adversarial_log_probs': log_probs,
            'settings': np.array(json.dumps(_settings(config, 'pgd20') | {'examples': count})),
        },
    )


def write_transfer_set(folder: pathlib.Path, sources: Sequence[pathlib.Path]) -> None:
    """Writes the part of a transfer set that tells its sources."""
    record = {'sources': [{'workdir': str(source)} for source in sources]}
    files.write_arrays(
        epath.Path(folder) / 'blackbox.npz', {'record': np.array(json.dumps(record))}
    )


def _correct(config: ConfigDict, outcome: Any) -> np.ndarray:
    if isinstance(outcome, Mapping):
        outcome = outcome['correct']
    if isinstance(outcome, np.ndarray):
        return outcome
    n = config.eval.num_examples
    return np.arange(n) < round(outcome * n)


def _result(config: ConfigDict, key: str, outcome: Any) -> dict[str, Any]:
    """Returns an attack's result, as `results.Results` makes it."""
    name = _name(key)
    correct, settings = _correct(config, outcome), _settings(config, name)
    accuracy = float(np.mean(correct))
    result = {
        'name': name,
        'split': 'validation' if key.startswith('validation_') else 'test',
        'n': len(correct),
        'correct': int(np.sum(correct)),
        'accuracy': accuracy,
    }
    if registry.is_staged(name):
        stage = {'name': 'apgd_ce', 'attacked': len(correct), 'seconds': 1.0}
        stage |= {'felled': len(correct) - int(np.sum(correct)), 'accuracy': accuracy}
        result |= {'stages': [stage], 'last_iterate_accuracy': None, 'last_iterate_n': 0}
    elif name in config.eval.long_attacks:
        stay = min(config.eval.iterate_examples, len(correct))
        points = [min(1.0, accuracy + 0.1 * i) for i in range(len(CURVE_STEPS))][::-1]
        result['curve'] = {
            'steps': list(CURVE_STEPS),
            'accuracy': points,
            'iterate_accuracy': points if stay else [],
            'iterate_n': stay,
        }
        known = stay and settings['restarts'] == 1
        result |= {
            'last_iterate_accuracy': points[-1] if known else None,
            'last_iterate_n': stay if known else 0,
        }
    else:
        result['last_iterate_accuracy'] = accuracy
    result |= {'no_gradient': 0, 'settings': settings, 'select_on': config.eval.select_on}
    result |= {**ENVIRONMENT, 'seconds': 1.5, 'key': key}
    changes = outcome if isinstance(outcome, Mapping) else {}
    settings |= changes.get('settings', {})
    return result | {k: v for k, v in changes.items() if k not in ('correct', 'settings')}


def _name(key: str) -> str:
    """Returns the attack of a key: 'pgd20' of 'validation_pgd20' and of 'pgd20_loss=margin'."""
    return key.removeprefix('validation_').partition('_')[0]


def _settings(config: ConfigDict, name: str) -> dict[str, Any]:
    """Returns an attack's settings, as `attack_settings.evaluation_settings` does."""
    kind, steps = (entry := registry.entry(name)).kind, entry.steps
    settings = {'attack': kind, 'combine': config.ensemble.combine, 'dtype': config.eval.dtype}
    if kind == 'clean':
        return settings
    settings['epsilon'] = config.epsilon
    if kind == 'blackbox':
        return settings | {'digest': 64 * 'd', 'share_fooled': 1.0}
    if registry.is_staged(name):
        found = registry.settings(config.eval, entry, config.epsilon)
        return settings | found | {'seed': config.eval.seed}
    group = config_lib.to_dict(config)['eval'][kind]
    fields = ('step_size', 'schedule', 'start', 'sigma', 'restarts', 'loss')
    settings |= {'steps': steps} | {field: group[field] for field in fields}
    settings['seed'] = config.eval.seed
    if name in config.eval.long_attacks:
        settings['iterate_examples'] = config.eval.iterate_examples
    return settings
