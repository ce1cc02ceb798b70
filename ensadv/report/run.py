"""A run as the report knows it: by what it wrote."""

import dataclasses
import functools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from ensadv.attacks import registry
from ensadv.errors import UserError
from ensadv.report import comparison
from ensadv.storage import files, records, selection, workdir


@dataclasses.dataclass(frozen=True, eq=False)
class Run:
    """A run, an ensemble of runs, or a model that was given, by what it wrote.

    Attributes:
      path: its workdir.
      name: of its workdir, below the directory that is reported on.
      record: its config.json.
      evaluations: its eval/<step>.json, by step, in order.
      labels: what attacks are called, by `made`; see `comparable.labels`.
      worst: by step and label further results, see `worst_case.add`.
    """

    path: epath.Path
    name: str
    record: Mapping[str, Any]
    evaluations: Mapping[int, Mapping[str, Any]]
    labels: Mapping[tuple[str, str], str] = dataclasses.field(default_factory=dict)
    worst: Mapping[int, Mapping[str, Mapping[str, Any]]] = dataclasses.field(default_factory=dict)

    @property
    def system(self) -> str:
        return self.record['config']['system']

    @property
    def config(self) -> Mapping[str, Any]:
        return self.record['config']

    @property
    def members(self) -> Sequence[Mapping[str, Any]]:
        """What an ensemble of runs says of these; empty for a run that was trained."""
        return self.record.get('members', ())

    @property
    def model(self) -> Mapping[str, Any] | None:
        """What is known of a model that was given; None for a run, whose training is known."""
        return self.record.get('model')

    @property
    def imported(self) -> Mapping[str, Any] | None:
        """What is known of the weights that its training began with, if they were imported."""
        return self.record.get('imported')

    @property
    def is_trained_here(self) -> bool:
        """Whether its config says how it was trained: it is no model that was given.

        Nor is it weights of another program's, as they were imported.
        """
        foreign = self.imported and self.imported['naming'] != records.EXPORTED
        return not (self.model or (foreign and self.steps == self.imported['step']))

    @property
    def of_selected(self) -> bool:
        """Whether it is an ensemble of runs' best snapshots, and not of their last."""
        return bool(self.members) and self.config['ensemble']['members_snapshot'] == 'best'

    @property
    def seed(self) -> str:
        """Its seed; of an ensemble of runs theirs, as in '0+1'."""
        seeds = [member['seed'] for member in self.members] or [self.config['seed']]
        return '+'.join(map(str, seeds))

    @property
    def steps(self) -> int:
        """The step at which it is finished."""
        if self.members:
            return max(member['step'] for member in self.members)
        if self.model:
            return max(self.evaluations, default=0)
        return self.config['train']['steps']

    @functools.cached_property
    def n(self) -> int:
        """How many test examples it is judged on; an attack may have been made on fewer."""
        return max(result['n'] for step in self.judged_steps for result in self.results(step))

    @property
    def wanted(self) -> tuple[str, ...]:
        """The attacks that it asks for on every snapshot."""
        return registry.names(self.config['eval'])

    @property
    def judge(self) -> str:
        """The attack by which the best snapshot is chosen."""
        return selection.selection_attack(self.wanted)

    @property
    def best(self) -> int | None:
        """The step of the best snapshot."""
        return selection.best_step(self.evaluations, self.judge, self.config)

    @property
    def judged_steps(self) -> list[int]:
        """The last step and, if there is a best one, that."""
        return list(dict.fromkeys(step for step in (self.steps, self.best) if step is not None))

    def is_long(self, result: Mapping[str, Any]) -> bool:
        """Returns whether a result is of an attack that only the best and the last step have."""
        return 'curve' in result or ('stages' in result and result['name'] not in self.wanted)

    def results(self, step: int) -> Sequence[Mapping[str, Any]]:
        """Returns all results at a step; of an attack as many as it was made with settings."""
        return self.evaluations[step]['attacks']

    def attacks(self, step: int) -> Mapping[str, Mapping[str, Any]]:
        """Returns the results at a step that have a label, by it, and those of the worst case."""
        return self._labelled[step]

    @functools.cached_property
    def _labelled(self) -> Mapping[int, Mapping[str, Mapping[str, Any]]]:
        named = {
            step: {self.labels.get(made(result)): result for result in self.results(step)}
            for step in self.evaluations
        }
        return {
            step: {label: result for label, result in found.items() if label is not None}
            | self.worst.get(step, {})
            for step, found in named.items()
        }

    def series(self, attack: str, key: str = 'accuracy') -> tuple[np.ndarray, np.ndarray]:
        """Returns steps and values, float64 [m], of every evaluation that has this attack.

        All are made with the same settings, those of the attack's label. NaN where a result lacks
        the value.
        """
        points = [
            (step, results[attack].get(key))
            for step in self.evaluations
            if attack in (results := self.attacks(step))
        ]
        steps, values = zip(*points, strict=True)
        return np.array(steps, float), np.array(values, float)

    @property
    def plane_files(self) -> list[epath.Path]:
        """Its files planes/<name>.npz, by name."""
        # Not by glob, for which a [ in the workdir's name would be a pattern.
        folder = self.path / 'planes'
        return [path for path in _entries(folder) if path.suffix == '.npz']

    @functools.cached_property
    def ledger(self) -> Mapping[str, np.ndarray]:
        """The last step's ledger; raises UserError as `ledger_at` does."""
        return self.ledger_at(self.steps)

    def ledger_at(self, step: int) -> Mapping[str, np.ndarray]:
        """Returns a step's ledger.

        Raises:
          UserError: if it is missing, damaged or no ledger.
        """
        path = workdir.evaluation_path(self.path, step, '.npz')
        ledger = workdir.read_ledger(path)
        if reason := comparison.malformed(ledger):
            raise UserError(f'{path}: {reason}')
        return ledger


