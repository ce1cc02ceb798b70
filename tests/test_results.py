"""Results by all their settings: side by side, under keys of their own, whoever wrote them."""

import collections
import json

import numpy as np
import pytest
from test_follow import config_for, fake, ledgers, make_run

from ensadv.evaluation import evaluate
from ensadv.evaluation.pending import View
from ensadv.evaluation.result_files import Evaluated, Unit
from ensadv.storage import checkpoints, files, leases, metrics
from ensadv.storage import selection as selection_lib
from ensadv.storage import workdir as workdir_lib

__all__ = ['fake']  # a fixture

pytestmark = pytest.mark.usefixtures('small_network')


@pytest.fixture
def scalars(monkeypatch):
    """What was written for TensorBoard when it was new: (step, tag, value) of each."""
    written = []

    def write(self, step, values, *, log=True):
        if log:
            written.extend((step, tag, value) for tag, value in values.items())

    monkeypatch.setattr(metrics.Writer, 'scalars', write)
    return written


def changed(config, **changes):
    config = config.copy_and_resolve_references()
    config.update_from_flattened_dict({k.replace('__', '.'): v for k, v in changes.items()})
    return config


def results_at(path, step):
    return workdir_lib.read_evaluations(path)[step]['attacks']


class Snapshots:
    """In the place of `checkpoints.Checkpoints`: snapshots without weights."""

    def __init__(self, steps):
        self._steps = list(steps)

    def steps(self):
        return list(self._steps)

    def save(self, step):
        self._steps.append(step)

    def delete(self, step):
        self._steps.remove(step)

    def restore(self, step, variables):
        return variables

    def close(self):
        pass


def count_reads(monkeypatch, workdir, snapshots, inline):
    """Returns how many files an evaluation of so many snapshots reads."""
    config = config_for(train__steps=snapshots, eval__long_attacks=('pgd3',))
    make_run(config, workdir, steps=())
    steps = range(1, snapshots + 1)
    made = Snapshots(() if inline else steps)
    reads = []
    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, 'open_snapshots', lambda path: made)
        for name in ('read_json', 'read_arrays'):
            read = getattr(files, name)
            patch.setattr(files, name, lambda path, read=read: reads.append(path) or read(path))
        job = evaluate.Job(config, workdir)
        for step in steps if inline else ():
            made.save(step)
            job.evaluate_pending()
        job.evaluate_pending(wait=True)
        job.close()
    assert len(workdir_lib.read_evaluations(workdir)) == snapshots
    assert len(made.steps()) == 2  # all accuracies are equal: the first is the best
    return len(reads)


@pytest.mark.parametrize('inline', [False, True])
def test_reads_grow_with_snapshots_and_not_with_their_square(workdir, fake, monkeypatch, inline):
    few, many = (count_reads(monkeypatch, workdir / str(n), n, inline) for n in (5, 20))
    assert few > 5
    assert many < 4 * few


def view(evaluated, asked=1):
    """A run of ten steps that wants ifgsm5 of step size 1.

    Args:
      evaluated: by step the accuracies that are there, by step size.
      asked: the step size that is asked for now.
    """
    settings = {size: {'attack': 'ifgsm', 'steps': 5, 'step_size': size} for size in (1, 2)}
    unit = {
        size: Unit('ifgsm5', 'test', selection_lib.identity(each))
        for size, each in settings.items()
    }

    def results(made):
        return {
            unit[size]: {'name': 'ifgsm5', 'accuracy': accuracy, 'settings': settings[size]}
            for size, accuracy in made.items()
        }

    found = {step: Evaluated(results(made), False) for step, made in evaluated.items()}
    config = {
        'eval': {
            'attacks': ['ifgsm5'], 'blackbox_path': '', 'select_on': 'test',
            'ifgsm': {'step_size': 1}, 'seed': 0,
        }
    }  # fmt: skip
    examples = Unit('ifgsm5', 'examples', '')
    return View(config, found, [unit[asked]], [examples], last_step=10)


def test_what_is_left_to_do():
    assert view({}).pending([2, 10]) == ([2, 10], False)
    assert view({2: {1: 0.5}}).pending([2, 10]) == ([10], False)
    # Until the last one is evaluated nobody knows the best.
    assert view({2: {1: 0.5}}).pending([2]) == ([], False)
    everything = {2: {1: 0.3}, 4: {1: 0.5}, 10: {1: 0.4}}
    assert view(everything).pending([2, 4, 10]) == ([4, 10], True)
    assert view(everything)._replace(only_on_last=True).pending([2, 4, 10]) == ([10], True)
    assert view(everything | {4: {2: 0.9}}).pending([2, 4, 10]) == ([4], False)


