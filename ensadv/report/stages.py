"""Attacks in stages: what of each system still stands after each part of them."""

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from ensadv.attacks import registry
from ensadv.report.collect import Collection
from ensadv.report.table1 import attack_name, mean_and_deviation
from ensadv.report.tables import Row, Table


class Part(NamedTuple):
    """What one part of an attack did; the targets of a targeted one are one part.

    Attributes:
      name: the part's, as 'apgd_t'.
      felled: how many examples.
      accuracy: in [0, 1], of what stands after it.
    """

    name: str
    felled: int
    accuracy: float


class CsvRow(NamedTuple):
    """A row of the CSV: a part of an attack on one run."""

    attack: str
    system: str
    seed: str
    part: str
    felled: int
    accuracy: float
    n: int


def parts(result: Mapping[str, Any]) -> list[Part]:
    """Returns the parts of a result of an attack in stages, 'clean' before them."""
    stages = result['stages']
    attacked, n = stages[0]['attacked'], result['n']
    found = [Part('clean', n - attacked, attacked / n)]
    # 'apgd_t 3' goes for the third target, and 'fab restarts' go on with 'fab'.
    for name, group in itertools.groupby(stages, lambda stage: stage['name'].partition(' ')[0]):
        mine = list(group)
        found.append(Part(name, sum(s['felled'] for s in mine), mine[-1]['accuracy']))
    return found


def tables(collection: Collection) -> Iterator[tuple[Table, list[CsvRow]]]:
    """Yields a table of the last snapshots for each attack that has several parts."""
    for attack in collection.attacks:
        by_system = {
            system: [
                (run.seed, result)
                for run in runs
                if (result := run.attacks(run.steps).get(attack)) and result.get('stages')
            ]
            for system, runs in collection.systems.items()
        }
        by_system = {system: found for system, found in by_system.items() if found}
        if any(len(parts(r)) > 2 for found in by_system.values() for _, r in found):
            yield _table(attack, by_system)


def _table(
    attack: str, by_system: Mapping[str, Sequence[tuple[str, Mapping[str, Any]]]]
) -> tuple[Table, list[CsvRow]]:
    """Returns an attack's table and its numbers; `by_system` has seeds and results."""
    rows, csv_rows = [], []
    names: list[str] = []
    for system, found in by_system.items():
        each = [parts(result) for _, result in found]
        names = names or [part.name for part in each[0]]
        columns = list(zip(*each, strict=True))
        cells = [mean_and_deviation([100 * p.accuracy for p in column]) for column in columns]
        felled = [f'{sum(p.felled for p in column):,}' for column in columns]
        rows += [
            Row((system, *cells, str(len(found)))),
            Row(('felled', *felled, ''), 'secondary'),
        ]
        csv_rows += [
            CsvRow(attack, system, seed, *part, result['n'])
            for (seed, result), mine in zip(found, each, strict=True)
            for part in mine
        ]
    n = csv_rows[0].n  # the same for all, by the attack's label
    title = f'{attack_name(attack)} by stage, last snapshots'
    notes = (
        'Accuracy in % after each part, which attacks only what the parts before it left standing; '
        f'n = {n:,} test examples. felled: how many examples fell to it, of all seeds together; '
        'under clean, those that are errors without an attack. The targets of a targeted attack '
        'are one part.',
    )
    header = ('system', *map(_part_name, names), 'seeds')
    name = f'stages_{re.sub("[^a-z0-9]+", "_", attack)}'
    return Table(name, title, header, tuple(rows), notes), csv_rows


def _part_name(name: str) -> str:
    known = name == 'clean' or name in registry.KINDS
    return attack_name(name) if known else name.upper().replace('_', '-')
