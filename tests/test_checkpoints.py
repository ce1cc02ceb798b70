"""Checkpoints: what several processes do in one directory, and what bad storage does."""

import pathlib
import resource
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from ensadv.errors import StorageError
from ensadv.storage import checkpoints

# Orbax leaves coroutines and threads behind when one of its files is damaged.
pytestmark = pytest.mark.filterwarnings('ignore::pytest.PytestUnraisableExceptionWarning')


def tree(step):
    rng = np.random.default_rng(step)
    kernel = rng.normal(size=(40, 50)).astype(np.float32)
    return {'params': {'kernel': kernel}, 'step': np.int32(step)}


def saved(workdir, steps=(1, 2, 3)):
    """Returns the directory of a few checkpoints."""
    opened = checkpoints.open_checkpoints(workdir, 3)
    for step in steps:
        opened.save(step, tree(step))
    opened.close()
    return pathlib.Path(workdir) / 'checkpoints'


def newest(workdir):
    return checkpoints.open_checkpoints(workdir, 3).restore_newest(tree(0))


def equal(found, step):
    np.testing.assert_array_equal(found['params']['kernel'], tree(step)['params']['kernel'])
    assert found['step'] == step


def data_file(folder):
    """Returns the file that holds the arrays' values."""
    return max(
        (path for path in folder.rglob('*') if path.is_file()), key=lambda p: p.stat().st_size
    )


def truncate(folder):
    path = data_file(folder)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def empty(folder):
    for path in folder.rglob('*'):
        if path.is_file():
            path.write_bytes(b'')


def remove_all(folder):
    shutil.rmtree(folder)
    folder.mkdir()


def remove_one(folder):
    data_file(folder).unlink()


def remove_metadata(folder):
    (folder / '_CHECKPOINT_METADATA').unlink()


def flip(folder):
    path = data_file(folder)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGES = [truncate, empty, remove_all, remove_one, remove_metadata, flip]


@pytest.mark.parametrize('damage', DAMAGES)
def test_a_damaged_newest_one_is_passed_over_with_a_warning(workdir, damage, caplog):
    folder = saved(workdir)
    damage(folder / '3')
    step, found = newest(workdir)
    assert step == 2
    equal(found, 2)
    (warning,) = [r.getMessage() for r in caplog.records if 'damaged; taking' in r.getMessage()]
    assert f'{folder}/3' in warning
    assert f'{folder}/2' in warning
    # The step is free: training comes by again.
    opened = checkpoints.open_checkpoints(workdir, 3)
    assert opened.steps() == [1, 2]
    assert (folder / '3.damaged').is_dir()
    opened.save(3, tree(3))
    opened.close()
    assert newest(workdir)[0] == 3


def test_no_usable_one_is_an_error_and_changes_nothing(workdir):
    folder = saved(workdir)
    for damage, step in zip((truncate, remove_all, flip), (1, 2, 3), strict=True):
        damage(folder / str(step))
    with pytest.raises(checkpoints.DamagedError, match='can be read') as raised:
        newest(workdir)
    assert all(f'{folder}/{step}' in str(raised.value) for step in (1, 2, 3))
    assert '\n' not in str(raised.value)
    assert checkpoints.open_checkpoints(workdir, 3).steps() == [1, 2, 3]
    assert newest(workdir / 'empty') is None


def test_a_flipped_bit_anywhere_is_found_or_does_no_harm(workdir):
    """Whatever bit: what comes back is what was written, or nothing does."""
    folder = saved(workdir, steps=(1,))
    rng = np.random.default_rng(0)
    files = sorted(path for path in folder.rglob('*') if path.is_file() and path.stat().st_size)
    found_out = 0
    for number in range(60):
        path = files[number % len(files)]
        content = path.read_bytes()
        flipped = bytearray(content)
        flipped[rng.integers(len(flipped))] ^= 1 << rng.integers(8)
        path.write_bytes(flipped)
        try:
            _, found = newest(workdir)
        except checkpoints.DamagedError:
            found_out += 1
        else:
            equal(found, 1)
        path.write_bytes(content)
    assert newest(workdir)[0] == 1
    assert found_out > 20


def test_what_cannot_be_written_is_one_line_and_harms_nothing(workdir):
    folder = saved(workdir, steps=(1, 2))
    opened = checkpoints.open_checkpoints(workdir, 3)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2_000, limits[1]))  # as on a disk that is full
    try:
        with pytest.raises(StorageError, match=f'{folder}: cannot be written') as raised:
            opened.save(3, tree(3), wait=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert '\n' not in str(raised.value)
    assert newest(workdir)[0] == 2
    # There is space again, and the same process or another goes on.
    opened = checkpoints.open_checkpoints(workdir, 2, tidy=True)
    opened.save(3, tree(3))
    opened.close()
    assert newest(workdir)[0] == 3
    assert sorted(path.name for path in folder.iterdir()) == ['2', '3']


def test_a_failure_in_the_background_is_not_lost(workdir):
    opened = checkpoints.open_checkpoints(workdir, 3)
    opened.save(1, tree(1), wait=True)
    shutil.rmtree(workdir / 'checkpoints')
    (workdir / 'checkpoints').write_text('a file')

    def save():
        opened.save(2, tree(2))
        opened.close()

    with pytest.raises(StorageError, match='cannot be written'):
        save()


def test_what_a_killed_process_left_is_deleted_only_by_who_writes(workdir):
    folder = saved(workdir, steps=(1,))
    left = folder / '2.orbax-checkpoint-tmp-1'
    left.mkdir()
    assert checkpoints.open_checkpoints(workdir, 3).steps() == [1]
    assert left.exists()
    opened = checkpoints.open_checkpoints(workdir, 3, tidy=True)
    assert opened.steps() == [1]
    opened.save(2, tree(2))
    opened.close()
    assert not left.exists()
    assert (folder / '2').exists()


def test_looking_while_another_process_deletes(workdir):
    """Orbax lists the steps and then looks into each; one may be gone by then."""
    snapshots = checkpoints.open_snapshots(workdir)
    snapshots.save(0, {'params': np.ones(3)}, wait=True)
    deleted = threading.Event()

    def look():
        while not deleted.is_set():
            checkpoints.open_snapshots(workdir).steps()

    with ThreadPoolExecutor() as executor:
        lookers = [executor.submit(look) for _ in range(2)]
        for step in range(1, 30):
            snapshots.save(step, {'params': np.ones(3)}, wait=True)
            snapshots.delete(step - 1)
        deleted.set()
        for looker in lookers:
            looker.result()
