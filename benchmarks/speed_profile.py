"""What a training step on a CPU spends its time on: Linux's `perf` looks 499 times a second.

    pip install -r requirements-benchmark.txt
    python benchmarks/speed_profile.py DEPTH WIDTH MEMBERS BATCH [--steps=20]

Steps of IFGSM-7, ours and then PyTorch's (by torch.compile), each side by itself. Every sample
belongs to a kind of code, by the names of functions: what multiplies matrices and convolves, what
puts matrices in the order in which they are multiplied, the operating system (new memory, threads
that sleep and wake), threads without work, and all else, nearly all of it what XLA and PyTorch
compile. The share of samples times the CPU seconds per step are a kind's CPU seconds per step. Also
how many operations the convolutions of a step are, and how fast a large matrix product is, which is
the limit of any direct convolution; and, by JAX's own profiler, how long a convolution of oneDNN's
takes until XLA's threads are at work on it.

Needs `perf` and the right to use it (kernel.perf_event_paranoid at most 2).
"""

import argparse
import bisect
import collections
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

# oneDNN, which both sides multiply with, tells perf the names of what it compiles.
os.environ['ONEDNN_JIT_PROFILE'] = '2'
os.environ.setdefault('OMP_WAIT_POLICY', 'PASSIVE')  # or PyTorch's threads would count as busy

import jax
import numpy as np
import torch

from benchmarks import adversarial_step, machine, speed_layers
from benchmarks.speed_tables import COMPILED, OURS, markdown
from benchmarks.speed_workers import set_up
from ensadv.cpu import onednn

# The first that matches the library or the function's name.
KINDS = {
    'kernel of the operating system': r'^\[(kernel|guest)',
    'packing of matrices': r'pack|reorder|im2col',
    'matrix products and convolutions': r'gemm|gebp|brgemm|jit_avx|conv|contract|_kernel_driver',
    'threads that look for work': r'ThreadPool|RunQueue|EventCount|gomp|sched_yield|pthread',
}
REST = 'all else: elementwise, sums, transpositions'


def kind_of(library, function):
    """Returns the kind of code that a sample was in, a key of KINDS or REST."""
    for kind, pattern in KINDS.items():
        if re.search(pattern, library) or re.search(pattern, function):
            return kind
    return REST


def shares(report):
    """Returns {kind: share of samples} of what `perf report` prints: share, library, function."""
    found = collections.Counter()
    for line in report.splitlines():
        match = re.match(r'\s*([\d.]+)%\s+(\[JIT\] tid \d+|\S+)\s+\[.\]\s+(.*)', line)
        if match:
            found[kind_of(match[2], match[3])] += float(match[1]) / 100
    return found


