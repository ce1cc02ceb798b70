"""Compiled programs kept between processes, so that what starts again compiles nothing anew."""

import hashlib
import os
import pathlib
import platform

import jax

from ensadv import workdir


def default_directory() -> str:
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


def enable(directory: str | None) -> None:
    """Keeps compiled programs in a directory, which may be on gs://, from now on.

    JAX's own environment variable JAX_COMPILATION_CACHE_DIR goes before.

    Args:
      directory: below it each kind of processor has its own. None is `default_directory`; ''
        keeps nothing.
    """
    if 'JAX_COMPILATION_CACHE_DIR' in os.environ or directory == '':
        return
    path = workdir.absolute(directory or default_directory()) / processor()
    jax.config.update('jax_compilation_cache_dir', str(path))
    # However little it took: a second start is to compile nothing.
    jax.config.update('jax_persistent_cache_min_compile_time_secs', 0)
