"""The report job: tables, figures and one page from the results of runs. No weights, no JAX."""

import itertools
from collections.abc import Sequence

from etils import epath

from ensadv.report import audit_page, basis, findings, page, paper, table1, tables
from ensadv.report.collect import collect

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
    from ensadv.report import planes_page, sections  # Matplotlib takes its time

    collection = collect(root, paper.SYSTEMS)
    writer = sections.Writer(root / FOLDER)
    numbers = table1.tables(collection)
    outcomes = findings.read_outcomes(collection)
    notes = [*collection.notes, *outcomes.notes]
    parts = [
        sections.claims(outcomes, notes),
        sections.accuracy(collection, numbers, notes, writer),
        audit_page.section(collection),
        sections.accuracy_over_training(collection, writer),
        sections.over_attack_steps(collection, writer),
        sections.differences(outcomes, writer),
        sections.members_of_ensembles(collection, writer),
        sections.computation_costs(outcomes, writer),
        sections.examples(collection, writer),
        planes_page.section(collection, writer),
        sections.how_made(collection),
        sections.apart(collection),
    ]
    parts = [part for part in parts if any(part.blocks)]
    writer.remove_old()
    title = f'{root.name}: adversarially trained ensembles'
    path = writer.folder / 'report.html'
    facts = basis.facts(collection)
    writer.text('report.html', page.to_html(title, facts, parts))
    writer.text('report.md', page.to_markdown(title, facts, parts))
    rows = list(itertools.chain.from_iterable(each.rows for each in numbers))
    writer.text('table1.csv', tables.to_csv(table1.CsvRow._fields, rows))
    writer.text('table1.tex', '\n'.join(tables.to_latex(each.table) for each in numbers))
    apart = _part(basis.APART_TITLE, basis.apart(collection))
    first = tables.to_markdown(numbers[0].table) if numbers else ''
    print('\n' + '\n'.join(filter(None, [first, apart])) + f'\nThe report: {path}')
    return path


def _part(title: str, items: Sequence[str]) -> str:
    """Returns a list under a heading, in Markdown; '' where there is nothing in it."""
    return '\n'.join([f'## {title}', '', *tables.markdown_list(items), '']) if items else ''
