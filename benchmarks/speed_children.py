"""The processes that speed.py and speed_gpu.py start."""

import json
import os
import re
import subprocess
import sys
import tempfile
import time

from benchmarks.machine import ROOT

WORKERS = ROOT / 'benchmarks' / 'speed_workers.py'
START = time.monotonic()


def say(text):
    """Tells on stderr what is under way."""
    print(f'{time.monotonic() - START:6.0f} s  {text}', file=sys.stderr, flush=True)


def environment(**more):
    """Returns a child's environment variables."""
    env = os.environ | {'TF_CPP_MIN_LOG_LEVEL': '2', 'PYTHONPATH': str(ROOT)} | more
    # It would go before what is asked for here, and let one row profit from another.
    env.pop('JAX_COMPILATION_CACHE_DIR', None)
    return env


def measure(device, function, /, *, xla='', may_fail=False, **settings):
    """Returns what a function of speed_workers.py returns.

    Args:
      device: its argument of this name.
      function: its name.
      xla: flags of XLA's for this alone.
      may_fail: whether to return None where it fails; else that ends the program, with exit code 2
        for a user's mistake and 1 for all else.
      settings: its other arguments.
    """
    command = [sys.executable, WORKERS, function, json.dumps(settings | {'device': device})]
    flags = f'{os.environ.get("XLA_FLAGS", "")} {xla}'.strip()
    with tempfile.TemporaryDirectory() as compiled:
        env = environment(XLA_FLAGS=flags, TORCHINDUCTOR_CACHE_DIR=compiled)
        # On a GPU PyTorch computes, too, and JAX is not to take most of its memory beforehand.
        env |= {'XLA_PYTHON_CLIENT_PREALLOCATE': 'false', 'XLA_PYTHON_CLIENT_MEM_FRACTION': '.95'}
        child = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True, check=False)
    if child.returncode == 0:
        return json.loads(child.stdout.splitlines()[-1])
    if child.returncode < 0:
        print(f'{function}: ended by signal {-child.returncode}', file=sys.stderr)
    if may_fail:
        return None
    sys.exit(2 if child.returncode == 2 else 1)


def run_main(workdir, config=None, fields=None, flags=(), counts=None):
    """Runs `main.py` to its end; ends the program where it fails.

    Args:
      workdir: the run's.
      config: file of the config; None: the run's own.
      fields: of the config, {'train.steps': 4, ...}.
      flags: further ones.
      counts: file for what it compiled, see `speed_workers.main_py`; None: not wanted.

    Returns:
      {step: seconds from the start of the process to the line with the metrics of that step}.
    """
    arguments = [f'--workdir={workdir}', *flags]
    arguments += [f'--config={config}'] if config else []
    arguments += [f'--config.{field}={value}' for field, value in (fields or {}).items()]
    command = [sys.executable, ROOT / 'main.py', *arguments]
    if counts:
        settings = json.dumps({'counts': str(counts), 'arguments': arguments})
        command = [sys.executable, WORKERS, 'main_py', settings]
    start, times, lines = time.monotonic(), {}, []
    with subprocess.Popen(
        command, cwd=ROOT, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        text=True,
    ) as child:  # fmt: skip
        for line in child.stderr:
            lines = [*lines[-19:], line]
            step = step_of(line)
            if step is not None:
                times.setdefault(step, time.monotonic() - start)
    if child.returncode:
        print(''.join(lines), file=sys.stderr)
        sys.exit(f'main.py {" ".join(arguments)}: failed, with exit code {child.returncode}')
    return times


def step_of(line):
    """Returns the step of a line of `main.py`'s log with training's metrics; of others None."""
    match = re.search(r'\] \[(\d+)\] .*\bloss=', line)
    return int(match[1]) if match else None
