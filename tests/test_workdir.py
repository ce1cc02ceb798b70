"""The files of a workdir: whole, or not there, and never a wrong number that looks right."""

import pathlib
import resource

import pytest
from etils import epath
from report_runs import run_config, write_ensemble, write_run

from ensadv.errors import StorageError, UserError
from ensadv.storage import files
from ensadv.storage import workdir as workdir_lib

CONTENT = {'accuracy': 0.7251, 'steps': [1, 2], 'nested': {'none': None}}


def test_json_comes_back(workdir):
    files.write_json(workdir / 'a.json', CONTENT)
    assert files.read_json(workdir / 'a.json') == CONTENT
    # Of somebody else, without a checksum.
    (workdir / 'b.json').write_text('{"a": 1}')
    assert files.read_json(workdir / 'b.json') == {'a': 1}


@pytest.mark.parametrize(
    'change',
    [
        lambda text: text.replace('0.7251', '0.7351'),
        lambda text: text.replace('accuracy', 'accuracz'),
        lambda text: text[:-10],
        lambda text: '',
        lambda text: '\x00' * len(text),
    ],
)
def test_changed_json_is_refused(workdir, change):
    path = workdir / 'a.json'
    files.write_json(path, CONTENT)
    path.write_text(change(path.read_text()))
    with pytest.raises(UserError, match=r'a\.json: (not valid JSON|is not what was written)'):
        files.read_json(path)


def test_json_that_is_no_text_is_refused(workdir):
    workdir.mkdir()
    (workdir / 'a.json').write_bytes(b'\xff\xfe{')
    (workdir / 'b.json').write_text(100_000 * '[')
    for name in ('a.json', 'b.json'):
        with pytest.raises(UserError, match='not valid JSON'):
            files.read_json(workdir / name)


def test_a_full_disk_leaves_the_old_file(workdir):
    path = workdir / 'a.json'
    files.write_json(path, CONTENT)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000, limits[1]))
    try:
        with pytest.raises(StorageError, match=r'a\.json: cannot be written: File too large'):
            files.write_json(path, {'long': 2_000 * 'a'})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert files.read_json(path) == CONTENT
    assert [path.name for path in workdir.iterdir()] == ['a.json']


def test_no_permission_is_one_line(workdir):
    workdir.mkdir()
    (workdir / 'file').write_text('')
    with pytest.raises(StorageError, match=r'cannot be written: (Not a directory|File exists)'):
        files.write_json(workdir / 'file' / 'a.json', CONTENT)


def test_put_aside(workdir):
    path = workdir / 'a.json'
    files.write_json(path, CONTENT)
    files.put_aside(path)
    files.put_aside(path)  # another process was faster
    assert [path.name for path in pathlib.Path(workdir).iterdir()] == ['a.json.damaged']


def test_a_ledger_is_a_file():
    with pytest.raises(UserError, match=r'/dev/zero: expected an undamaged .npz .*is no file'):
        workdir_lib.read_ledger(epath.Path('/dev/zero'))


def a_run(path, before, **changes):
    """Writes the config.json of a run that was made in `before`; None: by an older version."""
    was_in(write_run(path, run_config(**changes), {}), before)


def was_in(path, before):
    file = epath.Path(path) / 'config.json'
    record = files.read_json(file)
    del record['sessions'][-1]['workdir']
    if before is not None:
        record['sessions'][-1]['workdir'] = str(before)
    files.write_json(file, record)


@pytest.mark.parametrize('recorded', [True, False])
def test_a_moved_study_finds_its_own_transfer_set(tmp_path, recorded):
    old, new = tmp_path / 'old', tmp_path / 'elsewhere' / 'new'
    path = str(old / 'blackbox' / 'blackbox.npz')
    a_run(new / 'run', old / 'run' if recorded else None, eval__blackbox_path=path)
    found = lambda: workdir_lib.read_record(epath.Path(new) / 'run')['config']['eval']
    # Neither is there: what is told names the one that was used.
    assert found()['blackbox_path'] == path
    (new / 'blackbox').mkdir()
    (new / 'blackbox' / 'blackbox.npz').write_bytes(b'')
    assert found()['blackbox_path'] == str(new / 'blackbox' / 'blackbox.npz')
    # Another study may be where this one was; but an older run does not say where it was.
    (old / 'blackbox').mkdir(parents=True)
    (old / 'blackbox' / 'blackbox.npz').write_bytes(b'')
    there = new if recorded else old
    assert found()['blackbox_path'] == str(there / 'blackbox' / 'blackbox.npz')


def test_a_transfer_set_that_did_not_move_stays_where_it_is(tmp_path):
    path = tmp_path / 'sets' / 'blackbox.npz'
    path.parent.mkdir()
    path.write_bytes(b'')
    a_run(tmp_path / 'far' / 'run', tmp_path / 'old' / 'run', eval__blackbox_path=str(path))
    record = workdir_lib.read_record(epath.Path(tmp_path) / 'far' / 'run')
    assert record['config']['eval']['blackbox_path'] == str(path)


@pytest.mark.parametrize('recorded', [True, False])
def test_an_ensemble_that_moved_with_its_members_finds_them(tmp_path, recorded):
    old, new = tmp_path / 'old', tmp_path / 'new'
    runs = [old / 'a', old / 'b']
    for path in runs:
        a_run(path, path)
    write_ensemble(old / 'both', runs, {'clean': 0.5})
    was_in(old / 'both', old / 'both' if recorded else None)
    old.rename(new)
    record = workdir_lib.read_record(epath.Path(new) / 'both')
    there = [str(new / 'a'), str(new / 'b')]
    assert record['config']['ensemble']['members_from'] == ','.join(there)
    assert [member['workdir'] for member in record['members']] == there


def test_a_run_writes_down_where_it_is(workdir):
    config = run_config()
    facts = {'dataset': {}, 'parameters': 1}
    workdir_lib.write_record(workdir, config, facts, {'step': 0})
    sessions = files.read_json(workdir / 'config.json')['sessions']
    assert sessions == [{'workdir': str(workdir), 'step': 0}]


def test_where_no_run_is_the_near_ones_are_named(tmp_path):
    for name in ('runs/singleadv_seed0', 'runs/study/baseline_seed0', 'runs/study/vgg_seed0'):
        a_run(tmp_path / name, None)
    told = lambda name: workdir_lib.no_run(epath.Path(tmp_path) / name)
    assert f'did you mean {tmp_path}/runs/singleadv_seed0?' in told('runs/singeladv_seed0')
    assert f'did you mean {tmp_path}/runs/study/vgg_seed0?' in told('runs/study/vg_seed0')
    below = 'below it there are singleadv_seed0, study/baseline_seed0, study/vgg_seed0'
    assert told('runs') == f'no run is here (no config.json); {below}'
    near = f'in {tmp_path}/runs/study there are baseline_seed0, vgg_seed0'
    assert told('runs/study/zzz') == f'no run is here (no such directory); {near}'
    (tmp_path / 'empty').mkdir()
    assert told('empty') == 'no run is here (no config.json)'
