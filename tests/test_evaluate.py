"""The evaluation job: which snapshots, which attacks, what is written, what is kept."""

import json

import numpy as np
import pytest
from conftest import tiny_config

from ensadv import build
from ensadv import config as config_lib
from ensadv.errors import UserError
from ensadv.evaluation import attack_settings, evaluate, evaluator
from ensadv.storage import checkpoints, files, selection
from ensadv.storage import workdir as workdir_lib
from ensadv.training import train

pytestmark = pytest.mark.usefixtures('small_network')


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """A run with snapshots at steps 2, 4 and 6, not evaluated."""
    from etils import epath

    path = epath.Path(tmp_path_factory.mktemp('trained')) / 'run'
    config = tiny_config('singleadv', train__steps=6)
    train.run(config, path)
    return config, path


@pytest.fixture
def copy_of_trained(trained, tmp_path):
    import shutil

    from etils import epath

    config, path = trained
    shutil.copytree(path, tmp_path / 'copy')
    return config.copy_and_resolve_references(), epath.Path(tmp_path) / 'copy'


def best_step(config, path):
    return selection.best_step(
        workdir_lib.read_evaluations(path), 'ifgsm2', config_lib.to_dict(config)
    )


def ledger_path(path, step):
    return workdir_lib.evaluation_path(path, step, '.npz')


def test_writes_results_and_the_ledger_behind_them(copy_of_trained):
    config, path = copy_of_trained
    job = evaluate.Job(config, path)
    job.evaluate_pending()
    job.close()
    evaluations = workdir_lib.read_evaluations(path)
    assert list(evaluations) == [2, 4, 6]
    labels = build.dataset(config).label_test[:30]
    for step, content in evaluations.items():
        ledger = files.read_arrays(workdir_lib.evaluation_path(path, step, '.npz'))
        np.testing.assert_array_equal(ledger['label'], labels)
        assert [result['name'] for result in content['attacks']] == ['clean', 'ifgsm2']
        for result in content['attacks']:
            correct = ledger[f'{result["name"]}_correct']
            assert correct.dtype == bool
            assert result['n'] == len(correct) == 30
            assert result['correct'] == correct.sum()
            assert result['accuracy'] == correct.mean() <= result['last_iterate_accuracy']
            np.testing.assert_array_equal(correct, ledger[f'{result["name"]}_margin'] > 0)
        assert np.all(ledger['ifgsm2_margin'] <= ledger['clean_margin'] + 1e-6)
    settings = evaluations[6]['attacks'][1]['settings']
    assert settings == attack_settings.evaluation_settings(config, 'ifgsm2')
    assert (settings['steps'], settings['epsilon'], settings['step_size']) == (2, 0.15, 0.0375)


def test_keeps_the_best_and_the_last_snapshot(copy_of_trained):
    config, path = copy_of_trained
    job = evaluate.Job(config, path)
    job.evaluate_pending()
    job.close()
    best = best_step(config, path)
    assert checkpoints.open_snapshots(path).steps() == sorted({best, 6})


def test_only_what_is_missing_is_evaluated(copy_of_trained, monkeypatch):
    config, path = copy_of_trained
    done = []
    original = evaluator.Evaluator.evaluate

    def counting(self, variables, settings, images, labels, label, **others):
        done.append(label.rpartition(' ')[2])
        return original(self, variables, settings, images, labels, label, **others)

    monkeypatch.setattr(evaluator.Evaluator, 'evaluate', counting)

    def evaluate_with(**changes):
        done.clear()
        changed = config.copy_and_resolve_references()
        changed.update_from_flattened_dict({k.replace('__', '.'): v for k, v in changes.items()})
        job = evaluate.Job(changed, path)
        job.evaluate_pending()
        job.close()
        return sorted(done)

    assert evaluate_with() == ['clean'] * 3 + ['ifgsm2'] * 3
    assert evaluate_with() == []
    kept = len(checkpoints.open_snapshots(path).steps())
    assert evaluate_with(eval__attacks=('clean', 'ifgsm2', 'ifgsm3')) == ['ifgsm3'] * kept
    # Another setting is another attack; what was asked for before stays, and is not made again.
    before = workdir_lib.read_evaluations(path)[6]['attacks']
    others = {'eval__attacks': ('ifgsm2',), 'eval__ifgsm__step_size': 0.01}
    assert evaluate_with(**others) == ['ifgsm2_step_size=0.01'] * kept
    assert evaluate_with(**others) == []
    assert evaluate_with() == []
    attacked, added, *last = workdir_lib.read_evaluations(path)[6]['attacks']
    assert [last[0], attacked, last[1]] == before
    assert (added['name'], added['key']) == ('ifgsm2', 'ifgsm2_step_size=0.01')
    assert added['settings'] == before[1]['settings'] | {'step_size': 0.01}
    ledger = files.read_arrays(workdir_lib.evaluation_path(path, 6, '.npz'))
    for result in (added, *before):
        assert ledger[f'{result["key"]}_correct'].sum() == result['correct']
        assert json.loads(str(ledger[f'{result["key"]}_settings'])) == result['settings']
    with pytest.raises(UserError, match=r'eval\.num_examples: 30 -> 20'):
        evaluate_with(eval__attacks=('pgd2',), eval__num_examples=20)


