"""TensorFlow, which here reads data and writes TensorBoard files but never computes."""

import contextlib
import os
from types import ModuleType


def import_tensorflow() -> ModuleType:
    """Imports TensorFlow quietly, and keeps it off the accelerators, which are JAX's.

    Raises:
      ImportError: if it is not installed.
    """
    # Without this it tells at length how it would compute, and what else it will raise. JAX has put
    # a 1 there, which is too little.
    if os.environ.get('TF_CPP_MIN_LOG_LEVEL', '1') == '1':
        os.environ['TF_CPP_MIN_LOG_LEVEL'] = '2'
    os.environ.setdefault('TF_ENABLE_ONEDNN_OPTS', '0')
    import tensorflow as tf

    for kind in ('GPU', 'TPU'):
        with contextlib.suppress(RuntimeError):  # it already runs, as its user wants it to
            tf.config.set_visible_devices([], kind)
    return tf
