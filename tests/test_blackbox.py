"""The transfer set: made against sources of our own, verified, and judged by."""

import contextlib

import jax
import numpy as np
import pytest
from conftest import ROOT, TINY, overrides, run_main, tiny_config
from etils import epath

from configs import default
from ensadv import build, study
from ensadv import config as config_lib
from ensadv.attacks.threat_model import ThreatModel
from ensadv.errors import ConfigError, UserError
from ensadv.evaluation import blackbox, evaluate, finished_runs, transfer_sets
from ensadv.evaluation.evaluator import Evaluator
from ensadv.storage import checkpoints, files
from ensadv.storage import workdir as workdir_lib

pytestmark = pytest.mark.usefixtures('small_network')

CONFIGS = epath.Path(ROOT) / 'configs'
SETTINGS = TINY | {
    'train.steps': 40,
    'train.batch_size': 32,
    'train.learning_rate_steps': (30,),
    'blackbox.sources': ('baseline', 'ensemble2'),
    'blackbox.steps': 5,
    'blackbox.rounds': 3,
    'eval.num_examples': 40,
}


def config_of(**changes):
    config = default.get_config()
    config.update_from_flattened_dict(SETTINGS)
    config.update_from_flattened_dict({k.replace('__', '.'): v for k, v in changes.items()})
    return config


@pytest.fixture(scope='module')
def root(tmp_path_factory):
    """A transfer set and its sources."""
    root = epath.Path(tmp_path_factory.mktemp('blackbox'))
    blackbox.make(config_of(), root, CONFIGS, study.run_one)
    return root


@pytest.fixture(scope='module')
def dataset():
    return build.dataset(config_of())


def log_probs_of(path, images):
    """A run's log-probabilities on uint8 images, by nothing but its own snapshot."""
    stored = workdir_lib.read_record(path)['config']
    system = stored['system'].lower()
    config = tiny_config(system)
    network = build.network(config, build.dataset(config).describe())
    variables = checkpoints.open_snapshots(path).restore(
        stored['train']['steps'], network.variables
    )
    x = images.astype(np.float32) / 255
    return np.asarray(jax.jit(network.log_probs)(variables, x))


def test_every_source_errs_where_the_file_says_so(root, dataset):
    found = transfer_sets.load(root / 'blackbox.npz', dataset, ThreatModel('linf', 0.15))
    np.testing.assert_array_equal(found.indices, np.arange(40))
    np.testing.assert_array_equal(found.labels, dataset.label_test[:40])
    errs = [
        np.argmax(log_probs_of(root / f'{name}_seed1000', found.images), axis=1) != found.labels
        for name in ('baseline', 'ensemble2')
    ]
    np.testing.assert_array_equal(errs[0] & errs[1], found.fooled)
    assert found.fooled.mean() > 0.5
    moved = found.images.astype(int) - dataset.image_test[:40]
    assert 30 < np.abs(moved).max() <= 38  # of 38.25 levels


def test_the_record_says_how_it_was_made(root):
    record = transfer_sets.read_record(root / 'blackbox.npz')
    for source, name in zip(record['sources'], ('baseline', 'ensemble2'), strict=True):
        evaluations = workdir_lib.read_evaluations(root / f'{name}_seed1000')
        clean = evaluations[40]['attacks'][0]
        assert source['clean_accuracy'] == clean['accuracy']
        assert (source['seed'], source['step'], clean['n']) == (1000, 40, 40)
        # A clean training, whatever the systems that are judged by the set.
        assert source['config']['train']['adversarial_weight'] == 0
    rounds = record['made_by']['rounds']
    assert [r['steps'] for r in rounds] == [5, 10, 20]
    assert [r['restarts'] for r in rounds] == [1, 2, 3]
    assert rounds[0]['loss'] == 'mean_logits'
    assert record['made_by']['combine'] == 'logits'
    assert record['epsilon'] == 0.15
    assert record['fooled'] == record['fooled_per_round'][-1]
    assert record['fooled_per_round'] == sorted(record['fooled_per_round'])
    assert {'versions', 'devices', 'fingerprint', 'command'} <= record.keys()


