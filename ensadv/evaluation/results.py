"""What attacks do to the weights of each step: evaluated once, and kept in eval/."""

import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from absl import logging
from etils import epath
from ml_collections import ConfigDict

from ensadv import build
from ensadv import config as config_lib
from ensadv.attacks import registry
from ensadv.attacks.threat_model import ThreatModel
from ensadv.data import datasets
from ensadv.errors import UserError
from ensadv.evaluation import attack_settings, finished_runs, transfer_sets
from ensadv.evaluation.evaluator import Evaluator, LongVerdicts, StagedVerdicts, Verdicts
from ensadv.evaluation.result_files import ResultFiles, Unit
from ensadv.models import ensemble
from ensadv.runtime import distributed
from ensadv.storage import metrics, selection, workdir

AnyVerdicts = Verdicts | LongVerdicts | StagedVerdicts


class Results:
    """A workdir's eval/: what attacks do to the weights of each step, evaluated once.

    A step's files are written anew after each attack, so that what is finished is never lost.
    """

    def __init__(
        self,
        config: ConfigDict,
        workdir_path: epath.Path,
        label: str,
        make_network: Callable[[datasets.Dataset], ensemble.Network],
        dataset: datasets.Dataset | None = None,
    ):
        """Reads nothing yet, but for the transfer set's record: the workdir may be empty still.

        Args:
          config: a validated config.
          workdir_path: of a run, of an ensemble of runs, or of a model.
          label: the run's name in the progress.
          make_network: what is evaluated, for its data.
          dataset: of a model that is given; None: the config's, of a run.

        Raises:
          UserError: if an attack's settings cannot be made.
        """
        self.label = label
        self._config = config
        self._workdir = workdir_path
        self._make_network = make_network
        self._given = dataset
        self._settings: dict[Unit, dict[str, Any]] = {}
        names = registry.names(config.eval)
        self.units = [self._unit(name) for name in names]
        if config.eval.select_on == 'validation':
            self.units.append(self._unit(selection.selection_attack(names), 'validation'))
        self.long_units = [
            self._unit(registry.entry(text).name) for text in config.eval.long_attacks
        ]
        self.final_units = list(self.long_units)
        shown = selection.most_steps(names)
        if config.eval.examples and shown:
            self.final_units.append(self._unit(shown, 'examples'))
        self.files = ResultFiles(config, workdir_path, self._settings)
        self._evaluator: Evaluator | None = None
        self._writer: metrics.Writer | None = None
        self._shown: dict[str, int] = {}  # each scalar's latest step in TensorBoard's file
        self._in_order = True

    def _unit(self, name: str, split: str = 'test') -> Unit:
        settings = attack_settings.evaluation_settings(self._config, name)
        unit = Unit(name, split, selection.identity(settings))
        self._settings[unit] = settings
        return unit

    def evaluate(
        self, step: int, units: Sequence[Unit], restore: Callable[[ensemble.Network], Any]
    ) -> None:
        """Evaluates what is missing of `units` on all processes; process 0 writes it.

        Args:
          step: of the weights.
          units: what is wanted.
          restore: gives the network's weights, replicated.
        """
        found = self.files.read(step)
        missing = found.missing(units)
        places = [place for place, unit in enumerate(units) if unit in missing]
        missing = [units[place] for place in distributed.agree(places)]
        if not missing:
            return
        self._open()
        variables = restore(self._evaluator.network)
        done = dict(found.results)
        for unit in missing:
            if unit.split == 'examples':
                self._write_examples(step, unit, variables)
                continue
            start = time.monotonic()
            key = self.files.key(unit, done)
            verdicts = self._verdicts(step, unit, variables, f'{self.label} step {step} {key}')
            result = self._result(unit, verdicts)
            self._warn_of_no_gradient(key, verdicts)
            result |= {'seconds': round(time.monotonic() - start, 3), 'key': key}
            if distributed.is_main():
                result = self._add(step, unit, result, verdicts)
            done[unit] = result
            self._show(step, _accuracies([result]))
        self._writer.flush()
        shown = [
            f'{selection.ledger_key(done[unit])} {done[unit]["accuracy"]:.3f}'
            for unit in units
            if unit in done
        ]
        if shown:  # not so if there were only examples to be written
            logging.info('%s: step %d: %s', self.label, step, ', '.join(shown))

    def check(self) -> None:
        """Reads the data, if a run is still to be trained, and checks what evaluation needs.

        Raises:
          UserError: for what else would be told only when the first snapshot is there.
        """
        if workdir.read_record(self._workdir) is None:
            self._read_data(config_lib.to_dict(self._config))

    def close(self) -> None:
        """Waits until the metrics are written."""
        if self._writer is not None:
            self._writer.close()
            if not self._in_order:
                self._open_writer()
                self._writer.close()
            self._writer = None

    def _open(self) -> None:
        """Gets ready, at the first evaluation."""
        if self._writer is not None:
            return
        config = self._config
        # Evaluation computes in a type of its own, on whatever devices there are.
        workdir.check_config(self._workdir, config, ignore=('model.dtype',))
        record = workdir.read_record(self._workdir)
        # Nobody knows how a model that is given was trained.
        trained = () if 'model' in record else (record, *record.get('members', ()))
        dataset = self._read_data(*(judged['config'] for judged in trained))
        description = build.describe_data(config, dataset)
        workdir.check_data(self._workdir, description)
        distributed.check_same('the data', dataset.fingerprint)
        distributed.check_same('eval.indices', description['indices'])
        self._evaluator = Evaluator(self._make_network(dataset), config.eval.batch_size)
        self._environment = build.environment()
        distributed.tell(f'{self.label}: evaluation {build.computation(config, config.eval.dtype)}')
        self._open_writer()

    def _open_writer(self) -> None:
        """Opens TensorBoard's file, and writes what there is: once each, and in order."""
        # A model that is given has no course over training to be shown.
        folder = None if self._given else self._workdir / 'eval'
        self._writer = metrics.Writer(folder, first_step=0)
        self._shown, self._in_order = {}, True
        if distributed.is_main():
            for step, found in self.files.read_all().items():
                self._show(step, _accuracies(found.results.values()), log=False)

    def _show(self, step: int, accuracies: Mapping[str, float], *, log: bool = True) -> None:
        """Writes scalars for TensorBoard, which may drop those of later steps."""
        self._writer.scalars(step, accuracies, log=log)
        for tag in accuracies:
            self._in_order &= self._shown.get(tag, -1) < step
            self._shown[tag] = step

    def _read_data(self, *judged: Mapping[str, Any]) -> datasets.Dataset:
        """Reads what is evaluated on; `judged` are the configs of the runs that are evaluated."""
        config = self._config
        dataset = self._given or build.dataset(config)
        self._num_classes = dataset.num_classes
        self._places = places = build.test_places(config, len(dataset.label_test))
        self._splits = {
            'test': build.test_split(config, dataset), 'validation': dataset.split('validation')
        }  # fmt: skip
        if any(unit.name == 'blackbox' for unit in self.units):
            path = config.eval.blackbox_path
            transfer_set = transfer_sets.load(path, dataset, ThreatModel.of(config))
            there = np.isin(places, transfer_set.indices)
            if not np.all(there):
                raise UserError(
                    f'eval.blackbox_path: {path}: expected the {len(places)} test examples that '
                    f'are evaluated here, found {np.sum(there)} of them'
                )
            for stored in judged:
                finished_runs.refuse_sources(stored, transfer_set.record)
            found = np.searchsorted(transfer_set.indices, places)
            self._transfer_images = transfer_set.images[found]
        return dataset

    def _verdicts(self, step: int, unit: Unit, variables: Any, label: str) -> AnyVerdicts:
        if registry.is_staged(unit.name):
            return self._staged_verdicts(step, unit, variables, label)
        images, labels = self._splits[unit.split]
        if unit.name == 'blackbox':
            images = self._transfer_images
        evaluate = self._evaluator.evaluate
        if unit in self.long_units:
            evaluate = self._evaluator.long_attack
        return evaluate(
            variables, self._settings[unit], images, labels, label,
            split_places=self._places if unit.split == 'test' else None,
        )  # fmt: skip

    def _staged_verdicts(self, step: int, unit: Unit, variables: Any, label: str) -> StagedVerdicts:
        """Makes an attack in stages, from where a killed evaluation left it."""
        images, labels = self._splits[unit.split]
        count = registry.examples(self._settings[unit], len(labels))
        images, labels = images[:count], labels[:count]
        stages = registry.stages(
            self._settings[unit], self._num_classes, self._config.ensemble.size
        )
        names = [stage.name for stage in stages]
        if 'draws' in self._settings[unit] and self._evaluator.network.draws is None:
            distributed.tell(f'{label}: nothing in this network is random: one draw is made')
        read = self.files.read_stages if distributed.is_main() else lambda *_: None
        done = distributed.agree(read(step, unit, labels, names))

        def save(verdicts):
            if distributed.is_main():
                self.files.write_stages(step, unit, labels, verdicts)

        return self._evaluator.staged_attack(
            variables, self._settings[unit], images, labels, label, stages=stages, save=save,
            split_places=self._places[:count] if unit.split == 'test' else None,
            done=None if done is None else StagedVerdicts.of_lists(done),
        )  # fmt: skip

    def _result(self, unit: Unit, verdicts: AnyVerdicts) -> dict[str, Any]:
        """Returns a unit's part of the results, but for its time."""
        stands = verdicts.margin > 0
        # What no gradient was found for was not attacked, and is not called robust.
        correct = stands & verdicts.has_gradient
        result = {
            'name': unit.name,
            'split': unit.split,
            'n': len(correct),
            'correct': int(np.sum(correct)),
            'accuracy': float(np.mean(correct)),
        }
        if isinstance(verdicts, StagedVerdicts):
            result['stages'] = list(verdicts.stages)
            result |= {'last_iterate_accuracy': None, 'last_iterate_n': 0}
        elif isinstance(verdicts, LongVerdicts):
            result['curve'] = curve = self._curve(verdicts)
            # Of more restarts than one it is not known: only in the first do examples stay.
            known = curve['iterate_n'] and self._settings[unit]['restarts'] == 1
            result['last_iterate_accuracy'] = curve['iterate_accuracy'][-1] if known else None
            result['last_iterate_n'] = curve['iterate_n'] if known else 0
        else:
            last = (verdicts.last_margin > 0) & verdicts.has_gradient
            result['last_iterate_accuracy'] = float(np.mean(last))
        result['no_gradient'] = int(np.sum(stands & ~verdicts.has_gradient))
        result['settings'] = self._settings[unit]
        result['select_on'] = self._config.eval.select_on
        return result | self._environment

    def _warn_of_no_gradient(self, key: str, verdicts: AnyVerdicts) -> None:
        stands = verdicts.margin > 0
        if count := np.sum(stands & ~verdicts.has_gradient):
            logging.warning(
                '%s: %s: no gradient, or one of zeros or NaN only, on %d of the %d examples that '
                'stand: they were not attacked, and do not count as robust. Try another '
                'eval.<attack>.loss',
                self.label,
                key,
                count,
                np.sum(stands),
            )

    def _curve(self, verdicts: LongVerdicts) -> dict[str, Any]:
        """Returns accuracies over the first restart's steps: of the worst and current iterate."""
        stayed = verdicts.iterate_margin.shape[1]
        stands = verdicts.stands & verdicts.has_gradient
        iterate = (verdicts.iterate_margin > 0) & verdicts.has_gradient[:stayed]
        return {
            'steps': list(verdicts.steps),
            'accuracy': [float(np.mean(row)) for row in stands],
            'iterate_accuracy': [float(np.mean(row)) for row in iterate] if stayed else [],
            'iterate_n': stayed,
        }

    def _write_examples(self, step: int, unit: Unit, variables: Any) -> None:
        """Writes the first test examples' worst points, to be looked at, and the predictions."""
        images, labels = self._splits['test']
        count = min(self._config.eval.examples, len(labels))
        label = f'{self.label} step {step} {unit.split} {unit.name}'
        worst = self._evaluator.points(
            variables,
            self._settings[unit],
            images,
            labels,
            label,
            places=np.arange(count),
            split_places=self._places,
        ).worst
        clean = images[:count] / np.float32(255)
        log_probs = self._evaluator.log_probs(variables, np.concatenate([clean, worst]), label)
        arrays = {
            'index': self._places[:count],
            'label': labels[:count],
            'image': images[:count],
            'adversarial': worst,
            'clean_log_probs': log_probs[:count],
            'adversarial_log_probs': log_probs[count:],
            'settings': np.array(json.dumps(self._settings[unit], sort_keys=True)),
        }
        if distributed.is_main():
            workdir.write_examples(self._workdir, step, arrays)

    def _add(
        self,
        step: int,
        unit: Unit,
        result: Mapping[str, Any],
        verdicts: AnyVerdicts,
    ) -> dict[str, Any]:
        """Adds a unit to a step's files, and returns its result as it stands there."""
        prefix = '' if unit.split == 'test' else f'{unit.split}_'
        examples = {f'{prefix}label': self._splits[unit.split][1]}
        if unit.split == 'test':
            examples['index'] = self._places
        arrays = {
            'correct': (verdicts.margin > 0) & verdicts.has_gradient,
            'margin': verdicts.margin,
            'settings': np.array(json.dumps(self._settings[unit], sort_keys=True)),
        }
        if isinstance(verdicts, LongVerdicts):
            arrays['fooled_at'] = verdicts.fooled_at
        if isinstance(verdicts, StagedVerdicts):
            arrays['felled_by'] = verdicts.felled_by
        return self.files.add(step, unit, result, arrays, examples)


def _accuracies(results: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """Returns the scalars of results in TensorBoard."""
    return {f'accuracy/{selection.ledger_key(result)}': result['accuracy'] for result in results}
