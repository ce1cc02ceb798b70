"""Whole jobs: a run from its first step to its last evaluation, and a study of many runs."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
from absl import logging
from etils import epath
from ml_collections import ConfigDict

from ensadv import systems
from ensadv.errors import ConfigError, TrainingError, UserError
from ensadv.evaluation import any_model, audit, blackbox, decision_planes, evaluate, members
from ensadv.runtime import distributed
from ensadv.storage import workdir
from ensadv.training import train


def run_one(config: ConfigDict, path: epath.Path, label: str) -> None:
    """Trains one run to its end, and evaluates its snapshots on the way if `eval.inline` says so.

    Args:
      config: the run's, resolved.
      path: its workdir.
      label: its name in the progress.
    """
    job = evaluate.Job(config, path, label)
    inline = config.eval.inline
    try:
        if inline:
            job.check()
        train.run(config, path, on_snapshot=job.evaluate_pending if inline else None, label=label)
        if inline:
            job.evaluate_pending(wait=True)
    finally:
        job.close()
        # JAX keeps thousands of programs, which the next run cannot use. On a CPU each takes some
        # of the 65,530 memory mappings that Linux grants a process. XLA crashes when none is left.
        jax.clear_caches()


def run_and_show(config: ConfigDict, path: epath.Path) -> None:
    """Makes one run like `run_one`, and prints its accuracies."""
    config = config.copy_and_resolve_references()
    run_one(config, path, config.system)
    evaluate.show(path)


def draw_planes(config: ConfigDict, path: epath.Path) -> epath.Path:
    """Makes and draws the decision planes of two runs, or of one run's members.

    Returns:
      Their file.
    """
    file = decision_planes.run(config.copy_and_resolve_references(), path)
    if distributed.is_main():
        from ensadv.report import plane_figures  # Matplotlib takes long to import

        plane_figures.draw(file)
    return file


def make_audit(
    config: ConfigDict, path: epath.Path, model: any_model.Source | None = None
) -> epath.Path | None:
    """Audits a workdir's last snapshot, and writes a page on what it found; returns its path.

    Args:
      config: the run's, with this command's changes.
      path: the workdir.
      model: whose it is, where it is no run's.
    """
    if model:
        content = any_model.audit_model(config, path, model)
    else:
        content = audit.run(config, path)
        path = workdir.weights_folder(path, config)
    if not distributed.is_main():
        return None
    from ensadv.report import audit_page

    return audit_page.write(path, content)


def measure_members(
    config: ConfigDict, path: epath.Path, model: any_model.Source | None = None
) -> epath.Path | None:
    """Measures and shows what the members of a run's ensemble do; returns the path of the JSON.

    Args:
      config: the run's, with this command's changes.
      path: the workdir.
      model: whose it is, where it is no run's.

    Raises:
      UserError: if there are no members.
    """
    if model:
        raise UserError(f'{model.name}: a model is one network; --mode=members is for ensembles')
    folder, content = members.run(config, path)
    if not distributed.is_main():
        return None
    from ensadv.report import members as members_report

    return members_report.show(folder, content)


def make_transfer_set(config: ConfigDict, path: epath.Path, systems_dir: epath.Path) -> epath.Path:
    """Makes a transfer set and returns its path; see `blackbox.make`."""
    return blackbox.make(config, path, systems_dir, run_one)


def run(config: ConfigDict, path: epath.Path, systems_dir: epath.Path) -> None:
    """Makes the study's runs, and then a report, even if some runs failed.

    Args:
      config: the study's, validated, with its references unresolved.
      path: the study's workdir.
      systems_dir: configs/.

    Raises:
      UserError: if there is no such system, or its config is not valid.
      TrainingError: at the end, if runs failed.
    """
    report = None
    if distributed.is_main():
        try:
            from ensadv.report import sections  # noqa: F401  Matplotlib is needed at the end
            from ensadv.report import write as report
        except ImportError as error:  # training and evaluation need none of it
            logging.warning(
                'the report needs a package that is missing (%s): pip install -r requirements.txt; '
                'afterwards --mode=report writes it, on any machine',
                error,
            )

    # Mistakes in the systems are reported before the first source is trained.
    run_configs = dict(runs(config, systems_dir))
    seeds = [run_config.seed for run_config in run_configs.values()]
    if 'blackbox' in config.eval.attacks and not config.eval.blackbox_path:
        if config.blackbox.seed in seeds:
            raise ConfigError('blackbox.seed: expected another than those of study.seeds')
        transfer_set = make_transfer_set(config, path / 'blackbox', systems_dir)
        config.eval.blackbox_path = str(transfer_set)
    finished, failures = make_runs(config, path, systems_dir)
    if distributed.agree(report is not None):
        _draw_all_planes(path, finished, run_configs, pairs_of_planes(config, run_configs))
    if config.study.audit:
        _add('audit', finished, run_configs, audit.is_made, make_audit)
    if config.study.members:
        ensembles = [each for each in finished if run_configs[each.name].ensemble.size > 1]
        _add('members', ensembles, run_configs, members.is_made, members.run)
    if report and finished:
        report.write(path)
    if failures:
        reasons = '; '.join(f'{name}: {reason}' for name, reason in failures.items())
        raise TrainingError(f'not in the report: {reasons}')


def _draw_all_planes(
    path: epath.Path,
    finished: Sequence[epath.Path],
    run_configs: Mapping[str, ConfigDict],
    pairs: Sequence[tuple[str, str]],
) -> None:
    for first, second in pairs:
        if not {path / first, path / second} <= set(finished):
            continue
        try:
            with distributed.failing_together():
                run_config = run_configs[first]
                run_config.planes.other = str(path / second)
                draw_planes(run_config, path / first)
        except UserError as error:  # a report without them is still worth having
            logging.error('no decision planes: %s', error)
        jax.clear_caches()


def _add(
    what: str,
    finished: Sequence[epath.Path],
    run_configs: Mapping[str, ConfigDict],
    is_made: Callable[[ConfigDict, epath.Path], bool],
    make: Callable[[ConfigDict, epath.Path], Any],
) -> None:
    """Adds to finished runs what they have not yet."""
    for path in finished:
        try:
            with distributed.failing_together():
                if not distributed.agree(is_made(run_configs[path.name], path)):
                    logging.info('%s: %s', path.name, what)
                    make(run_configs[path.name], path)
        except UserError as error:  # a report without it is still worth having
            logging.error('%s: no %s: %s', path.name, what, error)
        jax.clear_caches()


def runs(config: ConfigDict, systems_dir: epath.Path) -> Iterator[tuple[str, ConfigDict]]:
    """Yields (name, config) of the study's runs: all systems of one seed, then those of the next.

    Args:
      config: the study's, validated, with its references unresolved.
      systems_dir: configs/.

    Raises:
      ConfigError: if there is no such system, or its config is not valid.
    """
    if not config.study.systems:
        raise ConfigError(f'study.systems: names no system; {systems.choices(systems_dir)}')
    for seed in config.study.seeds:
        for name in config.study.systems:
            run_config = systems.make_config(config, name, seed, 'study.systems', systems_dir)
            yield systems.run_name(name, seed), run_config


def pairs_of_planes(
    config: ConfigDict, run_configs: Mapping[str, ConfigDict]
) -> list[tuple[str, str]]:
    """Returns the names of the runs whose decision planes the study draws, of the first seed.

    These are the pair of `study.planes`, and each system of `study.responses` after the first of
    the study's that is trained cleanly and has as many members.

    Args:
      config: the study's.
      run_configs: by the runs' names.
    """
    seed = config.study.seeds[0]
    made = {name: run_configs[systems.run_name(name, seed)] for name in config.study.systems}
    pairs = [tuple(config.study.planes)] if config.study.planes else []
    if missing := set(config.study.planes) - set(made):
        logging.warning(
            'study.planes: no decision planes: not among study.systems: %s',
            ', '.join(sorted(missing)),
        )
        pairs = []
    clean = [name for name, each in made.items() if not each.train.adversarial_weight]
    for name in config.study.responses:
        size = made[name].ensemble.size if name in made else None
        found = [each for each in clean if made[each].ensemble.size == size and each != name]
        if found:
            pairs.append((found[0], name))
        else:
            logging.warning(
                'study.responses: no boundaries of %s: expected it among study.systems, and one '
                'that is trained cleanly and has as many members',
                name,
            )
    return [tuple(systems.run_name(name, seed) for name in pair) for pair in pairs]


def make_runs(
    config: ConfigDict, root: epath.Path, systems_dir: epath.Path
) -> tuple[list[epath.Path], dict[str, str]]:
    """Makes the runs that are not finished yet, each in root/<system>_seed<seed>.

    Args:
      config: the study's, validated, with its references unresolved.
      root: the study's workdir.
      systems_dir: configs/.

    Returns:
      The workdirs of the finished runs, and the reason of each failed one by its name.
    """
    # This makes and checks all configs before the first run begins.
    todo = list(runs(config, systems_dir))
    finished, failures = [], {}
    for number, (name, run_config) in enumerate(todo, start=1):
        label = f'[{number}/{len(todo)}] {name}'
        logging.info('%s', label)
        try:
            with distributed.failing_together():
                run_one(run_config, root / name, label)
        except TrainingError as error:
            # Go on with the others: this one would stop at the same place again.
            logging.error('%s: %s', label, error)
            failures[name] = str(error)
        else:
            finished.append(root / name)
    return finished, failures
