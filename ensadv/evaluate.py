"""The evaluation job: snapshots x attacks -> one file of results per snapshot."""

import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from etils import epath
from ml_collections import ConfigDict

from ensadv import build, checkpoints, data, ensemble, metrics, parallel, steps, workdir
from ensadv.errors import UserError


class Evaluator:
    """Evaluates weights under attacks, on the first examples of a test set, every one once.

    The results depend neither on the batch size nor on the devices: each example has its own key,
    and the last batch's padding is masked.
    """

    def __init__(self, config: ConfigDict, dataset: data.Dataset):
        """Puts the test set on the devices.

        Args:
          config: a validated config.
          dataset: its data.

        Raises:
          UserError: if fewer examples are there than config.eval.num_examples.
        """
        self._config = config
        self.num_examples = config.eval.num_examples or len(dataset.label_test)
        if self.num_examples > len(dataset.label_test):
            raise UserError(
                f'eval.num_examples: expected at most the {len(dataset.label_test)} test examples, '
                f'found {self.num_examples}'
            )
        self.labels = dataset.label_test[: self.num_examples]
        self._arrays = parallel.replicate((dataset.image_test[: self.num_examples], self.labels))
        self._model = build.model(config, dataset.describe(), dtype=config.eval.dtype)
        devices = parallel.num_devices()
        # A batch is as large as asked for, or as the test set, and divides by the devices.
        self._batch_size = -(-min(config.eval.batch_size, self.num_examples) // devices) * devices
        self._compiled: dict[str, Callable[..., Any]] = {}

    def init_variables(self) -> ensemble.Variables:
        """Returns the shapes of the weights that `evaluate` takes."""
        image_shape, k = self._arrays[0].shape[1:], self._config.ensemble.size
        return jax.eval_shape(lambda: ensemble.init(self._model, jax.random.key(0), k, image_shape))

    def evaluate(
        self, variables: ensemble.Variables, settings: Mapping[str, Any], label: str
    ) -> tuple[np.ndarray, np.ndarray]:
        """Returns each example's worst margin and its margin at the last iterate, float32 [n].

        Args:
          variables: replicated, every leaf [k, ...].
          settings: `build.evaluation_settings`.
          label: of the progress.
        """
        step = self._compile(settings)
        num_steps = np.int32(settings.get('steps', 0))
        margins = []
        firsts = range(0, self.num_examples, self._batch_size)
        robust = 0
        with metrics.progress(total=self.num_examples, label=label, unit='image') as bar:
            for first in firsts:
                outcome = jax.device_get(step(variables, self._arrays, np.int32(first), num_steps))
                valid = min(self._batch_size, self.num_examples - first)
                # [devices, share] -> [batch], in the order of the test set.
                margins.append([m.reshape(-1)[:valid] for m in outcome])
                robust += int(np.sum(margins[-1][0] > 0))
                bar.set_postfix(accuracy=f'{robust / (first + valid):.3f}', refresh=False)
                bar.update(valid)
        worst, last = (np.concatenate(column) for column in zip(*margins, strict=True))
        return worst, last

    def _compile(self, settings: Mapping[str, Any]) -> Callable[..., Any]:
        """Returns the attack's compiled batch step; one serves every number of steps."""
        kind = str({name: value for name, value in settings.items() if name != 'steps'})
        if kind in self._compiled:
            return self._compiled[kind]
        evaluate_step = partial(
            steps.evaluate_step,
            model=self._model,
            combine=settings['combine'],
            worst_case=build.worst_case(settings),
        )
        seed, last = settings.get('seed', 0), self.num_examples - 1

        def batch_step(variables, arrays, first, num_steps):
            images, labels = arrays
            places = jnp.minimum(first + parallel.my_share(self._batch_size), last)
            keys = jax.vmap(lambda place: jax.random.fold_in(jax.random.key(seed), place))(places)
            batch = data.to_pixels(images[places]), labels[places]
            return evaluate_step(variables, batch, keys, num_steps)

        self._compiled[kind] = parallel.run_on_devices(batch_step, 4, replicated_out=False)
        return self._compiled[kind]


class Job:
    """Evaluates a run's snapshots that are not evaluated yet, and keeps those worth keeping."""

    def __init__(self, config: ConfigDict, workdir_path: epath.Path, label: str = 'evaluate'):
        """Reads nothing yet: the workdir may be empty still.

        Args:
          config: a validated config.
          workdir_path: the run's.
          label: the run's name in the progress.
        """
        self._config = config
        self._workdir = workdir_path
        self._label = label
        self._settings = {
            name: build.evaluation_settings(config, name) for name in config.eval.attacks
        }
        self._evaluator: Evaluator | None = None
        self._writer: Any = None

    def evaluate_pending(self) -> None:
        """Evaluates every snapshot that lacks one of the config's attacks, the oldest first."""
        snapshots = checkpoints.open_snapshots(self._workdir)
        for step in snapshots.steps():
            done, ledger = self._finished(step)
            if all(name in done for name in self._settings):
                continue
            if self._evaluator is None:
                self._open()
            self._evaluate(step, snapshots, done, ledger)
        self._prune(snapshots)
        snapshots.close()

    def close(self) -> None:
        """Waits until the metrics are written."""
        if self._writer is not None:
            self._writer.flush()
            self._writer.close()
            self._writer = None

    def _open(self) -> None:
        config = self._config
        # Evaluation computes in a type of its own, on whatever devices there are.
        workdir.check_config(self._workdir, config, ignore=('model.dtype',))
        dataset = build.dataset(config)
        workdir.check_data(self._workdir, dataset.fingerprint)
        self._evaluator = Evaluator(config, dataset)
        self._writer = metrics.open_writer(self._workdir / 'eval')
        self._environment = build.environment()

    def _finished(self, step: int) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """Returns a snapshot's results, by attack, and their ledger, as far as they stay valid."""
        path = workdir.evaluation_path(self._workdir, step, '.json')
        ledger_path = workdir.evaluation_path(self._workdir, step, '.npz')
        if not path.exists() or not ledger_path.exists():
            return {}, {}
        done = {result['name']: result for result in workdir.read_json(path)['attacks']}
        for name, settings in self._settings.items():
            if name in done and done[name]['settings'] != settings:
                del done[name]
        return done, workdir.read_arrays(ledger_path)

    def _evaluate(
        self,
        step: int,
        snapshots: checkpoints.Checkpoints,
        done: dict[str, Any],
        ledger: dict[str, np.ndarray],
    ) -> None:
        evaluator = self._evaluator
        variables = snapshots.restore(step, evaluator.init_variables())
        results = {}
        for name, settings in self._settings.items():
            if name in done:
                results[name] = done[name]
                continue
            start = time.monotonic()
            worst, last = evaluator.evaluate(
                variables, settings, label=f'{self._label} step {step} {name}'
            )
            correct = worst > 0
            results[name] = {
                'name': name,
                'n': len(correct),
                'correct': int(np.sum(correct)),
                'accuracy': float(np.mean(correct)),
                'last_iterate_accuracy': float(np.mean(last > 0)),
                'seconds': round(time.monotonic() - start, 3),
                'settings': settings,
                **self._environment,
            }
            ledger |= {f'{name}_correct': correct, f'{name}_margin': worst}
        # Attacks that were asked for at another time stay.
        results |= {name: done[name] for name in done if name not in results}
        ledger['label'] = evaluator.labels
        self._write(step, list(results.values()), ledger)

    def _write(self, step: int, results: list[Any], arrays: Mapping[str, np.ndarray]) -> None:
        record = workdir.read_record(self._workdir)
        content = {
            'system': self._config.system,
            'seed': self._config.seed,
            'step': step,
            'dataset': record['dataset']['name'],
            'fingerprint': record['dataset']['fingerprint'],
            'split': 'test',
            'test_examples': record['dataset']['num_test'],
            'attacks': results,
        }
        # The ledger first: where the .json is, both are.
        workdir.write_arrays(workdir.evaluation_path(self._workdir, step, '.npz'), arrays)
        workdir.write_json(workdir.evaluation_path(self._workdir, step, '.json'), content)
        accuracies = {result['name']: result['accuracy'] for result in results}
        self._writer.write_scalars(step, {f'accuracy/{k}': v for k, v in accuracies.items()})
        shown = ', '.join(f'{name} {value:.3f}' for name, value in accuracies.items())
        logging.info('%s: step %d: %s', self._label, step, shown)

    def _prune(self, snapshots: checkpoints.Checkpoints) -> None:
        """Deletes evaluated snapshots except the last and the best."""
        evaluations = workdir.read_evaluations(self._workdir)
        evaluated = [step for step in snapshots.steps() if step in evaluations]
        if evaluated:
            keep = {evaluated[-1], best_step(evaluations)}
            for step in evaluated:
                if step not in keep:
                    snapshots.delete(step)


def run(config: ConfigDict, workdir_path: epath.Path) -> None:
    """Evaluates every snapshot of a run that is not evaluated yet, and prints the results.

    Raises:
      UserError: if the workdir holds no run or no snapshot, or the data are not the run's.
    """
    if workdir.read_record(workdir_path) is None:
        raise UserError(f'--workdir={workdir_path}: no run is here (no config.json)')
    job = Job(config, workdir_path, label=config.system)
    try:
        job.evaluate_pending()
    finally:
        job.close()
    if not show(workdir_path):
        raise UserError(f'--workdir={workdir_path}: no snapshot to evaluate yet')


def show(workdir_path: epath.Path) -> bool:
    """Prints a run's accuracies, a line for each evaluated step, and returns if there are any."""
    evaluations = workdir.read_evaluations(workdir_path)
    for step, content in evaluations.items():
        shown = '  '.join(f'{r["name"]} {r["accuracy"]:.4f}' for r in content['attacks'])
        print(f'step {step}  n {content["attacks"][0]["n"]}  {shown}')
    return bool(evaluations)


def best_step(evaluations: Mapping[int, Mapping[str, Any]]) -> int:
    """Returns the step with the best IFGSM5 accuracy, the paper's choice; the earliest of equals.

    Where IFGSM5 was never evaluated it is the first attack that was. Steps without are passed over.

    Args:
      evaluations: the content of eval/<step>.json by step, at least one.
    """
    names = [result['name'] for content in evaluations.values() for result in content['attacks']]
    attacked = [name for name in names if name != 'clean'] or names
    chosen = 'ifgsm5' if 'ifgsm5' in names else attacked[0]
    accuracies = {
        step: result['accuracy']
        for step in sorted(evaluations)
        for result in evaluations[step]['attacks']
        if result['name'] == chosen
    }
    return max(accuracies, key=accuracies.get)
