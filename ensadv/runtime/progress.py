"""What the program is at: bars with rate and time left on a terminal, lines in the log elsewhere.

Only process 0 shows it.
"""

import contextlib
import sys
import time
from collections.abc import Iterator

import tqdm
from absl import logging

from ensadv.runtime import distributed, terminal

LOG_SECONDS = 30  # between two lines of a bar where there is no terminal
COMPILING = 'compiling (usually 5 s to 2 min)'
_LINE = '{desc}: {percentage:.0f}% ({n_fmt}/{total_fmt}), {rate_fmt}, {remaining} left{postfix}'


class _LogStream:
    """Takes a bar's text to the log, line by line."""

    def write(self, text: str) -> None:
        # Where bars are nested tqdm moves the cursor with this code.
        if line := text.replace('\x1b[A', '').strip():
            logging.info('%s', line)

    def flush(self) -> None:
        pass


class Bar(tqdm.tqdm):
    """A tqdm whose rate and time left are those of what is compiled already."""

    def __init__(self, *, total: int, label: str, unit: str, initial: int = 0):
        """Shows the bar.

        Args:
          total: how many there are.
          label: what it is the progress of.
          unit: of what is counted.
          initial: how many are done already.
        """
        settings = {'total': total, 'initial': initial, 'desc': label, 'unit': unit}
        self._compiled = False  # since the last update
        if not distributed.is_main():
            super().__init__(**settings, disable=True)
        elif terminal.draws_bars():
            super().__init__(**settings, file=sys.stderr, dynamic_ncols=True, leave=False)
        else:
            super().__init__(
                **settings, file=_LogStream(), mininterval=LOG_SECONDS, delay=LOG_SECONDS,
                bar_format=_LINE, leave=False,
            )  # fmt: skip

    @contextlib.contextmanager
    def untimed(self) -> Iterator[None]:
        """Leaves the time inside out of the rate."""
        start = time.monotonic()
        yield
        if not self.disable:
            spent = time.monotonic() - start
            self.start_t += spent
            self.last_print_t += spent

    @contextlib.contextmanager
    def compiling(self) -> Iterator[None]:
        """Says that what is inside compiles, and leaves it out of the rate.

        What the next `update` counts is left out as well. Several before one `update` say it once.
        """
        if not self._compiled and not self.disable:
            if terminal.draws_bars():
                self.set_postfix_str(COMPILING)
            else:
                logging.info('%s: %s', self.desc, COMPILING)
        self._compiled = True
        with self.untimed():
            yield

    def update(self, n: float = 1) -> bool | None:
        """Counts n more."""
        if self.disable or not self._compiled or not n:
            return super().update(n)
        self._compiled = False
        self.n += n
        self.initial += n
        self.last_print_n += n
        if not terminal.draws_bars():
            return None
        self.postfix = None if self.postfix == COMPILING else self.postfix
        return self.refresh()


@contextlib.contextmanager
def waiting(what: str) -> Iterator[None]:
    """Says what the time inside goes to, where nothing can be counted.

    Args:
      what: as 'reading data'.
    """
    if not distributed.is_main():
        yield
    elif terminal.draws_bars():
        with tqdm.tqdm(desc=what, bar_format='{desc} ...', leave=False, file=sys.stderr):
            yield
    else:
        logging.info('%s', what)
        yield
