"""SIGTERM and SIGINT: how the program ends when it is asked to.

Wherever it is, it ends at once, by an exception that lets what is being written be finished; while
it trains, after the steps that are under way and with a checkpoint. What takes longer than
`GRACE_SECONDS`, or a second signal, is cut off: nothing on disk is ever half written.
"""

import contextlib
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from typing import NoReturn

from absl import logging

GRACE_SECONDS = 25.0  # from the signal to the end; batch systems often kill after 30
SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Stopped(BaseException):
    """The program was asked to end. As KeyboardInterrupt, it is no Exception.

    Attributes:
      signum: the signal's number.
    """

    def __init__(self, signum: int):
        name = signal.Signals(signum).name
        super().__init__(f'{name}: stopped; the same command goes on from here')
        self.signum = signum

    @property
    def exit_code(self) -> int:
        """128 + the signal's number, as shells have it: 143 for SIGTERM, 130 for SIGINT."""
        return 128 + self.signum


_requested: int | None = None
_deferred = False


def install() -> None:
    """Takes over both signals; from the main thread, once."""
    # Python's handlers run in the main thread, and only between two of its instructions: not while
    # XLA compiles. Whoever reads this socket is told in any case, and keeps the time.
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    threading.Thread(target=_watch, args=(reader, writer), name='stopping', daemon=True).start()
    for signum in SIGNALS:
        signal.signal(signum, _handle)


def _watch(reader: socket.socket, writer: socket.socket) -> None:
    del writer  # is kept open by being here
    signum = 0
    while signum not in SIGNALS:
        signum = reader.recv(1)[0]
    end = time.monotonic() + GRACE_SECONDS
    # `timeout` and others send a signal to a process and to its group: that is one, not two.
    impatient = time.monotonic() + 1
    while (left := end - time.monotonic()) > 0:
        reader.settimeout(left)
        with contextlib.suppress(TimeoutError):
            if reader.recv(1)[0] in SIGNALS and time.monotonic() > impatient:
                break
    name = signal.Signals(signum).name
    print(f'error: {name}: ended at once; what is on disk is whole', file=sys.stderr, flush=True)
    os._exit(128 + signum)


def _handle(signum: int, frame: object) -> None:
    del frame
    global _requested
    _requested = signum
    name = signal.Signals(signum).name
    if _deferred:
        logging.warning('%s: ending after a checkpoint; a second one ends at once', name)
    else:
        raise Stopped(signum)


def requested() -> bool:
    """Returns whether the program was asked to end."""
    return _requested is not None


def stop() -> NoReturn:
    """Ends the program, as this process or another that works with it was asked to.

    Raises:
      Stopped: always.
    """
    raise Stopped(signal.SIGTERM if _requested is None else _requested)


@contextlib.contextmanager
def deferred(defer: bool = True) -> Iterator[None]:
    """Keeps signals from interrupting what is inside, which asks `requested` itself.

    Args:
      defer: False, inside of another, lets them interrupt again.

    Raises:
      Stopped: at the end of what must not, or the beginning of what may, be interrupted, if the
        program was asked to end by then.
    """
    global _deferred
    before, _deferred = _deferred, defer
    try:
        _raise_if_due()
        yield
    finally:
        _deferred = before
    _raise_if_due()


def _raise_if_due() -> None:
    if _requested is not None and not _deferred:
        raise Stopped(_requested)
