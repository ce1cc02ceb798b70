"""The compare job: how two ledgers differ, example by example."""

from collections.abc import Sequence

from ensadv.errors import UserError
from ensadv.report import significance
from ensadv.storage import files, workdir


def of_ledgers(paths: Sequence[str]) -> str:
    """Returns a text that compares two ledgers.

    Args:
      paths: of two files eval/<step>.npz.

    Raises:
      UserError: if there are not two, or one cannot be read.
    """
    if len(paths) != 2:
        raise UserError('--ledgers: expected two files, as in --ledgers=A/eval/9.npz,B/eval/9.npz')
    paths = [files.absolute(path) for path in paths]
    comparisons = significance.compare(*map(workdir.read_ledger, paths))
    names = ('first', 'second')
    lines = [f'{name}: {path}' for name, path in zip(names, paths, strict=True)]
    return '\n'.join([*lines, '', significance.comparison_table(comparisons, names)])
