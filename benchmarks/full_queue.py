"""Whether convolutions and products stay right on a CPU while XLA's queues of tasks are full.

    python benchmarks/full_queue.py [--repeats=3]

One device, one compiled function: 300 independent convolutions, which fill the queues (1,024 tasks
for each thread), then each operation of the list 10 times, each after one of the last of them.
Prints how many results differ from the same operation alone by more than 0.1 % of its largest
value. With jaxlib 0.10.2 XLA's own convolutions and products that contract more than 288 values do
(README, Right on a CPU). Exit code 1 where one does that ensadv uses. For a CPU.
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
from ensadv import conv, xla_flags

_FLOOD, _COPIES = 300, 10
_NHWC = ('NHWC', 'HWIO', 'NHWC')


def _operations():
    """Returns {name: (whether ensadv uses it, function of two arrays, their shapes)}."""
    operations = {}
    for size, inputs, outputs, stride, window in (
        (32, 32, 160, 1, 3),
        (32, 64, 16, 1, 3),
        (32, 64, 64, 1, 3),
        (32, 64, 128, 2, 3),
        (16, 128, 32, 1, 3),
        (32, 320, 64, 1, 1),
        (8, 640, 640, 1, 3),
    ):
        shapes = ((32, size, size, inputs), (window, window, inputs, outputs))
        name = f'{window}x{window} {inputs} to {outputs}, {size}x{size}, stride {stride}'
        within = window**2 * inputs <= 288
        for kind, whose in (('grouped', "XLA's"), ('separate', "ensadv's"), ('onednn', "oneDNN's")):
            function = functools.partial(
                conv.get(kind),
                window_strides=(stride, stride),
                padding='SAME',
                dimension_numbers=_NHWC,
            )
            is_used = kind != 'grouped' or within
            operations[f'{whose} convolution {name}'] = is_used, function, shapes
    gradient = lambda x, g: lax.conv_general_dilated(x, g, (1, 1), 'VALID', dimension_numbers=_NHWC)
    shapes = ((3, 34, 34, 64), (32, 32, 64, 16))
    operations["XLA's gradient of the first weights, 3 to 16"] = True, gradient, shapes
    for rows, inner, columns in ((8192, 576, 16), (32768, 640, 320), (1000, 640, 10)):
        shapes = ((rows, inner), (inner, columns))
        operations[f'product {rows} x {inner} x {columns}'] = rows == 1000, jnp.matmul, shapes
    # As in gradients of weights: over all pixels.
    for inner, rows, columns in (
        (32768, 16, 64),
        (8192, 64, 64),
        (8192, 16, 640),
        (8192, 128, 128),
        (2048, 640, 640),
    ):
        shapes = ((inner, rows), (inner, columns))
        name = f'product {rows} x {inner} x {columns}, the first transposed'
        operations[name] = True, lambda a, b: a.T @ b, shapes
    strided = functools.partial(
        conv.get('separate'), window_strides=(2, 2), padding='SAME', dimension_numbers=_NHWC
    )
    images = (32, 16, 16, 320)
    of_images = lambda g, w: jax.vjp(lambda x: strided(x, w), jnp.zeros(images))[1](g)[0]
    shapes = ((32, 8, 8, 640), (3, 3, 320, 640))
    operations["ensadv's gradient of images, 3x3 320 to 640, stride 2"] = True, of_images, shapes
    return operations


def _normal(shape):
    return jnp.asarray(np.random.default_rng(0).standard_normal(shape, np.float32))


@functools.cache
def _flood():
    """Returns kernel and images of the convolutions that fill the queues."""
    images = _normal((32, 32, 32, 64))
    return _normal((3, 3, 64, 16)), [jnp.roll(images, i, 0) for i in range(_FLOOD)]


def _wrong(operation, shapes, repeats):
    """Returns how many of 10 * repeats results are wrong, and of the 300 * repeats before them."""
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
    for _ in range(repeats):
        flood, results = jax.block_until_ready(flooded(images, a, b))
        counts += sum(differs(x, right) for x in results), sum(map(differs, flood, flood_right))
    return tuple(map(int, counts))


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--repeats', type=int, default=3)
    args = parser.parse_args()
    load = os.getloadavg()[0]
    jax.config.update('jax_platforms', 'cpu')
    xla_flags.set_for_cpu()
    print('\n'.join(machine.describe(load)))
    results, before = _COPIES * args.repeats, _FLOOD * args.repeats
    print(f'\n| operation | wrong of {results} | wrong of the {before} before |')
    print('| --- | --: | --: |')
    failed = False
    for name, (is_used, operation, shapes) in _operations().items():
        wrong, before = _wrong(operation, shapes, args.repeats)
        failed |= is_used and wrong > 0
        print(f'| {name} | {wrong} | {before} |', flush=True)
    sys.exit(failed)


if __name__ == '__main__':
    main()