def test_escalation_goes_on_only_with_what_stands(root, monkeypatch, tmp_path):
    import shutil

    attacked = []
    original = Evaluator.points

    def watching(*given, places, **others):
        attacked.append(places)
        return original(*given, places=places, **others)

    monkeypatch.setattr(Evaluator, 'points', watching)
    copy = epath.Path(tmp_path) / 'copy'
    shutil.copytree(root, copy)
    before = transfer_sets.read_record(copy / 'blackbox.npz')
    (copy / 'blackbox.npz').unlink()
    blackbox.make(config_of(), copy, CONFIGS, study.run_one)
    assert len(attacked[0]) == 40
    for places, fooled in zip(attacked[1:], before['fooled_per_round'], strict=False):
        assert len(places) == 40 - fooled
    # Made again from the same sources it is the same set.
    assert transfer_sets.read_record(copy / 'blackbox.npz')['digest'] == before['digest']


def test_a_set_that_is_there_is_not_made_again(root, monkeypatch):
    def never(*_):
        raise AssertionError('attacked again')

    monkeypatch.setattr(Evaluator, 'points', never)
    assert blackbox.make(config_of(), root, CONFIGS, study.run_one) == root / 'blackbox.npz'
    with pytest.raises(UserError, match='made from other sources or settings'):
        blackbox.make(config_of(blackbox__rounds=1), root, CONFIGS, study.run_one)


def test_what_never_falls_is_told_and_marked(tmp_path, root, capsys):
    import shutil

    copy = epath.Path(tmp_path) / 'copy'
    shutil.copytree(root, copy)
    (copy / 'blackbox.npz').unlink()
    # A step size of nothing fools nobody who was right.
    config = config_of(blackbox__step_size=1e-7, blackbox__rounds=1, blackbox__start='none')
    blackbox.make(config, copy, CONFIGS, study.run_one)
    record = transfer_sets.read_record(copy / 'blackbox.npz')
    left = 40 - record['fooled']
    assert left > 0
    assert f'{left} never did, and are marked' in capsys.readouterr().out


@pytest.fixture
def judged(tmp_path):
    """A run that is no source, short."""
    path = epath.Path(tmp_path) / 'judged'
    config = tiny_config('singleadv', train__steps=2, eval__num_examples=40)
    study.run_one(config, path, 'judged')
    return config, path


def test_accuracy_on_the_set_is_that_of_a_forward_pass(root, judged, dataset):
    config, path = judged
    config.eval.blackbox_path = str(root / 'blackbox.npz')
    evaluate.run(config, path)
    found = transfer_sets.load(root / 'blackbox.npz', dataset, ThreatModel('linf', 0.15))
    correct = np.argmax(log_probs_of(path, found.images), axis=1) == found.labels
    results = {r['name']: r for r in workdir_lib.read_evaluations(path)[2]['attacks']}
    assert results['blackbox']['correct'] == correct.sum()
    assert results['blackbox']['n'] == 40
    settings = results['blackbox']['settings']
    assert settings['digest'] == found.record['digest']
    assert settings['share_fooled'] == found.fooled.mean()
    ledger = files.read_arrays(workdir_lib.evaluation_path(path, 2, '.npz'))
    np.testing.assert_array_equal(ledger['blackbox_correct'], correct)


def test_a_set_for_something_else_is_refused(root, judged, monkeypatch):
    config, path = judged
    config.eval.blackbox_path = str(root / 'nothing.npz')
    with pytest.raises(UserError, match=r'eval\.blackbox_path'):
        evaluate.Job(config, path)
    config.eval.blackbox_path = None
    config.eval.attacks = ('clean', 'blackbox')
    with pytest.raises(ConfigError, match='--mode=blackbox'):
        evaluate.Job(config, path)
    # A set for 40 examples does not do for the whole test split.
    config.eval.blackbox_path = str(root / 'blackbox.npz')
    config.eval.num_examples = None
    record = workdir_lib.read_record(path)
    record['config']['eval']['num_examples'] = None
    files.write_json(path / 'config.json', record)
    with pytest.raises(UserError, match=r'expected the 360 test examples.*found 40 of them'):
        evaluate.Job(config, path).evaluate_pending()


