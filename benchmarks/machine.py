"""With what and on what something was measured."""

import importlib.metadata
import importlib.util
import os
import pathlib
import platform
import re
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parents[1]
PACKAGES = ('jax', 'jaxlib', 'flax', 'torch', 'foolbox', 'torchattacks')


def cpu():
    """Returns the CPU's name."""
    try:
        info = pathlib.Path('/proc/cpuinfo').read_text()
    except OSError:
        info = ''
    match = re.search(r'^model name\s*: (.+)$', info, re.MULTILINE)
    return match[1] if match else platform.processor() or platform.machine()


def commit():
    """Returns the repository's commit, and whether files differ from it."""

    def git(*args):
        done = subprocess.run(['git', *args], cwd=ROOT, capture_output=True, text=True, check=False)
        return done.stdout.strip()

    changed = git('status', '--porcelain', '--untracked-files=no')
    return git('rev-parse', '--short', 'HEAD') + ', with uncommitted changes' * bool(changed)


def missing_packages():
    """Returns those of PACKAGES that are not installed."""
    return [name for name in PACKAGES if importlib.util.find_spec(name) is None]


def describe(load, packages=PACKAGES):
    """Returns the Markdown lines that say it; `load` is the load average before."""
    versions = [f'{name} {importlib.metadata.version(name)}' for name in packages]
    return [
        f'- `python {" ".join(sys.argv)}`, {time.strftime("%Y-%m-%d")}, commit {commit()}',
        f'- CPU: {cpu()}, {os.cpu_count()} cores; load average before: {load:.2f}',
        f'- Python {platform.python_version()}, {", ".join(versions)}',
        f'- XLA_FLAGS: {os.environ.get("XLA_FLAGS") or "(not set)"}',
    ]
