"""One, two and four devices compute the same run."""

import jax
import numpy as np
import pytest
from conftest import TINY, overrides, run_main, tiny_config
from etils import epath

from ensadv import build, checkpoints, evaluate, workdir

FIELDS = TINY | {'batch_norm.sync': True, 'train.steps': 3, 'train.snapshot_every': 3}


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    root = tmp_path_factory.mktemp('devices')
    for devices in (1, 2, 4):
        command = ['--config=configs/ensemble2adv.py', *overrides(FIELDS)]
        result = run_main(*command, f'--workdir={root}/{devices}', devices=devices)
        assert result.returncode == 0, result.stderr
    return epath.Path(root)


def weights(path):
    config = tiny_config('ensemble2adv')
    like = evaluate.Evaluator(config, build.dataset(config)).init_variables()
    return jax.device_get(checkpoints.open_snapshots(path).restore(3, like))


def test_the_trajectory_is_the_same(runs):
    one = weights(runs / '1')
    for devices in (2, 4):
        assert (
            workdir.read_record(runs / str(devices))['sessions'][0]['devices']['count'] == devices
        )
        other = weights(runs / str(devices))
        for a, b in zip(*map(jax.tree.leaves, (one, other)), strict=True):
            np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-4)


def test_the_evaluation_is_the_same(runs):
    ledgers = [
        workdir.read_arrays(workdir.evaluation_path(runs / str(n), 3, '.npz')) for n in (1, 2, 4)
    ]
    for other in ledgers[1:]:
        np.testing.assert_array_equal(other['label'], ledgers[0]['label'])
        for name in ('clean_margin', 'ifgsm2_margin'):
            np.testing.assert_allclose(other[name], ledgers[0][name], atol=5e-3)


def test_a_batch_that_does_not_divide_is_refused(tmp_path):
    command = ['--config=configs/singleadv.py', *overrides(TINY | {'train.batch_size': 10})]
    result = run_main(*command, f'--workdir={tmp_path}/run', devices=4)
    assert result.returncode == 2
    assert result.stderr.strip().splitlines()[-1] == (
        'error: train.batch_size: expected a multiple of the 4 devices, found 10'
    )
