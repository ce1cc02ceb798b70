"""From config values to the attacks of evaluation."""

from typing import Any

from ml_collections import ConfigDict

from ensadv import build
from ensadv.attacks import registry
from ensadv.attacks.threat_model import ThreatModel
from ensadv.errors import ConfigError
from ensadv.evaluation import transfer_sets


def evaluation_settings(config: ConfigDict, name: str) -> dict[str, Any]:
    """Returns all that decides an attack's outcome, as eval/<step>.json has it.

    Args:
      config: the run's.
      name: of one of its attacks; or an entry of its own, as `registry.entry` takes it.

    Raises:
      UserError: for blackbox, if its transfer set is missing; for eval.indices, see
        `datasets.read_places`.
    """
    group = config.eval
    entry = registry.entries(group).get(name) or registry.entry(name)
    found = {'attack': entry.kind, 'combine': config.ensemble.combine, 'dtype': group.dtype}
    if digest := build.indices_digest(config):  # the results of other examples are other results
        found['indices'] = digest
    if entry.kind == 'clean':
        return found
    threat = ThreatModel.of(config)
    found |= threat.to_json()
    if entry.kind == 'blackbox':
        if not group.blackbox_path:
            raise ConfigError(
                'eval.blackbox_path: needed for the attack blackbox; --mode=blackbox with '
                '--config=configs/blackbox.py makes such a file'
            )
        record = transfer_sets.read_record(group.blackbox_path, threat)
        # The digest, and not the path, decides the outcome.
        return found | {'digest': record['digest'], 'share_fooled': record['share_fooled']}
    found |= registry.settings(group, entry, config.epsilon) | {'seed': group.seed}
    if name in map(_name, group.long_attacks) and not registry.is_staged(name):
        found['iterate_examples'] = group.iterate_examples
    return found


def _name(text: str) -> str:
    return registry.entry(text).name
