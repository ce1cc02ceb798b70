"""Evaluation: sums and counts over every example once, whatever the batch."""

import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import tiny_config

from ensadv import build, checkpoints, data, evaluate, parallel, train
from ensadv import workdir as workdir_lib
from ensadv.errors import UserError

# 17 test images, which divides by nothing: labels 0, 1, 2 come 5, 8 and 4 times.
TEST_LABELS = [0, 1, 2, 1, 1, 0, 2, 1, 0, 1, 1, 2, 0, 1, 2, 1, 0]


def seventeen():
    rng = np.random.default_rng(0)
    images = lambda n: rng.integers(0, 256, (n, 4, 4, 1), np.uint8)
    labels = np.array(TEST_LABELS, np.int32)
    return data.Dataset('npz', images(9), np.arange(9, dtype=np.int32) % 3, images(17), labels, 3)


class Constant(nn.Module):
    """The same logits for every image: class 1 wins by 0.5 over class 0."""

    @nn.compact
    def __call__(self, x, train):
        del train
        bias = self.param('bias', lambda _: jnp.array([0.5, 1.0, -1.0]))
        self.variable('batch_stats', 'none', jnp.zeros, ())
        return jnp.broadcast_to(bias, (len(x), 3))


class Brightness(nn.Module):
    """Bright images are class 0, dark ones class 1."""

    @nn.compact
    def __call__(self, x, train):
        del train
        scale = self.param('scale', lambda _: jnp.array(10.0))
        self.variable('batch_stats', 'none', jnp.zeros, ())
        z = scale * (jnp.mean(x, axis=(1, 2, 3)) - 0.5)
        return jnp.stack([z, -z, jnp.full_like(z, -100)], axis=-1)


def evaluator_of(monkeypatch, network, dataset=None, **changes):
    monkeypatch.setattr(build, 'model', lambda *_, **__: network)
    changes = {'eval__num_examples': 17, 'eval__batch_size': 5} | changes
    config = tiny_config('ensemble2', **changes)
    return config, evaluate.Evaluator(config, dataset or seventeen())


def variables_of(network, k=2):
    one = network.init(jax.random.key(0), jnp.zeros((1, 4, 4, 1)), train=False)
    stacked = jax.tree.map(lambda leaf: jnp.stack([leaf] * k), one)
    return parallel.replicate(stacked)


@pytest.mark.parametrize('name', ['clean', 'ifgsm3', 'pgd3'])
@pytest.mark.parametrize('batch_size', [1, 5, 17, 100])
def test_constant_logits_have_the_accuracy_worked_out_by_hand(monkeypatch, name, batch_size):
    config, evaluator = evaluator_of(monkeypatch, Constant(), eval__batch_size=batch_size)
    settings = build.evaluation_settings(config, name)
    worst, last = evaluator.evaluate(variables_of(Constant()), settings, 'test')
    assert len(worst) == len(last) == 17
    assert np.mean(worst > 0) == 8 / 17
    np.testing.assert_array_equal(worst > 0, np.array(TEST_LABELS) == 1)
    np.testing.assert_allclose(worst[[0, 1, 2]], [-0.5, 0.5, -2.0], atol=1e-6)
    np.testing.assert_array_equal(worst, last)


def test_a_model_whose_worst_case_is_known(monkeypatch):
    """The mean brightness moves by epsilon, as far as the pixel box lets every pixel move."""
    dataset = seventeen()
    config, evaluator = evaluator_of(monkeypatch, Brightness(), dataset)
    x = dataset.image_test / 255.0
    toward = np.where(np.array(TEST_LABELS) == 0, -1, 1)
    moved = np.clip(x + 0.15 * toward[:, None, None, None], 0, 1).mean((1, 2, 3))
    z = 10 * (moved - 0.5)
    expected = np.select(
        [np.array(TEST_LABELS) == 0, np.array(TEST_LABELS) == 1], [2 * z, -2 * z], np.nan
    )
    settings = build.evaluation_settings(config, 'ifgsm20')
    worst, _ = evaluator.evaluate(variables_of(Brightness()), settings, 'test')
    known = np.isfinite(expected)
    np.testing.assert_allclose(worst[known], expected[known], atol=1e-4)


def test_results_do_not_depend_on_the_batch_size(monkeypatch):
    results = []
    for batch_size in (3, 17):
        config, evaluator = evaluator_of(monkeypatch, Brightness(), eval__batch_size=batch_size)
        settings = build.evaluation_settings(config, 'pgd2')
        results.append(evaluator.evaluate(variables_of(Brightness()), settings, 'test'))
    np.testing.assert_allclose(results[0], results[1], atol=1e-6)


