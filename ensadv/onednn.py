"""oneDNN's convolution, which XLA:CPU has inside and does not use by itself.

XLA's own convolutions are Eigen's. oneDNN's, which PyTorch computes with as well, take 0.73 to 0.99
of their time (3x3 kernels, stride 1, 16 to 64 channels, 8 and 64 images; two cores of an Intel Xeon
with AVX-512), and stay right where a thread's queue is full (`slices`; README, Right on a CPU).

JAX has no function for them, but XLA takes an operation by its name, with a configuration that is
this version's own: another one may end the process. So they are used with the version that they
were tried with, and nowhere else.

A program with such an operation cannot be written to JAX's compilation cache, as XLA takes the
operation for another kind when it writes it down: once `is_there` has been asked, JAX does not try.
"""

import functools
import importlib.metadata
import json
import platform
import sys
from collections.abc import Sequence

import jax
from jax import Array

_VERSION = '0.10.2'  # of jax and jaxlib
TARGET = '__onednn$convolution'  # XLA's name of the operation


def is_there() -> bool:
    """Returns whether convolutions of float32 can be given to oneDNN here."""
    return jax.default_backend() == 'cpu' and _is_in_this_jaxlib()


@functools.cache
def _is_in_this_jaxlib() -> bool:
    versions = {importlib.metadata.version(name) for name in ('jax', 'jaxlib')}
    if versions != {_VERSION} or (sys.platform, platform.machine()) != ('linux', 'x86_64'):
        return False
    _keep_out_of_the_cache()
    return True


def _keep_out_of_the_cache() -> None:
    """Has JAX write no program with oneDNN's operations to its compilation cache."""
    from jax._src import compilation_cache  # no public way keeps a single program out

    put = compilation_cache.put_executable_and_time

    @functools.wraps(put)
    def put_others(cache_key, module_name, executable, *args):
        if not any(TARGET in module.to_string() for module in executable.hlo_modules()):
            put(cache_key, module_name, executable, *args)

    compilation_cache.put_executable_and_time = put_others


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
