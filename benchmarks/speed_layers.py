"""What limits a training step on a CPU: every convolution of a Wide ResNet, ours and PyTorch's.

    pip install -r requirements-benchmark.txt
    python benchmarks/speed_layers.py DEPTH WIDTH BATCH [--repeats=10]

Times each convolution alone, in three ways: forward, the gradient of its input, the gradient of its
weights; ours as `model.conv=onednn` compiles it, PyTorch's with channels_last and oneDNN,
float32, on all cores. Multiplied by how often a step of IFGSM-7 does each, these are the
convolutions' share of table 1 of speed.py. Also the rate of large matrix products, which no
convolution is faster than unless it does less (Winograd).
"""

import argparse
import collections
import os
import pathlib
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import jax
import jax.numpy as jnp
import numpy as np
import torch

from benchmarks import machine
from benchmarks.speed_tables import markdown
from ensadv.models import conv

ATTACK_STEPS = 7
TURNS = 3
PASSES = ('forward', 'input gradient', 'weight gradient')


def layers(depth, width):
    """Returns {(side of the input, channels in, out, side of the kernel, stride): how many}."""
    found = collections.Counter({(32, 3, 16, 3, 1): 1})
    channels, side = 16, 32
    for group in range(3):
        features = 16 * 2**group * width
        for block in range((depth - 4) // 6):
            stride = 2 if group and not block else 1
            if stride > 1 or channels != features:
                found[side, channels, features, 1, stride] += 1
            found[side, channels, features, 3, stride] += 1
            side //= stride
            found[side, features, features, 3, 1] += 1
            channels = features
    return found


def times_in_a_step(layer):
    """Returns how often a step makes each of PASSES for a layer."""
    of_images = layer == (32, 3, 16, 3, 1)
    # The gradient of the image is the attack's alone.
    return ATTACK_STEPS + 2, ATTACK_STEPS + (0 if of_images else 2), 2


def operations(layer, batch):
    """Returns the floating-point operations of one of PASSES."""
    side, channels, features, kernel, stride = layer
    return 2 * batch * (side // stride) ** 2 * kernel**2 * channels * features


def operations_in_a_step(depth, width, batch):
    """Returns the floating-point operations of all convolutions in a step of one member."""
    return sum(
        count * sum(times_in_a_step(layer)) * operations(layer, batch)
        for layer, count in layers(depth, width).items()
    )


def functions(layer, batch, rng):
    """Returns ({pass: ours}, {pass: PyTorch's}) of a layer: functions without arguments."""
    side, channels, features, kernel, stride = layer
    pad = kernel // 2
    x = rng.normal(size=(batch, side, side, channels)).astype(np.float32)
    w = rng.normal(size=(kernel, kernel, channels, features)).astype(np.float32)
    g = rng.normal(size=(batch, side // stride, side // stride, features)).astype(np.float32)
    convolve = conv.get('onednn')

    def forward(x, w):
        return convolve(
            x, w, (stride, stride), [(pad, pad)] * 2, dimension_numbers=('NHWC', 'HWIO', 'NHWC')
        )

    def input_gradient(g, w):
        return jax.vjp(lambda x: forward(x, w), jnp.zeros_like(x))[1](g)[0]

    def weight_gradient(g, x):
        return jax.vjp(lambda w: forward(x, w), jnp.zeros_like(w))[1](g)[0]

    compiled = (forward, (x, w)), (input_gradient, (g, w)), (weight_gradient, (g, x))
    ours = {}
    for name, (f, arrays) in zip(PASSES, compiled, strict=True):
        f, arrays = jax.jit(f), jax.device_put(arrays)
        ours[name] = lambda f=f, arrays=arrays: jax.block_until_ready(f(*arrays))

    last = torch.channels_last
    tx, tg = (
        torch.from_numpy(a.transpose(0, 3, 1, 2)).contiguous(memory_format=last) for a in (x, g)
    )
    tw = torch.from_numpy(w.transpose(3, 2, 0, 1).copy()).contiguous(memory_format=last)

    def backward(mask):
        return torch.ops.aten.convolution_backward(
            tg, tx, tw, None, [stride] * 2, [pad] * 2, [1, 1], False, [0, 0], 1, mask
        )

    theirs = {
        'forward': lambda: torch.nn.functional.conv2d(tx, tw, None, stride, pad),
        'input gradient': lambda: backward([True, False, False]),
        'weight gradient': lambda: backward([False, True, False]),
    }
    return ours, theirs


def seconds_of(sides, repeats):
    """Returns the median seconds of each function, each called several times on end, in turns."""
    times = [[] for _ in sides]
    for _ in range(TURNS):
        for f, own in zip(sides, times, strict=True):
            # PyTorch's threads spin for a while after each call, and would slow ours down.
            time.sleep(0.05)
            for number in range(repeats + 2):
                start = time.perf_counter()
                f()
                if number > 1:
                    own.append(time.perf_counter() - start)
    return [float(np.median(own)) for own in times]


def matrix_products(repeats):
    """Returns rows of matrix products: what, GFLOP/s of ours, of PyTorch's."""
    rows = []
    n = 2048
    a = np.ones((n, n), np.float32)
    tall = np.ones((65_536, 64), np.float32)
    for name, left, right, transposed in (
        (f'A B, {n} x {n} each', a, a, False),
        ('A B, A 65,536 x 64, B 64 x 64', tall, np.ones((64, 64), np.float32), False),
        ('A^T B, both 65,536 x 64 (as in gradients of weights)', tall, tall, True),
    ):
        product = (lambda a, b: a.T @ b) if transposed else (lambda a, b: a @ b)
        f = jax.jit(product)
        arrays, tensors = jax.device_put((left, right)), (torch.tensor(left), torch.tensor(right))
        seconds = seconds_of(
            [
                lambda f=f, arrays=arrays: jax.block_until_ready(f(*arrays)),
                lambda product=product, tensors=tensors: product(*tensors),
            ],
            repeats,
        )
        inner = left.shape[0] if transposed else left.shape[1]
        rows_out = left.shape[1] if transposed else left.shape[0]
        num_operations = 2 * inner * right.shape[1] * rows_out
        rows.append([name, *(f'{num_operations / s / 1e9:.0f}' for s in seconds)])
    return rows


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name in ('depth', 'width', 'batch'):
        parser.add_argument(name, type=int)
    parser.add_argument(
        '--repeats', type=int, default=10, help='timed calls of each in a turn (10)'
    )
    args = parser.parse_args()
    load = os.getloadavg()[0]
    jax.config.update('jax_platforms', 'cpu')
    torch.set_num_threads(os.cpu_count())
    torch.set_grad_enabled(False)
    rng = np.random.default_rng(0)
    rows, totals = [], np.zeros((len(PASSES), 2))
    for layer, count in sorted(layers(args.depth, args.width).items(), reverse=True):
        side, channels, features, kernel, stride = layer
        cells = [
            f'{channels} -> {features}, {side} x {side}, {kernel} x {kernel} / {stride}',
            count,
        ]
        ours, theirs = functions(layer, args.batch, rng)
        for number, name in enumerate(PASSES):
            seconds = seconds_of([ours[name], theirs[name]], args.repeats)
            times = count * times_in_a_step(layer)[number]
            totals[number] += times * np.array(seconds)
            cells += [
                ' / '.join(f'{1e3 * s:.2f}' for s in seconds),
                ' / '.join(f'{operations(layer, args.batch) / s / 1e9:.0f}' for s in seconds),
            ]
        rows.append(cells)
    columns = ['convolution', 'layers']
    columns += [text for name in PASSES for text in (f'{name}, ms', 'GFLOP/s')]
    print('\n'.join(machine.describe(load)))
    print(f'\nWRN-{args.depth}-{args.width}, batch {args.batch}; each cell: ensadv / PyTorch\n')
    print('\n'.join(markdown(columns, rows)))
    print(f'\nIn a step of IFGSM-{ATTACK_STEPS}, one member, seconds:\n')
    whole = np.concatenate([totals, totals.sum(0, keepdims=True)])
    print('\n'.join(markdown(
        ['convolutions', 'ensadv', 'PyTorch', 'PyTorch / ensadv'],
        [
            [name, f'{ours:.3f}', f'{theirs:.3f}', f'{theirs / ours:.2f}']
            for name, (ours, theirs) in zip((*PASSES, 'all'), whole, strict=True)
        ],
    )))  # fmt: skip
    of_all = operations_in_a_step(args.depth, args.width, args.batch)
    rates = ' and '.join(f'{of_all / s / 1e9:.0f}' for s in whole[-1])
    print(f'\n{of_all / 1e9:.0f} GFLOP, done at {rates} GFLOP/s.\n')
    columns = ['matrix product', 'ensadv (XLA), GFLOP/s', 'PyTorch, GFLOP/s']
    print('\n'.join(markdown(columns, matrix_products(args.repeats))))


if __name__ == '__main__':
    main()
