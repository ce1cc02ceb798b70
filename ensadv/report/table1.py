"""The paper's Table 1, by its rules, and a table of the last snapshots."""

import collections
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from ensadv.attacks import registry
from ensadv.report import analysis, audit_page, paper, worst_case
from ensadv.report.collect import Collection, strongest
from ensadv.report.run import Run, by_name, name_of
from ensadv.report.tables import Row, Table

LAST_EVALUATIONS = 10  # that Table 1a averages
WINDOW = 50  # evaluations in the rolling median, as in the paper
MISSING = '-'
CsvRow = collections.namedtuple(
    'CsvRow',
    'table system seed attack reading accuracy standard_deviation lowest highest seeds n '
    'evaluations step no_gradient',
    defaults=[None] * 8,
)


class Value(NamedTuple):
    """What one run brings to a cell."""

    accuracy: float  # at the worst iterate, in [0, 1]
    last: float  # at the last iterate; NaN where it is not known
    n: int  # examples of `accuracy`
    last_n: int  # examples of `last`
    no_gradient: int  # examples that stood without having been attacked; they are not correct
    evaluations: int  # how many were averaged
    step: int  # of the last of them


Values = Mapping[Run, Mapping[str, Value]]


class Numbers(NamedTuple):
    """A table and its numbers as CSV has them."""

    table: Table
    rows: list[CsvRow]


def attack_name(attack: str) -> str:
    """Returns an attack's label as the paper writes names: 'PGD20', 'black-box'.

    Settings that differ follow: 'PGD20 (loss=margin)'. Robust accuracy's stays as it is.
    """
    if attack == worst_case.ROBUST:
        return attack
    entry = registry.entry(name_of(attack))
    kind = entry.kind.upper().replace('_', '-')
    for word in ('AutoAttack', 'Square'):
        kind = kind.replace(word.upper(), word)
    name = f'{kind}{entry.steps or ""}{entry.suffix.replace("_", " ")}'
    if entry.kind in registry.WITHOUT_SETTINGS:
        name = {'blackbox': 'black-box'}.get(entry.kind, entry.kind)
    settings = attack.removeprefix(name_of(attack)).strip()
    return f'{name} ({settings})' if settings else name


def tables(collection: Collection) -> list[Numbers]:
    """Returns the tables of the last snapshots, and the paper's 1a, 1b and 1c.

    A table without any number is left out.
    """
    runs = collection.runs
    if not runs:
        return []
    spread = (
        'Accuracy in %, mean ± standard deviation over the seeds (n - 1 in its denominator); under '
        'attack at the worst iterate: an example counts only if no step fooled it. '
        f'{_sizes(runs)} test examples.'
    )
    last, over_last = _with_robust(
        {run: _at(run, run.steps) for run in runs}, {run: run.steps for run in runs}
    )
    averaged = {run: _averaged(run, collection.over_training) for run in runs}
    best_steps = {run: run.best for run in runs}
    best, over_best = _with_robust(
        {run: _at(run, run.best, long=False) for run in runs}, best_steps
    )
    final = {run: _at(run, run.best, long=True) for run in runs}
    attacked, over_final = _with_robust(
        {run: mine for run, mine in final.items() if mine}, best_steps
    )
    final |= attacked
    trained = _trained(runs)
    at_last = [
        f'Each run at its last step ({_span([run.steps for run in trained])}); nothing was '
        f'selected{_but_for(runs)}.'
        for _ in trained[:1]
    ]
    of_best = _of_best(trained)
    judge = attack_name((trained or runs)[0].judge)
    kinds = (
        ('last_snapshot', 'Last snapshot', last, {}, [*at_last, *over_last]),
        (
            'table1a',
            f'Table 1a. Mean of the last {LAST_EVALUATIONS} evaluations',
            averaged,
            paper.TABLE_1A,
            _averaged_notes(runs, averaged),
        ),
        (
            'table1b',
            f'Table 1b. At the best {judge} step',
            best,
            paper.TABLE_1B,
            [*of_best, *over_best],
        ),
        (
            'table1c',
            'Table 1c. Long attacks, on the snapshots of Table 1b',
            final,
            paper.TABLE_1C,
            [*of_best, *over_final],
        ),
    )
    numbers = [
        _numbers(collection, name, title, values, papers, [spread, *notes])
        for name, title, values, papers, notes in kinds
    ]
    return [each for each in numbers if each.rows]