def test_the_first_examples_alone_when_told(monkeypatch):
    config, evaluator = evaluator_of(monkeypatch, Constant(), eval__num_examples=7)
    settings = build.evaluation_settings(config, 'clean')
    worst, _ = evaluator.evaluate(variables_of(Constant()), settings, 'test')
    np.testing.assert_array_equal(worst > 0, np.array(TEST_LABELS[:7]) == 1)
    with pytest.raises(UserError, match='at most the 17 test examples, found 18'):
        evaluator_of(monkeypatch, Constant(), eval__num_examples=18)


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


def test_writes_results_and_the_ledger_behind_them(copy_of_trained):
    config, path = copy_of_trained
    job = evaluate.Job(config, path)
    job.evaluate_pending()
    job.close()
    evaluations = workdir_lib.read_evaluations(path)
    assert list(evaluations) == [2, 4, 6]
    labels = build.dataset(config).label_test[:30]
    for step, content in evaluations.items():
        ledger = workdir_lib.read_arrays(workdir_lib.evaluation_path(path, step, '.npz'))
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
    assert settings == build.evaluation_settings(config, 'ifgsm2')
    assert (settings['steps'], settings['epsilon'], settings['step_size']) == (2, 0.15, 0.0375)


def test_keeps_the_best_and_the_last_snapshot(copy_of_trained):
    config, path = copy_of_trained
    job = evaluate.Job(config, path)
    job.evaluate_pending()
    job.close()
    best = evaluate.best_step(workdir_lib.read_evaluations(path))
    assert checkpoints.open_snapshots(path).steps() == sorted({best, 6})


def test_only_what_is_missing_is_evaluated(copy_of_trained, monkeypatch):
    config, path = copy_of_trained
    done = []
    original = evaluate.Evaluator.evaluate

    def counting(self, variables, settings, label):
        done.append(label.rpartition(' ')[2])
        return original(self, variables, settings, label)

    monkeypatch.setattr(evaluate.Evaluator, 'evaluate', counting)

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
    # Another setting is another attack; what was asked for before stays.
    assert evaluate_with(eval__attacks=('ifgsm2',), eval__ifgsm_step_size=0.01) == ['ifgsm2'] * kept
    last = workdir_lib.read_evaluations(path)[6]['attacks']
    assert [r['name'] for r in last] == ['ifgsm2', 'clean', 'ifgsm3']
    assert last[0]['settings']['step_size'] == 0.01
    ledger = workdir_lib.read_arrays(workdir_lib.evaluation_path(path, 6, '.npz'))
    assert all(f'{r["name"]}_margin' in ledger for r in last)
    with pytest.raises(UserError, match=r'eval\.num_examples: 30 -> 20'):
        evaluate_with(eval__attacks=('pgd2',), eval__num_examples=20)


def test_data_other_than_the_runs_are_refused(copy_of_trained):
    config, path = copy_of_trained
    record = workdir_lib.read_record(path)
    record['dataset']['fingerprint'] = 'another'
    workdir_lib.write_json(path / 'config.json', record)
    with pytest.raises(UserError, match='made on other data'):
        evaluate.Job(config, path).evaluate_pending()


def evaluation(**accuracies):
    return {'attacks': [{'name': k, 'accuracy': v} for k, v in accuracies.items()]}


@pytest.mark.parametrize(
    'evaluations, expected',
    [
        ({1: {'clean': 0.9, 'ifgsm5': 0.3}, 2: {'clean': 0.5, 'ifgsm5': 0.4}}, 2),
        ({5: {'clean': 0.9, 'ifgsm5': 0.3}, 3: {'clean': 0.5, 'ifgsm5': 0.3}}, 3),
        ({1: {'pgd5': 0.2, 'ifgsm5': 0.3}, 2: {'pgd5': 0.9, 'ifgsm5': 0.2}}, 1),
        ({1: {'clean': 0.9, 'pgd5': 0.3}, 2: {'clean': 0.5, 'pgd5': 0.4}}, 2),
        ({1: {'clean': 0.9}, 2: {'clean': 0.5}}, 1),
        ({1: {'ifgsm5': 0.3}, 2: {'clean': 0.9, 'pgd50': 0.8}}, 1),
    ],
)
def test_the_best_step_is_that_of_ifgsm5(evaluations, expected):
    evaluations = {step: evaluation(**values) for step, values in evaluations.items()}
    assert evaluate.best_step(evaluations) == expected


def test_results_are_plain_json(copy_of_trained):
    config, path = copy_of_trained
    evaluate.run(config, path)
    text = workdir_lib.evaluation_path(path, 6, '.json').read_text()
    assert json.loads(text)['test_examples'] == 360
    assert 'NaN' not in text
