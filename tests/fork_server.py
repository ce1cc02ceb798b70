"""Runs main.py hundreds of times: a process that has imported everything forks for each run.

A forked process is as fresh as a new one: flags are not parsed, and JAX has started no backend. It
takes a few hundredths of a second where a new one takes seconds to import JAX.
"""

import contextlib
import functools
import gc
import json
import os
import pathlib
import runpy
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Iterator
from typing import NamedTuple

ROOT = pathlib.Path(__file__).parents[1]
GOT_THROUGH = 88  # the exit code where the input was accepted and the work would begin
CRASHED = 99
SECONDS = 30  # far more than any run takes


class Result(NamedTuple):
    """How a run ended: its exit code, the negative number of the signal that killed it."""

    code: int
    stdout: str
    stderr: str


class Server:
    """The other end of `serve`."""

    def __init__(self):
        # Its threads would be those of the process that forks.
        environment = os.environ | {'OPENBLAS_NUM_THREADS': '1', 'PYTHONPATH': str(ROOT)}
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, *args: str, uid: int | None = None) -> Result:
        """Runs main.py with these arguments, as another user if that is told."""
        self._process.stdin.write(json.dumps({'args': list(map(str, args)), 'uid': uid}) + '\n')
        self._process.stdin.flush()
        return Result(*json.loads(self._process.stdout.readline()))

    def close(self) -> None:
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait()


@contextlib.contextmanager
def started() -> Iterator[Server]:
    """A server that lives as long as the block."""
    server = Server()
    try:
        yield server
    finally:
        server.close()


def serve() -> None:
    """Answers requests on stdin, a line each, on stdout."""
    import_everything()
    gc.freeze()  # or the first collection in each forked process would copy all memory
    # A lock that another thread holds would stay locked in the forked process.
    assert len(os.listdir('/proc/self/task')) == 1 or sys.platform != 'linux'
    for line in sys.stdin:
        print(json.dumps(answer(**json.loads(line))), flush=True)


def import_everything() -> None:
    """Imports what main.py needs for any job, and cuts off what takes time."""
    import sklearn.datasets
    import sklearn.model_selection
    from matplotlib.figure import Figure

    import main
    from ensadv import describe, study
    from ensadv.evaluation import blackbox, decision_planes, evaluate
    from ensadv.report import drawing, significance
    from ensadv.training import train

    del blackbox, decision_planes, evaluate, main, sklearn, study

    def got_through(*args, **kwargs):
        sys.stdout.flush()
        os._exit(GOT_THROUGH)

    # What comes next traces the network: for seconds, and not the user's input any more.
    train.init_state = got_through
    describe.describe = got_through
    # A report draws its figures, but writes a dot for each.
    dot = drawing.png(Figure((0.1, 0.1)))
    drawing._written = lambda figure, **options: dot
    significance.resample = functools.partial(significance.resample, num=10)


def answer(args: list[str], uid: int | None) -> Result:
    """Runs main.py in a forked process."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        child = os.fork()
        if not child:
            run(args, uid, out.fileno(), err.fileno())
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read().decode(errors='backslashreplace'))
    return Result(status, *texts)


def run(args: list[str], uid: int | None, out: int, err: int) -> None:
    """Becomes main.py, and ends the process."""
    code = CRASHED
    try:
        signal.alarm(SECONDS)  # kills it, whatever it is at
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(out, 1)
        os.dup2(err, 2)
        if uid is not None:
            os.setuid(uid)
        sys.argv = ['main.py', *args]
        runpy.run_path('main.py', run_name='__main__')
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else error.code is not None
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == '__main__':
    serve()
