"""eval.indices: evaluation on chosen places of the test split."""

import hashlib
import json
import shutil

import jax
import numpy as np
import pytest
from conftest import ROOT, tiny_config
from etils import epath

from configs import default
from ensadv import build, config_checks, errors, study
from ensadv.attacks.threat_model import ThreatModel
from ensadv.data import datasets
from ensadv.errors import ConfigError, UserError
from ensadv.evaluation import blackbox, evaluate, transfer_sets
from ensadv.storage import checkpoints, files
from ensadv.storage import workdir as workdir_lib

pytestmark = pytest.mark.usefixtures('small_network')

PLACES = [359, 4, 9, 2, 77, 300, 11, 150, 33, 8, 61, 210]
SORTED = np.array(sorted(PLACES))


def written(path, places) -> str:
    np.savetxt(path, places, fmt='%d')
    return str(path)


# The file


@pytest.mark.parametrize(
    'content',
    [
        b'7\n0\n2147483647\n',
        b'0\r\n\r\n  7 \r\n2147483647',
        b'\xef\xbb\xbf0\n7\n2147483647',
    ],
)
def test_places_are_read_in_ascending_order(tmp_path, content):
    (tmp_path / 'places.txt').write_bytes(content)
    found = datasets.read_places(str(tmp_path / 'places.txt'))
    assert found.dtype == np.int32
    assert found.tolist() == [0, 7, 2147483647]


@pytest.mark.parametrize(
    'content, told',
    [
        (b'', 'found no number'),
        (b'\n \n', 'found no number'),
        (b'3\n1.0\n', "line 2: found '1.0', allowed is a text of places"),
        (b'3\n-1\n', "line 2: found '-1'"),
        (b'3, 4\n', "line 1: found '3, 4'"),
        (b'2147483648\n', "line 1: found '2147483648'"),
        (b'9' * 5000, "line 1: found '999"),
        ('\u0663\n'.encode(), 'line 1'),
        (b'5\n3\n5\n', 'found 5 in line 1 and in line 3, allowed is each place once'),
        (b'\x93NUMPY\x01\x00v\x00', 'line 1'),
    ],
)
def test_a_file_without_places_is_refused(tmp_path, content, told):
    path = tmp_path / 'places.txt'
    path.write_bytes(content)
    with pytest.raises(errors.DataError) as caught:
        datasets.read_places(str(path))
    assert str(caught.value).startswith(f'eval.indices: {path}: ')
    assert told in str(caught.value)
    assert '\n' not in str(caught.value)


def test_a_file_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(errors.DataError, match=r'eval\.indices: cannot read .*none\.txt'):
        datasets.read_places(str(tmp_path / 'none.txt'))


def test_places_beyond_the_split_are_refused(tmp_path):
    config = tiny_config(eval__indices=written(tmp_path / 'p', [1, 360]), eval__num_examples=None)
    dataset = build.dataset(config)
    with pytest.raises(ConfigError, match=r'eval.indices: .*0\.\.359, found 360'):
        build.test_split(config, dataset)


def test_it_does_not_go_with_a_number_of_examples():
    config = default.get_config()
    config.eval.indices = 'places.txt'
    config_checks.validate(config)
    config.eval.num_examples = 5
    with pytest.raises(ConfigError, match=r'eval\.indices, eval\.num_examples: .*places.txt and 5'):
        config_checks.validate(config)


# A run


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """A run that is evaluated on `PLACES`."""
    folder = tmp_path_factory.mktemp('indices')
    config = tiny_config(
        train__steps=2, eval__num_examples=None, eval__examples=3, eval__batch_size=5,
        eval__indices=written(folder / 'places.txt', PLACES),
        # So the ledger's last part is not of the test split.
        eval__select_on='validation', data__validation_examples=50,
    )  # fmt: skip
    path = epath.Path(folder) / 'run'
    study.run_one(config, path, 'run')
    return config, path


@pytest.fixture
def run(trained, tmp_path):
    config, path = trained
    shutil.copytree(path, tmp_path / 'copy')
    return config.copy_and_resolve_references(), epath.Path(tmp_path) / 'copy'