def test_data_other_than_the_runs_are_refused(copy_of_trained):
    config, path = copy_of_trained
    record = workdir_lib.read_record(path)
    record['dataset']['fingerprint'] = 'another'
    files.write_json(path / 'config.json', record)
    with pytest.raises(UserError, match='made on other data'):
        evaluate.Job(config, path).evaluate_pending()


def job_of(config, path, **changes):
    changed = config.copy_and_resolve_references()
    changed.update_from_flattened_dict({k.replace('__', '.'): v for k, v in changes.items()})
    return evaluate.Job(changed, path)


def test_a_look_with_fewer_attacks_deletes_nothing(copy_of_trained):
    config, path = copy_of_trained
    job_of(config, path, eval__attacks=('clean',)).evaluate_pending()
    assert checkpoints.open_snapshots(path).steps() == [2, 4, 6]
    job_of(config, path).evaluate_pending()
    assert len(checkpoints.open_snapshots(path).steps()) < 3


def names_of(path, step):
    return [r['name'] for r in workdir_lib.read_evaluations(path)[step]['attacks']]


def test_what_another_process_wrote_meanwhile_stays(copy_of_trained, monkeypatch):
    """As where a paused process wakes, whose claim another has taken over."""
    config, path = copy_of_trained
    original = evaluator.Evaluator.evaluate
    meanwhile = []

    def interrupted(self, *args, **others):
        verdicts = original(self, *args, **others)
        if not meanwhile:
            meanwhile.append(True)
            other = job_of(config, path, eval__attacks=('pgd2', 'ifgsm3'))
            for step in (2, 4, 6):
                other._results.evaluate(
                    step,
                    other._results.units,
                    lambda network, step=step: checkpoints.open_snapshots(path).restore(
                        step, network.variables
                    ),
                )
        return verdicts

    monkeypatch.setattr(evaluator.Evaluator, 'evaluate', interrupted)
    job_of(config, path).evaluate_pending()
    assert names_of(path, 2) == ['clean', 'ifgsm2', 'pgd2', 'ifgsm3']
    ledger = files.read_arrays(workdir_lib.evaluation_path(path, 2, '.npz'))
    assert all(f'{name}_margin' in ledger for name in names_of(path, 2))


def test_results_stay_whole_where_others_die_between_ledger_and_json(copy_of_trained, monkeypatch):
    config, path = copy_of_trained
    job_of(config, path).evaluate_pending()
    before = workdir_lib.read_evaluations(path)
    arrays = {step: files.read_arrays(ledger_path(path, step)) for step in before}
    original = files.write_json

    def dies_after_the_ledger(target, content):
        if any(r['settings'].get('step_size') == 0.01 for r in content['attacks']):
            raise OSError('power loss')
        original(target, content)

    monkeypatch.setattr(files, 'write_json', dies_after_the_ledger)
    other = {'eval__ifgsm__step_size': 0.01}
    with pytest.raises(OSError, match='power loss'):
        job_of(config, path, **other).evaluate_pending()
    monkeypatch.setattr(files, 'write_json', original)
    assert workdir_lib.read_evaluations(path) == before
    sizes = {s: len(files.read_arrays(ledger_path(path, s))) for s in before}
    (half,) = (s for s in before if sizes[s] > len(arrays[s]))
    ledger = files.read_arrays(ledger_path(path, half))
    assert set(ledger) - set(arrays[half]) == {
        f'ifgsm2_step_size=0.01_{suffix}' for suffix in ('correct', 'margin', 'settings')
    }
    for name, array in arrays[half].items():
        np.testing.assert_array_equal(ledger[name], array)
    # What is half written is no result: it is made again.
    job_of(config, path, **other).evaluate_pending()
    keys = [r['key'] for r in workdir_lib.read_evaluations(path)[half]['attacks']]
    assert keys == ['clean', 'ifgsm2', 'ifgsm2_step_size=0.01']