def _at(run: Run, step: int | None, long: bool | None = None) -> dict[str, Value]:
    """Returns a run's results at a step: all, or only the long attacks, or only the others."""
    if step is None:
        return {}
    return {
        name: Value(
            result['accuracy'],
            math.nan if (last := result['last_iterate_accuracy']) is None else last,
            result['n'],
            result.get('last_iterate_n', result['n']),
            result['no_gradient'],
            1,
            step,
        )
        for name, result in run.attacks(step).items()
        if long is None or long == run.is_long(result)
    }


def _with_robust(values: Values, steps: Mapping[Run, int | None]) -> tuple[Values, list[str]]:
    """Adds robust accuracy to the runs' values at these steps, and returns a note on it, too."""
    labels, found = worst_case.robust(list(values), steps)
    if not found:
        return values, []
    values = {run: dict(mine) for run, mine in values.items()}
    for run, result in found.items():
        if not values[run]:
            continue  # of a table without any
        accuracy, n = result['accuracy'], result['n']
        value = Value(accuracy, math.nan, n, n, result['no_gradient'], 1, steps[run])
        values[run] = {worst_case.ROBUST: value} | values[run]
    *names, last = map(attack_name, labels)
    n = next(iter(found.values()))['n']
    note = (
        f'robust: an example counts only if it stands under every attack that all of these '
        f'snapshots have: {", ".join(names)} and {last}; n = {n:,}.'
    )
    return values, [note]


def _averaged(run: Run, over_training: Sequence[str]) -> dict[str, Value]:
    """Returns the means of a run's last evaluations, outliers replaced as in the paper."""
    values = {}
    for name, result in run.attacks(run.steps).items():
        if run.is_long(result) or name not in over_training:
            continue  # long attacks are made on two snapshots only
        (accuracy, count), (last, _) = (
            analysis.mean_of_last(cleaned(run, name, key)[1], LAST_EVALUATIONS)
            for key in ('accuracy', 'last_iterate_accuracy')
        )
        steps, unattacked = run.series(name, 'no_gradient')
        no_gradient = int(np.nansum(unattacked[-LAST_EVALUATIONS:]))
        n = result['n']
        values[name] = Value(accuracy, last, n, n, no_gradient, count, int(steps[-1]))
    return values


def cleaned(run: Run, attack: str, key: str = 'accuracy') -> tuple[np.ndarray, np.ndarray]:
    """Returns steps and values of a run's evaluations, outliers replaced."""
    steps, values = run.series(attack, key)
    return steps, analysis.replace_outliers(values, WINDOW)[0]


def _numbers(
    collection: Collection,
    name: str,
    title: str,
    values: Values,
    papers: Mapping[str, Mapping[str, float]],
    notes: Sequence[str],
) -> Numbers:
    """Returns a table of these values: a row for each system, its last iterate, and the paper's.

    A system without any is left out.
    """
    attacks = [worst_case.ROBUST, *collection.attacks]
    attacks = [a for a in attacks if any(a in values[run] for run in collection.runs)]
    # Clean and black-box accuracy have no iterates.
    known = [v for run in collection.runs for v in values[run].values() if not math.isnan(v.last)]
    shows_last = any(value.last != value.accuracy for value in known)
    audited = name == 'last_snapshot' and any(map(audit_page.read, collection.runs))
    nothing = [''] * audited
    rows, csv_rows = [], []
    for system, runs in collection.systems.items():
        mine = [values[run] for run in runs]
        if not any(mine):
            continue
        facts = _facts(runs[0])
        audit = [audit_page.system_cell(runs)] if audited else []
        cells = (_cell(mine, attack) for attack in attacks)
        rows.append(Row((system, *facts, *cells, str(len(runs)), *audit)))
        if shows_last:
            cells = (_cell(mine, attack, 'last') for attack in attacks)
            rows.append(Row(('last iterate', '', '', *cells, '', *nothing), 'secondary'))
        of_paper = _of_paper(papers.get(system, {}), runs, attacks)
        if of_paper:
            cells = (_paper(of_paper.get(attack)) for attack in attacks)
            rows.append(Row(('paper', '', '', *cells, '3', *nothing), 'paper'))
        for attack in attacks:
            csv_rows += _csv_rows(name, system, runs, values, attack)
            if attack in of_paper:
                numbers = (of_paper[attack], None, None, None, 3, 10_000)
                csv_rows.append(CsvRow(name, system, 'all', attack, 'paper', *numbers))
    header = ('system', 'members', 'parameters', *_columns(attacks, values), 'seeds')
    header += ('audit',) * audited
    cells = [cell for row in rows for cell in row.cells[3 : len(header) - audited]]
    notes = [
        *notes,
        *_last_iterate_notes([v for mine in values.values() for v in mine.values()], cells),
        *_settings_notes(collection, attacks),
        *([_MARK] if any('*' in cell for cell in cells) else []),
        *_paper_notes(collection, rows),
    ]
    table = Table(name, title, header, tuple(rows), tuple(notes))
    return Numbers(table, csv_rows if attacks else [])


