"""A workdir's eval/ as files: results by all their settings, and the ledgers behind them."""

import contextlib
import hashlib
import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from absl import logging
from etils import epath
from ml_collections import ConfigDict

from ensadv.errors import UserError
from ensadv.storage import files, ledgers, selection, workdir

# Of each attack's arrays in the ledger.
LEDGER_SUFFIXES = ('correct', 'margin', 'settings', 'fooled_at', 'felled_by')
_EXAMPLES = '_examples.npz'


class Unit(NamedTuple):
    """An attack with its settings on a split; results have it once per snapshot.

    The split 'examples' is the first few of the test split, whose images are kept to be looked at.

    Attributes:
      name: the attack's.
      split: 'test', 'validation' or 'examples'.
      settings: see `selection.identity`.
    """

    name: str
    split: str
    settings: str


class Evaluated(NamedTuple):
    """What eval/ holds of the weights of one step.

    Attributes:
      results: by unit, as eval/<step>.json has them.
      has_examples: whether images to be looked at are there.
    """

    results: Mapping[Unit, Mapping[str, Any]]
    has_examples: bool

    def missing(self, units: Iterable[Unit]) -> list[Unit]:
        """Returns which of these units are not there."""
        # Examples count whatever their settings, which they tell: nobody would gain from others.
        return [
            unit
            for unit in units
            if not (self.has_examples if unit.split == 'examples' else unit in self.results)
        ]


NOTHING = Evaluated({}, False)