def test_what_is_kept_and_what_is_done():
    everything = {2: {1: 0.3}, 4: {1: 0.5, 2: 0.1}, 6: {2: 0.9}, 10: {1: 0.4}}
    found = view(everything)
    assert found.worth_keeping == {4, 10}
    assert [step for step in (2, 4, 6, 8, 10) if found.is_done(step)] == [2, 4, 10]
    # Another attack than the run's own is asked for: the run still needs step 6.
    other = view(everything, asked=2)
    assert [step for step in everything if other.is_done(step)] == [4]
    assert view({}).worth_keeping == set()


def write_as_an_older_version(path, step, **settings):
    """Makes a step's files those of version 0.1.0, which replaced results and had no keys.

    Args:
      settings: what ifgsm2 was last made with.
    """
    file = workdir_lib.evaluation_path(path, step, '.json')
    content = files.read_json(file)
    for result in content['attacks']:
        assert result.pop('key') == result['name']
    made = content['attacks'][1]['settings']
    made |= settings
    files.write_json(file, content)
    ledger = files.read_arrays(file.with_suffix('.npz'))
    ledger['ifgsm2_settings'] = np.array(json.dumps(made, sort_keys=True))
    files.write_arrays(file.with_suffix('.npz'), ledger)


def test_results_of_an_older_version_are_read_and_stay(workdir, fake, scalars):
    config = config_for()
    make_run(config, workdir)
    fake.accuracies = {(2, 'ifgsm2'): 0.9}
    evaluate.run(config, workdir)
    for step in (2, 4, 6):
        write_as_an_older_version(workdir, step)
    before, arrays = workdir_lib.read_evaluations(workdir), ledgers(workdir)
    fake.calls.clear()
    evaluate.run(config, workdir)
    assert fake.calls == []
    margin = changed(config, eval__ifgsm__loss='margin')
    evaluate.run(margin, workdir)
    evaluate.run(config, workdir)
    assert fake.calls == [(2, 'ifgsm2_loss=margin'), (6, 'ifgsm2_loss=margin')]
    for step in (2, 6):
        clean, attacked, added = results_at(workdir, step)
        assert [clean, attacked] == before[step]['attacks']
        assert added['settings'] == attacked['settings'] | {'loss': 'margin'}
        ledger = ledgers(workdir)[step]
        assert json.loads(str(ledger[f'{added["key"]}_settings'])) == added['settings']
        for name, array in arrays[step].items():
            np.testing.assert_array_equal(ledger[name], array)
    assert workdir_lib.read_evaluations(workdir)[4] == before[4]


def test_what_an_older_version_replaced_keeps_its_place(workdir, fake, scalars):
    """Its key is the plain name, of other settings than the run's own, which get one of theirs."""
    config = config_for()
    make_run(config, workdir, steps=(2, 4))
    evaluate.run(config, workdir)
    write_as_an_older_version(workdir, 4, step_size=0.01)
    make_run(config, workdir, steps=(6,))
    scalars.clear()
    evaluate.run(config, workdir)
    own = config.eval.ifgsm.step_size
    found = {
        step: {
            selection_lib.ledger_key(result): result['settings'].get('step_size')
            for result in results_at(workdir, step)
        }
        for step in (2, 4, 6)
    }
    assert found == {
        2: {'clean': None, 'ifgsm2': own},
        4: {'clean': None, 'ifgsm2': 0.01, f'ifgsm2_step_size={own}': own},
        6: {'clean': None, f'ifgsm2_step_size={own}': own},
    }
    for step, keys in found.items():
        for key, step_size in keys.items():
            settings = json.loads(str(ledgers(workdir)[step][f'{key}_settings']))
            assert settings.get('step_size') == step_size


def test_no_scalar_of_tensorboard_is_of_two_settings(workdir, fake, scalars):
    config = config_for()
    make_run(config, workdir)
    # Others come first at one step, and the run's own at another.
    others = [
        changed(config, eval__ifgsm__step_size=0.01),
        changed(config, eval__ifgsm__step_size=0.01, eval__ifgsm__restarts=2),
    ]
    for configs, steps in (([others[0], config], ('4', '6')), ([config, *others], ())):
        held = leases.open_leases(workdir)
        assert all(held.take(step) for step in steps)
        for each in configs:
            job = evaluate.Job(each, workdir)
            job.evaluate_pending()
            job.close()
        held.close()
    made = collections.defaultdict(set)
    evaluations = workdir_lib.read_evaluations(workdir)
    for step, tag, value in scalars:
        (result,) = (r for r in evaluations[step]['attacks'] if f'accuracy/{r["key"]}' == tag)
        assert result['accuracy'] == value
        made[tag].add(selection_lib.identity(result['settings']))
    assert {tag: len(settings) for tag, settings in made.items()} == {
        'accuracy/clean': 1,
        'accuracy/ifgsm2': 1,
        'accuracy/ifgsm2_step_size=0.01': 1,
        'accuracy/ifgsm2_restarts=2_step_size=0.01': 1,
    }
    assert len(scalars) == len(set(fake.calls)) == len(fake.calls)


