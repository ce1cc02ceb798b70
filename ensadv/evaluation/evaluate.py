"""The evaluation job: every snapshot of a run, or an ensemble of runs, under every attack."""

import contextlib
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from absl import logging
from etils import epath
from ml_collections import ConfigDict

from ensadv import build
from ensadv import config as config_lib
from ensadv.errors import ConfigError, TrainingError, UserError
from ensadv.evaluation import finished_runs
from ensadv.evaluation.pending import View
from ensadv.evaluation.result_files import Evaluated, Unit
from ensadv.evaluation.results import Results
from ensadv.runtime import distributed
from ensadv.storage import checkpoints, files, leases, ledgers, selection, workdir

POLL_SECONDS = 5  # between two looks at what another process does


class Job:
    """Evaluates a run's snapshots, each once, and keeps those worth keeping.

    Any number of commands may do this in one workdir: each takes a lease on what it is at. The
    processes of one command do it together, and process 0 takes the lease for them. Each has a
    view of its own of the workdir, whose files others may see later: what comes of it is agreed on
    before it decides anything.
    """

    def __init__(self, config: ConfigDict, workdir_path: epath.Path, label: str = 'evaluate'):
        """See `Results`."""
        self._config = config
        self._workdir = workdir_path
        self._folder = workdir.weights_folder(workdir_path, config)
        self._results = Results(
            config, self._folder, label, lambda dataset: build.network(config, dataset.describe())
        )
        self._leases = leases.open_leases(self._folder)
        self._looked_for_damage = False
        self._complete: dict[int, Evaluated] = {}  # which need not be read again
        self._damaged: dict[int, checkpoints.DamagedError] = {}  # snapshots

    def evaluate_pending(self, wait: bool = False) -> None:
        """Evaluates every snapshot that lacks one of the config's attacks, the oldest first.

        Once the last one is evaluated, the long attacks follow, and examples to look at.

        Args:
          wait: whether to wait for what other processes are at, and do it should they die.

        Raises:
          TrainingError: where it waits, at the end, if there are damaged snapshots.
        """
        snapshots = checkpoints.open_snapshots(self._workdir)
        if not self._looked_for_damage:
            self._put_aside_damaged(snapshots.steps())
        evaluated = waited = False
        while True:
            view = self._look()
            if not (pending := self._pending(snapshots, view)):
                break
            mine = [self._evaluate(step, units, snapshots) for step, units in pending]
            if any(mine):
                evaluated = True
                continue
            if not wait:
                break
            if not waited:
                for step, _ in pending:
                    holder = self._leases.holder(str(step)) or 'another process'
                    logging.info('%s: waiting: %s is at step %d', self._label, holder, step)
                waited = True
            time.sleep(POLL_SECONDS)
        # Which snapshots stay is decided by the weights that are evaluated in the workdir itself.
        if (evaluated or wait) and self._folder == self._workdir:
            self._prune(snapshots, view)
        snapshots.close()
        if wait and self._damaged:
            raise TrainingError(
                f'not evaluated: {"; ".join(map(str, self._damaged.values()))}. All else is. '
                'Remove what is damaged, and the same command ends well; the last snapshot, once '
                'it is removed, is made again by training from the checkpoint of its step'
            )

    def follow(self) -> None:
        """Evaluates snapshots as training writes them, until the last one is evaluated.

        Raises:
          TrainingError: if training shows no sign of life for config.eval.follow_timeout seconds.
        """
        seen, since = None, time.monotonic()
        while True:
            self.evaluate_pending()
            view = self._look()
            if distributed.agree(view.has_last or view.last_step in self._damaged):
                break
            signs = self._signs_of_life()
            late = time.monotonic() - since > self._config.eval.follow_timeout
            # What is still pending is what another process is at, be it for hours.
            if signs != seen or self._is_pending(view):
                seen, since = signs, time.monotonic()
            elif distributed.agree(late):
                reached = max((step for steps in signs[:2] for step in steps), default=0)
                raise TrainingError(
                    f'no new checkpoint or snapshot in {self._workdir} for '
                    f'{self._config.eval.follow_timeout:g} s (eval.follow_timeout): training is '
                    f'at step {reached} of {view.last_step}, and stands still. What is there is '
                    'evaluated; start training, and then this'
                )
            time.sleep(POLL_SECONDS)
        self.evaluate_pending(wait=True)

    def check(self) -> None:
        """See `Results.check`."""
        self._results.check()

    def close(self) -> None:
        """Waits until the metrics are written, and gives leases back."""
        self._leases.close()
        self._results.close()

    @property
    def _label(self) -> str:
        return self._results.label

    def _look(self) -> View:
        """Returns how the workdir is now, by this process's view: each file is read once.

        What has all that is asked of every snapshot is not read again by later looks: results are
        added, and never replaced.
        """
        record = workdir.read_record(self._folder)
        config = record['config'] if record else config_lib.to_dict(self._config)
        view = View(
            config,
            self._results.files.read_all(self._complete),
            self._results.units,
            self._results.final_units,
            # By the run's own config or by this one, whichever is later.
            max(self._config.train.steps, config['train']['steps']),
            only_on_last=self._config.eval.long_attacks_on == 'last',
        )
        self._complete = {s: found for s, found in view.evaluated.items() if view.is_done(s)}
        return view

    def _look_again(self, view: View, step: int) -> View:
        """Returns the view with a step's files as they are now; the caller has its claim."""
        self._complete.pop(step, None)
        return view._replace(evaluated={**view.evaluated, step: self._results.files.read(step)})

    def _pending(
        self, snapshots: checkpoints.Checkpoints, view: View
    ) -> list[tuple[int, list[Unit]]]:
        """Returns the snapshots with something to do, and what they should have."""
        steps = [step for step in snapshots.steps() if step not in self._damaged]
        pending, is_final = distributed.agree(view.pending(steps))
        units = view.final_units if is_final else view.units
        return [(step, units) for step in pending]

    def _evaluate(
        self, step: int, units: Sequence[Unit], snapshots: checkpoints.Checkpoints
    ) -> bool:
        """Evaluates a snapshot; returns False if another process is at it."""
        with self._taken(step) as mine:
            self._complete.pop(step, None)
            # It may have been done, and even deleted, since it was found to be pending.
            if mine and step in snapshots.steps():
                try:
                    self._results.evaluate(
                        step,
                        units,
                        lambda network: finished_runs.restore(
                            snapshots, step, self._config, network
                        ),
                    )
                except checkpoints.DamagedError as error:
                    logging.error('%s: damaged; going on without it', error)
                    self._damaged[step] = error
        return mine

    def _put_aside_damaged(self, snapshots: Sequence[int]) -> None:
        """Has damaged results made again, once: it reads them all."""
        for step in distributed.agree(workdir.evaluated_steps(self._folder)):
            with self._taken(step) as mine:
                if mine and distributed.is_main():
                    self._results.files.put_aside_damaged(step, again=step in snapshots)
        self._looked_for_damage = True

    @contextlib.contextmanager
    def _taken(self, step: int) -> Iterator[bool]:
        """Takes a lease on a snapshot for all processes, and gives whether it was got."""
        with contextlib.ExitStack() as stack:
            main = distributed.is_main()
            yield distributed.agree(main and stack.enter_context(self._leases.taken(str(step))))

    def _is_pending(self, view: View) -> bool:
        snapshots = checkpoints.open_snapshots(self._workdir)
        pending = self._pending(snapshots, view)
        snapshots.close()
        return bool(pending)

    def _signs_of_life(self) -> tuple[Any, ...]:
        """Returns what changes while training goes on."""
        folders = []
        for opened in (
            checkpoints.open_checkpoints(self._workdir, self._config.train.checkpoints_to_keep),
            checkpoints.open_snapshots(self._workdir),
        ):
            folders.append(tuple(opened.steps()))
            opened.close()
        record = workdir.read_record(self._workdir)
        return *folders, distributed.agree(len(record['sessions']) if record else None)

    def _prune(self, snapshots: checkpoints.Checkpoints, view: View) -> None:
        """Deletes snapshots that have all attacks, the run's own too, but for the last and best."""
        keep = distributed.agree(sorted(view.worth_keeping))
        for step in snapshots.steps():
            if step in keep:
                continue
            with self._taken(step) as mine:
                # Another process may have finished it just now, and found it to be the best.
                now = self._look_again(view, step) if mine else view
                done = mine and now.is_done(step) and step not in now.worth_keeping
                if distributed.agree(done) and step in snapshots.steps():
                    snapshots.delete(step)


