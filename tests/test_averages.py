"""Averaged weights: from the field to what is trained, evaluated and reported."""

import jax
import numpy as np
import pytest
from conftest import tiny_config, variables_like
from etils import epath

from ensadv import build, losses
from ensadv.errors import ConfigError
from ensadv.evaluation import evaluate, finished_runs
from ensadv.evaluation.evaluator import Evaluator
from ensadv.report import collect
from ensadv.storage import checkpoints, workdir
from ensadv.training import train

pytestmark = pytest.mark.usefixtures('small_network')

DECAY = 0.6
EVERY_STEP = {'train__snapshot_every': 1, 'train__steps_per_call': 1, 'eval__num_examples': 120}


@pytest.fixture(scope='module', params=['ensemble2adv', 'separate2adv'])
def run(request, tmp_path_factory):
    """A run that goes on from its second step, with a snapshot of every step."""
    path = epath.Path(tmp_path_factory.mktemp('averages')) / 'run'
    config = tiny_config(request.param, train__ema_decay=DECAY, **EVERY_STEP)
    config.system = request.param
    for config.train.steps in (2, 4):
        train.run(config, path)
    return config, path


def snapshots(config, path):
    """Returns each step's trained and averaged weights."""
    like = variables_like(config)
    opened = checkpoints.open_snapshots(path)
    found = [opened.restore(step, {**like, 'averaged': like}) for step in opened.steps()]
    averaged = [each.pop('averaged') for each in found]
    return jax.device_get((found, averaged))


def test_a_snapshot_has_the_averages_over_all_steps(run):
    trained, averaged = snapshots(*run)
    for step, found in enumerate(averaged, start=1):
        weights = DECAY ** np.arange(step - 1, -1, -1)
        mean = lambda *leaves, w=weights: np.tensordot(w, np.stack(leaves), 1) / w.sum()
        expected = jax.tree.map(mean, *trained[:step])
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), found, expected)


def test_either_weights_are_evaluated_and_both_are_in_the_report(run):
    config, path = run[0].copy_and_resolve_references(), run[1]
    for config.eval.weights in ('auto', 'trained', 'auto'):
        evaluate.run(config, path)
    trained, averaged = snapshots(config, path)
    dataset = build.dataset(config)
    judge = Evaluator(build.network(config, dataset.describe()), 40)
    images, labels = dataset.image_test[:120] / np.float32(255), dataset.label_test[:120]
    for folder, variables in ((path, averaged[-1]), (path / workdir.TRAINED, trained[-1])):
        ledger = workdir.read_ledger(workdir.evaluation_path(folder, 4, '.npz'))
        margin = losses.margin(judge.log_probs(variables, images, 'clean'), labels)
        np.testing.assert_allclose(ledger['clean_margin'], margin, atol=1e-5)
    found = collect.collect(path, ())
    assert list(found.systems) == [config.system, f'{config.system}, trained weights']
    assert found.apart == []
    # As members, in planes and in transfer sets a run stands with its usual weights.
    _, variables = finished_runs.load_one(finished_runs.find(path, 'field', config), 'float32')
    jax.tree.map(np.testing.assert_array_equal, variables, averaged[-1])


def test_without_an_average_there_is_nothing_to_pick():
    from ensadv import config as config_lib
    from ensadv import config_checks

    config = tiny_config('singleadv', eval__weights='averaged')
    with pytest.raises(ConfigError, match=r'eval\.weights: averaged weights need an average'):
        config_checks.validate(config)
    assert config_lib.weights(tiny_config('singleadv')) == 'trained'
    assert config_lib.weights(tiny_config('singleadv', train__ema_decay=0.9)) == 'averaged'