def test_what_no_attack_could_be_made_on_is_not_called_robust(copy_of_trained, monkeypatch, caplog):
    config, path = copy_of_trained
    original = evaluator.Evaluator.evaluate

    def without_gradient(self, variables, settings, *args, **others):
        verdicts = original(self, variables, settings, *args, **others)
        if 'steps' not in settings:
            return verdicts
        margin = np.arange(-5, 25, dtype=np.float32) + 0.5  # 5 fall, 25 stand
        return verdicts._replace(
            margin=margin, last_margin=margin, has_gradient=np.arange(30) % 2 == 0
        )

    monkeypatch.setattr(evaluator.Evaluator, 'evaluate', without_gradient)
    job_of(config, path).evaluate_pending()
    clean, attacked = workdir_lib.read_evaluations(path)[6]['attacks']
    assert clean['no_gradient'] == 0
    assert (attacked['no_gradient'], attacked['correct']) == (13, 12)
    assert attacked['accuracy'] == attacked['last_iterate_accuracy'] == 12 / 30
    ledger = files.read_arrays(workdir_lib.evaluation_path(path, 6, '.npz'))
    np.testing.assert_array_equal(
        ledger['ifgsm2_correct'], (np.arange(30) >= 5) & (np.arange(30) % 2 == 0)
    )
    assert 'no gradient, or one of zeros or NaN only, on 13 of the 25' in caplog.text


def test_long_attacks_are_made_on_the_best_and_the_last(copy_of_trained):
    config, path = copy_of_trained
    settings = {'eval__long_attacks': ('pgd7',), 'eval__iterate_examples': 10}
    job_of(config, path, **settings).evaluate_pending()
    evaluations = workdir_lib.read_evaluations(path)
    best = best_step(config, path)
    for step in (2, 4, 6):
        assert ('pgd7' in names_of(path, step)) == (step in (best, 6))
    result = evaluations[6]['attacks'][-1]
    curve = result['curve']
    assert curve['steps'] == [1, 2, 5, 7]
    assert len(curve['accuracy']) == len(curve['iterate_accuracy']) == 4
    assert curve['accuracy'] == sorted(curve['accuracy'], reverse=True)
    assert curve['accuracy'][-1] == result['accuracy']
    assert curve['iterate_n'] == result['last_iterate_n'] == 10
    assert curve['iterate_accuracy'][-1] == result['last_iterate_accuracy']
    ledger = files.read_arrays(workdir_lib.evaluation_path(path, 6, '.npz'))
    fooled_at = ledger['pgd7_fooled_at']
    np.testing.assert_array_equal(fooled_at == -1, ledger['pgd7_margin'] > 0)
    assert np.mean((fooled_at == -1) | (fooled_at > 2)) == curve['accuracy'][1]


def test_long_attacks_on_the_last_alone(copy_of_trained):
    config, path = copy_of_trained
    settings = {'eval__long_attacks': ('pgd7',), 'eval__long_attacks_on': 'last'}
    job_of(config, path, **settings).evaluate_pending()
    assert best_step(config, path) != 6
    assert ['pgd7' in names_of(path, step) for step in (2, 4, 6)] == [False, False, True]


def test_examples_are_kept_of_the_best_and_the_last(copy_of_trained):
    config, path = copy_of_trained
    shown = {'eval__examples': 5, 'eval__attacks': ('clean', 'pgd3', 'ifgsm2')}
    job = job_of(config, path, **shown)
    job.evaluate_pending()
    best = best_step(config, path)
    for step in (2, 4, 6):
        assert (workdir_lib.read_examples(path, step) is not None) == (step in (best, 6))
    kept = workdir_lib.read_examples(path, 6)
    test = build.dataset(config)
    np.testing.assert_array_equal(kept['image'], test.image_test[:5])
    np.testing.assert_array_equal(kept['label'], test.label_test[:5])
    settings = json.loads(str(kept['settings']))
    assert (settings['attack'], settings['steps']) == ('pgd', 3)
    # It is the point where the ledger's verdict was found.
    perturbation = kept['adversarial'] - kept['image'] / np.float32(255)
    assert 0 < np.abs(perturbation).max() <= config.epsilon + 1e-6
    log_probs = kept['adversarial_log_probs'].astype(float)
    own = np.eye(10, dtype=bool)[kept['label']]
    margin = log_probs[own] - np.where(own, -np.inf, log_probs).max(axis=1)
    ledger = files.read_arrays(workdir_lib.evaluation_path(path, 6, '.npz'))
    np.testing.assert_allclose(margin, ledger['pgd3_margin'][:5], atol=1e-4)
    # Those that are there stay: two processes with other attacks would undo each other's for ever.
    file = workdir_lib.evaluation_path(path, 6, '_examples.npz')
    files.write_arrays(file, {'there': np.ones(1)})
    job_of(config, path, **(shown | {'eval__pgd__step_size': 0.01})).evaluate_pending()
    assert list(workdir_lib.read_examples(path, 6)) == ['there']