def run(config: ConfigDict, workdir_path: epath.Path) -> None:
    """Evaluates what is not evaluated yet of a run, or an ensemble of runs, and prints the results.

    Raises:
      UserError: if the workdir holds no run or no snapshot, or the data are not the run's.
      TrainingError: where it follows training, and that stops.
    """
    config = config.copy_and_resolve_references()
    if config.ensemble.members_from:
        run_members(config, workdir_path)
        show(workdir_path)
        return
    if not config.eval.follow and workdir.read_record(workdir_path) is None:
        raise UserError(f'--workdir={workdir_path}: {workdir.no_run(workdir_path)}')
    folder = workdir.weights_folder(workdir_path, config)
    if folder != workdir_path:
        config.system += ', trained weights'
        _describe_folder(config, workdir_path, folder)
    job = Job(config, workdir_path, label=config.system)
    try:
        if config.eval.follow:
            job.follow()
        else:
            job.evaluate_pending(wait=True)
    finally:
        job.close()
    if not show(folder):
        raise UserError(f'--workdir={workdir_path}: no snapshot to evaluate yet')


def _describe_folder(config: ConfigDict, workdir_path: epath.Path, folder: epath.Path) -> None:
    """Writes config.json of other weights than those that a run's eval/ is of."""
    if not distributed.is_main():
        return
    found = workdir.read_record(folder)
    if found and found['config']['train']['steps'] == config.train.steps:
        return
    facts = workdir.read_record(workdir_path)
    session = facts.pop('sessions')[-1] | {'command': sys.argv, **build.environment()}
    del facts['config']
    workdir.write_record(folder, config, facts, session)


