"""The members job: why an ensemble is, or is not, more than its members."""

import json
import time
from collections.abc import Mapping
from typing import Any

from absl import logging
from etils import epath
from ml_collections import ConfigDict

from ensadv import build
from ensadv import config as config_lib
from ensadv.attacks import registry
from ensadv.attacks.threat_model import ThreatModel
from ensadv.errors import UserError
from ensadv.evaluation import attack_settings, finished_runs, member_measures, member_statistics
from ensadv.runtime import distributed
from ensadv.storage import member_files, workdir


def run(config: ConfigDict, path: epath.Path) -> tuple[epath.Path, dict[str, Any]]:
    """Measures what the members of a finished run, or of an ensemble of runs, do.

    eval/<step>_members.json has it, and eval/<step>_members.npz each image's part in it. What is
    there already, of the same snapshot and settings, is not made again.

    Args:
      config: the run's, with this command's changes; `members` says how.
      path: the workdir.

    Returns:
      The directory whose eval/ has the files, and the content of the first.

    Raises:
      UserError: if there is no finished run, or it has one member.
    """
    config = config.copy_and_resolve_references()
    record = workdir.read_record(path)
    if record is None:
        raise UserError(f'--workdir={path}: {workdir.no_run(path)}')
    k = _members(record)
    if k == 1:
        raise UserError(
            f'--workdir={path}: {record["config"]["system"]} has one member; --mode=members is for '
            'two or more'
        )
    if not config.epsilon:
        raise UserError('epsilon: expected a number > 0, found 0: there is no attack')
    folder, step = workdir.weights_folder(path, config), _step(record)
    if workdir.read_record(folder) is None:
        raise UserError(f'--workdir={folder}: {workdir.no_run(folder)}; --mode=evaluate makes it')
    found = _made_before(config, folder, record)
    if distributed.agree(found is not None):
        logging.info('%s: made already', member_files.path_of(folder, step))
        return folder, found
    start = time.monotonic()
    opened = finished_runs.open_workdir(config, path)
    settings = _settings(config, record)
    n = settings['n']
    distributed.tell(f'members: attack {build.computation(config, config.eval.dtype)}')
    parts, without = member_measures.parts_of(
        opened.network, opened.variables, k, config.eval.batch_size
    )
    subject = member_measures.Subject(
        parts,
        without,
        opened.images[:n],
        opened.labels[:n],
        opened.places[:n],
        ThreatModel.of(config),
        settings['attacks'],
        config.members.directions,
        config.members.radius,
        config.eval.seed,
    )
    ledger = member_measures.measure(subject)
    content = {
        'system': config.system,
        'step': opened.step,
        'k': k,
        'n': n,
        'places': [int(subject.places[0]), int(subject.places[-1])],
        'settings': settings,
        **member_statistics.content(ledger, list(settings['attacks']), config.epsilon),
        'seconds': round(time.monotonic() - start, 3),
        **build.environment(),
    }
    if distributed.is_main():
        member_files.write(folder, content, ledger)
    return folder, content


def is_made(config: ConfigDict, path: epath.Path) -> bool:
    """Returns whether a run has the measures that its config asks for, of its last snapshot."""
    folder = workdir.weights_folder(path, config)
    return _made_before(config, folder, workdir.read_record(path)) is not None


def _made_before(
    config: ConfigDict, folder: epath.Path, record: Mapping[str, Any]
) -> dict[str, Any] | None:
    """Returns the measures that are there, if they are of the last snapshot and these settings."""
    try:
        found = member_files.read(folder, _step(record))
    except UserError as error:
        logging.warning('%s; it is made anew', error)
        return None
    return found if found and found['settings'] == _settings(config, record) else None


def _members(record: Mapping[str, Any]) -> int:
    return len(record.get('members', ())) or record['config']['ensemble']['size']


def _step(record: Mapping[str, Any]) -> int:
    """Returns the step of the last snapshot, or the last of the members' ones."""
    steps = [member['step'] for member in record.get('members', ())]
    return max(steps, default=record['config']['train']['steps'])


def _settings(config: ConfigDict, record: Mapping[str, Any]) -> dict[str, Any]:
    """Returns all that decides the measures beside the weights, as JSON has it."""
    found = {
        'n': min(
            config.members.examples, len(build.test_places(config, record['dataset']['num_test']))
        ),
        'indices': build.indices_digest(config),
        **ThreatModel.of(config).to_json(),
        'attacks': {
            registry.entry(text).name: _attack_settings(config, text)
            for text in config.members.attacks
        },
        'directions': config.members.directions,
        'radius': config.members.radius,
        'seed': config.eval.seed,
        'combine': config.ensemble.combine,
        'dtype': config.eval.dtype,
        'weights': config_lib.weights(config),
    }
    return json.loads(json.dumps(found))


def _attack_settings(config: ConfigDict, text: str) -> dict[str, Any]:
    """Returns an attack's settings; of one in stages, those of the one stage that it has."""
    found = attack_settings.evaluation_settings(config, text)
    for name in ('iterate_examples', 'examples', 'indices'):
        found.pop(name, None)
    return found | (registry.only_stage(found) if registry.is_staged(text) else {})
