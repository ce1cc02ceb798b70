"""What computes convolutions and products on a CPU: kernels that are right while XLA is busy.

Eigen's, which XLA:CPU has as well, are wrong where a thread's queue of tasks is full and a sum has
more values than one block (benchmarks/full_queue.py).
"""

import math
import pathlib
import re

import jax
import jax.numpy as jnp
import pytest
from conftest import QUICK_COMPILE, TINY, overrides, run_main

BLOCK = 288  # values of a sum that Eigen takes at once, at least
ONE_THREAD = 2**20  # multiplications that Eigen does without tasks for other threads, at most


def sums_by_eigen(hlo: str) -> list[str]:
    """Returns the convolutions and products of a compiled program that Eigen may get wrong.

    Products whose first factor is transposed, as in gradients of weights, are right: Eigen sums
    them otherwise.
    """
    in_library = set(re.findall(r'fusion\(.*kind=kCustom, calls=%([\w.-]+)', hlo))
    defined = dict(re.findall(r'%([\w.-]+) = (\(.*?\)|\S+) ', hlo))

    def shape(operand):
        name, _, place = operand.strip().split('%')[-1].partition('#')  # of a tuple
        found = re.findall(r'\w+\[([\d,]*)\]', defined[name])[int(place or 0)]
        return [int(size) for size in found.split(',') if size]

    found, computation = [], ''
    for line in hlo.splitlines():
        if line and not line.startswith(' '):
            computation = line.removeprefix('ENTRY ').split(' ')[0].lstrip('%')
        operation = re.search(r' (convolution|dot)\(([^)]*)\)', line)
        if not operation or computation in in_library:
            continue
        kind, operands = operation.groups()
        first, second = map(shape, operands.split(', '))
        result = shape(line.split(' = ')[0])
        if kind == 'convolution':  # [KH, KW, I, O]
            values, is_right = math.prod(second[:-1]), False
        else:
            axis = int(re.search(r'lhs_contracting_dims={(\d+)}', line)[1])
            values, is_right = first[axis], axis < len(first) - 1
        if values > BLOCK and values * math.prod(result) > ONE_THREAD and not is_right:
            found.append(line.strip())
    return found


def test_what_goes_to_eigen_is_found():
    x, w = jnp.ones((8, 8, 8, 64)), jnp.ones((3, 3, 64, 64))
    convolve = lambda x, w: jax.lax.conv_general_dilated(
        x, w, (1, 1), 'SAME', dimension_numbers=('NHWC', 'HWIO', 'NHWC')
    )
    product = lambda x: x.reshape(512, 64) @ jnp.ones((64, 50))
    long_product = lambda x: x.reshape(32, 1024) @ jnp.ones((1024, 50))
    for function, arguments, goes_there in (
        (convolve, (x, w), True),
        (convolve, (x[..., :16], w[:, :, :16]), False),
        (product, (x,), False),
        (long_product, (x,), True),
    ):
        lowered = jax.jit(function).lower(*arguments)
        assert sums_by_eigen(lowered.compile().as_text()) == []
        by_eigen = lowered.compile(
            compiler_options={'xla_cpu_experimental_ynn_fusion_type': ''}
        ).as_text()
        assert bool(sums_by_eigen(by_eigen)) == goes_there


@pytest.mark.parametrize('kind', ['auto', 'separate'])
def test_a_run_computes_nothing_that_may_be_wrong(tmp_path, monkeypatch, kind):
    # What is read from the cache is not compiled, and what is not compiled is not written down.
    monkeypatch.setenv('JAX_ENABLE_COMPILATION_CACHE', 'false')
    fields = TINY | {
        'model.conv': kind,
        'train.steps': 1,
        'train.snapshot_every': 1,
        'attack.steps': 1,
        'ensemble.size': 2,
        'eval.attacks': ('clean', 'ifgsm1'),
    }
    flags = f'{QUICK_COMPILE} --xla_dump_to={tmp_path}/programs --xla_dump_hlo_as_text'
    command = ['--config=configs/singleadv.py', *overrides(fields), f'--workdir={tmp_path}/run']
    result = run_main(*command, xla_flags=flags)
    assert result.returncode == 0, result.stderr
    programs = list(pathlib.Path(tmp_path, 'programs').glob('*after_optimizations.txt'))
    texts = [path.read_text() for path in programs]
    # Training's program and the attack's are among them.
    assert sum('dot(' in text for text in texts) >= 2
    assert [sum_ for text in texts for sum_ in sums_by_eigen(text)] == []


def test_the_flag_that_gives_them_to_eigen_is_refused(tmp_path):
    flags = '--xla_cpu_experimental_ynn_fusion_type='
    command = ['--config=configs/singleadv.py', *overrides(TINY), f'--workdir={tmp_path}/run']
    result = run_main(*command, xla_flags=flags)
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1].startswith(
        f'error: XLA_FLAGS: expected without {flags[:-1]}'
    )
    assert not (tmp_path / 'run').exists()
