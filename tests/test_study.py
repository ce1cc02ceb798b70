"""Studies: which runs, going on, and the report at the end."""

import hashlib
import importlib
import re
import sys

import jax
import numpy as np
import pytest
from conftest import CIFAR10, ROOT, TINY, TINY_STUDY, overrides, run_main, tiny_config
from etils import epath

import ensadv
from configs import quickstart, table1
from ensadv import command_line, config_checks, study
from ensadv.errors import ConfigError, TrainingError, UserError
from ensadv.evaluation import audit, members
from ensadv.report import write
from ensadv.storage import files
from ensadv.storage import workdir as workdir_lib
from ensadv.training import train

CONFIGS = epath.Path(ROOT) / 'configs'


def test_table1_is_the_papers_eight_systems_with_three_seeds():
    runs = dict(study.runs(table1.get_config(), CONFIGS))
    assert len(runs) == 24
    assert list(runs)[:8] == [f'{name}_seed0' for name in table1.get_config().study.systems]
    assert runs['doubleadv_seed2'].model.width == 15
    assert runs['doubleadv_seed2'].seed == 2
    assert runs['separate2adv_seed1'].ensemble.training == 'separate'
    assert runs['baseline_seed0'].train.adversarial_weight == 0
    assert {config.train.steps for config in runs.values()} == {500_000}


def test_quickstart_is_the_same_thing_small():
    runs = {config.system: config for _, config in study.runs(quickstart.get_config(), CONFIGS)}
    assert list(runs) == ['Baseline', 'SingleAdv', 'DoubleAdv', 'Ensemble2Adv', 'Separate2Adv']
    # In the paper's proportion, 10 to 15.
    assert runs['DoubleAdv'].model.width == 1.5 * runs['SingleAdv'].model.width
    assert runs['SingleAdv'].attack.step_size == runs['SingleAdv'].epsilon / 4


@pytest.mark.parametrize(
    'systems, told',
    [
        ((), 'names no system'),
        (('singlead',), "did you mean 'singleadv'"),
        (('default',), 'unknown'),
    ],
)
def test_systems_that_do_not_exist_are_refused(systems, told):
    config = quickstart.get_config()
    config.study.systems = systems
    with pytest.raises(ConfigError, match=told):
        list(study.runs(config, CONFIGS))


def test_decision_planes_are_of_the_first_seeds_runs(caplog):
    def pairs(config):
        return study.pairs_of_planes(config, dict(study.runs(config, CONFIGS)))

    config = quickstart.get_config()
    config.study.seeds = (4, 5)
    pair = ('singleadv_seed4', 'ensemble2adv_seed4')
    assert pairs(config) == [pair]
    # What adversarial training changes is seen beside a clean system of as many members.
    config.study.responses = ('singleadv', 'ensemble2adv', 'doubleadv', 'ensemble4adv')
    singles = [('baseline_seed4', f'{name}_seed4') for name in ('singleadv', 'doubleadv')]
    assert pairs(config) == [pair, *singles]
    assert 'study.responses: no boundaries of ensemble4adv: expected it among' in caplog.text
    config.study.systems = (*config.study.systems, 'ensemble2')
    assert pairs(config) == [
        pair,
        singles[0],
        ('ensemble2_seed4', 'ensemble2adv_seed4'),
        singles[1],
    ]
    # A study of other systems is not refused for the pair that its config file names.
    config.study.systems = ('baseline', 'singleadv')
    assert pairs(config) == singles[:1]
    assert 'study.planes: no decision planes: not among study.systems: ensemble2adv' in caplog.text


@pytest.mark.parametrize(
    'field, value',
    [('ensemble.size', 3), ('ensemble.training', 'separate'), ('train.adversarial_weight', 0.0)],
)
def test_a_study_cannot_set_what_makes_a_system_its_own(field, value):
    config = quickstart.get_config()
    config.update_from_flattened_dict({field: value})
    with pytest.raises(ConfigError, match=field):
        list(study.runs(config, CONFIGS))


def test_sizes_follow_the_studys_epsilon():
    config = quickstart.get_config()
    config.epsilon = 0.2
    assert dict(study.runs(config, CONFIGS))['singleadv_seed0'].attack.step_size == 0.05


def test_one_run_that_diverges_does_not_stop_the_others(monkeypatch, tmp_path):
    config = quickstart.get_config()
    config.study.systems = ('baseline', 'singleadv')
    begun = []

    def run_one(config, path, label):
        begun.append(path.name)
        if config.system == 'Baseline':
            raise TrainingError('loss is not finite')

    monkeypatch.setattr(study, 'run_one', run_one)
    finished, failures = study.make_runs(config, epath.Path(tmp_path), CONFIGS)
    assert begun == ['baseline_seed0', 'singleadv_seed0']
    assert [path.name for path in finished] == ['singleadv_seed0']
    assert failures == {'baseline_seed0': 'loss is not finite'}


