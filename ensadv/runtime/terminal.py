"""The terminal, if there is one: bars are drawn there, and lines logged everywhere else."""

import os
import sys


def draws_bars() -> bool:
    """Returns whether stderr is a terminal whose cursor can be moved within a known width."""
    if not sys.stderr.isatty() or os.environ.get('TERM') == 'dumb':
        return False
    try:
        return os.get_terminal_size(sys.stderr.fileno()).columns > 0
    except OSError:
        return False