def _columns(attacks: Sequence[str], values: Values) -> list[str]:
    """Returns what to call the attacks' columns, with n where it is not all examples."""
    sizes = {a: next(mine[a].n for mine in values.values() if a in mine) for a in attacks}
    most = max(run.n for run in values)
    # A label may say it already.
    fewer = {a: n for a, n in sizes.items() if n < most and 'examples=' not in a}
    return [attack_name(a) + (f', n = {fewer[a]:,}' if a in fewer else '') for a in attacks]


def _facts(run: Run) -> tuple[str, str]:
    """Returns how many members and parameters a system has, as far as that is known."""
    if run.model:
        return MISSING, MISSING
    return str(run.config['ensemble']['size']), f'{run.record["parameters"]:,}'


def _trained(runs: Sequence[Run]) -> list[Run]:
    return [run for run in runs if not run.model]


def _last_iterate_notes(values: Sequence[Value], cells: Sequence[str]) -> list[str]:
    """Returns on how many examples the last iterate is known, where that is not on all."""
    sizes = [value.last_n for value in values if 0 < value.last_n < value.n]
    if not sizes or not any('†' in cell for cell in cells):
        return []
    return [f'† On the first {_span(sizes)} examples only, those that stay to the last iterate.']


def _settings_notes(collection: Collection, attacks: Sequence[str]) -> list[str]:
    """Returns, for each attack of which a table has several settings, which of them count."""
    notes = []
    for name, labels in by_name(attacks).items():
        mine = collection.of_all(labels)
        chosen = strongest(mine, collection.runs)
        if len(labels) == 1 or chosen is None:
            continue
        text = f'{attack_name(name)} was made with several settings.'
        if worst_case.is_worst(chosen):
            several = [attack_name(a) for a in mine if a != chosen]
            notes.append(
                f'{text} The {worst_case.WORST} counts: an example is correct only if none of '
                f'those that all runs have, {" and ".join(several)}, fooled it.'
            )
        else:
            notes.append(
                f'{text} {attack_name(chosen)} counts: of those that all runs have, it fooled the '
                'most examples.'
            )
    return notes


_MARK = (
    '* Some examples were never attacked, since their gradients are zero or NaN. They do not count '
    'as correct.'
)


def _cell(values: Sequence[Mapping[str, Value]], attack: str, reading: str = 'accuracy') -> str:
    """Returns mean and deviation over the runs that have the attack, and how many if not all."""
    there = [mine[attack] for mine in values if attack in mine]
    numbers = [getattr(value, reading) for value in there]
    numbers = [100 * number for number in numbers if not math.isnan(number)]
    if not numbers:
        return MISSING
    text = mean_and_deviation(numbers)
    if any(value.no_gradient for value in there):
        text += '*'
    if reading == 'last' and any(value.last_n < value.n for value in there):
        text += '†'
    return text if len(numbers) == len(values) else f'{text} ({len(numbers)} of {len(values)})'


def mean_and_deviation(numbers: Sequence[float]) -> str:
    """Returns numbers as a cell has them: '76.1 ± 0.4', or '76.1' of one."""
    text = f'{statistics.mean(numbers):.1f}'
    return f'{text} ± {statistics.stdev(numbers):.1f}' if len(numbers) > 1 else text


def _of_paper(
    numbers: Mapping[str, float], runs: Sequence[Run], attacks: Sequence[str]
) -> dict[str, float]:
    """Returns the paper's numbers of a system, by attack, where ours can stand beside them."""
    if paper.unlike(runs):
        return {}
    others = {
        label
        for run in runs
        for step in run.judged_steps
        for label, result in run.attacks(step).items()
        if not paper.is_its_attack(result['settings']) or worst_case.is_worst(label)
    }
    return {a: numbers[name_of(a)] for a in attacks if name_of(a) in numbers and a not in others}


