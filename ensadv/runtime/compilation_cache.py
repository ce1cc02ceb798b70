"""Compiled programs kept between processes, so that what starts again compiles nothing anew."""

import os

import jax
from etils import epath

from ensadv.cpu import processor


def enable(directory: str | None) -> None:
    """Keeps compiled programs in a directory, which may be on gs://, from now on.

    JAX's own environment variable JAX_COMPILATION_CACHE_DIR goes before.

    Args:
      directory: below it each kind of processor has its own. None is `default_directory`; ''
        keeps nothing.
    """
    if 'JAX_COMPILATION_CACHE_DIR' in os.environ or directory == '':
        return
    path = epath.Path(directory or processor.cache_directory()).expanduser() / processor.processor()
    jax.config.update('jax_compilation_cache_dir', str(path))
    # However little it took: a second start is to compile nothing.
    jax.config.update('jax_persistent_cache_min_compile_time_secs', 0)