def profiled(step, num_steps):
    """Makes steps while perf looks; of ours they are one call, as training makes them.

    Returns:
      {kind: CPU seconds per step}, and seconds per step.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = f'{folder}/perf.data'
        perf = subprocess.Popen(
            ['perf', 'record', '--quiet', '-e', 'cpu-clock', '-F', '499', '-p', str(os.getpid()),
             '-o', file],
        )  # fmt: skip
        time.sleep(2)
        if perf.poll() is not None:
            sys.exit('perf does not run here')
        wall, cpu = time.perf_counter(), time.process_time()
        step(num_steps)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        perf.send_signal(signal.SIGINT)
        perf.wait()
        report = subprocess.run(
            ['perf', 'report', '-i', file, '--stdio', '--no-children', '-F',
             'overhead,dso,symbol'],
            capture_output=True, text=True, check=True,
        ).stdout  # fmt: skip
    seconds = {kind: share * cpu / num_steps for kind, share in shares(report).items()}
    return seconds, wall / num_steps


def waits(step, num_steps):
    """Makes steps while JAX's profiler looks; returns what oneDNN's convolutions wait for.

    One of them begins in one thread of XLA's, which hands parts to another, computes its own and
    waits for the rest. The times are those of one that has the other thread to itself, as nearly
    all have in attacks; hence medians.

    Returns:
      How many convolutions there are in a step, and the medians of the seconds until parts are
      handed out, from there until another thread begins, and from its end to the convolution's.
      None where JAX's profiler names none of that.
    """
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, profiler_options=options):
            step(num_steps)
        (file,) = pathlib.Path(folder).rglob('*.xplane.pb')
        planes = jax.profiler.ProfileData.from_file(str(file)).planes
        events = [
            (event.start_ns, event.duration_ns, event.name)
            for plane in planes
            for line in plane.lines
            for event in line.events
        ]
    marks = {
        mark: sorted(start for start, _, name in events if name == f'ThreadpoolListener::{mark}')
        for mark in ('Record', 'StartRegion', 'StopRegion')
    }
    rows, count = [], 0
    for start, duration, name in events:
        if onednn.TARGET not in name or name.startswith('end: '):
            continue
        count += 1
        end = start + duration
        found = {
            mark: times[bisect.bisect(times, start) : bisect.bisect(times, end)]
            for mark, times in marks.items()
        }
        if all(found.values()):
            handed, begun, done = found['Record'][0], found['StartRegion'][0], found['StopRegion']
            rows.append((handed - start, begun - handed, end - done[-1]))
    if not rows:
        return None
    return count / num_steps, *(np.median(rows, axis=0) / 1e9)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name in ('depth', 'width', 'members', 'batch'):
        parser.add_argument(name, type=int)
    parser.add_argument('--steps', type=int, default=20, help='of each side (20)')
    args = parser.parse_args()
    if shutil.which('perf') is None:
        parser.exit(2, 'perf: not found; it is in the package linux-perf or linux-tools\n')
    load = os.getloadavg()[0]
    set_up('cpu')
    config = adversarial_step.step_config(
        args.depth, args.width, args.members, args.batch, speed_layers.ATTACK_STEPS
    )
    ours = adversarial_step.Ours(config)
    steps = {OURS: ours.step, COMPILED: adversarial_step.Peer(ours, True).step}
    found, walls = {}, {}
    for side, step in steps.items():
        step()
        found[side], walls[side] = profiled(step, args.steps)
    waited = waits(ours.step, min(args.steps, 4))  # a step has some ten thousand events
    operations = args.members * speed_layers.operations_in_a_step(
        args.depth, args.width, args.batch
    )
    product, *_ = speed_layers.matrix_products(10)
    print('\n'.join(machine.describe(load)))
    print(f'\nWRN-{args.depth}-{args.width}, members: {args.members}, batch {args.batch}, '
          f'{args.steps} steps of each side; CPU seconds per step\n')  # fmt: skip
    print('\n'.join(describe(found, walls, 'step', operations, product, waited)))


def describe(found, walls, what, operations, product, waited):
    """Returns the profile's lines.

    Args:
      found: {side: {kind: CPU seconds}}, and walls: {side: seconds}, for one of `what` each.
      what: 'step' or 'attack'.
      operations: floating-point operations of the convolutions of one.
      product: a row of `speed_layers.matrix_products`.
      waited: what `waits` returned.
    """
    rows = [
        [kind, *(f'{found[side].get(kind, 0.0):.3f}' for side in walls)] for kind in (*KINDS, REST)
    ]
    rows.append(['all', *(f'{sum(found[side].values()):.3f}' for side in walls)])
    rows.append([f'seconds per {what}', *(f'{wall:.3f}' for wall in walls.values())])
    rows.append(['GFLOP/s', *(f'{operations / wall / 1e9:.0f}' for wall in walls.values())])
    lines = [
        *markdown(['', *walls], rows),
        '',
        f'The convolutions of one {what} are {operations / 1e9:.0f} GFLOP. {product[0]}: '
        f'{product[1]} GFLOP/s by XLA, {product[2]} by PyTorch.',
    ]
    if waited:
        count, handed, begun, done = waited
        milliseconds = count * (handed + begun + done) * 1e3
        lines += [
            '',
            f'One {what} has {count:.0f} convolutions of oneDNN. Medians: one takes '
            f'{handed * 1e6:.0f} us until it hands parts to another thread, '
            f'{begun * 1e6:.0f} us more until that begins, and {done * 1e6:.0f} us from its end '
            f"to the convolution's, in all {milliseconds:.0f} ms, in which one core at most "
            'computes.',
        ]
    return lines


if __name__ == '__main__':
    torch.set_num_threads(os.cpu_count())
    main()
