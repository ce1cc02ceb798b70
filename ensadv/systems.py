"""Systems: the files of configs/ that a study, or a transfer set, makes runs of."""

import copy
import importlib
from collections.abc import Callable

from etils import epath
from ml_collections import ConfigDict

from ensadv import config as config_lib
from ensadv.errors import ConfigError
from ensadv.values import nearest

RunOne = Callable[[ConfigDict, epath.Path, str], None]  # config, workdir, label
_COMMON = (('probs', 'joint'), ('logits', 'joint'))  # combine and training of all systems
NO_SYSTEMS = ('__init__', 'blackbox', 'default', 'quickstart', 'small', 'table1')


def known(systems_dir: epath.Path) -> list[str]:
    """Returns the names of all systems in configs/."""
    return sorted(path.stem for path in systems_dir.glob('*.py') if path.stem not in NO_SYSTEMS)


def there_are(systems_dir: epath.Path) -> str:
    """Returns the names of all systems, for messages."""
    return f'there are: {", ".join(known(systems_dir))}'


def run_name(name: str, seed: int) -> str:
    """Returns the directory of a system's run: 'ensemble2adv_seed1'."""
    return f'{name}_seed{seed}'


def make_config(
    config: ConfigDict, name: str, seed: int, field: str, systems_dir: epath.Path
) -> ConfigDict:
    """Returns a run's config, resolved: the common base with the system's diff on it.

    The diff is the `system` function of configs/<name>.py.

    Args:
      config: the common base, with its references unresolved.
      name: the system's.
      seed: the run's.
      field: that named it, for errors.
      systems_dir: configs/, to name what there is.

    Raises:
      ConfigError: if there is no such system, or its config is not valid.
    """
    # What makes a system what its name says is not for the base to set.
    if (config.model.name, config.ensemble.size) != ('wide_resnet', 1):
        raise ConfigError(f'model.name, ensemble.size: set by the systems of {field}, not for them')
    if (config.ensemble.combine, config.ensemble.training) not in _COMMON:
        raise ConfigError(
            f'ensemble.combine, ensemble.training: set by the systems of {field}, not for them, '
            'but for the mean of probs or logits'
        )
    if not config.train.adversarial_weight:
        raise ConfigError(f'train.adversarial_weight: 0 is for the systems of {field} to set')
    names = known(systems_dir)
    if name not in names:
        raise ConfigError(
            f"{field}: unknown '{name}'{nearest(name, names)}; {there_are(systems_dir)}"
        )
    run_config = copy.deepcopy(config)
    importlib.import_module(f'configs.{name}').system(run_config)
    run_config.seed = seed
    run_config = run_config.copy_and_resolve_references()
    config_lib.validate(run_config)
    return run_config
