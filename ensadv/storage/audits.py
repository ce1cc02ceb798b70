"""What audits found: eval/<step>_audit.json. No JAX."""

from collections.abc import Iterable, Mapping
from typing import Any

from etils import epath

from ensadv.storage import files, records, selection, workdir

VERDICTS = PASSED, FAILED, NOT_MADE = ('passed', 'failed', 'not made')


def path_of(folder: epath.Path, step: int) -> epath.Path:
    """Returns the path of a step's audit in a workdir."""
    return workdir.evaluation_path(folder, step, '_audit.json')


def write(folder: epath.Path, content: Mapping[str, Any]) -> None:
    """Writes an audit, in place of an earlier one of the step."""
    files.write_json(path_of(folder, content['step']), content)


def read(folder: epath.Path, step: int) -> dict[str, Any] | None:
    """Reads a step's audit; returns None where there is none.

    Raises:
      UserError: if it is damaged.
    """
    mismatch = lambda content: records.mismatch(content, records.AUDIT)
    return files.read_checked_json(path_of(folder, step), mismatch, 'an audit')


def is_current(content: Mapping[str, Any], results: Iterable[Mapping[str, Any]]) -> bool:
    """Returns whether an audit is of all these results, as eval/<step>.json has them."""
    return set(map(selection.ledger_key, results)) == set(content['attacks'])


def verdict(content: Mapping[str, Any]) -> str:
    """Returns an audit in a few words: 'passed', or which checks failed."""
    failed = [check['name'] for check in content['checks'] if check['verdict'] == FAILED]
    return f'{FAILED}: {", ".join(failed)}' if failed else PASSED
