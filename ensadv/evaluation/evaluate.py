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
from ensadv.attacks import registry
from ensadv.errors import ConfigError, TrainingError, UserError
from ensadv.evaluation import finished_runs
from ensadv.evaluation.results import Results, Unit
from ensadv.runtime import distributed
from ensadv.storage import checkpoints, files, leases, selection, workdir

POLL_SECONDS = 5  # between two looks at what another process does


class Job:
    """Evaluates a run's snapshots, each once, and keeps those worth keeping.

    Any number of commands may do this in one workdir: each takes a lease on what it is at. The
    processes of one command do it together, and process 0 takes the lease for them. Methods that
    say "by this process's view" read the workdir, whose files others may see later: what comes of
    it is agreed on before it decides anything.
    """

    def __init__(self, config: ConfigDict, workdir_path: epath.Path, label: str = 'evaluate'):
        """See `Results`."""
        self._config = config
        self._workdir = workdir_path
        self._results = Results(
            config, workdir_path, label, lambda dataset: build.network(config, dataset.describe())
        )
        self._leases = leases.open_leases(workdir_path)
        self._looked_for_damage = False
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
        while pending := self._pending(snapshots):
            if any(self._evaluate(step, units, snapshots) for step, units in pending):
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
        # It reads all results, too much for each look at a trainer.
        if evaluated or wait:
            self._prune(snapshots)
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
            if distributed.agree(self._has_last() or self._goal() in self._damaged):
                break
            signs = self._signs_of_life()
            late = time.monotonic() - since > self._config.eval.follow_timeout
            # What is still pending is what another process is at, be it for hours.
            if signs != seen or self._is_pending():
                seen, since = signs, time.monotonic()
            elif distributed.agree(late):
                reached = max((step for steps in signs[:2] for step in steps), default=0)
                raise TrainingError(
                    f'no new checkpoint or snapshot in {self._workdir} for '
                    f'{self._config.eval.follow_timeout:g} s (eval.follow_timeout): training is '
                    f'at step {reached} of {self._goal()}, and stands still. What is there is '
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

    def _pending(self, snapshots: checkpoints.Checkpoints) -> list[tuple[int, list[Unit]]]:
        """Returns the snapshots with something to do, and what they should have."""
        units, final = self._results.units, self._results.final_units
        pending, is_final = distributed.agree(self._pending_by_view(snapshots.steps()))
        return [(step, final if is_final else units) for step in pending]

    def _pending_by_view(self, steps: Sequence[int]) -> tuple[list[int], bool]:
        """Returns, by this process's view, which steps have something to do, and if the last."""
        units, final = self._results.units, self._results.final_units
        steps = [step for step in steps if step not in self._damaged]
        pending = [step for step in steps if self._results.missing(step, units)]
        if pending or not final or not self._has_last():
            return pending, False
        wanted = [step for step in self._worth_keeping() if step in steps]
        return [step for step in wanted if self._results.missing(step, final)], True

    def _evaluate(
        self, step: int, units: Sequence[Unit], snapshots: checkpoints.Checkpoints
    ) -> bool:
        """Evaluates a snapshot; returns False if another process is at it."""
        with self._taken(step) as mine:
            # It may have been done, and even deleted, since it was found to be pending.
            if mine and step in snapshots.steps():
                try:
                    self._results.evaluate(
                        step, units, lambda network: snapshots.restore(step, network.variables)
                    )
                except checkpoints.DamagedError as error:
                    logging.error('%s: damaged; going on without it', error)
                    self._damaged[step] = error
        return mine

    def _put_aside_damaged(self, snapshots: Sequence[int]) -> None:
        """Has damaged results made again, once: it reads them all."""
        for step in distributed.agree(workdir.evaluated_steps(self._workdir)):
            with self._taken(step) as mine:
                if mine and distributed.is_main():
                    self._results.put_aside_damaged(step, again=step in snapshots)
        self._looked_for_damage = True

    @contextlib.contextmanager
    def _taken(self, step: int) -> Iterator[bool]:
        """Takes a lease on a snapshot for all processes, and gives whether it was got."""
        with contextlib.ExitStack() as stack:
            main = distributed.is_main()
            yield distributed.agree(main and stack.enter_context(self._leases.taken(str(step))))

    def _goal(self) -> int:
        """Returns the run's last step, by its own config or by this one, whichever is later.

        By this process's view.
        """
        record = workdir.read_record(self._workdir)
        mine = self._config.train.steps
        return max(mine, record['config']['train']['steps']) if record else mine

    def _has_last(self) -> bool:
        """Returns whether the snapshot of the run's last step has all attacks but the long ones.

        By this process's view.
        """
        return not self._results.missing(self._goal(), self._results.units)

    def _is_pending(self) -> bool:
        snapshots = checkpoints.open_snapshots(self._workdir)
        pending = self._pending(snapshots)
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

    def _worth_keeping(self) -> set[int]:
        """Returns the best and the last of the steps that have all attacks as they are set now.

        What has others is no rival: another process may be at it. By this process's view.
        """
        evaluations = {
            step: content
            for step, content in workdir.read_evaluations(self._workdir).items()
            if not self._results.missing(step, self._results.units)
        }
        attack = selection.selection_attack(self._wanted_by_run())
        best = selection.best_step(evaluations, attack, self._config_of_run())
        return {step for step in (best, max(evaluations, default=None)) if step is not None}

    def _config_of_run(self) -> Mapping[str, Any]:
        """Returns the run's own config, which may ask for other attacks than this job's."""
        record = workdir.read_record(self._workdir)
        return record['config'] if record else config_lib.to_dict(self._config)

    def _wanted_by_run(self) -> tuple[str, ...]:
        """Returns the attacks that the run itself asks for."""
        return registry.names(self._config_of_run()['eval'])

    def _is_done(self, step: int) -> bool:
        """Returns whether nobody needs the snapshot for an attack on every snapshot any more.

        The run's own have to be there with its own settings. By this process's view.
        """
        config, wanted = self._config_of_run(), self._wanted_by_run()
        units = [(name, 'test') for name in wanted]
        if config['eval']['select_on'] == 'validation':
            units.append((selection.selection_attack(wanted), 'validation'))
        return not self._results.missing(step, self._results.units) and all(
            self._results.has_configured(step, *unit, config) for unit in units
        )

    def _prune(self, snapshots: checkpoints.Checkpoints) -> None:
        """Deletes snapshots that have all attacks, the run's own too, but for the last and best."""
        keep = distributed.agree(sorted(self._worth_keeping()))
        for step in snapshots.steps():
            if step in keep:
                continue
            with self._taken(step) as mine:
                # Another process may have finished it just now, and found it to be the best.
                done = mine and self._is_done(step) and step not in self._worth_keeping()
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
    job = Job(config, workdir_path, label=config.system)
    try:
        if config.eval.follow:
            job.follow()
        else:
            job.evaluate_pending(wait=True)
    finally:
        job.close()
    if not show(workdir_path):
        raise UserError(f'--workdir={workdir_path}: no snapshot to evaluate yet')


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
    # An ensemble of runs has this one snapshot, its best and its last.
    units = [*results.units, *results.final_units]
    with contextlib.ExitStack() as stack:
        lease = leases.open_leases(workdir_path).taken(str(step))
        if not distributed.agree(distributed.is_main() and stack.enter_context(lease)):
            raise UserError(f'--workdir={workdir_path}: another process is evaluating this')
        if distributed.is_main() and results.missing(step, units):
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
        shown = '  '.join(
            f'{selection.ledger_key(r)} {r["accuracy"]:.4f}' for r in content['attacks']
        )
        print(f'step {step}  n {content["attacks"][0]["n"]}  {shown}')
    return distributed.agree(bool(evaluations))
