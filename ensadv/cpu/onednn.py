"""oneDNN's convolution, which XLA:CPU has inside and does not use by itself.

PyTorch computes with oneDNN's convolutions as well.

JAX has no function for them, but XLA takes an operation by its name, with a configuration that may
be another in another version, and a wrong one may end the process. So each version is tried once,
in a process of its own, and is used where its results are right.

A program with such an operation cannot be written to JAX's compilation cache, as XLA takes the
operation for another kind when it writes it down. Once `available` has been asked, JAX does not
try.
"""

import contextlib
import functools
import hashlib
import importlib.metadata
import json
import os
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Sequence

import jax
import numpy as np
from jax import Array

from ensadv.cpu import backend, processor

TARGET = '__onednn$convolution'  # XLA's name of the operation
_TRIAL_SECONDS = 120.0  # it takes three; what takes longer hangs


def available() -> bool:
    """Returns whether convolutions of float32 can be given to oneDNN here."""
    return backend.is_cpu() and _works()


@functools.cache
def _works() -> bool:
    """Returns whether a process of its own has come to the right results, now or before."""
    root = pathlib.Path(__file__).parents[2]
    versions = [importlib.metadata.version(name) for name in ('jax', 'jaxlib')]
    source = hashlib.sha256(pathlib.Path(__file__).read_bytes()).hexdigest()[:8]
    kept = pathlib.Path(processor.cache_directory()).expanduser().parent
    kept /= '-'.join(('onednn', *versions, processor.processor(), source))
    if not kept.exists():
        paths = [str(root), os.environ.get('PYTHONPATH', '')]
        environment = os.environ | {'JAX_PLATFORMS': 'cpu', 'PYTHONPATH': os.pathsep.join(paths)}
        environment.pop('XLA_FLAGS', None)
        trial = 'from ensadv.cpu import onednn; onednn.try_out()'
        try:
            subprocess.run(
                [sys.executable, '-c', trial], env=environment, capture_output=True, check=True,
                stdin=subprocess.DEVNULL, timeout=_TRIAL_SECONDS,
            )  # fmt: skip
        except (OSError, subprocess.SubprocessError):
            return False
        # Where nothing can be kept, it is tried each time.
        with contextlib.suppress(OSError):
            kept.parent.mkdir(parents=True, exist_ok=True)
            kept.touch()
    _keep_out_of_the_cache()
    return True


def try_out() -> None:
    """Convolves as `conv` does for training and attacks, with a compilation cache.

    Raises:
      Exception: where that does not work. A version that has another configuration may also end
        the process.
    """
    rng = np.random.default_rng(0)
    x = rng.standard_normal((4, 9, 9, 8)).astype(np.float32)
    w = rng.standard_normal((3, 3, 8, 16)).astype(np.float32)
    with tempfile.TemporaryDirectory() as folder:
        jax.config.update('jax_compilation_cache_dir', folder)
        jax.config.update('jax_persistent_cache_min_compile_time_secs', 0)
        _keep_out_of_the_cache()
        for strides, padding, dilation, inputs_first in (
            ((1, 1), ((1, 1), (1, 1)), (1, 1), False),
            ((2, 2), ((0, 1), (0, 1)), (1, 1), False),
            ((1, 1), ((1, 2), (0, 1)), (1, 2), True),
        ):
            kernel = w.transpose(2, 0, 1, 3) if inputs_first else w
            ours = jax.jit(
                functools.partial(
                    conv, strides=strides, padding=padding, rhs_dilation=dilation,
                    inputs_first=inputs_first,
                )
            )(x, kernel)  # fmt: skip
            xla_own = jax.lax.conv_general_dilated(
                x, w, strides, padding, rhs_dilation=dilation,
                dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
            )  # fmt: skip
            np.testing.assert_allclose(ours, xla_own, rtol=1e-4, atol=1e-4)


def _keep_out_of_the_cache() -> None:
    """Has JAX write no program with oneDNN's operations to its compilation cache."""
    from jax._src import compilation_cache as jax_cache  # no public way keeps one program out

    put = jax_cache.put_executable_and_time

    @functools.wraps(put)
    def put_others(cache_key, module_name, executable, *args):
        if not any(TARGET in module.to_string() for module in executable.hlo_modules()):
            put(cache_key, module_name, executable, *args)

    jax_cache.put_executable_and_time = put_others


def conv(
    x: Array,
    w: Array,
    strides: Sequence[int],
    padding: Sequence[tuple[int, int]],
    rhs_dilation: Sequence[int] = (1, 1),
    inputs_first: bool = False,
) -> Array:
    """Convolves, as `lax.conv_general_dilated` does.

    Args:
      x: float32 [N, H, W, I].
      w: float32 [KH, KW, I, O], or [I, KH, KW, O] with `inputs_first`: oneDNN copies w into an
        order of its own in any case, so that transposing it costs nothing.
      strides, padding, rhs_dilation: for each of both spatial axes; pads are >= 0.

    Returns:
      float32 [N, H', W', O].
    """
    window, inputs = (w.shape[1:3], 0) if inputs_first else (w.shape[:2], 2)
    size = [
        (n + low + high - (taps - 1) * dilation - 1) // stride + 1
        for n, (low, high), taps, dilation, stride in zip(
            x.shape[1:3], padding, window, rhs_dilation, strides, strict=True
        )
    ]
    images = {'batch_dim': 0, 'feature_dim': 3, 'spatial_dims': [1, 2]}
    kernel = {
        'input_feature_dim': inputs,
        'output_feature_dim': 3,
        'spatial_dims': [1, 2] if inputs_first else [0, 1],
    }
    config = {
        'dims': 4,
        'input': {'dims': 4, 'data': images},
        'kernel': {'dims': 4, 'filter': kernel},
        'output': {'dims': 4, 'data': images},
        'window': {
            'size': window,
            'pad_left': [low for low, _ in padding],
            'pad_right': [high for _, high in padding],
            'strides': list(strides),
            'window_dilations': list(rhs_dilation),
        },
        'feature_groups': 1,
    }
    call = jax.ffi.ffi_call(
        TARGET,
        jax.ShapeDtypeStruct((len(x), *size, w.shape[-1]), x.dtype),
        custom_call_api_version=1,
        legacy_backend_config=json.dumps({'onednn_conv_config': config}),
    )
    return call(x, w)