def _paper(accuracy: float | None) -> str:
    return MISSING if accuracy is None else f'{100 * accuracy:.0f}'


def _csv_rows(
    table: str, system: str, runs: Sequence[Run], values: Values, attack: str
) -> list[CsvRow]:
    """Returns a row for each run that has the attack, and one for all of them, by reading."""
    rows = []
    for reading, get, size in (
        ('worst iterate', lambda v: v.accuracy, lambda v: v.n),
        ('last iterate', lambda v: v.last, lambda v: v.last_n),
    ):
        there = {run.seed: values[run][attack] for run in runs if attack in values[run]}
        known = {seed: value for seed, value in there.items() if not math.isnan(get(value))}
        numbers = [get(value) for value in known.values()]
        for seed, v in known.items():
            rows.append(
                CsvRow(
                    table, system, seed, attack, reading, get(v), seeds=1, n=size(v),
                    evaluations=v.evaluations, step=v.step, no_gradient=v.no_gradient,
                )
            )  # fmt: skip
        if numbers:
            rows.append(
                CsvRow(
                    table, system, 'all', attack, reading, statistics.mean(numbers),
                    statistics.stdev(numbers) if len(numbers) > 1 else None, min(numbers),
                    max(numbers), len(numbers), size(next(iter(known.values()))),
                    no_gradient=sum(value.no_gradient for value in known.values()),
                )
            )  # fmt: skip
    return rows


def _paper_notes(collection: Collection, rows: Sequence[Row]) -> list[str]:
    """Returns what the paper's numbers are, and where ours were trained otherwise."""
    if not any(row.kind == 'paper' for row in rows):
        return []
    notes = [
        "paper: the paper's own numbers, at the last iterate of one start, which climbs the "
        'cross-entropy.'
    ]
    its = [runs for runs in collection.systems.values() if not paper.unlike(runs)]
    others = dict.fromkeys(text for runs in its for text in paper.trained_otherwise(runs))
    if others:
        notes.append(f"Ours were not trained like the paper's: {'; '.join(others)}.")
    return notes


def _span(numbers: Sequence[int]) -> str:
    low, high = min(numbers), max(numbers)
    return f'{low:,}' if low == high else f'{low:,} to {high:,}'


def _sizes(runs: Sequence[Run]) -> str:
    return f'n = {_span([run.n for run in runs])}'


def _but_for(runs: Sequence[Run]) -> str:
    systems = dict.fromkeys(run.system for run in runs if run.of_selected)
    return f', except for the members of {" and ".join(systems)}' if systems else ''


def _averaged_notes(runs: Sequence[Run], averaged: Values) -> list[str]:
    """Returns over how much is averaged, and how many outliers were replaced."""
    counts = [value.evaluations for run in runs for value in averaged[run].values()]
    if not counts:
        return []
    notes = []
    if min(counts) < LAST_EVALUATIONS:
        notes.append(
            f'Averaged over {_span(counts)} evaluations: some runs have fewer than '
            f'{LAST_EVALUATIONS}.'
        )
    lengths, replaced = [], 0
    for run in runs:
        for name in averaged[run]:
            values = run.series(name)[1]
            lengths.append(len(values))
            replaced += int(np.sum(analysis.replace_outliers(values, WINDOW)[1]))
    notes.append(
        'Outliers (more than three standard deviations off the mean distance to the rolling '
        f'median, window {WINDOW}) are replaced by the median: {replaced} of {sum(lengths):,} '
        'accuracies.'
    )
    if min(lengths) < WINDOW:
        notes.append(
            f'The window is shorter where a run has fewer than {WINDOW} evaluations '
            f'(here {_span(lengths)}).'
        )
    return notes


def _of_best(runs: Sequence[Run]) -> list[str]:
    """Returns how the best snapshots were selected, and of which steps they are."""
    steps = [run.best for run in runs if run.best is not None]
    if not steps:
        return []
    split = runs[0].config['eval']['select_on']
    text = f'Each run at its own best step ({_span(steps)}), selected on the {split} split'
    return [text + (', as in the paper.' if split == 'test' else '.')]
