"""From config values to the attacks of evaluation."""

from collections.abc import Mapping
from typing import Any

import jax
from ml_collections import ConfigDict

from ensadv import build
from ensadv.attacks import driver
from ensadv.config import parse_attack
from ensadv.errors import ConfigError
from ensadv.evaluation import transfer_sets


def attack_names(config: ConfigDict) -> tuple[str, ...]:
    """Returns the attacks of every snapshot; with a transfer set blackbox is one of them."""
    names = tuple(config.eval.attacks)
    if config.eval.blackbox_path and 'blackbox' not in names:
        names += ('blackbox',)
    return names


def evaluation_settings(config: ConfigDict, name: str) -> dict[str, Any]:
    """Returns all that decides an evaluation attack's outcome, as eval/<step>.json has it.

    Raises:
      UserError: for blackbox, if its transfer set is missing; for eval.indices, see
        `data.read_places`.
    """
    kind, steps = parse_attack(name)
    settings = {'attack': kind, 'combine': config.ensemble.combine, 'dtype': config.eval.dtype}
    if digest := build.indices_digest(config):  # the results of other examples are other results
        settings['indices'] = digest
    if kind == 'clean':
        return settings
    settings['epsilon'] = config.epsilon
    if kind == 'blackbox':
        if not config.eval.blackbox_path:
            raise ConfigError(
                'eval.blackbox_path: needed for the attack blackbox; --mode=blackbox with '
                '--config=configs/blackbox.py makes such a file'
            )
        record = transfer_sets.read_record(config.eval.blackbox_path, config.epsilon)
        # The digest, and not the path, decides the outcome.
        return settings | {'digest': record['digest'], 'share_fooled': record['share_fooled']}
    group = config.eval[kind]
    settings |= {
        'steps': steps,
        'step_size': group.step_size,
        'schedule': group.schedule,
        'start': group.start,
        'sigma': group.sigma,
        'restarts': group.restarts,
        'loss': group.loss,
        'seed': config.eval.seed,
    }
    if name in config.eval.long_attacks:
        settings['iterate_examples'] = config.eval.iterate_examples
    return settings


def attack_step(settings: Mapping[str, Any], num_steps: int | jax.Array) -> Any:
    """Returns the attack's step, for an attack of so many steps (which may be traced)."""
    step_size = driver.schedule(settings['schedule'], settings['step_size'], num_steps)
    return driver.STEPS[settings['attack']](step_size)