def test_a_run_leaves_no_compiled_programs_behind(monkeypatch, tmp_path):
    compiled = jax.jit(lambda x: x + 1)
    monkeypatch.setattr(train, 'run', lambda *_, **__: compiled(1.0))
    programs = lambda: len(jax.devices()[0].client.live_executables())
    before = programs()  # that other tests hold
    compiled(1)
    assert programs() == before + 1
    study.run_one(tiny_config(eval__inline=False), epath.Path(tmp_path), 'a run')
    assert programs() <= before


@pytest.mark.parametrize('asked', [True, False])
def test_a_study_audits_the_runs_that_have_no_audit_and_goes_on_after_a_failed_one(
    monkeypatch, tmp_path, asked
):
    config = quickstart.get_config()
    systems = ('baseline', 'singleadv', 'doubleadv', 'ensemble2', 'ensemble2adv')
    config.study.update({'systems': systems, 'planes': ()})
    config.study.audit = config.study.members = asked
    config.eval.attacks = ('clean', 'pgd20')
    finished = [epath.Path(tmp_path / f'{name}_seed0') for name in config.study.systems]
    audited, measured, reported = [], [], []

    def make_audit(config, path):
        audited.append((config.system, path.name))
        if config.system == 'Baseline':
            raise UserError('no weights')

    monkeypatch.setattr(study, 'make_runs', lambda *args: (finished, {}))
    monkeypatch.setattr(study, 'make_audit', make_audit)
    monkeypatch.setattr(audit, 'is_made', lambda config, path: 'singleadv' in path.name)
    # Of ensembles alone, also that of what members do.
    monkeypatch.setattr(members, 'run', lambda config, path: measured.append(path.name))
    monkeypatch.setattr(members, 'is_made', lambda config, path: path.name == 'ensemble2_seed0')
    monkeypatch.setattr(write, 'write', reported.append)
    study.run(config, epath.Path(tmp_path), CONFIGS)
    names = ('Baseline', 'DoubleAdv', 'Ensemble2', 'Ensemble2Adv')
    expected = [(name, f'{name.lower()}_seed0') for name in names]
    assert audited == (expected if asked else [])
    assert measured == (['ensemble2adv_seed0'] if asked else [])
    assert reported == [epath.Path(tmp_path)]


@pytest.mark.parametrize(
    'pair', [('baseline',), ('baseline', 'baseline'), ('baseline', 'singleadv', 'doubleadv')]
)
def test_decision_planes_are_of_two_systems_of_the_study(pair):
    config = quickstart.get_config()
    config.study.planes = pair
    with pytest.raises(ConfigError, match=r'study\.planes: expected'):
        config_checks.validate(config)


def test_a_study_without_matplotlib_trains_and_says_what_is_missing(
    monkeypatch, tmp_path, caplog, capfd
):
    for name in [name for name in sys.modules if name.startswith('ensadv.report')]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr(ensadv, 'report', raising=False)
    monkeypatch.setitem(sys.modules, 'matplotlib', None)
    config = quickstart.get_config()
    config.eval.attacks = ('clean',)
    finished = [tmp_path / f'{name}_seed0' for name in config.study.systems]
    monkeypatch.setattr(study, 'make_runs', lambda *args: (finished, {}))
    study.run(config, epath.Path(tmp_path), CONFIGS)
    assert 'the report needs a package that is missing' in caplog.text
    with pytest.raises(SystemExit), command_line.error_exits():
        importlib.import_module('ensadv.report.sections')
    assert re.search(
        r'error: .*matplotlib.*pip install -r requirements\.txt', capfd.readouterr().err
    )


FIELDS = (
    TINY
    | TINY_STUDY
    | {
        'study.systems': ('baseline', 'separate2adv'),
        'study.planes': ('baseline', 'separate2adv'),
        'train.snapshot_every': 4,
        'study.members': True,
        'members.examples': 4,
        'members.attacks': ('ifgsm2',),
        'members.directions': 1,
        'members.radius': 0.5,
    }
)