def test_both_are_shown_and_damage_of_either_is_found(workdir, fake, scalars, capsys, caplog):
    config = config_for()
    make_run(config, workdir, steps=(6,))
    evaluate.run(config, workdir)
    key = 'ifgsm2_loss=margin'
    fake.accuracies = {(6, key): 0.3}
    evaluate.run(changed(config, eval__ifgsm__loss='margin'), workdir)
    last = capsys.readouterr().out.splitlines()[-1]
    shown = 'clean 0.5000  ifgsm2 0.5000  ifgsm2_loss=margin 0.3000'
    assert last == f'step 6  n 30  robust 0.3000  {shown}'
    # Older results do not say it, and the ledger does.
    json_path = workdir_lib.evaluation_path(workdir, 6, '.json')
    content = files.read_json(json_path)
    assert content.pop('robust')['attacks'] == ['clean', 'ifgsm2', key]
    files.write_json(json_path, content)
    evaluate.show(workdir)
    assert capsys.readouterr().out.splitlines()[-1] == last
    path = workdir_lib.evaluation_path(workdir, 6, '.npz')
    ledger = files.read_arrays(path)
    files.write_arrays(path, {k: v for k, v in ledger.items() if k != f'{key}_correct'})
    fake.calls.clear()
    evaluate.run(config, workdir)
    # It is put aside with all that it had: what the run itself asks for is made again.
    assert fake.calls == [(6, 'clean'), (6, 'ifgsm2')]
    assert f'{path.name}.damaged' in [p.name for p in path.parent.iterdir()]
    assert f'evaluating again, but for {key}, which this command does not ask for' in caplog.text


def test_the_attack_on_held_out_examples_is_kept_by_its_settings_too(workdir, fake, scalars):
    config = config_for(data__validation_examples=40, eval__select_on='validation')
    make_run(config, workdir)
    fake.accuracies = {(2, 'validation_ifgsm2'): 0.9}
    evaluate.run(config, workdir)
    key = 'validation_ifgsm2_loss=margin'
    fake.accuracies = {(6, key): 0.8}
    evaluate.run(changed(config, eval__ifgsm__loss='margin'), workdir)
    content = workdir_lib.read_evaluations(workdir)[6]
    assert [result['key'] for result in content['validation']] == ['validation_ifgsm2', key]
    ledger = ledgers(workdir)[6]
    assert len(ledger['validation_label']) == len(ledger[f'{key}_correct']) == 40
    assert len(ledger['ifgsm2_loss=margin_correct']) == 30


@pytest.mark.parametrize(
    'settings, others, expected',
    [
        ({'a': 1, 'b': 2}, [{'a': 1, 'b': 2}], []),
        ({'a': 1, 'b': 2}, [{'a': 0, 'b': 2}, {'a': 1, 'b': 0.5}], ['a=1', 'b=2']),
        ({'a': 1}, [{'a': 1.0}], []),
        ({'a': 1}, [{'a': 1, 'stay': 9}], ['stay=None']),
        (
            {'digest': 64 * 'd', 'share_fooled': 0.9},
            [{'digest': 64 * 'e', 'share_fooled': 1}],
            ['digest=dddddddddddddddddddd'],
        ),
    ],
)
def test_what_is_told_of_settings(settings, others, expected):
    assert selection_lib.differences(settings, others) == expected
    if len(others) == 1:
        same = selection_lib.identity(settings) == selection_lib.identity(others[0])
        assert same == (not expected)


CONFIG = {
    'eval': {
        'attacks': ['clean', 'pgd20'],
        'long_attacks': ['pgd500'],
        'iterate_examples': 10,
        'seed': 0,
        'pgd': {'loss': 'margin', 'step_size': 0.1, 'new': 1},
    }
}


@pytest.mark.parametrize(
    'name, settings, expected',
    [
        ('pgd20', {'loss': 'margin', 'step_size': 0.1, 'seed': 0, 'epsilon': 9}, True),
        ('pgd20', {'loss': 'margin', 'step_size': 0.1, 'seed': 1}, False),
        ('pgd20', {'loss': 'cross_entropy', 'step_size': 0.1, 'seed': 0}, False),
        ('pgd20', {'loss': 'margin', 'seed': 0, 'iterate_examples': 10}, False),
        ('pgd500', {'loss': 'margin', 'seed': 0, 'iterate_examples': 10}, True),
        ('pgd500', {'loss': 'margin', 'seed': 0, 'iterate_examples': 20}, False),
        ('pgd500', {'loss': 'margin', 'seed': 0}, False),
        ('pgd7', {'loss': 'margin', 'seed': 0}, True),
        ('clean', {'dtype': 'float32'}, True),
        ('blackbox', {'digest': 'd'}, True),
    ],
)
def test_what_a_config_asks_for(name, settings, expected):
    assert selection_lib.is_configured(name, settings, CONFIG) == expected
