"""A workdir that is not on this machine's disk: gs:// in memory, and TensorFlow's ram://."""

import json
import warnings

import fsspec
import jax
import numpy as np
import object_store
import pytest
from conftest import ROOT, tiny_config, variables_like
from etils import epath
from etils.epath import backend, gpath, register

from ensadv import study
from ensadv.errors import UserError
from ensadv.report import write as report
from ensadv.storage import checkpoints, files, leases, metrics
from ensadv.storage import workdir as workdir_lib

pytestmark = pytest.mark.usefixtures('small_network')


@pytest.fixture(scope='module')
def bucket():
    """Makes gs:// the store in memory: for epath, by fsspec, and for Orbax, by TensorStore."""
    # It warns when Orbax imports it.
    with warnings.catch_warnings(action='ignore'):
        import google.cloud.storage  # noqa: F401
    patch = pytest.MonkeyPatch()
    # With TensorFlow epath would take its file system, which knows Google's address alone.
    patch.setenv('EPATH_USE_TF', 'false')
    gpath._is_tf_installed.cache_clear()
    backend.fsspec_backend._get_filesystem.cache_clear()
    fsspec.register_implementation('gcs', object_store.FileSystem, clobber=True)
    fsspec.register_implementation('gs', object_store.FileSystem, clobber=True)
    with object_store.serving() as address:
        patch.setenv('TENSORSTORE_GCS_HTTP_URL', address)
        patch.setenv('STORAGE_EMULATOR_HOST', address)
        patch.setenv('GOOGLE_AUTH_TOKEN_FOR_TESTING', 'none')
        yield files.absolute('gs://bucket')
    patch.undo()
    gpath._is_tf_installed.cache_clear()
    backend.fsspec_backend._get_filesystem.cache_clear()


@pytest.fixture
def without_tensorboard(monkeypatch):
    """TensorBoard's files are TensorFlow's to write: see the last test."""
    for name in ('_import_clu', '_import_tensorboard'):
        monkeypatch.setattr(metrics, name, lambda: None)


def weights(config, path, step):
    tree = checkpoints.open_snapshots(path).restore(step, variables_like(config))
    return [leaf.tobytes() for leaf in jax.tree.leaves(jax.device_get(tree))]


def without_times(evaluations):
    text = json.dumps(evaluations, sort_keys=True)
    return json.loads(text, object_hook=lambda d: {k: v for k, v in d.items() if k != 'seconds'})


def test_a_folder_appears_when_all_in_it_is_written(bucket):
    path = bucket / 'exported' / 'out'
    files.check_is_free(path, '--to')
    with files.appearing(path, 'one') as folder:
        (folder / 'one').write_bytes(b'1')
        (folder / 'two').write_text('2')
        assert not path.exists()
    assert sorted(each.name for each in path.iterdir()) == ['one', 'two']
    assert [each.name for each in path.parent.iterdir()] == ['out']
    with pytest.raises(UserError, match='is there already'):
        files.check_is_free(path, '--to')


@pytest.mark.usefixtures('without_tensorboard')
def test_a_run_goes_on_and_is_evaluated_and_reported_on(bucket, tmp_path):
    here, there = epath.Path(tmp_path) / 'run', bucket / 'runs' / 'run'
    changes = {'train__snapshot_every': 1, 'eval__examples': 2}
    config = tiny_config('baseline', **changes)
    study.run_one(config, here, 'here')
    for steps in (2, 4):
        study.run_one(tiny_config('baseline', **changes, train__steps=steps), there, 'there')
    sessions = workdir_lib.read_record(there)['sessions']
    assert [session['step'] for session in sessions] == [0, 2]
    # The same weights, to the bit, and the same results; what is done is deleted alike.
    kept = checkpoints.open_snapshots(there).steps()
    assert 4 in kept
    assert weights(config, there, 4) == weights(config, here, 4)
    evaluations = [workdir_lib.read_evaluations(path) for path in (here, there)]
    assert list(evaluations[0]) == [1, 2, 3, 4]
    for step in (1, 3, 4):
        assert without_times(evaluations[0][step]) == without_times(evaluations[1][step])
        ledgers = [
            workdir_lib.read_ledger(workdir_lib.evaluation_path(path, step, '.npz'))
            for path in (here, there)
        ]
        for key in ledgers[0].keys() & ledgers[1].keys():
            np.testing.assert_array_equal(ledgers[0][key], ledgers[1][key])
    assert workdir_lib.read_examples(there, 4)['adversarial'].shape == (2, 8, 8, 1)
    page = report.write(bucket / 'runs')
    assert page.read_text().startswith('<!')
    names = object_store.OBJECTS.names('bucket/runs/')
    # Nothing half done is left, and nothing fell onto this machine's disk.
    assert not [name for name in names if '.tmp' in name or '/claims/' in name]
    assert any(name.endswith('table1.csv') for name in names)
    assert not (ROOT / 'gs:').exists()