class ResultFiles:
    """Reads and writes the files of a workdir's eval/."""

    def __init__(
        self,
        config: ConfigDict,
        workdir_path: epath.Path,
        settings: Mapping[Unit, Mapping[str, Any]],
    ):
        """Reads nothing yet.

        Args:
          config: a validated config.
          workdir_path: of a run, or of an ensemble of runs.
          settings: of each unit that the config asks for, in its order.
        """
        self._config = config
        self._workdir = workdir_path
        self._settings = settings
        self._keys: dict[Unit, str] | None = None  # of all steps

    def read(self, step: int) -> Evaluated:
        """Reads what there is of a step.

        Raises:
          UserError: if its .json is damaged.
        """
        examples = workdir.evaluation_path(self._workdir, step, _EXAMPLES)
        return Evaluated(self._results(step), examples.exists())

    def read_all(self, known: Mapping[int, Evaluated] | None = None) -> dict[int, Evaluated]:
        """Reads what there is of all steps, each file once.

        Args:
          known: by step results that need not be read again; whether a step has files is looked at.

        Returns:
          By step, ascending.

        Raises:
          UserError: if a .json is damaged.
        """
        known, folder = known or {}, self._workdir / 'eval'
        names = {path.name for path in folder.iterdir()} if folder.exists() else set()
        stems = [name.removesuffix('.json') for name in names if name.endswith('.json')]
        found = {}
        for step in sorted(int(stem) for stem in stems if stem.isdecimal()):
            results = known[step].results if step in known else self._results(step)
            found[step] = Evaluated(results, f'{step}{_EXAMPLES}' in names)
        return found

    def _results(self, step: int) -> dict[Unit, dict[str, Any]]:
        path = workdir.evaluation_path(self._workdir, step, '.json')
        if not path.exists():
            return {}
        content = files.read_json(path)
        return {
            Unit(result['name'], result['split'], selection.identity(result['settings'])): result
            for result in (*content['attacks'], *content['validation'])
        }

    def key(self, unit: Unit, results: Mapping[Unit, Mapping[str, Any]]) -> str:
        """Returns what a unit is called in the ledger and among the scalars of TensorBoard.

        That is the attack's name, where its settings are those of the run's config.json, and else
        the name and what differs. It is the same at all steps, and another for each settings.

        Args:
          unit: not of the split 'examples'.
          results: what the step has already.
        """
        if unit in results:
            return selection.ledger_key(results[unit])
        if self._keys is None:
            self._keys = self._read_keys()
        here = {selection.ledger_key(result): other for other, result in results.items()}
        # An older version replaced results, and so gave the name to others at other steps.
        if (key := self._keys.get(unit)) and key not in here:
            return key
        settings = self._settings[unit]
        plain = unit.name if unit.split == 'test' else f'{unit.split}_{unit.name}'
        config = workdir.read_record(self._workdir)['config']
        others = [selection.as_configured(unit.name, settings, config)]
        holders = [*self._keys.items(), *((other, key) for key, other in here.items())]
        others += [json.loads(other.settings) for other, key in holders if key == plain]
        keys = ['_'.join([plain, *selection.differences(settings, [other])]) for other in others]
        numbered = (f'{keys[-1]}_{number}' for number in itertools.count(2))
        used = {*here, *self._keys.values()}
        return next(key for key in itertools.chain(keys, numbered) if key not in used)

    def _read_keys(self) -> dict[Unit, str]:
        """Returns what each unit is called that some step has."""
        keys: dict[Unit, str] = {}
        for step in workdir.evaluated_steps(self._workdir):
            with contextlib.suppress(UserError, TypeError, KeyError):  # damaged
                for unit, result in self._results(step).items():
                    keys.setdefault(unit, selection.ledger_key(result))
        return keys

    def add(
        self,
        step: int,
        unit: Unit,
        result: Mapping[str, Any],
        arrays: Mapping[str, np.ndarray],
        examples: Mapping[str, np.ndarray],
    ) -> dict[str, Any]:
        """Adds a unit to a step's files, as they are by now.

        Nothing is replaced but what is of the same settings. What is new comes to the ledger first,
        so that the .json never has what the ledger has not.

        Args:
          step: of the weights.
          unit: not of the split 'examples'.
          result: without its key.
          arrays: of the ledger, by `LEDGER_SUFFIXES`.
          examples: the ledger's arrays that do not depend on the attack.

        Returns:
          The result with its key.
        """
        done = self._results(step)
        key = self.key(unit, done)
        result = {**result, 'key': key}
        path = workdir.evaluation_path(self._workdir, step, '.npz')
        dataset = workdir.read_record(self._workdir)['dataset']
        kept = {'index', 'label', 'validation_label'}
        kept |= {
            f'{selection.ledger_key(other)}_{suffix}'
            for other in done.values()
            for suffix in LEDGER_SUFFIXES
        }
        ledger = files.read_arrays(path) if path.exists() else {}
        ledger = {name: array for name, array in ledger.items() if name in kept}
        ledger |= {**examples, **{f'{key}_{suffix}': array for suffix, array in arrays.items()}}
        files.write_arrays(path, {**ledger, 'fingerprint': np.array(dataset['fingerprint'])})
        done[unit] = result
        # In the config's order; then what was asked for at another time, and stays. Of a name the
        # first stays the first.
        names = [other.name for other in (*self._settings, *done)]
        ordered = sorted(done, key=lambda other: names.index(other.name))
        tested = [done[other] for other in ordered if other.split == 'test']
        robust = ledgers.robust(tested, ledger)
        content = {
            'system': self._config.system,
            'seed': self._config.seed,
            'step': step,
            'dataset': dataset['name'],
            'fingerprint': dataset['fingerprint'],
            'test_examples': dataset['num_test'],
            'select_on': self._config.eval.select_on,
            **({'robust': robust} if robust else {}),
            'attacks': tested,
            'validation': [done[other] for other in ordered if other.split == 'validation'],
        }
        files.write_json(workdir.evaluation_path(self._workdir, step, '.json'), content)
        self._stages_path(step, unit).unlink(missing_ok=True)
        if self._keys is not None:
            self._keys[unit] = key
        return result

    def read_stages(
        self, step: int, unit: Unit, labels: np.ndarray, names: Sequence[str]
    ) -> list[Any] | None:
        """Reads what a killed evaluation had of an attack in stages.

        Args:
          step: of the weights.
          unit: the attack.
          labels: of the examples.
          names: of the attack's stages.

        Returns:
          As `evaluator.StagedVerdicts.to_lists` gives it; None where there is nothing of use.
        """
        path = self._stages_path(step, unit)
        if not path.exists() or _why_unreadable(path, ('settings', 'labels', 'verdicts')):
            return None
        arrays = files.read_arrays(path)
        verdicts = json.loads(str(arrays['verdicts']))
        made = [stage['name'] for stage in verdicts[-1]]
        same = str(arrays['settings']) == unit.settings and np.array_equal(arrays['labels'], labels)
        return verdicts if same and made == list(names[: len(made)]) else None

    def write_stages(self, step: int, unit: Unit, labels: np.ndarray, verdicts: Any) -> None:
        """Keeps what an attack in stages has so far; `add` removes it."""
        arrays = {
            'settings': np.array(unit.settings),
            'labels': labels,
            'verdicts': np.array(json.dumps(verdicts.to_lists())),
        }
        files.write_arrays(self._stages_path(step, unit), arrays)

    def _stages_path(self, step: int, unit: Unit) -> epath.Path:
        digest = hashlib.sha256(f'{unit.split} {unit.settings}'.encode()).hexdigest()[:16]
        return workdir.evaluation_path(self._workdir, step, f'_{unit.name}_{digest}.stages.npz')

    def put_aside_damaged(self, step: int, again: bool) -> None:
        """Renames a step's files if one is damaged, so that they are made again.

        Args:
          step: whose; the caller has its claim.
          again: whether its weights are there.
        """
        examples = workdir.evaluation_path(self._workdir, step, _EXAMPLES)
        if examples.exists() and (reason := _why_unreadable(examples)):
            logging.warning('%s: damaged (%s)', examples, reason)
            files.put_aside(examples)
        path, reason, results = self._damage(step)
        if not reason:
            return
        remedy = 'evaluating again' if again else 'its snapshot is gone, so it stays without'
        others = [
            selection.ledger_key(result)
            for unit, result in results.items()
            if unit not in self._settings
        ]
        if again and others:
            remedy += f', but for {", ".join(others)}, which this command does not ask for'
        logging.warning('%s: damaged (%s); %s', path, reason, remedy)
        # Accuracies without a ledger are worth more than nothing.
        if again or path.suffix == '.json':
            for suffix in ('.json', '.npz'):
                files.put_aside(workdir.evaluation_path(self._workdir, step, suffix))

    def _damage(self, step: int) -> tuple[epath.Path, str, Mapping[Unit, Mapping[str, Any]]]:
        """Returns a file of a step, why it is damaged, and the results that can be read.

        The reason is '' if both files are whole.
        """
        path = workdir.evaluation_path(self._workdir, step, '.json')
        try:
            results = self._results(step)
        except (UserError, TypeError, KeyError) as error:
            return path, str(error), {}
        path = workdir.evaluation_path(self._workdir, step, '.npz')
        arrays = [f'{selection.ledger_key(result)}_correct' for result in results.values()]
        return path, _why_unreadable(path, arrays), results


def _why_unreadable(path: epath.Path, names: Sequence[str] = ()) -> str:
    """Returns why a file of arrays is damaged, '' if it is whole and has those of these names."""
    try:
        arrays = files.read_arrays(path)  # an archive has checksums
    except FileNotFoundError:
        return 'it is not there'
    except OSError:  # the storage's trouble, and not the file's
        raise
    except Exception as error:  # whatever zipfile, zlib and NumPy raise
        return str(error) or type(error).__name__
    lacking = sorted(set(names) - set(arrays))
    return f'it lacks {", ".join(lacking)}' if lacking else ''