def run_members(config: ConfigDict, workdir_path: epath.Path) -> None:
    """Evaluates the ensemble whose members are the runs of config.ensemble.members_from.

    The workdir gets a config.json that tells the runs, and eval/ as a run's has it, with the
    number of the latest of the members' steps.

    Raises:
      UserError: if a member is not a finished run on this data.
    """
    field = 'ensemble.members_from'
    paths = [files.absolute(path.strip()) for path in config.ensemble.members_from.split(',')]
    if len(set(paths)) != len(paths):
        raise ConfigError(f'{field}: expected workdirs, each once, found {list(map(str, paths))}')
    members = [
        finished_runs.find(path, field, config, config.ensemble.members_snapshot) for path in paths
    ]
    config = config.copy_and_resolve_references()
    config.ensemble.members_from = ','.join(map(str, paths))
    config.ensemble.size = len(members)
    config.ensemble.training = 'separate'
    workdir.check_config(workdir_path, config, ignore=('model.dtype',))
    dataset = build.dataset(config)
    for member in members:
        workdir.check_data(member.path, dataset.describe())
    distributed.check_same('the data', dataset.fingerprint)
    description = build.describe_data(config, dataset)
    workdir.check_data(workdir_path, description)
    facts = {
        'dataset': description,
        'parameters': sum(member.record['parameters'] for member in members),
        'members': [member.describe() for member in members],
    }
    _check_members(workdir_path, facts['members'])
    step = max(member.step for member in members)
    network, variables = finished_runs.load(
        members, combine=config.ensemble.combine, dtype=config.eval.dtype
    )
    results = Results(config, workdir_path, config.system, lambda _: network)
    evaluate_once(config, workdir_path, results, step, facts, variables)


def evaluate_once(
    config: ConfigDict,
    workdir_path: epath.Path,
    results: Results,
    step: int,
    facts: Mapping[str, Any],
    variables: Any,
) -> None:
    """Evaluates what was not trained in its workdir, all attacks at once, and closes the results.

    It has this one snapshot, its best and its last.

    Args:
      config: what config.json is to have, if the workdir is new.
      workdir_path: where `results` are.
      results: of this workdir.
      step: under which they stand.
      facts: of config.json, see `workdir.write_record`.
      variables: the network's, replicated.

    Raises:
      UserError: if another process is at it.
    """
    units = [*results.units, *results.final_units]
    with contextlib.ExitStack() as stack:
        lease = leases.open_leases(workdir_path).taken(str(step))
        if not distributed.agree(distributed.is_main() and stack.enter_context(lease)):
            raise UserError(f'--workdir={workdir_path}: another process is evaluating this')
        if distributed.is_main() and results.files.read(step).missing(units):
            session = {'step': step, **build.environment(), 'command': sys.argv}
            # As of a run that was trained, the config stays that of its beginning.
            is_new = workdir.read_record(workdir_path) is None
            workdir.write_record(workdir_path, config if is_new else None, facts, session)
        distributed.check_shared(workdir_path / 'config.json')
        try:
            results.evaluate(step, units, lambda _: variables)
        finally:
            results.close()


def _check_members(workdir_path: epath.Path, members: Sequence[Mapping[str, Any]]) -> None:
    """Refuses a workdir whose results are of other snapshots of these runs."""
    record = workdir.read_record(workdir_path)
    found = [member['step'] for member in record['members']] if record else []
    steps = [member['step'] for member in members]
    if record and found != steps:
        raise UserError(
            f"--workdir={workdir_path}: is of the members' snapshots of steps {found}, and now "
            f'they are {steps}; use another workdir'
        )


def show(workdir_path: epath.Path) -> bool:
    """Prints a run's accuracies, a line for each evaluated step, and returns if there are any."""
    evaluations = workdir.read_evaluations(workdir_path) if distributed.is_main() else {}
    for step, content in evaluations.items():
        n = max(result['n'] for result in content['attacks'])
        found = {'robust': _robust(workdir_path, step, content)}
        found |= {selection.ledger_key(result): result for result in content['attacks']}
        shown = '  '.join(_accuracy(key, result, n) for key, result in found.items() if result)
        print(f'step {step}  n {n}  {shown}')
    return distributed.agree(bool(evaluations))


def _accuracy(key: str, result: Mapping[str, Any], n: int) -> str:
    of_fewer = f' (n {result["n"]})' if result['n'] < n else ''
    return f'{key} {result["accuracy"]:.4f}{of_fewer}'


def _robust(workdir_path: epath.Path, step: int, content: Mapping[str, Any]) -> Any:
    """Returns a step's robust accuracy, which older results lack; None where it is not known."""
    if 'robust' not in content:
        with contextlib.suppress(UserError):
            ledger = workdir.read_ledger(workdir.evaluation_path(workdir_path, step, '.npz'))
            return ledgers.robust(content['attacks'], ledger)
    return content.get('robust')
