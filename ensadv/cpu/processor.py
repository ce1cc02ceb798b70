"""This processor, and where programs for it are kept."""

import hashlib
import os
import pathlib
import platform


def cache_directory() -> str:
    """Returns where programs are kept unless told otherwise: the user's cache directory."""
    return os.path.join(os.environ.get('XDG_CACHE_HOME') or '~/.cache', 'ensadv', 'compiled')


def processor() -> str:
    """Returns a name of this processor's instruction set.

    Programs for one CPU can end a process on another, and machines may share a home directory.
    """
    info = pathlib.Path('/proc/cpuinfo')
    lines = info.read_text().splitlines() if info.exists() else []
    flags = next((line for line in lines if line.startswith(('flags', 'Features'))), '')
    return f'{platform.machine()}-{hashlib.sha256(flags.encode()).hexdigest()[:8]}'