def test_a_study_trains_reports_and_goes_on(tmp_path):
    command = ['--mode=study', '--config=configs/quickstart.py', *overrides(FIELDS)]
    first = run_main(*command, f'--workdir={tmp_path}', small=True)
    assert first.returncode == 0, first.stderr
    for job in (
        '[source 1/1] baseline_seed1000: training',
        'transfer set: attack',
        '[1/2] baseline_seed0: training',
        '[1/2] baseline_seed0: evaluation',
        '[2/2] separate2adv_seed0: training',
        '[2/2] separate2adv_seed0: evaluation',
        'decision planes: attack',
    ):
        assert first.stderr.count(f'{job} on 1 device (cpu), in float32, JAX ') == 1, job
    text = (tmp_path / 'report' / 'report.md').read_text()
    table = text.split('### Last snapshot\n\n')[1].split('\n\n')[0]
    assert table in first.stdout
    rows = [[cell.strip() for cell in line.strip('|').split('|')] for line in table.splitlines()]
    assert [row[0] for row in rows if 'iterate' not in row[0]][2:] == ['Baseline', 'Separate2Adv']
    assert rows[0][3:7] == ['robust', 'clean', 'IFGSM2', 'black-box']
    assert 'n 30.' in text
    assert 'blackbox/baseline_seed1000: a source of the transfer set' in first.stdout
    assert first.stdout.splitlines()[-3] == f'The report: {tmp_path}/report/report.html'
    page = (tmp_path / 'report' / 'report.html').read_text()
    assert 'figure_examples' in page
    assert 'figure4_baseline_seed0-separate2adv_seed0' in page
    assert 'figure3' in page  # one of them is trained cleanly
    assert 'figure_members' in page
    ledger = files.read_arrays(epath.Path(tmp_path) / 'separate2adv_seed0/eval/4_members.npz')
    assert ledger['ifgsm2_transfer'].shape == (3, 3, 4)
    of_run = files.read_arrays(epath.Path(tmp_path) / 'separate2adv_seed0/eval/4.npz')
    np.testing.assert_allclose(ledger['clean_margin'][2], of_run['clean_margin'][:4], atol=1e-4)
    # The set is made once, against a run with another seed than those that are judged.
    assert (tmp_path / 'blackbox' / 'baseline_seed1000' / 'config.json').exists()
    transfer_set = (tmp_path / 'blackbox' / 'blackbox.npz').read_bytes()
    digest = hashlib.sha256(transfer_set).hexdigest()
    # A run that is lost is made again, a finished one is not touched.
    finished = tmp_path / 'baseline_seed0' / 'eval' / '4.json'
    before = finished.stat().st_mtime_ns
    measured = tmp_path / 'separate2adv_seed0' / 'eval' / '4_members.json'
    of_members = measured.stat().st_mtime_ns
    (tmp_path / 'separate2adv_seed0' / 'eval' / '4.json').unlink()
    again = run_main(*command, f'--workdir={tmp_path}', small=True)
    assert again.returncode == 0, again.stderr
    assert (tmp_path / 'report' / 'report.md').read_text() == text
    assert finished.stat().st_mtime_ns == before
    assert measured.stat().st_mtime_ns == of_members
    again = (tmp_path / 'blackbox' / 'blackbox.npz').read_bytes()
    assert hashlib.sha256(again).hexdigest() == digest


@pytest.mark.skipif(not CIFAR10.exists(), reason='no prepared CIFAR-10 here')
def test_systems_of_each_kind_on_real_cifar10_images(tmp_path):
    """Each trains, snapshots and evaluates on the images of the paper."""
    sizes = {'baseline': 1, 'doubleadv': 1, 'ensemble4adv': 4, 'separate2adv': 2}
    fields = TINY | {
        'data.name': 'cifar10', 'data.data_dir': CIFAR10, 'data.pad': 4, 'epsilon': '8/255',
        'train.steps': 1, 'train.batch_size': 4, 'eval.attacks': ('clean',),
        'eval.num_examples': 8, 'eval.batch_size': 4, 'study.systems': tuple(sizes),
        'study.planes': (),
    }  # fmt: skip
    command = ['--mode=study', '--config=configs/quickstart.py', f'--workdir={tmp_path}']
    result = run_main(*command, *overrides(fields), tensorflow=True)
    assert result.returncode == 0, result.stderr
    for name, size in sizes.items():
        path = epath.Path(tmp_path) / f'{name}_seed0'
        record, evaluations = workdir_lib.read_record(path), workdir_lib.read_evaluations(path)
        assert list(evaluations) == [1]
        assert {result['n'] for result in evaluations[1]['attacks']} == {8}
        assert record['dataset']['num_train'] == 50_000
        assert record['dataset']['class_names'][:2] == ['airplane', 'automobile']
        assert record['config']['epsilon'] == 8 / 255
        assert record['config']['ensemble']['size'] == size
