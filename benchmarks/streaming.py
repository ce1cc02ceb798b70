"""Trains on a file of images far larger than memory, and measures what memory that takes.

    python benchmarks/streaming.py [--images=20_000_000] [--limit=4] [--steps=40]

The file holds images of 32 x 32 x 3 pixels and lies in a temporary folder. It is sparse: it has its
whole size, and takes none of the disk, so reading it is faster than a disk's. Training may have
--limit GiB of memory of its own (RLIMIT_DATA), which a memory map is not. Prints a table.
"""

import argparse
import functools
import os
import pathlib
import re
import resource
import subprocess
import sys
import tempfile
import time

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from benchmarks import machine

SHAPE = (32, 32, 3)
FIELDS = {
    'data.name': 'npz',
    'data.extra_fraction': 0.7,
    'data.cutmix': 1.0,
    'model.depth': 10,
    'model.width': 1,
    'train.batch_size': 128,
    'train.adversarial_weight': 0.0,
    'train.log_every': 10,
    'train.steps_per_call': 5,
    'eval.inline': False,
}
MEASURED = {
    'VmData': "the process's own, which RLIMIT_DATA limits",
    'RssAnon': "the process's own, in memory",
    'RssFile': 'of files, in memory, which the system takes back where it is short',
}


def write(folder: pathlib.Path, n: int) -> None:
    """Writes n images that are all black, and a small data set to add them to."""
    (folder / 'extra').mkdir()
    np.lib.format.open_memmap(folder / 'extra' / 'image.npy', 'w+', np.uint8, (n, *SHAPE))
    rng = np.random.default_rng(0)
    np.save(folder / 'extra' / 'label.npy', rng.integers(0, 10, n, np.uint8))
    arrays = {
        f'{kind}_{split}': values
        for split in ('train', 'test')
        for kind, values in (
            ('image', rng.integers(0, 256, (1000, *SHAPE), np.uint8)),
            ('label', np.arange(1000) % 10),
        )
    }
    np.savez(folder / 'my.npz', **arrays)


def train(folder: pathlib.Path, steps: int, limit: int) -> tuple[dict[str, int], list[float], str]:
    """Returns the most bytes of each kind of memory, examples per second, and what is streamed."""
    fields = FIELDS | {
        'data.path': folder / 'my.npz', 'data.extra': f'{folder}/extra', 'train.steps': steps,
    }  # fmt: skip
    command = [sys.executable, 'main.py', '--config=configs/baseline.py']
    command += [f'--config.{field}={value}' for field, value in fields.items()]
    log = folder / 'log.txt'
    with log.open('w') as file:
        process = subprocess.Popen(
            [*command, f'--workdir={folder}/run'], cwd=machine.ROOT, stdout=file, stderr=file,
            preexec_fn=functools.partial(resource.setrlimit, resource.RLIMIT_DATA, (limit, limit)),
        )  # fmt: skip
    most = dict.fromkeys(MEASURED, 0)
    while process.poll() is None:
        found = pathlib.Path(f'/proc/{process.pid}/status').read_text()
        for name in most:
            if match := re.search(rf'^{name}:\s+(\d+) kB', found, re.MULTILINE):
                most[name] = max(most[name], 1024 * int(match[1]))
        time.sleep(0.2)
    text = log.read_text()
    if process.returncode:
        sys.exit(text)
    rates = [float(rate) for rate in re.findall(r'examples_per_second=([\d.]+)', text)]
    return most, rates, re.search(r'streaming .*', text)[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--images', type=int, default=20_000_000)
    parser.add_argument('--limit', type=float, default=4, help='GiB')
    parser.add_argument('--steps', type=int, default=40)
    args, load = parser.parse_args(), os.getloadavg()[0]
    with tempfile.TemporaryDirectory(prefix='streaming-') as name:
        folder = pathlib.Path(name)
        write(folder, args.images)
        size = (folder / 'extra' / 'image.npy').stat().st_size
        most, rates, told = train(folder, args.steps, int(args.limit * 2**30))
    gib = lambda number: f'{number / 2**30:.2f} GiB'
    rows = {
        f'file of {args.images:,} images': size,
        'limit of memory (RLIMIT_DATA)': args.limit * 2**30,
        **{f'{words} ({kind}), at most': most[kind] for kind, words in MEASURED.items()},
    }
    print('# Training on a file larger than memory\n')
    print('\n'.join(machine.describe(load, ('jax', 'jaxlib', 'numpy'))))
    print(f'\n"{told}"; {args.steps} steps of {FIELDS["train.batch_size"]} examples.')
    print('\n| memory | size |\n| --- | --- |')
    print('\n'.join(f'| {name} | {gib(value)} |' for name, value in rows.items()))
    print(
        f'\nExamples per second, each over {FIELDS["train.log_every"]} steps: '
        f'{", ".join(f"{rate:.0f}" for rate in rates)}.'
    )


if __name__ == '__main__':
    main()
