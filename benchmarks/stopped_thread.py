"""Stops one of this process's threads now and then, as a busy machine or a hypervisor does."""

import contextlib
import ctypes
import os
import pathlib
import subprocess
import sys
import time

_SEIZE, _INTERRUPT, _CONT = 0x4206, 0x4207, 7  # of ptrace, on Linux
_WALL = 0x40000000  # waitpid: also for threads
_ALLOW_ANY_TRACER = 0x59616D61, ctypes.c_ulong(-1)  # of prctl
_NAME = 'XLAEigen'  # in the names of the threads that XLA:CPU computes in


@contextlib.contextmanager
def stopped_thread(stopped: float = 0.4, running: float = 0.3):
    """Stops one of XLA's threads for `stopped` seconds, then lets it run for `running`, and so on.

    Raises:
      RuntimeError: if XLA has no threads yet, or the system does not allow it.
    """
    ctypes.CDLL(None).prctl(*_ALLOW_ANY_TRACER, 0, 0, 0)
    threads = [task for task in pathlib.Path('/proc/self/task').iterdir()
               if _NAME in (task / 'comm').read_text()]  # fmt: skip
    if not threads:
        raise RuntimeError(f'no thread has a name with {_NAME}: compute something first')
    command = [sys.executable, __file__, min(threads, key=lambda task: int(task.name)).name]
    child = subprocess.Popen([*command, str(stopped), str(running)], stdout=subprocess.PIPE)
    try:
        if child.stdout.readline() != b'stopping\n':
            raise RuntimeError('the system does not let one process stop a thread of another')
        yield
    finally:
        child.kill()
        child.wait()


def _stop(thread: int, stopped: float, running: float) -> None:
    """Stops and continues a thread of another process, until this process is killed."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.ptrace.argtypes = (ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p)
    if libc.ptrace(_SEIZE, thread, None, None):
        sys.exit(os.strerror(ctypes.get_errno()))
    print('stopping', flush=True)
    while True:
        time.sleep(running)
        libc.ptrace(_INTERRUPT, thread, None, None)
        os.waitpid(thread, _WALL)
        time.sleep(stopped)
        libc.ptrace(_CONT, thread, None, None)


if __name__ == '__main__':
    _stop(int(sys.argv[1]), float(sys.argv[2]), float(sys.argv[3]))
