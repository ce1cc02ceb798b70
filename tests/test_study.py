"""Studies: which runs, going on, and the table."""

import hashlib

import pytest
from conftest import CIFAR10, QUICK_COMPILE, ROOT, TINY, overrides, run_main
from etils import epath

from configs import quickstart, table1
from ensadv import report, study
from ensadv.errors import ConfigError, TrainingError

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


def run_of(system, seed, accuracies, *, parameters=1234567, n=10_000, **settings):
    machine = {
        'devices': {'count': 8, 'kind': 'TPU v3'},
        'versions': {'jax': '1.2', 'ensadv': '0.1'},
    }
    record = {
        'config': {'ensemble': {'size': 2}},
        'dataset': {'name': 'cifar10', 'num_train': 50_000, 'num_test': 10_000, 'fingerprint': 'f'},
        'parameters': parameters,
        'sessions': [machine],
    }
    settings = {'epsilon': 0.25, 'steps': 20, 'combine': system} | settings
    attacks = {
        name: {'accuracy': value, 'n': n, 'settings': settings, **machine}
        for name, value in accuracies.items()
    }
    return report.Run(system, seed, 500_000, attacks, record)


def rows_of(table):
    lines = [line for line in table.splitlines() if line.startswith('|')]
    assert len({len(line) for line in lines}) == 1
    return [[cell.strip() for cell in line.strip('|').split('|')] for line in lines]


def test_table_by_hand():
    runs = [
        run_of('Baseline', 0, {'clean': 0.95, 'pgd20': 0.0}),
        run_of('Ensemble2Adv', 0, {'clean': 0.80, 'pgd20': 0.5}, parameters=7),
        run_of('Ensemble2Adv', 1, {'clean': 0.84, 'pgd20': 0.525}, parameters=7),
    ]
    table = report.table(runs)
    rows = rows_of(table)
    assert rows[0] == ['system', 'members', 'parameters', 'clean', 'pgd20', 'seeds']
    assert rows[2] == ['Baseline', '2', '1,234,567', '95.0', '0.0', '1']
    assert rows[3] == ['Ensemble2Adv', '2', '7', '82.0 (80.0-84.0)', '51.2 (50.0-52.5)', '2']
    assert '10,000 of the 10,000 test images of cifar10' in table
    assert 'pgd20: epsilon 0.25' in table
    assert 'Trained on 8 x TPU v3 with jax 1.2, ensadv 0.1; evaluated on 8 x TPU v3' in table


def test_numbers_of_attacks_without_gradients_are_marked():
    runs = [run_of('Baseline', seed, {'pgd20': 0.25}) for seed in (0, 1)]
    runs.append(run_of('SingleAdv', 0, {'pgd20': 0.5}))
    runs[1].attacks['pgd20']['no_gradient'] = 30
    table = report.table(runs)
    assert [row[3] for row in rows_of(table)[2:]] == ['25.0* (25.0-25.0)', '50.0']
    assert '* 30 examples stood without having been attacked' in table


@pytest.mark.parametrize(
    'change, reason',
    [({'epsilon': 0.5}, 'pgd20 with epsilon 0.5, not 0.25'), ({'n': 100}, 'on 100 examples')],
)
def test_runs_that_cannot_be_compared_are_named_and_left_out(change, reason):
    runs = [
        run_of('Baseline', 0, {'pgd20': 0.5}),
        run_of('Baseline', 1, {'pgd20': 0.9}, **change),
        run_of('SingleAdv', 0, {'pgd20': 0.7}),
    ]
    table = report.table(runs)
    assert [row[-2:] for row in rows_of(table)[2:]] == [['50.0', '1'], ['70.0', '1']]
    assert (
        f'Not in the table: Baseline, seed 1: pgd20 {reason}'.replace('pgd20 pgd20', 'pgd20')
        in table
    )


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


def test_one_run_that_diverges_does_not_stop_the_others(tmp_path):
    config = quickstart.get_config()
    config.study.systems = ('baseline', 'singleadv')
    begun = []

    def run_one(config, path, label):
        begun.append(path.name)
        if config.system == 'Baseline':
            raise TrainingError('loss is not finite')

    finished, failures = study.run(config, epath.Path(tmp_path), CONFIGS, run_one)
    assert begun == ['baseline_seed0', 'singleadv_seed0']
    assert [path.name for path in finished] == ['singleadv_seed0']
    assert failures == {'baseline_seed0': 'loss is not finite'}
    assert report.table([]) == 'No run has an evaluation yet.\n'


