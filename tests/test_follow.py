"""Several processes evaluate one run: beside its training, each thing once, killed or not."""

import collections
import contextlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from conftest import ROOT, TINY, overrides, run_environment, tiny_config

from ensadv import build, study
from ensadv import config as config_lib
from ensadv.attacks import driver
from ensadv.errors import TrainingError
from ensadv.evaluation import evaluate, evaluator
from ensadv.storage import checkpoints, files, leases, metrics, selection
from ensadv.storage import workdir as workdir_lib
from ensadv.training import train

pytestmark = pytest.mark.usefixtures('small_network')

UNITS = ['clean', 'ifgsm2']
SECONDS = 120  # no test waits longer for another thread or process

# main.py with short waits, small networks and no TensorFlow; argv[1] names the attack that never
# ends, if any.
DRIVER = """
import runpy, sys, time
sys.path.append('tests')
import small_network
from ensadv.evaluation import evaluate, evaluator
from ensadv.storage import metrics

small_network.install()

evaluate.POLL_SECONDS = 0.1
metrics._import_clu = metrics._import_tensorboard = lambda: None
hang_at = sys.argv.pop(1)
original = evaluator.Evaluator.evaluate

def hanging(self, variables, settings, images, labels, label, **others):
    while hang_at and label.endswith(hang_at):
        time.sleep(1)
    return original(self, variables, settings, images, labels, label, **others)

evaluator.Evaluator.evaluate = hanging
runpy.run_path('main.py', run_name='__main__')
"""


