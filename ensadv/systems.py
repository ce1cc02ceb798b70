"""Systems: the files in configs/ whose runs make up a study or the sources of a transfer set."""

import copy
import importlib
from collections.abc import Callable

from etils import epath
from ml_collections import ConfigDict

from ensadv import architectures, config_checks, values
from ensadv import config as config_lib
from ensadv.errors import ConfigError
from ensadv.values import nearest

RunOne = Callable[[ConfigDict, epath.Path, str], None]  # of config, workdir and label
_COMMON = (('probs', 'joint'), ('logits', 'joint'))  # combine and training that a base may set


def names(systems_dir: epath.Path) -> list[str]:
    """Returns the names of all systems in configs/: its files that define the function `system`."""
    files = systems_dir.glob('*.py')
    return sorted(path.stem for path in files if '\ndef system(' in path.read_text())


def choices(systems_dir: epath.Path) -> str:
    """Returns the part of an error message that lists all systems."""
    return f'there are: {", ".join(names(systems_dir))}'


def run_name(name: str, seed: int) -> str:
    """Returns the name of a run's directory, for example 'ensemble2adv_seed1'."""
    return f'{name}_seed{seed}'


def make_config(
    config: ConfigDict, name: str, seed: int, field: str, systems_dir: epath.Path
) -> ConfigDict:
    """Returns a run's config, resolved: the common base, changed by the system's file.

    The function `system` in configs/<name>.py makes the changes.

    Args:
      config: the common base, with its references unresolved.
      name: the system's.
      seed: the run's.
      field: the config field that names the system, for errors.
      systems_dir: configs/, whose systems an error lists.

    Raises:
      ConfigError: if there is no such system, or its config is not valid.
    """
    # The base must not set what makes a system what its name says.
    is_own = architectures.own(config.model.name)
    if not (is_own or config.model.name == 'wide_resnet') or config.ensemble.size != 1:
        raise ConfigError(f'model.name, ensemble.size: set by the systems of {field}, not for them')
    if (config.ensemble.combine, config.ensemble.training) not in _COMMON:
        raise ConfigError(
            f'ensemble.combine, ensemble.training: set by the systems of {field}, not for them, '
            'but for the mean of probs or logits'
        )
    if not config.train.adversarial_weight:
        raise ConfigError(f'train.adversarial_weight: 0 is for the systems of {field} to set')
    allowed = names(systems_dir)
    if name not in allowed:
        raise ConfigError(
            f"{field}: unknown '{name}'{nearest(name, allowed)}; {choices(systems_dir)}"
        )
    run_config = copy.deepcopy(config)
    importlib.import_module(f'configs.{name}').system(run_config)
    sizes = [(each.model.depth, each.model.width) for each in (config, run_config)]
    if is_own and architectures.own(run_config.model.name) and sizes[0] != sizes[1]:
        raise ConfigError(
            f'{field}: {name} is {name} by model.depth and model.width, which a network of your '
            f'own (model.name={values.shown(config.model.name)}) does not have'
        )
    run_config.seed = seed
    run_config = run_config.copy_and_resolve_references()
    config_checks.validate(run_config)
    config_lib.keep_network(run_config)
    return run_config