def evaluation(**accuracies):
    """Returns a step's results under attacks as OWN has them; <name>_other is with other ones."""
    results = [
        {
            'name': key.removesuffix('_other'),
            'accuracy': accuracy,
            'settings': {'seed': int(key.endswith('_other'))},
        }
        for key, accuracy in accuracies.items()
    ]
    return {'attacks': results, 'validation': []}


OWN = {'eval': {'attacks': ['clean', 'ifgsm5'], 'select_on': 'test', 'seed': 0}}
HELD_OUT = {'eval': OWN['eval'] | {'select_on': 'validation'}}


@pytest.mark.parametrize(
    'evaluations, expected',
    [
        ({1: {'clean': 0.9, 'ifgsm5': 0.3}, 2: {'clean': 0.5, 'ifgsm5': 0.4}}, 2),
        ({5: {'clean': 0.9, 'ifgsm5': 0.3}, 3: {'clean': 0.5, 'ifgsm5': 0.3}}, 3),
        ({1: {'pgd5': 0.2, 'ifgsm5': 0.3}, 2: {'pgd5': 0.9, 'ifgsm5': 0.2}}, 1),
        ({1: {'ifgsm5': 0.3}, 2: {'clean': 0.9, 'pgd50': 0.8}}, 1),
        ({1: {'clean': 0.9}}, None),
        ({}, None),
        # Accuracies under other settings are not compared with these.
        ({1: {'ifgsm5': 0.3}, 2: {'ifgsm5': 0.4}, 3: {'ifgsm5_other': 0.9}}, 2),
        ({1: {'ifgsm5': 0.3}, 2: {'ifgsm5_other': 0.9, 'ifgsm5': 0.2}}, 1),
        ({1: {'ifgsm5_other': 0.1, 'ifgsm5': 0.2}, 2: {'ifgsm5': 0.3, 'ifgsm5_other': 0}}, 2),
        ({1: {'ifgsm5_other': 0.9}, 2: {'ifgsm5_other': 0.8}, 3: {'ifgsm5': 0.1}}, 3),
        ({1: {'ifgsm5_other': 0.8}, 2: {'ifgsm5_other': 0.9}}, 2),
    ],
)
def test_the_best_step_is_that_of_the_highest_accuracy(evaluations, expected):
    evaluations = {step: evaluation(**values) for step, values in evaluations.items()}
    assert selection.best_step(evaluations, 'ifgsm5', OWN) == expected
    # The same on the other split, which must not see the test's.
    swapped = {
        step: {'attacks': [], 'validation': content['attacks']}
        for step, content in evaluations.items()
    }
    assert selection.best_step(swapped, 'ifgsm5', HELD_OUT) == expected
    assert selection.best_step(swapped, 'ifgsm5', OWN) is None


@pytest.mark.parametrize(
    'names, expected',
    [
        (('clean', 'ifgsm7', 'ifgsm5', 'pgd20'), 'ifgsm5'),
        (('clean', 'blackbox', 'pgd5', 'ifgsm7'), 'pgd5'),
        (('blackbox', 'clean'), 'clean'),
        (('blackbox',), 'blackbox'),
    ],
)
def test_the_attack_that_selects(names, expected):
    assert selection.selection_attack(names) == expected


@pytest.mark.parametrize(
    'names, expected',
    [
        (('clean', 'pgd5', 'ifgsm20', 'pgd20', 'blackbox'), 'pgd20'),
        (('pgd20', 'ifgsm20'), 'pgd20'),
        (('pgd20', 'ifgsm21'), 'ifgsm21'),
        (('clean', 'blackbox'), None),
        ((), None),
    ],
)
def test_the_attack_with_the_most_steps(names, expected):
    assert selection.most_steps(names) == expected
    assert selection.strongest(names) == expected


@pytest.mark.parametrize(
    'names, expected',
    [
        (('autoattack', 'pgd500', 'autoattack_plus'), 'autoattack_plus'),
        (('fab_t', 'apgd_t', 'autoattack', 'pgd500'), 'autoattack'),
        (('square', 'fab_t', 'apgd_t20', 'pgd500'), 'apgd_t20'),
        # It sees no gradients.
        (('square', 'pgd5'), 'pgd5'),
        (('clean', 'square'), 'square'),
    ],
)
def test_the_strongest_attack_is_autoattack_or_a_part_of_it(names, expected):
    assert selection.strongest(names) == expected
    # Whose examples are kept is in one stage.
    assert selection.most_steps(names) in {'pgd500', 'pgd5', None}


def test_results_are_plain_json(copy_of_trained):
    config, path = copy_of_trained
    evaluate.run(config, path)
    text = workdir_lib.evaluation_path(path, 6, '.json').read_text()
    assert json.loads(text)['test_examples'] == 360
    assert 'NaN' not in text
