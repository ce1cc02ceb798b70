"""The files of a workdir: whole, or not there, and never a wrong number that looks right."""

import pathlib
import resource

import pytest
from etils import epath

from ensadv import workdir as workdir_lib
from ensadv.errors import StorageError, UserError

CONTENT = {'accuracy': 0.7251, 'steps': [1, 2], 'nested': {'none': None}}


def test_json_comes_back(workdir):
    workdir_lib.write_json(workdir / 'a.json', CONTENT)
    assert workdir_lib.read_json(workdir / 'a.json') == CONTENT
    # Of somebody else, without a checksum.
    (workdir / 'b.json').write_text('{"a": 1}')
    assert workdir_lib.read_json(workdir / 'b.json') == {'a': 1}


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
    workdir_lib.write_json(path, CONTENT)
    path.write_text(change(path.read_text()))
    with pytest.raises(UserError, match=r'a\.json: (not valid JSON|is not what was written)'):
        workdir_lib.read_json(path)


def test_json_that_is_no_text_is_refused(workdir):
    workdir.mkdir()
    (workdir / 'a.json').write_bytes(b'\xff\xfe{')
    (workdir / 'b.json').write_text(100_000 * '[')
    for name in ('a.json', 'b.json'):
        with pytest.raises(UserError, match='not valid JSON'):
            workdir_lib.read_json(workdir / name)


def test_a_full_disk_leaves_the_old_file(workdir):
    path = workdir / 'a.json'
    workdir_lib.write_json(path, CONTENT)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000, limits[1]))
    try:
        with pytest.raises(StorageError, match=r'a\.json: cannot be written: File too large'):
            workdir_lib.write_json(path, {'long': 2_000 * 'a'})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert workdir_lib.read_json(path) == CONTENT
    assert [path.name for path in workdir.iterdir()] == ['a.json']


def test_no_permission_is_one_line(workdir):
    workdir.mkdir()
    (workdir / 'file').write_text('')
    with pytest.raises(StorageError, match=r'cannot be written: (Not a directory|File exists)'):
        workdir_lib.write_json(workdir / 'file' / 'a.json', CONTENT)


def test_put_aside(workdir):
    path = workdir / 'a.json'
    workdir_lib.write_json(path, CONTENT)
    workdir_lib.put_aside(path)
    workdir_lib.put_aside(path)  # another process was faster
    assert [path.name for path in pathlib.Path(workdir).iterdir()] == ['a.json.damaged']


def test_a_ledger_is_a_file():
    with pytest.raises(UserError, match=r'/dev/zero: expected an undamaged .npz .*is no file'):
        workdir_lib.read_ledger(epath.Path('/dev/zero'))
