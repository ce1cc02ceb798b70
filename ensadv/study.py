"""The study job: many runs, each a system and a seed, then one table."""

import importlib
from collections.abc import Callable, Iterator

from absl import logging
from etils import epath
from ml_collections import ConfigDict

from ensadv import config as config_lib
from ensadv import report, workdir
from ensadv.config import nearest
from ensadv.errors import ConfigError, TrainingError

RunOne = Callable[[ConfigDict, epath.Path, str], None]  # config, workdir, label


def runs(config: ConfigDict, systems_dir: epath.Path) -> Iterator[tuple[str, ConfigDict]]:
    """Yields (name, config) of the study's runs, all systems of a seed before the next seed.

    A run's config is the study's with the system's diff on it: the `system` function of
    configs/<name>.py.

    Args:
      config: the study's, validated.
      systems_dir: configs/, to name what there is.

    Raises:
      ConfigError: if there is no such system, or its config is not valid.
    """
    known = sorted(
        path.stem
        for path in systems_dir.glob('*.py')
        if path.stem not in ('__init__', 'default', 'quickstart', 'table1')
    )
    if not config.study.systems:
        raise ConfigError(f'study.systems: names no system; there are: {", ".join(known)}')
    for seed in config.study.seeds:
        for name in config.study.systems:
            if name not in known:
                raise ConfigError(
                    f"study.systems: unknown '{name}'{nearest(name, known)}; "
                    f'there are: {", ".join(known)}'
                )
            run_config = config.copy_and_resolve_references()
            importlib.import_module(f'configs.{name}').system(run_config)
            run_config.seed = seed
            config_lib.validate(run_config)
            yield f'{name}_seed{seed}', run_config


def run(config: ConfigDict, root: epath.Path, systems_dir: epath.Path, run_one: RunOne) -> None:
    """Makes the runs that are not finished, each in root/<system>_seed<seed>, and prints the table.

    Args:
      config: the study's, validated.
      root: the study's workdir.
      systems_dir: configs/.
      run_one: trains and evaluates one run to its end, at once if it is there already.

    Raises:
      TrainingError: at the end, if runs could not be finished.
    """
    # All configs are made, and so checked, before the first run begins.
    todo = list(runs(config, systems_dir))
    failures: dict[str, str] = {}
    for number, (name, run_config) in enumerate(todo, start=1):
        label = f'[{number}/{len(todo)}] {name}'
        logging.info('%s', label)
        try:
            run_one(run_config, root / name, label)
        except TrainingError as error:
            # The others are worth having, and this one would stop at the same place again.
            logging.error('%s: %s', label, error)
            failures[name] = str(error)
    finished = [report.read_run(root / name) for name, _ in todo if name not in failures]
    text = report.table([result for result in finished if result is not None])
    path = root / 'table.md'
    workdir.write_bytes(path, text.encode())
    print(f'\n{text}\nWritten to {path}')
    if failures:
        reasons = '; '.join(f'{name}: {reason}' for name, reason in failures.items())
        raise TrainingError(f'not in the table: {reasons}')
