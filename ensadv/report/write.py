"""The report job: tables, figures and one page from the results of runs. No weights, no JAX."""

import itertools
from collections.abc import Sequence

from etils import epath

from ensadv.report import basis, findings, page, paper, sections, table1, tables
from ensadv.report.collect import Collection, collect

FOLDER = 'report'


def write(root: epath.Path) -> epath.Path:
    """Writes root/report/ from the runs below a directory, and prints the first table.

    Args:
      root: a study's workdir, or any directory with runs below it, or a run's workdir.

    Returns:
      The path of the page.

    Raises:
      UserError: if no run is there.
    """
    collection = collect(root, paper.SYSTEMS)
    writer = sections.Writer(root / FOLDER)
    numbers = table1.tables(collection)
    outcomes = findings.read_outcomes(collection)
    notes = [*collection.notes, *outcomes.notes]
    parts = [
        sections.claims(outcomes, notes),
        sections.accuracy(numbers, notes),
        sections.over_training(collection, writer),
        sections.over_attack_steps(collection, writer),
        sections.differences(outcomes, writer),
        sections.computation_costs(collection, outcomes, writer),
        sections.examples(collection, writer),
        sections.decision_planes(collection, writer),
        sections.how_made(collection),
        sections.apart(collection),
    ]
    parts = [part for part in parts if part.blocks]
    writer.remove_old()
    title = f'{root.name}: adversarially trained ensembles'
    path = writer.folder / 'report.html'
    writer.text('report.html', page.render(title, basis.facts(collection), parts))
    shown = _write_tables(collection, numbers, notes, writer)
    print(f'\n{shown}\nThe report: {path}')
    return path


def _write_tables(
    collection: Collection,
    numbers: Sequence[table1.Numbers],
    notes: Sequence[str],
    writer: sections.Writer,
) -> str:
    """Writes table1.md, .csv and .tex; returns the Markdown of the first table."""
    parts = [tables.to_markdown(each.table) for each in numbers]
    made = [*notes, *basis.all_of_it(collection)]
    apart = [f'- {name}: {reason}.' for name, reason in collection.apart]
    if made:
        parts.append('\n'.join([f'## {sections.BASIS}', '', *(f'- {note}' for note in made), '']))
    if apart:
        parts.append('\n'.join([f'## {sections.APART}', '', *apart, '']))
    writer.text('table1.md', '\n'.join(parts))
    rows = itertools.chain.from_iterable(each.rows for each in numbers)
    writer.text('table1.csv', tables.to_csv(table1.CSV_HEADER, rows))
    writer.text('table1.tex', '\n'.join(tables.to_latex(each.table) for each in numbers))
    return '\n'.join([*parts[:1], *(parts[-1:] if apart and numbers else [])])