def test_another_epsilon_is_refused(root, tmp_path):
    path = epath.Path(tmp_path) / 'run'
    config = tiny_config(
        'singleadv', train__steps=2, epsilon=0.1, eval__num_examples=40,
        eval__blackbox_path=str(root / 'blackbox.npz'),
    )  # fmt: skip
    with pytest.raises(UserError, match='epsilon'):
        study.run_one(config, path, 'other')


def test_a_source_is_not_judged_by_its_own_set(root):
    path = root / 'baseline_seed1000'
    config = config_of(seed=1000, eval__blackbox_path=str(root / 'blackbox.npz'))
    stored = workdir_lib.read_record(path)['config']
    config.system = stored['system']
    config.train.adversarial_weight = 0.0
    config = config.copy_and_resolve_references()
    config.model.dtype = 'float32'
    config.train.snapshot_every = 40
    with pytest.raises(UserError, match='one of the sources'):
        evaluate.Job(config, path).evaluate_pending()


@pytest.mark.parametrize(
    'changes, refused',
    [
        ({}, True),
        ({'seed': 999}, False),
        ({'train.adversarial_weight': 1.0}, False),
        # Members 1000 and 1001; and 998 and 999.
        ({'seed': 500, 'ensemble.size': 2, 'ensemble.training': 'separate'}, True),
        ({'seed': 499, 'ensemble.size': 2, 'ensemble.training': 'separate'}, False),
    ],
)
def test_who_is_a_source(root, changes, refused):
    record = transfer_sets.read_record(root / 'blackbox.npz')
    config = default.get_config()
    config.update_from_flattened_dict(config_lib.flatten(record['sources'][0]['config']))
    config.update_from_flattened_dict(changes)
    told = pytest.raises(UserError, match='one of the sources')
    with told if refused else contextlib.nullcontext():
        finished_runs.refuse_sources(config_lib.to_dict(config), record)


@pytest.mark.parametrize(
    'changes, told',
    [
        ({'blackbox__sources': ('singleadv',)}, 'singleadv is trained adversarially'),
        ({'blackbox__sources': ('basline',)}, "did you mean 'baseline'"),
        ({'ensemble__size': 4}, 'set by the systems of blackbox.sources'),
        ({'model__name': 'vgg', 'model__depth': 11}, 'set by the systems of blackbox.sources'),
    ],
)
def test_sources_are_what_their_names_say(tmp_path, changes, told):
    def never(*_):
        raise AssertionError('trained')

    with pytest.raises(ConfigError, match=told):
        blackbox.make(config_of(**changes), epath.Path(tmp_path), CONFIGS, never)


def test_mistakes_in_a_study_are_told_before_a_source_is_trained(tmp_path):
    fields = SETTINGS | {'eval.attacks': ('clean', 'blackbox')}
    for change, told in (
        ({'study.systems': ('singleadvv',)}, 'singleadvv'),
        ({'study.systems': ('singleadv',), 'study.seeds': (0, 1000)}, 'blackbox.seed'),
    ):
        command = ['--mode=study', '--config=configs/quickstart.py', f'--workdir={tmp_path}/run']
        result = run_main(*command, *overrides(fields | change))
        assert result.returncode == 2
        assert told in result.stderr.splitlines()[-1]
        assert not (tmp_path / 'run').exists()


def test_equal_restarts_are_not_paid_for():
    rounds = blackbox._rounds(config_of(blackbox__start='none', blackbox__rounds=3))
    assert [r['restarts'] for r in rounds] == [1, 1, 1]
