"""What audits found, as a page of their own and as a section of the report."""

from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from ensadv.errors import UserError
from ensadv.report import page, tables
from ensadv.report.collect import Collection
from ensadv.report.run import Run
from ensadv.report.tables import Row, Table
from ensadv.storage import audits, files, workdir

NOT_AUDITED = '-'
_SUMMARY_HEADER = ('robust accuracy', 'with the audit', 'n', 'audit')
_NOTE = (
    'Robust accuracy in %, on the test examples that the audit looked at: under the attacks that '
    "the run made, and under the audit's own as well. --mode=audit makes an audit; "
    'eval/<step>_audit.html has all its checks.'
)
_HEADER = ('check', 'verdict', 'evidence', 'images', 'what to do')


def table(content: Mapping[str, Any]) -> Table:
    """Returns the checks of an audit, those that failed first."""
    rows = sorted(content['checks'], key=lambda check: check['verdict'] != audits.FAILED)
    return Table(
        'audit',
        f'Audit of {content["system"]}, step {content["step"]:,}: {audits.verdict(content)}',
        _HEADER,
        tuple(
            Row((c['name'], c['verdict'], c['evidence'], f'{c["n"]:,}', c['remedy'])) for c in rows
        ),
        (summary(content),),
    )


def summary(content: Mapping[str, Any]) -> str:
    """Returns in a sentence what is reported, and what the audit's own attacks left of it."""
    return (
        f'On the first {content["n"]:,} test examples {100 * content["reported"]:.1f} % stand '
        f'under {", ".join(content["attacks"])}, and {100 * content["found"]:.1f} % under the '
        "audit's attacks as well: the robust accuracy is at most this."
    )


def read(run: Run) -> dict[str, Any] | None:
    """Returns the audit of a run's last step; None where there is none that can be read."""
    try:
        return audits.read(run.path, run.steps)
    except UserError:
        return None


def _run_cell(run: Run) -> str:
    """Returns what a run's row says of its audit."""
    content = read(run)
    if content is None:
        return NOT_AUDITED
    old = '' if audits.is_current(content, run.results(run.steps)) else ' (of fewer attacks)'
    return audits.verdict(content) + old


def system_cell(runs: Sequence[Run]) -> str:
    """Returns what the row of a system, of these runs, says of their audits."""
    return '; '.join(dict.fromkeys(map(_run_cell, runs)))


def section(collection: Collection) -> page.Section:
    """Returns what the audits of the last snapshots found; nothing where none was made."""
    found = {run: content for run in collection.runs if (content := read(run))}
    rows = [
        Row(
            (
                run.name,
                f'{100 * content["reported"]:.1f}',
                f'{100 * content["found"]:.1f}',
                f'{content["n"]:,}',
                _run_cell(run),
            )
        )
        for run, content in found.items()
    ]
    failed = [
        f'{run.name}, {c["name"]}: {c["evidence"]} {c["remedy"]}'
        for run, content in found.items()
        for c in content['checks']
        if c['verdict'] == audits.FAILED
    ]
    table = Table(
        'audits', 'Audits of the last snapshots', ('run', *_SUMMARY_HEADER), tuple(rows), (_NOTE,)
    )
    return page.Section('Can the numbers be believed?', 'audits', [table, failed] if found else [])


def write(folder: epath.Path, content: Mapping[str, Any]) -> epath.Path:
    """Writes a workdir's audit.html, and prints the table; returns the page's path."""
    found = table(content)
    facts = [('audited', content['system']), ('versions', _versions(content))]
    sections = [page.Section('Checks', 'checks', [found])]
    path = workdir.evaluation_path(folder, content['step'], '_audit.html')
    text = page.to_html(f'{folder.name}: can its robust accuracy be believed?', facts, sections)
    files.write_bytes(path, text.encode())
    print(f'\n{tables.to_markdown(found)}\nThe page: {path}')
    return path


def _versions(content: Mapping[str, Any]) -> str:
    return ', '.join(f'{name} {version}' for name, version in content['versions'].items())