def ledger_of(path, step=2):
    return files.read_arrays(workdir_lib.evaluation_path(path, step, '.npz'))


def results_of(path, step=2):
    return {r['name']: r for r in workdir_lib.read_evaluations(path)[step]['attacks']}


def margins_of(path, config, images, labels):
    """A run's margins on uint8 images, by nothing but its own snapshot."""
    network = build.network(config, build.dataset(config).describe())
    variables = checkpoints.open_snapshots(path).restore(2, network.variables)
    log_probs = np.asarray(jax.jit(network.log_probs)(variables, images.astype(np.float32) / 255))
    own = np.eye(10, dtype=bool)[labels]
    return log_probs[own] - np.where(own, -np.inf, log_probs).max(axis=1)


def test_the_examples_in_these_places_are_evaluated(trained):
    config, path = trained
    test = build.dataset(config)
    images, labels = test.image_test[SORTED], test.label_test[SORTED]
    ledger = ledger_of(path)
    assert ledger['index'].tolist() == SORTED.tolist()
    np.testing.assert_array_equal(ledger['label'], labels)
    expected = margins_of(path, config, images, labels)
    np.testing.assert_allclose(ledger['clean_margin'], expected, atol=1e-5)
    digest = hashlib.sha256(SORTED.astype('<i4').tobytes()).hexdigest()
    for name, result in results_of(path).items():
        assert result['n'] == len(PLACES)
        assert result['settings']['indices'] == digest
        assert json.loads(str(ledger[f'{name}_settings']))['indices'] == digest
    assert workdir_lib.read_record(path)['dataset']['indices'] == digest
    kept = workdir_lib.read_examples(path, 2)
    assert kept['index'].tolist() == SORTED[:3].tolist()
    np.testing.assert_array_equal(kept['image'], images[:3])


def test_the_first_ones_have_their_places_too(tmp_path):
    config = tiny_config(train__steps=2, eval__attacks=('clean',), eval__num_examples=7)
    study.run_one(config, epath.Path(tmp_path) / 'run', 'run')
    assert ledger_of(epath.Path(tmp_path) / 'run')['index'].tolist() == list(range(7))
    assert 'indices' not in results_of(epath.Path(tmp_path) / 'run')['clean']['settings']
    # A run of before this field is one on the first examples, and goes on as such.
    record = workdir_lib.read_record(epath.Path(tmp_path) / 'run')
    del record['dataset']['indices'], record['config']['eval']['indices']
    files.write_json(epath.Path(tmp_path) / 'run' / 'config.json', record)
    config.eval.attacks = ('clean', 'ifgsm2')
    evaluate.run(config, epath.Path(tmp_path) / 'run')
    assert results_of(epath.Path(tmp_path) / 'run')['ifgsm2']['n'] == 7


def test_the_file_may_move_but_not_change(run, tmp_path):
    config, path = run
    config.eval.indices = written(tmp_path / 'moved.txt', SORTED)  # in another order, too
    config.eval.attacks = ('clean', 'ifgsm3')
    before = results_of(path)['clean']
    evaluate.run(config, path)
    assert results_of(path)['clean'] == before
    assert results_of(path)['ifgsm3']['n'] == len(PLACES)
    for other in (written(tmp_path / 'other.txt', PLACES[:-1]), None):
        config.eval.indices = other
        with pytest.raises(UserError, match=r'test examples of another eval\.indices \(digest'):
            evaluate.run(config, path)
    assert results_of(path)['clean'] == before


def test_training_goes_on_with_the_same_places_only(run, tmp_path):
    config, path = run
    config.train.steps = 4
    config.eval.indices = written(tmp_path / 'other.txt', PLACES[1:])
    with pytest.raises(UserError, match=r'another eval\.indices'):
        study.run_one(config, path, 'run')
    assert list(workdir_lib.read_evaluations(path)) == [2]