@contextlib.contextmanager
def main_process(*args, hang_at=''):
    """Starts main.py, and gives the process, which does not outlive the test."""
    process = subprocess.Popen(
        [sys.executable, '-c', DRIVER, hang_at, *map(str, args)],
        cwd=ROOT,
        env=run_environment(),
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def wait_until(condition):
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline, 'waited in vain'
        time.sleep(0.01)


def config_for(**changes):
    return tiny_config('singleadv', **{'train__steps': 6, **changes})


def make_run(config, path, steps=(2, 4, 6)):
    """Writes what training leaves behind, with weights of chance."""
    dataset = build.dataset(config)
    facts = {'dataset': dataset.describe(), 'parameters': 0}
    session = {'step': 0, **build.environment(), 'command': ['main.py']}
    workdir_lib.write_record(path, build.resolve(config), facts, session)
    for step in steps:
        write_snapshot(config, path, step)


def write_snapshot(config, path, step):
    network = build.network(config, build.dataset(config).describe())
    rng = np.random.default_rng(step)
    # Running variances must be positive; other weights may be.
    weights = jax.tree.map(
        lambda leaf: np.abs(rng.normal(0.1, 0.3, leaf.shape)).astype(leaf.dtype), network.variables
    )
    snapshots = checkpoints.open_snapshots(path)
    snapshots.save(step, weights, wait=True)
    snapshots.close()


def snapshot_steps(path):
    return checkpoints.open_snapshots(path).steps()


def evaluated(path, step):
    """Returns the names of the attacks on the test split that a step has."""
    content = workdir_lib.read_evaluations(path).get(step, {'attacks': []})
    return [result['name'] for result in content['attacks']]


def ledgers(path):
    return {
        step: files.read_arrays(workdir_lib.evaluation_path(path, step, '.npz'))
        for step in workdir_lib.read_evaluations(path)
    }


class FakeEvaluator:
    """In the Evaluator's place: writes down what it is asked for, and answers as it is told.

    Attributes:
      calls: (step, key in the ledger) of each attack, as it begins.
      accuracies: by (step, key); .5 where there is none.
      before: called with (step, key) as an attack begins.
      labels: what each attack was given, by (step, key).
    """

    def __init__(self):
        self.calls = []
        self.accuracies = {}
        self.before = lambda call: None
        self.labels = {}

    def evaluate(self, variables, settings, images, labels, label, **others):
        call = (int(label.split()[-2]), label.split()[-1])
        self.calls.append(call)
        self.labels[call] = labels
        self.before(call)
        right = round(self.accuracies.get(call, 0.5) * len(labels))
        margin = np.where(np.arange(len(labels)) < right, 1.0, -1.0).astype(np.float32)
        return evaluator.Verdicts(margin, margin, np.ones(len(labels), bool))

    def long_attack(self, variables, settings, images, labels, label, **others):
        margin, _, has_gradient = self.evaluate(variables, settings, images, labels, label)
        fooled_at = np.where(margin > 0, driver.NEVER, 1)
        return evaluator.LongVerdicts(
            margin, has_gradient, fooled_at, (1,), margin[None] > 0, margin[None]
        )


@pytest.fixture
def fake(monkeypatch):
    made = FakeEvaluator()
    for name in ('evaluate', 'long_attack'):
        answer = getattr(made, name)
        monkeypatch.setattr(
            evaluator.Evaluator, name, lambda self, *args, answer=answer, **_: answer(*args)
        )
    return made


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    """Short waits, no TensorFlow, and no snapshot is deleted that lacks one of UNITS."""
    monkeypatch.setattr(evaluate, 'POLL_SECONDS', 0.05)
    for name in ('_import_clu', '_import_tensorboard'):
        monkeypatch.setattr(metrics, name, lambda: None)
    delete = checkpoints.Checkpoints.delete

    def checked(self, step):
        path = self._directory.parent
        assert set(evaluated(path, step)) >= set(UNITS), f'step {step} was not evaluated'
        delete(self, step)

    monkeypatch.setattr(checkpoints.Checkpoints, 'delete', checked)


@pytest.fixture
def in_thread():
    """Starts a function in another thread, which stands for another process; gives its future."""
    with ThreadPoolExecutor() as executor:
        yield executor.submit


def following(config, **changes):
    """Returns a copy of a config that follows, with changes."""
    config = config.copy_and_resolve_references()
    fields = {'eval.follow': True} | {k.replace('__', '.'): v for k, v in changes.items()}
    config.update_from_flattened_dict(fields)
    return config


def test_a_follower_started_before_the_trainer_evaluates_each_snapshot_once(workdir):
    fields = TINY | {'train.steps': 6, 'eval.inline': False, 'eval.long_attacks': ('pgd3',)}
    command = ['--config=configs/singleadv.py', *overrides(fields), f'--workdir={workdir}']
    follow = ['--mode=evaluate', '--config.eval.follow=True']
    with main_process(*command, *follow) as process:

        def while_training():
            # Training is still going on when its first snapshot is evaluated.
            wait_until(lambda: evaluated(workdir, 2) == UNITS or process.poll() is not None)

        config = config_for(eval__inline=False, eval__long_attacks=('pgd3',))
        train.run(config, workdir, on_snapshot=while_training)
        _, log = process.communicate(timeout=SECONDS)
    assert process.returncode == 0, log
    evaluations = workdir_lib.read_evaluations(workdir)
    kept = sorted({selection.best_step(evaluations, 'ifgsm2', config_lib.to_dict(config)), 6})
    assert snapshot_steps(workdir) == kept
    for step in (2, 4, 6):
        assert evaluated(workdir, step) == [*UNITS, *(['pgd3'] if step in kept else [])]
        assert log.count(f'step {step}: clean ') == 1
        assert log.count(f'step {step}: pgd3 ') == (step in kept)


def test_two_followers_share_what_a_trainer_writes_and_does_not_delete(workdir, fake, in_thread):
    config = config_for(train__checkpoints_to_keep=1, eval__long_attacks=('pgd3',))
    # Both followers stay at the first attack of two snapshots until training is at its end.
    trained = threading.Barrier(3, timeout=SECONDS)
    met = set()

    def before(call):
        if threading.get_ident() not in met:
            met.add(threading.get_ident())
            trained.wait()

    fake.before = before
    followers = [in_thread(evaluate.run, following(config), workdir) for _ in range(2)]
    train.run(config, workdir)
    wait_until(lambda: len(met) == 2)
    assert sorted(fake.calls) == [(2, 'clean'), (4, 'clean')]
    assert checkpoints.open_checkpoints(workdir, 1).steps() == [6]
    assert snapshot_steps(workdir) == [2, 4, 6]
    trained.wait()
    for follower in followers:
        follower.result(SECONDS)
    expected = [(step, name) for step in (2, 4, 6) for name in UNITS]
    assert sorted(fake.calls) == sorted([*expected, (2, 'pgd3'), (6, 'pgd3')])
    assert snapshot_steps(workdir) == [2, 6]
    assert list((workdir / 'claims').iterdir()) == []


def test_inline_evaluation_and_a_follower_share(workdir, fake, in_thread, monkeypatch):
    """Training goes on while the follower is at a snapshot, and waits for it in the end."""
    config = config_for(eval__long_attacks=('pgd3',))
    trainer = threading.get_ident()
    fake.before = lambda call: (
        wait_until(lambda: (6, 'ifgsm2') in fake.calls) if call == (2, 'ifgsm2') else None
    )
    evaluate_pending = evaluate.Job.evaluate_pending

    def second(self, wait=False):
        if threading.get_ident() == trainer:
            wait_until(lambda: fake.calls)
        evaluate_pending(self, wait)

    monkeypatch.setattr(evaluate.Job, 'evaluate_pending', second)
    follower = in_thread(evaluate.run, following(config), workdir)
    study.run_one(config, workdir, 'inline')
    # What training waited for is done: its user may read the results.
    expected = [(step, name) for step in (2, 4, 6) for name in UNITS]
    assert sorted(fake.calls) == sorted([*expected, (2, 'pgd3'), (6, 'pgd3')])
    follower.result(SECONDS)
    assert sorted(fake.calls) == sorted([*expected, (2, 'pgd3'), (6, 'pgd3')])
    assert fake.calls[:3] == [(2, 'clean'), (2, 'ifgsm2'), (4, 'clean')]
    assert snapshot_steps(workdir) == [2, 6]


def test_an_evaluator_that_fails_goes_on_where_it_was(workdir, fake):
    config = config_for()
    make_run(config, workdir)

    def fail(call):
        if call == (4, 'ifgsm2'):
            raise OSError('the storage is gone')

    fake.before = fail
    with pytest.raises(OSError, match='storage'):
        evaluate.run(config, workdir)
    assert evaluated(workdir, 4) == ['clean']
    assert fake.calls.pop() == (4, 'ifgsm2')
    fake.before = lambda call: None
    evaluate.run(config, workdir)
    assert fake.calls == [(step, name) for step in (2, 4, 6) for name in UNITS]


def test_a_killed_evaluator_goes_on_and_gives_the_same_results(workdir, monkeypatch):
    """SIGKILL between two attacks on a snapshot, and the same once more."""
    config, whole, killed = config_for(), workdir / 'whole', workdir / 'killed'
    for path in (whole, killed):
        make_run(config, path)
    evaluate.run(config, whole)
    command = ['--mode=evaluate', f'--workdir={killed}']
    with main_process(*command, hang_at='step 4 ifgsm2') as process:
        wait_until(lambda: evaluated(killed, 4) or process.poll() is not None)
        assert process.poll() is None, process.stderr.read()
        os.kill(process.pid, signal.SIGKILL)
    assert evaluated(killed, 2) == UNITS
    assert evaluated(killed, 4) == ['clean']
    assert [path.name[:2] for path in (killed / 'claims').iterdir()] == ['4.']
    attacked = []
    original = evaluator.Evaluator.evaluate

    def counting(self, *args, **others):
        attacked.append(args[-1].partition(' step ')[2])
        return original(self, *args, **others)

    monkeypatch.setattr(evaluator.Evaluator, 'evaluate', counting)
    evaluate.run(config, killed)
    assert attacked == ['4 ifgsm2', '6 clean', '6 ifgsm2']
    expected, found = ledgers(whole), ledgers(killed)
    assert list(expected) == list(found) == [2, 4, 6]
    for step in expected:
        assert expected[step].keys() == found[step].keys()
        for name, array in expected[step].items():
            np.testing.assert_array_equal(found[step][name], array)
    # The weights are of chance, but they are not trivial.
    assert 0 < expected[6]['clean_correct'].sum() < 30
    assert np.any(expected[6]['ifgsm2_margin'] < expected[6]['clean_margin'])
    assert snapshot_steps(killed) == snapshot_steps(whole)


def test_a_half_written_snapshot_is_left_until_it_is_whole(workdir, fake, in_thread):
    config = config_for()
    make_run(config, workdir)
    snapshots = workdir / 'snapshots'
    # As Orbax writes it: under another name, one file after the other.
    half = snapshots / f'6{ocp.path.step.TMP_DIR_SUFFIX}'
    (snapshots / '6').rename(half)
    assert ocp.path.step.is_tmp_checkpoint(half)
    manifest = next(pathlib.Path(half).rglob('manifest.ocdbt'))
    manifest.rename(tmp := workdir / 'manifest')
    files = sorted(map(str, pathlib.Path(half).rglob('*')))
    evaluate.run(config, workdir)
    follower = in_thread(evaluate.run, following(config), workdir)
    time.sleep(0.3)
    assert not follower.done()
    assert fake.calls == [(step, name) for step in (2, 4) for name in UNITS]
    assert sorted(map(str, pathlib.Path(half).rglob('*'))) == files
    pathlib.Path(tmp).rename(manifest)
    half.rename(snapshots / '6')
    follower.result(SECONDS)
    assert fake.calls == [(step, name) for step in (2, 4, 6) for name in UNITS]


def test_a_trainer_that_stopped_for_good_is_noticed(workdir, fake):
    config = config_for()
    make_run(config, workdir, steps=(2, 4))
    with pytest.raises(TrainingError) as caught:
        evaluate.run(following(config, eval__follow_timeout=0.2), workdir)
    message = str(caught.value)
    assert '\n' not in message
    for told in (str(workdir), 'step 4 of 6', '0.2 s (eval.follow_timeout)'):
        assert told in message
    assert fake.calls == [(step, name) for step in (2, 4) for name in UNITS]
    assert snapshot_steps(workdir) == [2, 4]
    # Started again, training goes on from its checkpoint, and so does this.
    write_snapshot(config, workdir, 6)
    evaluate.run(following(config, eval__follow_timeout=0.2), workdir)
    assert fake.calls == [(step, name) for step in (2, 4, 6) for name in UNITS]


def test_a_trainer_that_never_began_is_noticed(workdir):
    fields = TINY | {'eval.follow': True, 'eval.follow_timeout': 0.2}
    args = ['--mode=evaluate', '--config=configs/singleadv.py', *overrides(fields)]
    with main_process(*args, f'--workdir={workdir}') as process:
        _, log = process.communicate(timeout=SECONDS)
    assert process.returncode == 1, log
    (line,) = log.strip().splitlines()
    assert line.startswith(f'error: no new checkpoint or snapshot in {workdir} for 0.2 s (eval.')
    assert 'at step 0 of 4' in line


def test_only_training_has_to_show_signs_of_life(workdir, fake, in_thread):
    """Evaluations may take longer than eval.follow_timeout, one's own and another process's."""
    config = config_for()
    make_run(config, workdir)
    config = following(config, eval__follow_timeout=0.2)
    fake.before = lambda call: time.sleep(0.4 * (call == (2, 'clean')))
    other = leases.open_leases(workdir)
    assert other.take('6')
    follower = in_thread(evaluate.run, config, workdir)
    wait_until(lambda: evaluated(workdir, 4) == UNITS)
    time.sleep(0.6)
    assert not follower.done()
    other.close()
    follower.result(SECONDS)
    assert fake.calls == [(step, name) for step in (2, 4, 6) for name in UNITS]


@pytest.mark.parametrize('first, kept', [(0.9, [2, 6]), (0.1, [4, 6])])
def test_the_best_and_the_last_survive_evaluators_out_of_order(
    workdir, fake, in_thread, first, kept
):
    config = config_for()
    make_run(config, workdir)
    fake.accuracies = {(2, 'ifgsm2'): first, (4, 'ifgsm2'): 0.6, (6, 'ifgsm2'): 0.3}
    rest_done = threading.Event()

    def before(call):
        if call == (2, 'ifgsm2'):
            assert rest_done.wait(SECONDS)

    fake.before = before
    slow, quick = evaluate.Job(config, workdir), evaluate.Job(config, workdir)
    slow_one = in_thread(slow.evaluate_pending)
    wait_until(lambda: (2, 'ifgsm2') in fake.calls)
    quick.evaluate_pending()
    assert snapshot_steps(workdir) == [2, 4, 6]
    rest_done.set()
    slow_one.result(SECONDS)
    for job in (slow, quick):
        job.close()
    assert snapshot_steps(workdir) == kept
    assert sorted(fake.calls) == sorted((step, name) for step in (2, 4, 6) for name in UNITS)


def test_a_snapshot_that_appears_while_others_are_deleted_stays(workdir, fake, monkeypatch):
    config = config_for()
    make_run(config, workdir, steps=(2,))
    prune = evaluate.Job._prune

    def late(self, snapshots, view):
        for step in (4, 6):
            write_snapshot(config, workdir, step)
        prune(self, snapshots, view)

    monkeypatch.setattr(evaluate.Job, '_prune', late)
    job = evaluate.Job(config, workdir)
    job.evaluate_pending()
    job.close()
    assert fake.calls == [(2, name) for name in UNITS]
    assert snapshot_steps(workdir) == [2, 4, 6]


def test_the_best_stays_that_under_the_settings_of_the_run(workdir, fake):
    """Others are made on what is left, and their accuracies are not compared with the run's own."""
    config = config_for()
    make_run(config, workdir)
    fake.accuracies = {(2, 'ifgsm2'): 0.6, (4, 'ifgsm2'): 0.2, (6, 'ifgsm2'): 0.5}
    evaluate.run(config, workdir)
    assert snapshot_steps(workdir) == [2, 6]
    changed = config.copy_and_resolve_references()
    changed.eval.ifgsm.step_size = 0.1
    key = 'ifgsm2_step_size=0.1'
    fake.accuracies = {(2, key): 0.1, (6, key): 0.2}
    evaluate.run(changed, workdir)
    assert snapshot_steps(workdir) == [2, 6]
    evaluate.run(config, workdir)
    assert fake.calls == [*((s, n) for s in (2, 4, 6) for n in UNITS), (2, key), (6, key)]
    accuracies = [
        [result['accuracy'] for result in content['attacks']]
        for content in workdir_lib.read_evaluations(workdir).values()
    ]
    assert accuracies == [[0.5, 0.6, 0.1], [0.5, 0.2], [0.5, 0.5, 0.2]]


def test_a_snapshot_without_the_runs_own_settings_is_not_deleted(workdir, fake):
    config = config_for()
    make_run(config, workdir)
    changed = config.copy_and_resolve_references()
    changed.eval.ifgsm.step_size = 0.1
    evaluate.run(changed, workdir)
    assert snapshot_steps(workdir) == [2, 4, 6]
    fake.accuracies = {(4, 'ifgsm2'): 0.9}
    evaluate.run(config, workdir)
    assert snapshot_steps(workdir) == [4, 6]
    assert len(fake.calls) == len(set(fake.calls)) == 9


def test_an_evaluator_with_other_attacks_keeps_the_snapshot_it_is_at(workdir, fake, in_thread):
    config = config_for()
    make_run(config, workdir)
    fake.accuracies = {(2, 'ifgsm2'): 0.1}
    attacks_done, look_at = threading.Event(), []

    def before(call):
        if call == (2, 'pgd2'):
            assert attacks_done.wait(SECONDS)
            look_at.append(snapshot_steps(workdir))

    fake.before = before
    other = config.copy_and_resolve_references()
    other.eval.attacks = ('clean', 'pgd2')
    other_one = in_thread(evaluate.run, other, workdir)
    wait_until(lambda: (2, 'pgd2') in fake.calls)
    job = evaluate.Job(config, workdir)
    job.evaluate_pending()
    attacks_done.set()
    # With what the other is at done, this one does its own attack on it too.
    job.evaluate_pending(wait=True)
    job.close()
    other_one.result(SECONDS)
    assert 2 in look_at[0]
    counts = collections.Counter(fake.calls)
    assert set(counts.values()) == {1}
    assert {(2, 'clean'), (2, 'pgd2'), (4, 'ifgsm2'), (6, 'ifgsm2'), (6, 'pgd2')} <= set(counts)


@pytest.mark.parametrize('select_on, best', [('test', 2), ('validation', 4)])
def test_the_best_is_chosen_on_the_split_asked_for(workdir, fake, select_on, best):
    config = config_for(data__validation_examples=40, eval__select_on=select_on)
    make_run(config, workdir)
    fake.accuracies = {
        (2, 'ifgsm2'): 0.9, (4, 'ifgsm2'): 0.5, (6, 'ifgsm2'): 0.4,
        (2, 'validation_ifgsm2'): 0.2, (4, 'validation_ifgsm2'): 0.8,
        (6, 'validation_ifgsm2'): 0.3,
    }  # fmt: skip
    evaluate.run(config, workdir)
    assert snapshot_steps(workdir) == [best, 6]
    evaluations = workdir_lib.read_evaluations(workdir)
    assert selection.best_step(evaluations, 'ifgsm2', config_lib.to_dict(config)) == best
    for step, content in evaluations.items():
        results = [*content['attacks'], *content['validation']]
        assert {result['select_on'] for result in results} == {content['select_on']} == {select_on}
        assert [result['n'] for result in content['attacks']] == [30, 30]
        ledger = ledgers(workdir)[step]
        if select_on == 'test':
            assert content['validation'] == []
            assert 'validation_label' not in ledger
            continue
        (result,) = content['validation']
        assert (result['name'], result['split'], result['n']) == ('ifgsm2', 'validation', 40)
        assert result['accuracy'] == fake.accuracies[step, 'validation_ifgsm2']
        held_out = build.dataset(config).label_validation
        np.testing.assert_array_equal(fake.labels[step, 'validation_ifgsm2'], held_out)
        np.testing.assert_array_equal(ledger['validation_label'], held_out)
        assert ledger['validation_ifgsm2_correct'].sum() == result['correct']
    # Results as they stand on disk decide, when the evaluation goes on.
    path = workdir_lib.evaluation_path(workdir, best, '.json')
    content = json.loads(path.read_text())
    for result in (*content['attacks'], *content['validation']):
        result['accuracy'] = 0.0
    files.write_json(path, content)
    evaluate.run(config, workdir)
    assert snapshot_steps(workdir) == [6]
