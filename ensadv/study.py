"""The study job: many runs, each a system and a seed."""

from collections.abc import Iterator

from absl import logging
from etils import epath
from ml_collections import ConfigDict

from ensadv import parallel, systems
from ensadv.errors import ConfigError, TrainingError


def runs(config: ConfigDict, systems_dir: epath.Path) -> Iterator[tuple[str, ConfigDict]]:
    """Yields (name, config) of the study's runs, all systems of a seed before the next seed.

    Args:
      config: the study's, validated, with its references unresolved.
      systems_dir: configs/, to name what there is.

    Raises:
      ConfigError: if there is no such system, or its config is not valid.
    """
    if not config.study.systems:
        raise ConfigError(f'study.systems: names no system; {systems.there_are(systems_dir)}')
    for seed in config.study.seeds:
        for name in config.study.systems:
            run_config = systems.make_config(config, name, seed, 'study.systems', systems_dir)
            yield systems.run_name(name, seed), run_config


def pair_of_planes(config: ConfigDict) -> tuple[str, str] | None:
    """Returns the names of the two runs whose decision planes are drawn; None if none are."""
    if not config.study.planes:
        return None
    if missing := set(config.study.planes) - set(config.study.systems):
        logging.warning(
            'study.planes: no decision planes: not among study.systems: %s',
            ', '.join(sorted(missing)),
        )
        return None
    first, second = config.study.planes
    seed = config.study.seeds[0]
    return systems.run_name(first, seed), systems.run_name(second, seed)


def run(
    config: ConfigDict, root: epath.Path, systems_dir: epath.Path, run_one: systems.RunOne
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
            with parallel.failing_together():
                run_one(run_config, root / name, label)
        except TrainingError as error:
            # The others are worth having, and this one would stop at the same place again.
            logging.error('%s: %s', label, error)
            failures[name] = str(error)
        else:
            finished.append(root / name)
    return finished, failures
