"""Damaged results and snapshots: made again where that is possible, and told where it is not."""

import json

import numpy as np
import pytest
from conftest import empty_files, tensorboard_values
from test_follow import UNITS, config_for, evaluated, fake, ledgers, make_run, snapshot_steps

from ensadv.errors import TrainingError
from ensadv.evaluation import evaluate
from ensadv.storage import checkpoints
from ensadv.storage import workdir as workdir_lib

__all__ = ['fake']  # a fixture
# Orbax leaves coroutines and threads behind when one of its files is damaged.
pytestmark = pytest.mark.filterwarnings('ignore::pytest.PytestUnraisableExceptionWarning')

pytestmark = pytest.mark.usefixtures('small_network')


@pytest.fixture
def finished(workdir, fake):
    """A run with snapshots at 2, 4 and 6, evaluated; 4 is the best, and 2's snapshot is gone."""
    config = config_for()
    make_run(config, workdir)
    fake.accuracies[4, 'ifgsm2'] = 0.9
    evaluate.run(config, workdir)
    fake.calls.clear()
    return config


def cut(path):
    path.write_bytes(path.read_bytes()[:-50])


def other_digit(path):
    path.write_text(path.read_text().replace('"correct": 27', '"correct": 28'))


def no_results(path):
    path.write_text('{"a": 1}')


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def remove(path):
    path.unlink()


@pytest.mark.parametrize(
    'suffix, damage',
    [
        *(('.json', damage) for damage in (cut, other_digit, no_results)),
        *(('.npz', damage) for damage in (cut, flip, remove)),
    ],
)
def test_damaged_results_are_made_again(workdir, finished, fake, caplog, suffix, damage):
    results, arrays = workdir_lib.read_evaluations(workdir), ledgers(workdir)
    path = workdir_lib.evaluation_path(workdir, 4, suffix)
    damage(path)
    evaluate.run(finished, workdir)
    assert fake.calls == [(4, name) for name in UNITS]
    assert [r.getMessage() for r in caplog.records if f'{path}: damaged' in r.getMessage()]
    again = workdir_lib.read_evaluations(workdir)
    for content in (*results.values(), *again.values()):
        for result in content['attacks']:
            del result['seconds']
    assert again == results
    for step, ledger in ledgers(workdir).items():
        for name, array in ledger.items():
            np.testing.assert_array_equal(array, arrays[step][name])
    assert snapshot_steps(workdir) == [4, 6]
    shown = tensorboard_values(workdir / 'eval')
    assert {tag: [step for step, _ in pairs] for tag, pairs in shown.items()} == {
        f'accuracy/{name}': [2, 4, 6] for name in UNITS
    }
    assert dict(shown['accuracy/ifgsm2'])[4] == pytest.approx(0.9)


def test_whole_results_are_left_alone(workdir, finished, fake):
    before = {path: path.stat().mtime for path in (workdir / 'eval').iterdir()}
    evaluate.run(finished, workdir)
    assert fake.calls == []
    assert {path: path.stat().mtime for path in (workdir / 'eval').iterdir()} == before


def test_results_whose_snapshot_is_gone(workdir, finished, fake, caplog):
    """Accuracies without a ledger stay; a ledger without accuracies does not count."""
    workdir_lib.evaluation_path(workdir, 2, '.npz').write_bytes(b'')
    evaluate.run(finished, workdir)
    assert list(workdir_lib.read_evaluations(workdir)) == [2, 4, 6]
    assert 'its snapshot is gone' in caplog.text
    workdir_lib.evaluation_path(workdir, 2, '.json').write_bytes(b'')
    evaluate.run(finished, workdir)
    assert list(workdir_lib.read_evaluations(workdir)) == [4, 6]
    assert fake.calls == []


def test_a_damaged_snapshot_is_told_when_all_else_is_evaluated(workdir, fake, caplog):
    config = config_for()
    make_run(config, workdir)
    empty_files(workdir / 'snapshots' / '4')
    job = evaluate.Job(config, workdir)
    job.evaluate_pending()  # beside training, which it does not stop
    assert 'snapshots/4: ' in caplog.text
    with pytest.raises(TrainingError, match=r'not evaluated: .*snapshots/4: '):
        job.evaluate_pending(wait=True)
    job.close()
    assert fake.calls == [(step, name) for step in (2, 6) for name in UNITS]
    assert evaluated(workdir, 4) == []
    (workdir / 'snapshots' / '4').rmtree()
    evaluate.run(config, workdir)


def test_a_follower_does_not_wait_for_a_damaged_last_snapshot(workdir, fake):
    config = config_for(eval__follow=True)
    make_run(config, workdir)
    empty_files(workdir / 'snapshots' / '6')
    with pytest.raises(TrainingError, match=r'not evaluated: .*snapshots/6: '):
        evaluate.run(config, workdir)
    assert fake.calls == [(step, name) for step in (2, 4) for name in UNITS]


def test_weights_that_are_not_what_was_written_are_not_evaluated(workdir, fake):
    """One changed number in a snapshot that can be read: a wrong accuracy that would look right."""
    config = config_for()
    make_run(config, workdir, steps=(6,))
    metadata = workdir / 'snapshots' / '6' / '_CHECKPOINT_METADATA'
    content = json.loads(metadata.read_text())
    checksums = content['custom_metadata']['crc32']
    checksums[min(checksums)] ^= 1
    metadata.write_text(json.dumps(content))
    with pytest.raises(TrainingError, match=r'1 of .* arrays are not what was written'):
        evaluate.run(config, workdir)
    assert fake.calls == []
    assert checkpoints.open_snapshots(workdir).steps() == [6]
