"""The audit job: whether what eval/ says of a workdir's last snapshot can be believed."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from absl import logging
from etils import epath
from ml_collections import ConfigDict

from ensadv import build
from ensadv.attacks.threat_model import ThreatModel
from ensadv.errors import UserError
from ensadv.evaluation import audit_attacks, audit_checks, finished_runs
from ensadv.evaluation.audit_checks import Check, Subject
from ensadv.evaluation.evaluator import Evaluator
from ensadv.models import ensemble
from ensadv.runtime import distributed
from ensadv.storage import audits, ledgers, selection, workdir


def run(config: ConfigDict, path: epath.Path) -> dict[str, Any]:
    """Audits the last snapshot of a finished run, or an ensemble of runs, and shows what it found.

    eval/<step>_audit.json has it; an earlier audit's is replaced.

    Args:
      config: the run's, with this command's changes; `audit` says on how many images.
      path: the workdir.

    Returns:
      The content of that file.

    Raises:
      UserError: if nothing there can be audited.
    """
    config = config.copy_and_resolve_references()
    found = finished_runs.open_workdir(config, path)
    return audit_network(
        config,
        workdir.weights_folder(path, config),
        found.network,
        found.variables,
        found.step,
        (found.images, found.labels),
        found.places,
    )


def is_made(config: ConfigDict, path: epath.Path) -> bool:
    """Returns whether a run has an audit of the attacks that it has by now."""
    step = config.train.steps
    try:
        content = audits.read(path, step)
    except UserError:  # damaged
        return False
    results = workdir.read_evaluations(path).get(step, {'attacks': []})['attacks']
    return content is not None and audits.is_current(content, results)


def audit_network(
    config: ConfigDict,
    path: epath.Path,
    network: ensemble.Network,
    variables: Any,
    step: int,
    split: tuple[np.ndarray, np.ndarray],
    places: np.ndarray,
) -> dict[str, Any]:
    """Audits a network whose results are in a workdir, writes what it found and shows it.

    Args:
      config: has `audit`, `eval`, `epsilon` and `norm`.
      path: the workdir.
      network: what is audited.
      variables: its weights, replicated.
      step: whose results are audited.
      split: the images and labels that they are of.
      places: of these in the test split.

    Returns:
      The content of eval/<step>_audit.json.

    Raises:
      UserError: if there are no results of an attack.
    """
    results = workdir.read_evaluations(path).get(step, {'attacks': []})['attacks']
    if not any(result['name'] != 'clean' for result in results):
        raise UserError(
            f'--workdir={path}: no attack on step {step} to audit yet; --mode=evaluate makes some'
        )
    ledger = workdir.read_ledger(workdir.evaluation_path(path, step, '.npz'))
    stands = [ledger[f'{selection.ledger_key(result)}_margin'] > 0 for result in results]
    n = min(config.audit.examples, *map(len, stands))
    stands = np.stack([found[:n] for found in stands])
    subject = Subject(
        Evaluator(network, config.eval.batch_size),
        variables,
        split[0][:n],
        split[1][:n],
        places[:n],
        ThreatModel.of(config),
        results,
        stands,
        config.eval.seed,
    )
    tell = lambda check: distributed.tell(f'audit: {check.name}: {check.verdict}. {check.evidence}')
    checks, standing = make(subject, tell)
    content = {
        'system': config.system,
        'step': step,
        'n': n,
        'places': [int(places[0]), int(places[n - 1])],
        'attacks': [selection.ledger_key(result) for result in results],
        'reported': float(np.mean(ledgers.robust_examples(results, ledger)[:n])),
        'found': float(np.mean(standing)),
        'settings': subject.settings(),
        'checks': [dataclasses.asdict(check) for check in checks],
        **build.environment(),
    }
    if distributed.is_main():
        audits.write(path, content)
    logging.info('audit: %s', audits.verdict(content))
    return content


def make(
    subject: Subject, tell: Callable[[Check], None] = lambda check: None
) -> tuple[list[Check], np.ndarray]:
    """Makes all checks.

    Args:
      subject: what is audited, of at least one image.
      tell: called with each check as soon as it is made.

    Returns:
      The checks, and which images stood under the audit's own attacks, too, bool [n].
    """
    further = audit_attacks.FurtherAttacks(subject, subject.standing)
    checks = []
    for check in _checks(subject, further):
        tell(check)
        checks.append(check)
    return checks, further.standing


def _checks(subject: Subject, further: audit_attacks.FurtherAttacks) -> Iterator[Check]:
    yield from audit_checks.check_network(subject)
    clean = subject.log_probs(audit_checks.pixels(subject)).argmax(-1) == subject.labels
    yield audit_attacks.check_noise(subject, clean)
    yield audit_attacks.check_rounding(subject, clean)
    yield from audit_attacks.check_attacks(subject, further)
    yield audit_attacks.check_large_epsilon(subject, clean)
