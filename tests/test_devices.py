"""One, two and four devices compute the same run; the kind that is asked for is the one taken."""

import shutil
import sys
import types

import jax
import numpy as np
import pytest
from absl import logging
from conftest import TINY, overrides, run_main, tiny_config, variables_like
from etils import epath

from ensadv.data import datasets
from ensadv.errors import UserError
from ensadv.runtime import distributed
from ensadv.storage import checkpoints, files, workdir

pytestmark = pytest.mark.usefixtures('small_network')

FIELDS = TINY | {
    'epsilon': 0.08,
    'eval.num_examples': 90,
    'batch_norm.sync': True,
    'train.steps': 3,
    'train.snapshot_every': 3,
    'eval.long_attacks': ('pgd6', 'autoattack_short(gradient_steps=4,targets=2,queries=12)'),
    'eval.iterate_examples': 7,
}


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    root = tmp_path_factory.mktemp('devices')
    digits = datasets.load('digits')
    np.savez(root / 'extra.npz', image=255 - digits.image_train[:50], label=digits.label_train[:50])
    mixed = {'data.extra': f'{root}/extra.npz', 'data.extra_fraction': 0.4, 'data.cutmix': 1.0}
    for devices in (1, 2, 4):
        on_device = 'no' if devices == 4 else 'yes'
        fields = FIELDS | mixed | {'eval.inline': devices == 1, 'data.on_device': on_device}
        command = ['--config=configs/ensemble2adv.py', *overrides(fields)]
        result = run_main(*command, f'--workdir={root}/{devices}', devices=devices, small=True)
        assert result.returncode == 0, result.stderr
    return epath.Path(root)


def weights(path):
    config = tiny_config('ensemble2adv')
    return jax.device_get(checkpoints.open_snapshots(path).restore(3, variables_like(config)))


def test_the_trajectory_is_the_same(runs):
    one = weights(runs / '1')
    for devices in (2, 4):
        assert (
            workdir.read_record(runs / str(devices))['sessions'][0]['devices']['count'] == devices
        )
        other = weights(runs / str(devices))
        for a, b in zip(*map(jax.tree.leaves, (one, other)), strict=True):
            np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-4)


@pytest.fixture(scope='module')
def ledgers(runs):
    """What one snapshot's evaluation comes to on 1, 2 and 4 devices."""
    evaluated = {1: runs / '1'}
    for devices in (2, 4):
        evaluated[devices] = copy = runs / f'evaluated_on_{devices}'
        shutil.copytree(runs / '1', copy)
        (copy / 'eval').rmtree()
        result = run_main('--mode=evaluate', f'--workdir={copy}', devices=devices, small=True)
        assert result.returncode == 0, result.stderr
    for devices, path in evaluated.items():
        results = workdir.read_evaluations(path)[3]['attacks']
        assert {result['devices']['count'] for result in results} == {devices}
    return [
        files.read_arrays(workdir.evaluation_path(path, 3, '.npz')) for path in evaluated.values()
    ]


@pytest.mark.parametrize('name', ['clean', 'ifgsm2', 'pgd6', 'autoattack_short'])
def test_the_evaluation_is_the_same(ledgers, name):
    for other in ledgers[1:]:
        np.testing.assert_array_equal(other['label'], ledgers[0]['label'])
        np.testing.assert_array_equal(other[f'{name}_correct'], ledgers[0][f'{name}_correct'])
        np.testing.assert_allclose(other[f'{name}_margin'], ledgers[0][f'{name}_margin'], atol=5e-4)


def test_each_stage_of_autoattack_fells_the_same_examples(ledgers):
    felled_by = [ledger['autoattack_short_felled_by'] for ledger in ledgers]
    assert {-1, 0, 1, 2} <= set(felled_by[0])  # some stand, are errors, fall to different stages
    for other in felled_by[1:]:
        np.testing.assert_array_equal(other, felled_by[0])


def test_a_batch_that_does_not_divide_is_refused(tmp_path):
    command = ['--config=configs/singleadv.py', *overrides(TINY | {'train.batch_size': 10})]
    result = run_main(*command, f'--workdir={tmp_path}/run', devices=4)
    assert result.returncode == 2
    assert result.stderr.strip().splitlines()[-1] == (
        'error: train.batch_size: expected a multiple of the 4 devices, found 10'
    )


@pytest.mark.parametrize('wanted', ['auto', 'cpu', 'gpu', 'tpu'])
@pytest.mark.parametrize('found', ['cpu', 'gpu', 'tpu'])
def test_only_the_kind_of_device_that_is_asked_for_will_do(monkeypatch, wanted, found):
    monkeypatch.setattr(jax, 'devices', lambda: [types.SimpleNamespace(platform=found)])
    if wanted in ('auto', found):
        distributed.check_device(wanted)
        return
    with pytest.raises(UserError, match=f'device: expected {wanted}, found {found}'):
        distributed.check_device(wanted)


@pytest.mark.parametrize('terminal', [True, False])
@pytest.mark.parametrize('verbosity', [logging.INFO, logging.WARNING])
def test_what_is_told_is_seen_once(monkeypatch, capsys, terminal, verbosity):
    logged = []
    monkeypatch.setattr(sys.stderr, 'isatty', lambda: terminal)
    monkeypatch.setattr(logging, 'get_verbosity', lambda: verbosity)
    monkeypatch.setattr(logging, 'info', lambda text, *values: logged.append(text % values))
    distributed.tell('a line')
    assert logged == ['a line'] * (verbosity == logging.INFO)
    printed = capsys.readouterr().err
    assert printed == ('a line\n' if terminal and not logged else '')
