"""Accuracy over training as a table, and as a CSV of all evaluations."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ensadv.report.collect import Collection
from ensadv.report.table1 import attack_name
from ensadv.report.tables import Row, Table

_SHOWN = 6  # steps at most


class CsvRow(NamedTuple):
    """One attack on one snapshot."""

    system: str
    seed: str
    step: int
    attack: str
    accuracy: float
    last_iterate_accuracy: float | None
    n: int


def csv_rows(collection: Collection) -> list[CsvRow]:
    """Returns all that the runs' snapshots have of the attacks of `collection.over_training`."""
    return [
        CsvRow(
            run.system,
            run.seed,
            step,
            attack,
            result['accuracy'],
            result.get('last_iterate_accuracy'),
            result['n'],
        )
        for run in collection.runs
        for step in sorted(run.evaluations)
        for attack, result in run.attacks(step).items()
        if attack in collection.over_training
    ]


def table(collection: Collection, attacks: Sequence[str]) -> Table | None:
    """Returns the means over seeds at steps that all runs have; None of fewer than two steps.

    Args:
      collection: the runs.
      attacks: whose accuracy is shown, of `collection.over_training`.
    """
    runs = [run for run in collection.runs if not run.model]
    found = [{s for s in r.evaluations if all(a in r.attacks(s) for a in attacks)} for r in runs]
    steps = sorted(set.intersection(*found)) if found else []
    if len(steps) < 2:
        return None
    places = np.linspace(0, len(steps) - 1, min(_SHOWN, len(steps))).round().astype(int)
    steps = [steps[place] for place in places]
    rows = []
    for system, mine in collection.systems.items():
        for attack in attacks if mine[0] in runs else ():
            means = [np.mean([run.attacks(s)[attack]['accuracy'] for run in mine]) for s in steps]
            rows.append(
                Row((system, attack_name(attack), *(f'{100 * mean:.1f}' for mean in means)))
            )
    return Table(
        'over_training',
        'Accuracy over training',
        ('system', 'attack', *(f'step {step:,}' for step in steps)),
        tuple(rows),
        ('Accuracy in %, mean over the seeds, at the worst iterate; no outlier is replaced.',),
    )
