"""The study job: many runs, each a system and a seed."""

import copy
import importlib
from collections.abc import Callable, Iterator

from absl import logging
from etils import epath
from ml_collections import ConfigDict

from ensadv import config as config_lib
from ensadv.config import nearest
from ensadv.errors import ConfigError, TrainingError

RunOne = Callable[[ConfigDict, epath.Path, str], None]  # config, workdir, label
NO_SYSTEMS = ('__init__', 'default', 'quickstart', 'table1')


def runs(config: ConfigDict, systems_dir: epath.Path) -> Iterator[tuple[str, ConfigDict]]:
    """Yields (name, config) of the study's runs, all systems of a seed before the next seed.

    A run's config is the study's with the system's diff on it: the `system` function of
    configs/<name>.py.

    Args:
      config: the study's, validated, with its references unresolved.
      systems_dir: configs/, to name what there is.

    Raises:
      ConfigError: if there is no such system, or its config is not valid.
    """
    known = sorted(path.stem for path in systems_dir.glob('*.py') if path.stem not in NO_SYSTEMS)
    there_are = f'there are: {", ".join(known)}'
    if not config.study.systems:
        raise ConfigError(f'study.systems: names no system; {there_are}')
    # What makes a system what its name says is not for the study to set.
    if config.ensemble.size != 1 or config.ensemble.training != 'joint':
        raise ConfigError(
            'ensemble.size, ensemble.training: set by the systems of a study, not for it'
        )
    if not config.train.adversarial_weight:
        raise ConfigError('train.adversarial_weight: 0 is for the systems of a study to set')
    for seed in config.study.seeds:
        for name in config.study.systems:
            if name not in known:
                raise ConfigError(
                    f"study.systems: unknown '{name}'{nearest(name, known)}; {there_are}"
                )
            run_config = copy.deepcopy(config)
            importlib.import_module(f'configs.{name}').system(run_config)
            run_config.seed = seed
            run_config = run_config.copy_and_resolve_references()
            config_lib.validate(run_config)
            yield f'{name}_seed{seed}', run_config


def run(
    config: ConfigDict, root: epath.Path, systems_dir: epath.Path, run_one: RunOne
) -> tuple[list[epath.Path], dict[str, str]]:
    """Makes the runs that are not finished, each in root/<system>_seed<seed>.

    Args:
      config: the study's, validated, with its references unresolved.
      root: the study's workdir.
      systems_dir: configs/.
      run_one: trains and evaluates one run to its end, at once if it is there already.

    Returns:
      The workdirs of the finished runs, and the reasons of those that could not be, by name.
    """
    # All configs are made, and so checked, before the first run begins.
    todo = list(runs(config, systems_dir))
    finished, failures = [], {}
    for number, (name, run_config) in enumerate(todo, start=1):
        label = f'[{number}/{len(todo)}] {name}'
        logging.info('%s', label)
        try:
            run_one(run_config, root / name, label)
        except TrainingError as error:
            # The others are worth having, and this one would stop at the same place again.
            logging.error('%s: %s', label, error)
            failures[name] = str(error)
        else:
            finished.append(root / name)
    return finished, failures