def test_a_run_on_the_first_examples_is_not_evaluated_on_others(run, tmp_path):
    config, path = run
    record = workdir_lib.read_record(path)
    record['dataset']['indices'] = None
    files.write_json(path / 'config.json', record)
    config.eval.attacks = ('ifgsm3',)
    with pytest.raises(UserError, match=r'\(none\) than given now \(digest'):
        evaluate.run(config, path)


def test_an_ensemble_of_runs_has_places_of_its_own(trained, tmp_path):
    path = epath.Path(tmp_path) / 'ensemble'
    config = tiny_config(
        'separate2adv', ensemble__members_from=str(trained[1]), eval__attacks=('clean',),
        eval__num_examples=None, eval__indices=written(tmp_path / 'p.txt', [5, 3]),
        data__validation_examples=50,
    )  # fmt: skip
    evaluate.run(config, path)
    assert ledger_of(path)['index'].tolist() == [3, 5]
    recorded = workdir_lib.read_record(path)['dataset']['indices']
    config.eval.indices = written(tmp_path / 'q.txt', [5, 4])
    with pytest.raises(UserError, match=r'another eval\.indices'):
        evaluate.run(config, path)
    assert workdir_lib.read_record(path)['dataset']['indices'] == recorded


# Transfer sets


def transfer_set_of(dataset: datasets.Dataset, places: np.ndarray) -> transfer_sets.TransferSet:
    noise = np.random.default_rng(0).integers(0, 30, dataset.image_test.shape, np.uint8)
    images = np.maximum(dataset.image_test, noise)[places]
    record = {
        'epsilon': 0.15,
        'fingerprint': dataset.fingerprint,
        'sources': [{'system': 'Baseline', 'seed': 1000, 'config': {'seed': 1000}}],
    }
    fooled = np.zeros(len(places), bool)
    labels = dataset.label_test[places]
    return transfer_sets.TransferSet(images, labels, places.astype(np.int32), fooled, record)


@pytest.mark.parametrize('places', [np.arange(360), np.union1d(SORTED, [0, 1, 60, 358])])
def test_a_transfer_set_of_more_examples_gives_those_of_the_places(run, tmp_path, places):
    config, path = run
    dataset = build.dataset(config)
    stored = transfer_set_of(dataset, places)
    config.eval.blackbox_path = str(tmp_path / 'set.npz')
    transfer_sets.write(config.eval.blackbox_path, stored)
    evaluate.run(config, path)
    mine = np.isin(places, SORTED)
    expected = margins_of(path, config, stored.images[mine], dataset.label_test[SORTED])
    np.testing.assert_allclose(ledger_of(path)['blackbox_margin'], expected, atol=1e-5)


def test_a_transfer_set_that_lacks_a_place_is_refused(run, tmp_path):
    config, path = run
    stored = transfer_set_of(build.dataset(config), np.setdiff1d(np.arange(360), [77]))
    config.eval.blackbox_path = str(tmp_path / 'set.npz')
    transfer_sets.write(config.eval.blackbox_path, stored)
    told = 'expected the 12 test examples that are evaluated here, found 11 of them'
    with pytest.raises(UserError, match=told):
        evaluate.run(config, path)


def test_a_transfer_set_is_made_for_the_places(tmp_path):
    config = tiny_config(
        train__steps=2, eval__num_examples=None, blackbox__sources=('baseline',),
        blackbox__steps=2, blackbox__rounds=1,
        eval__indices=written(tmp_path / 'places.txt', PLACES),
    )  # fmt: skip
    root, configs = epath.Path(tmp_path) / 'set', epath.Path(ROOT) / 'configs'
    blackbox.make(config, root, configs, study.run_one)
    stored = transfer_sets.load(
        root / 'blackbox.npz', build.dataset(config), ThreatModel('linf', 0.15)
    )
    assert stored.indices.tolist() == SORTED.tolist()
    blackbox.make(config, root, configs, study.run_one)  # is there already
    config.eval.indices = written(tmp_path / 'others.txt', PLACES[1:])
    with pytest.raises(UserError, match='made from other sources or settings'):
        blackbox.make(config, root, configs, study.run_one)