@pytest.mark.usefixtures('without_tensorboard')
def test_another_config_and_damage_are_told_there_too(bucket):
    path = bucket / 'other'
    config = tiny_config('baseline', eval__inline=False, train__steps=2)
    study.run_one(config, path, 'run')
    with pytest.raises(UserError, match=r'belongs to a run with another config \(seed: 0 -> 3\)'):
        study.run_one(
            tiny_config('baseline', eval__inline=False, train__steps=4, seed=3), path, 'run'
        )
    (path / 'config.json').write_text('{"config":')
    with pytest.raises(UserError, match='not valid JSON'):
        workdir_lib.read_record(path)


def test_leases_there_have_one_holder(bucket):
    first, second = leases.open_leases(bucket), leases.open_leases(bucket)
    assert first.take('4')
    assert not second.take('4')
    assert second.take('5')
    first.beat()
    assert first.still_held('4')
    first.release('4')
    assert second.take('4')
    second.close()
    assert not object_store.OBJECTS.names('bucket/claims')


@pytest.fixture
def ram(monkeypatch):
    """Gives a path on TensorFlow's file system in memory, which epath reaches as it does gs://."""
    monkeypatch.setattr(gpath, '_URI_PREFIXES', (*gpath._URI_PREFIXES, 'ram://'))
    monkeypatch.setattr(gpath, '_URI_SCHEMES', gpath._URI_SCHEMES | {'ram'})
    monkeypatch.setitem(gpath._URI_MAP_ROOT, 'ram://', '/ram/')
    monkeypatch.setitem(gpath._PREFIX_TO_BACKEND, 'ram', backend.tf_backend)
    monkeypatch.setitem(register._URI_PREFIXES_TO_CLS, 'ram://', gpath.PosixGPath)
    return files.absolute('ram://bucket') / 'run'


def test_files_through_tensorflows_file_systems(ram):
    assert workdir_lib.read_record(ram) is None
    assert workdir_lib.read_evaluations(ram) == {}
    files.write_json(ram / 'a.json', {'a': 1})
    files.write_json(ram / 'a.json', {'a': 2})
    assert files.read_json(ram / 'a.json') == {'a': 2}
    for step in (10, 9):
        files.write_json(workdir_lib.evaluation_path(ram, step, '.json'), {'step': step})
    assert list(workdir_lib.read_evaluations(ram)) == [9, 10]
    workdir_lib.write_examples(ram, 9, {'label': np.arange(3)})
    assert workdir_lib.read_examples(ram, 9)['label'].tolist() == [0, 1, 2]
    files.write_arrays(workdir_lib.evaluation_path(ram, 9, '.npz'), {'label': np.arange(2)})
    path = workdir_lib.evaluation_path(ram, 9, '.npz')
    assert workdir_lib.read_ledger(path)['label'].tolist() == [0, 1]
    with pytest.raises(UserError, match='found no such file'):
        workdir_lib.read_ledger(workdir_lib.evaluation_path(ram, 8, '.npz'))
    first, second = leases.open_leases(ram), leases.open_leases(ram)
    assert first.take('4')
    assert not second.take('4')
    first.beat()
    assert first.still_held('4')
    first.close()
    assert second.take('4')
    second.close()
    assert not [file.name for file in ram.iterdir() if 'tmp' in file.name]


def test_tensorboards_files_on_tensorflows_file_systems(ram):
    import tensorflow as tf

    log = metrics.TrainingLog(
        ram, label='run', steps=4, first_step=0, profile_step=0, profile_steps=0
    )
    log.hyperparameters({'seed': 0})
    log.scalars(4, {'loss': 0.5})
    log.close()
    events = [
        tf.compat.v1.Event.FromString(record.numpy())
        for file in ram.glob('events.*')
        for record in tf.data.TFRecordDataset(str(file))
    ]
    values = {
        value.tag: float(tf.make_ndarray(value.tensor))
        for event in events
        for value in event.summary.value
        if value.tag == 'loss'
    }
    assert values == {'loss': 0.5}
    assert {event.step for event in events} >= {4}