FIELDS = TINY | {
    'study.systems': ('baseline', 'separate2adv'),
    'train.snapshot_every': 4,
    'eval.attacks': ('clean', 'ifgsm2', 'blackbox'),
    'blackbox.sources': ('baseline',),
    'blackbox.steps': 2,
    'blackbox.rounds': 1,
}


def test_a_study_trains_tabulates_and_goes_on(tmp_path):
    command = ['--mode=study', '--config=configs/quickstart.py', *overrides(FIELDS)]
    first = run_main(*command, f'--workdir={tmp_path}', xla_flags=QUICK_COMPILE)
    assert first.returncode == 0, first.stderr
    table = (tmp_path / 'table.md').read_text()
    assert table in first.stdout
    assert [line.split()[1] for line in table.splitlines()[2:4]] == ['Baseline', 'Separate2Adv']
    header = [cell.strip() for cell in table.splitlines()[0].split('|')]
    assert header[4:7] == ['clean', 'ifgsm2', 'blackbox']
    assert '30 of the 360 test images of digits' in table
    # The set is made once, against a run with another seed than those that are judged.
    assert (tmp_path / 'blackbox' / 'baseline_seed1000' / 'config.json').exists()
    transfer_set = (tmp_path / 'blackbox' / 'blackbox.npz').read_bytes()
    digest = hashlib.sha256(transfer_set).hexdigest()
    # A run that is lost is made again, a finished one is not touched.
    finished = tmp_path / 'baseline_seed0' / 'eval' / '4.json'
    before = finished.stat().st_mtime_ns
    (tmp_path / 'separate2adv_seed0' / 'eval' / '4.json').unlink()
    again = run_main(*command, f'--workdir={tmp_path}', xla_flags=QUICK_COMPILE)
    assert again.returncode == 0, again.stderr
    assert (tmp_path / 'table.md').read_text() == table
    assert finished.stat().st_mtime_ns == before
    again = (tmp_path / 'blackbox' / 'blackbox.npz').read_bytes()
    assert hashlib.sha256(again).hexdigest() == digest


@pytest.mark.skipif(not CIFAR10.exists(), reason='no prepared CIFAR-10 here')
@pytest.mark.parametrize(
    'systems, sizes',
    [
        (('baseline', 'doubleadv', 'ensemble2', 'ensemble4'), [1, 1, 2, 4]),
        (('singleadv', 'separate2adv', 'ensemble2adv', 'ensemble4adv'), [1, 2, 2, 4]),
    ],
)
def test_the_eight_systems_on_real_cifar10_images(tmp_path, systems, sizes):
    """Each trains, snapshots, evaluates, and goes on, on the images of the paper."""
    fields = TINY | {
        'data.name': 'cifar10', 'data.data_dir': CIFAR10, 'data.pad': 4, 'epsilon': '8/255',
        'train.snapshot_every': 1, 'train.checkpoint_every': 1, 'train.batch_size': 4,
        'study.systems': systems, 'eval.attacks': ('clean', 'ifgsm1'), 'eval.num_examples': 16,
    }  # fmt: skip
    command = ['--mode=study', '--config=configs/quickstart.py', f'--workdir={tmp_path}']
    for steps in (1, 2):
        changed = overrides(fields | {'train.steps': steps})
        result = run_main(*command, *changed, xla_flags=QUICK_COMPILE)
        assert result.returncode == 0, result.stderr
    assert result.stderr.count('going on from the checkpoint of step 1') == 4
    runs = [report.read_run(epath.Path(tmp_path) / f'{name}_seed0') for name in systems]
    assert [run.step for run in runs] == [2] * 4
    assert {attack['n'] for run in runs for attack in run.attacks.values()} == {16}
    assert {run.record['dataset']['num_train'] for run in runs} == {50_000}
    assert {run.record['config']['epsilon'] for run in runs} == {8 / 255}
    assert [run.record['config']['ensemble']['size'] for run in runs] == sizes
