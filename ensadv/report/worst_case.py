"""The worst case over an attack's settings, and over all attacks: nothing may fool an example.

One loss may find what another misses, and for each network another one. So what is judged is not
the attack with the settings that were best on average, but all of them together.
"""

import contextlib
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ensadv.errors import UserError
from ensadv.report import comparison
from ensadv.report.run import Run, by_name, name_of
from ensadv.storage import ledgers, selection

WORST = 'worst case'  # in labels
ROBUST = 'robust'  # what takes the place of a label for robust accuracy


def is_worst(label: str) -> bool:
    """Returns whether a label is that of a worst case."""
    return label == f'{name_of(label)} {WORST}'


def add(runs: Sequence[Run]) -> list[Run]:
    """Returns the runs with a further result for each attack of which all have several settings.

    It is made from the ledgers of the last and the best step, of the settings that all runs have at
    their last step. Where a ledger is not that of the results, there is none.
    """
    labels = runs[0].labels.values() if runs else ()
    shared = [a for a in labels if all(a in run.attacks(run.steps) for run in runs)]
    groups = {name: mine for name, mine in by_name(shared).items() if len(mine) > 1}
    return [_with_worst(run, groups) for run in runs]


def _with_worst(run: Run, groups: Mapping[str, Sequence[str]]) -> Run:
    worst: dict[int, dict[str, Mapping[str, Any]]] = {}
    for step in run.judged_steps:
        there = run.attacks(step)
        for name, labels in groups.items():
            if all(label in there for label in labels):
                with contextlib.suppress(UserError):
                    result = _worst([there[label] for label in labels], run.ledger_at(step))
                    worst.setdefault(step, {})[f'{name} {WORST}'] = result
    return dataclasses.replace(run, worst=worst)


def _worst(parts: Sequence[Mapping[str, Any]], ledger: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Returns a result as of an attack that tries all of these.

    Raises:
      UserError: if the ledger is not that of the results.
    """
    for part in parts:
        check(part, ledger)
    keys = [selection.ledger_key(part) for part in parts]
    first = parts[0]
    result = {
        **first,
        'parts': keys,
        'settings': {
            field: value
            for field, value in first['settings'].items()
            if all(part['settings'].get(field) == value for part in parts)
        },
        # Of the last iterates nobody knows which example each is of.
        'last_iterate_accuracy': None,
    }
    if 'curve' in first:
        result['curve'] = {'steps': [], 'accuracy': [], 'iterate_accuracy': [], 'iterate_n': 0}
        result['last_iterate_n'] = 0
    right = correct(result, ledger)
    return result | {
        'n': len(right),
        'correct': int(np.sum(right)),
        'accuracy': float(np.mean(right)),
        'no_gradient': int(np.sum(ledgers.stands(ledger, keys) & ~right)),
    }


def robust(
    runs: Sequence[Run], steps: Mapping[Run, int | None]
) -> tuple[list[str], dict[Run, Mapping[str, Any]]]:
    """Returns the runs' robust accuracies over the attacks that all of them have.

    Args:
      runs: of one table.
      steps: of each run the snapshot's; a run without one is left out.

    Returns:
      The labels of those attacks; none if none attacks anything. And by run what `ledgers.robust`
      gives, where the ledger is that of the results.
    """
    there = {
        run: {label: r for label, r in run.attacks(steps[run]).items() if 'parts' not in r}
        for run in runs
        if steps[run] is not None
    }
    first = next(iter(there.values()), ())
    shared = [label for label in first if all(label in mine for mine in there.values())]
    found = {}
    for run, mine in there.items():
        with contextlib.suppress(UserError):
            ledger = run.ledger_at(steps[run])
            for label in shared:
                check(mine[label], ledger)
            if result := ledgers.robust([mine[label] for label in shared], ledger):
                found[run] = result
    return shared, found


def correct(result: Mapping[str, Any], ledger: Mapping[str, np.ndarray]) -> np.ndarray:
    """Returns which examples a result counts as correct, bool [n].

    In the worst case those that nothing fooled, and that some settings found a gradient for.
    """
    if 'parts' not in result:
        return ledger[f'{selection.ledger_key(result)}_correct']
    return ledgers.correct(ledger, result['parts'], result['parts'])


def check(result: Mapping[str, Any], ledger: Mapping[str, np.ndarray]) -> None:
    """Raises UserError if a ledger is not that of a result which a run has written."""
    key = selection.ledger_key(result)
    found = ledger.get(f'{key}_correct')
    counts = (result['n'], result['correct'])
    fits = found is not None and (len(found), int(np.sum(found))) == counts
    fits &= comparison.settings_of(ledger, key) in (None, result['settings'])
    if not fits or len(found) != comparison.examples_of(ledger, key):
        raise UserError(f'its ledger and its results differ in {key}')
