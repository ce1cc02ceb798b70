"""Compiled programs kept between processes, so that what starts again compiles nothing anew."""

import os

import jax

from ensadv import workdir

MIN_SECONDS = 0.5  # of compiling, for a program to be kept


def default_directory() -> str:
    """Returns where programs are kept unless told otherwise: the user's cache directory."""
    return os.path.join(os.environ.get('XDG_CACHE_HOME') or '~/.cache', 'ensadv', 'compiled')


def enable(directory: str | None) -> None:
    """Keeps compiled programs in a directory, which may be on gs://, from now on.

    JAX's own environment variable JAX_COMPILATION_CACHE_DIR goes before.

    Args:
      directory: None is `default_directory`; '' keeps nothing.
    """
    if 'JAX_COMPILATION_CACHE_DIR' in os.environ or directory == '':
        return
    path = workdir.absolute(directory or default_directory())
    jax.config.update('jax_compilation_cache_dir', str(path))
    jax.config.update('jax_persistent_cache_min_compile_time_secs', MIN_SECONDS)
