"""Whether convolutions and products stay right on a CPU while XLA's queues of tasks are full.

    python benchmarks/full_queue.py [--repeats=2] [--rows=TEXT]
    XLA_FLAGS=--xla_force_host_platform_device_count=2 python benchmarks/full_queue.py
    XLA_FLAGS=--xla_cpu_experimental_ynn_fusion_type= python benchmarks/full_queue.py

One compiled function on each device: 300 independent convolutions, which fill the queues (1,024
tasks for each thread), then each operation of the list 10 times, each after one of the last of
them. Prints how many results differ from the same operation alone by more than 0.1 % of its largest
value; exit code 1 where one does. The third command takes convolutions and products from the
library that XLA:CPU has for them and gives them to Eigen, whose results are then wrong. For a CPU.
"""

import argparse
import functools
import os
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from benchmarks import machine
from ensadv.models import conv

_FLOOD, _COPIES = 300, 10
_NHWC = ('NHWC', 'HWIO', 'NHWC')


def _operations():
    """Returns {name: (function of two arrays, their shapes)}."""
    operations = {}
    for size, inputs, outputs, stride, window in (
        (32, 32, 160, 1, 3), (32, 64, 16, 1, 3), (32, 64, 64, 1, 3), (32, 64, 128, 2, 3),
        (16, 128, 32, 1, 3), (32, 320, 64, 1, 1), (8, 640, 640, 1, 3), (2, 128, 128, 1, 3),
    ):  # fmt: skip
        shapes = ((32, size, size, inputs), (window, window, inputs, outputs))
        name = f'{window}x{window} {inputs} to {outputs}, {size}x{size}, stride {stride}'
        for kind, whose in (('grouped', "XLA's"), ('separate', "ensadv's"), ('onednn', "oneDNN's")):
            function = functools.partial(
                conv.get(kind),
                window_strides=(stride, stride),
                padding='SAME',
                dimension_numbers=_NHWC,
            )
            operations[f'{whose} convolution {name}'] = function, shapes
    gradient = lambda x, g: lax.conv_general_dilated(x, g, (1, 1), 'VALID', dimension_numbers=_NHWC)
    shapes = ((3, 34, 34, 64), (32, 32, 64, 16))
    operations["XLA's gradient of the first weights, 3 to 16"] = gradient, shapes
    for rows, inner, columns in ((8192, 576, 16), (32768, 640, 320), (1000, 640, 10)):
        shapes = ((rows, inner), (inner, columns))
        operations[f'product {rows} x {inner} x {columns}'] = jnp.matmul, shapes
    # As in gradients of weights: over all pixels.
    for inner, rows, columns in (
        (32768, 16, 64), (8192, 64, 64), (8192, 16, 640), (8192, 128, 128), (2048, 640, 640),
        (512, 256, 10),
    ):  # fmt: skip
        shapes = ((inner, rows), (inner, columns))
        name = f'product {rows} x {inner} x {columns}, the first transposed'
        operations[name] = lambda a, b: a.T @ b, shapes
    images = (32, 16, 16, 320)
    shapes = ((32, 8, 8, 640), (3, 3, 320, 640))
    for kind, whose in (('grouped', "XLA's"), ('separate', "ensadv's")):
        strided = functools.partial(
            conv.get(kind), window_strides=(2, 2), padding='SAME', dimension_numbers=_NHWC
        )
        of_images = lambda g, w, strided=strided: jax.vjp(
            lambda x: strided(x, w), jnp.zeros(images)
        )[1](g)[0]
        name = f'{whose} gradient of images, 3x3 320 to 640, stride 2'
        operations[name] = of_images, shapes
    return operations


def _normal(shape):
    return jnp.asarray(np.random.default_rng(0).standard_normal(shape, np.float32))


@functools.cache
def _flood():
    """Returns kernel and images of the convolutions that fill the queues."""
    images = _normal((32, 32, 32, 64))
    return _normal((3, 3, 64, 16)), [jnp.roll(images, i, 0) for i in range(_FLOOD)]


def _wrong(operation, shapes, repeats):
    """Returns how many results of the operation are wrong, and of the convolutions before them."""
    kernel, images = _flood()
    a, b = map(_normal, shapes)
    convolve = jax.jit(
        lambda x, w: lax.conv_general_dilated(x, w, (1, 1), 'SAME', dimension_numbers=_NHWC)
    )

    @jax.jit
    def flooded(images, a, b):
        flood = [convolve(x, kernel) for x in images]
        # Nothing is above infinity, which XLA does not know.
        awaited = [jnp.where(y[0, 0, 0, 0] > jnp.inf, 0, a) for y in flood[-_COPIES:]]
        return flood, [operation(lax.optimization_barrier(x), b) for x in awaited]

    expected = jax.jit(operation)(a, b), *[convolve(x, kernel) for x in images]
    right, *flood_right = map(np.asarray, expected)
    differs = lambda x, y: bool(np.abs(np.asarray(x) - y).max() > 1e-3 * np.abs(y).max())
    counts = np.zeros(2, int)
    inputs = [jax.device_put((images, a, b), device) for device in jax.devices()]
    for _ in range(repeats):
        for flood, results in jax.block_until_ready([flooded(*arrays) for arrays in inputs]):
            counts += (
                sum(differs(x, right) for x in results),
                sum(map(differs, flood, flood_right)),
            )
    return tuple(map(int, counts))


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--repeats', type=int, default=2)
    parser.add_argument('--rows', default='', help='only operations whose names have this text')
    args = parser.parse_args()
    load = os.getloadavg()[0]
    jax.config.update('jax_platforms', 'cpu')
    print('\n'.join(machine.describe(load, ('jax', 'jaxlib'))))
    runs = args.repeats * jax.device_count()
    print(f'- {jax.device_count()} devices')
    print(f'\n| operation | wrong of {_COPIES * runs} | wrong of the {_FLOOD * runs} before |')
    print('| --- | --: | --: |')
    jax.block_until_ready(jnp.ones((999, 999)) @ jnp.ones((999, 999)))  # has XLA make its threads
    total = 0
    for name, (operation, shapes) in _operations().items():
        if args.rows in name:
            counts = _wrong(operation, shapes, args.repeats)
            total += sum(counts)
            print(f'| {name} | {" | ".join(map(str, counts))} |', flush=True)
    sys.exit(total > 0)


if __name__ == '__main__':
    main()
