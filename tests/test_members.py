"""Ensembles of finished runs."""

import jax
import numpy as np
import pytest
from conftest import TINY, overrides, tiny_config
from etils import epath

from ensadv import build, study
from ensadv.errors import ConfigError, UserError
from ensadv.evaluation import evaluate
from ensadv.storage import checkpoints, files
from ensadv.storage import workdir as workdir_lib

pytestmark = pytest.mark.usefixtures('small_network')


@pytest.fixture(scope='module')
def root(tmp_path_factory):
    """Runs of different architectures, seeds and numbers of members."""
    root = epath.Path(tmp_path_factory.mktemp('members'))
    for name, system, changes in (
        ('wide', 'singleadv', {}),
        ('deep', 'singleadv', {'seed': 1, 'model__name': 'vgg', 'model__depth': 11}),
        ('two', 'ensemble2', {'seed': 2}),
    ):
        config = tiny_config(system, train__steps=2, **changes)
        study.run_one(config, root / name, name)
    return root


def log_probs_of(path, images):
    record = workdir_lib.read_record(path)['config']
    system = record['system'].lower()
    model = record['model']
    config = tiny_config(system, model__name=model['name'], model__depth=model['depth'])
    network = build.network(config, build.dataset(config).describe())
    variables = checkpoints.open_snapshots(path).restore(2, network.variables)
    return np.asarray(jax.jit(network.log_probs)(variables, images.astype(np.float32) / 255))


def ensemble_config(root, *names, **changes):
    members = ','.join(str(root / name) for name in names)
    return tiny_config('separate2adv', ensemble__members_from=members, **changes)


@pytest.mark.parametrize('combine', ['probs', 'logits'])
@pytest.mark.parametrize('names', [('wide', 'deep'), ('wide', 'two', 'deep'), ('two',)])
def test_predicts_as_worked_out_from_its_members(root, tmp_path, names, combine):
    path = epath.Path(tmp_path) / 'ensemble'
    config = ensemble_config(
        root, *names, ensemble__combine=combine, eval__attacks=('clean',), eval__num_examples=20
    )
    evaluate.run(config, path)
    dataset = build.dataset(config)
    images, labels = dataset.image_test[:20], dataset.label_test[:20]
    members = np.stack([log_probs_of(root / name, images) for name in names])
    if combine == 'probs':
        log_probs = np.log(np.mean(np.exp(members), axis=0))
    else:
        log_probs = np.mean(members, axis=0)
    right = np.take_along_axis(log_probs, labels[:, None], 1)[:, 0]
    others = np.where(np.arange(10) == labels[:, None], -np.inf, log_probs).max(1)
    ledger = files.read_arrays(workdir_lib.evaluation_path(path, 2, '.npz'))
    np.testing.assert_allclose(ledger['clean_margin'], right - others, atol=1e-4)
    record = workdir_lib.read_record(path)
    assert record['config']['ensemble']['size'] == len(names)
    assert [member['system'] for member in record['members']] == [
        {'two': 'Ensemble2'}.get(name, 'SingleAdv') for name in names
    ]
    assert record['parameters'] == sum(
        workdir_lib.read_record(root / name)['parameters'] for name in names
    )


def test_is_attacked_as_one_and_goes_on_by_its_workdir_alone(root, tmp_path, monkeypatch):
    path = epath.Path(tmp_path) / 'ensemble'
    config = ensemble_config(root, 'wide', 'deep', eval__long_attacks=('pgd3',))
    evaluate.run(config, path)
    content = workdir_lib.read_evaluations(path)[2]
    assert [r['name'] for r in content['attacks']] == ['clean', 'ifgsm2', 'pgd3']
    assert content['system'] == 'Separate2Adv'
    before = workdir_lib.evaluation_path(path, 2, '.json').stat().mtime
    evaluate.run(config, path)
    assert workdir_lib.evaluation_path(path, 2, '.json').stat().mtime == before
    # With other settings too, which come beside them; the first ones stay those of its config.
    other = ensemble_config(
        root, 'wide', 'deep', eval__long_attacks=('pgd3',), eval__pgd__loss='margin'
    )
    evaluate.run(other, path)
    added = workdir_lib.read_evaluations(path)[2]['attacks']
    assert [r['key'] for r in added] == ['clean', 'ifgsm2', 'pgd3', 'pgd3_loss=margin']
    assert added[:3] == content['attacks']
    record = workdir_lib.read_record(path)
    assert record['config']['eval']['pgd']['loss'] == 'cross_entropy'
    assert len(record['sessions']) == 2


@pytest.mark.parametrize(
    'names, changes, told',
    [
        (('wide', 'nothing'), {}, 'no run is here'),
        (('wide', 'wide'), {}, 'each once'),
        (('wide', 'deep'), {'ensemble__members_snapshot': 'best', 'eval__select_on': 'validation',
                            'data__validation_examples': 20}, 'may have seen what is held out'),
    ],
)  # fmt: skip
def test_what_is_no_ensemble_is_refused(root, tmp_path, names, changes, told):
    config = ensemble_config(root, *names, **changes)
    with pytest.raises(UserError, match=told):
        evaluate.run(config, epath.Path(tmp_path) / 'ensemble')
    assert not (tmp_path / 'ensemble').exists()


def test_unfinished_runs_and_other_data_are_refused(root, tmp_path):
    import shutil

    copy = epath.Path(tmp_path) / 'copy'
    shutil.copytree(root / 'wide', copy)
    record = workdir_lib.read_record(copy)
    record['config']['train']['steps'] = 9
    files.write_json(copy / 'config.json', record)
    config = ensemble_config(root, 'deep')
    config.ensemble.members_from += f',{copy}'
    with pytest.raises(UserError, match=r'a snapshot at step 9, found snapshots at \[2\]'):
        evaluate.run(config, epath.Path(tmp_path) / 'ensemble')
    record['config']['train']['steps'] = 2
    record['dataset']['fingerprint'] = 'another'
    files.write_json(copy / 'config.json', record)
    with pytest.raises(UserError, match='other data'):
        evaluate.run(config, epath.Path(tmp_path) / 'ensemble')


def test_a_workdir_is_of_these_snapshots(root, tmp_path):
    path = epath.Path(tmp_path) / 'ensemble'
    config = ensemble_config(root, 'wide', 'deep', eval__attacks=('clean',))
    evaluate.run(config, path)
    record = workdir_lib.read_record(path)
    record['members'][1]['step'] = 1
    files.write_json(path / 'config.json', record)
    with pytest.raises(UserError, match=r'of steps \[2, 1\], and now they are \[2, 2\]'):
        evaluate.run(config, path)


def test_gating_has_to_be_trained_with_its_members(root):
    from ensadv import config_checks

    config = ensemble_config(root, 'wide', 'deep', ensemble__combine='gating')
    with pytest.raises(ConfigError, match='gating is trained with the members'):
        config_checks.validate(config)


def test_only_evaluation_takes_members_from(root):
    from conftest import run_main

    result = run_main(
        '--config=configs/separate2adv.py', '--workdir=/nowhere', *overrides(TINY),
        f'--config.ensemble.members_from={root / "wide"}',
    )  # fmt: skip
    assert result.returncode == 2
    assert 'only for --mode=evaluate, audit or members, found --mode=train' in result.stderr