# How a system combines its members is its own, and not a setting of the attack.
_OF_A_SYSTEM = 'combine'


def made(result: Mapping[str, Any]) -> tuple[str, str]:
    """Returns an attack's name, and as JSON all that decides its result but for the network."""
    rest = {key: value for key, value in result['settings'].items() if key != _OF_A_SYSTEM}
    return result['name'], json.dumps(rest | {'examples': result['n']}, sort_keys=True)


def name_of(label: str) -> str:
    """Returns the name of a label's attack: 'pgd20' of 'pgd20 loss=margin'."""
    return label.partition(' ')[0]


def by_name(labels: Iterable[str]) -> dict[str, list[str]]:
    """Returns labels by the name of their attack, in their order."""
    found: dict[str, list[str]] = {}
    for label in labels:
        found.setdefault(name_of(label), []).append(label)
    return found


def find(root: epath.Path) -> Iterator[epath.Path]:
    """Yields the directories at or below `root` that hold a run's config.json, by name.

    Of a damaged one it is not known whose it is: its directory is yielded, and so are the runs
    below it. Another program's is passed over.
    """
    file = root / 'config.json'
    if file.exists():
        try:
            content = files.read_json(file)
        except UserError:
            yield root
        else:
            if isinstance(content, dict) and isinstance(content.get('config'), dict):
                yield root
                if (other := root / workdir.TRAINED / 'config.json').exists():
                    yield other.parent
                return
    for path in _entries(root):
        if path.is_dir():
            yield from find(path)


def _entries(folder: epath.Path) -> list[epath.Path]:
    """Returns what a directory holds, by name; nothing where it is none or may not be read."""
    try:
        return sorted(folder.iterdir()) if folder.is_dir() else []
    except PermissionError:
        return []


def read(path: epath.Path, name: str) -> Run:
    """Reads a run; raises UserError if one of its files is damaged."""
    run = Run(path, name, workdir.read_record(path), workdir.read_evaluations(path))
    if not run.config['eval']['attacks']:
        raise UserError('its config.json names no attack')
    for text in run.config['eval']['attacks']:
        registry.entry(text, 'its config.json')
    mine = run.system, run.config['seed'], run.record['dataset']['fingerprint']
    for step, content in run.evaluations.items():
        file = f'eval/{step}.json'
        if reason := records.mismatch(content, records.EVALUATION):
            raise UserError(f'{file} is not of a run ({reason})')
        found = content['system'], content['seed'], content['fingerprint']
        if (*found, content['step']) != (*mine, step):
            raise UserError(
                f'{file} is of another run: {found[0]}, seed {found[1]}, step {content["step"]}'
            )
        for result in (*content['attacks'], *content['validation']):
            _check_result(result, file)
    return run


def _check_result(result: Mapping[str, Any], file: str) -> None:
    """Raises UserError if numbers in a result contradict each other."""
    name = result['name']
    steps = registry.entry(name, file).steps
    expected = records.ATTACK_SETTINGS if steps and not registry.is_staged(name) else {}
    reason = records.mismatch(result['settings'], expected)
    if reason:
        raise UserError(f'{file}: settings of {name}: {reason}')
    curve = result.get('curve', {})
    lengths = {len(values) for values in curve.values() if isinstance(values, list) and values}
    accuracies = result['accuracy'], *curve.get('accuracy', ())
    for accuracy in accuracies:
        if not 0 <= accuracy <= 1:  # NaN is not either
            raise UserError(f'{file}: {name} with accuracy {accuracy}')
    if len(lengths) > 1:
        raise UserError(f'{file}: {name} with a curve of {sorted(lengths)} points')
