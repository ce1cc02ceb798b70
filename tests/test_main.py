"""The program as its users run it: what it prints, and one line for each mistake."""

import json
import logging as python_logging
import os
import sys
import threading

import jax
import numpy as np
import pytest
from absl import logging
from conftest import ROOT, TINY, overrides, run_main

from configs import default, small
from ensadv import build, command_line, describe
from ensadv.data import datasets
from ensadv.errors import ConfigError
from ensadv.training import train

SINGLE = '--config=configs/singleadv.py'
ARRAYS = {
    'image_train': np.zeros((20, 8, 8, 1), np.uint8),
    'label_train': np.arange(20) % 2,
    'image_test': np.zeros((4, 8, 8, 1), np.uint8),
    'label_test': np.arange(4) % 2,
}


def last_error(result, code=2):
    lines = result.stderr.strip().splitlines()
    assert result.returncode == code, result.stderr
    assert 'Traceback' not in result.stderr
    assert lines[-1].startswith('error: ')
    return lines[-1]


@pytest.mark.parametrize(
    'args, told',
    [
        ([], '--config: needed'),
        ([SINGLE], '--workdir: needed'),
        ([SINGLE, '--config.train.steps=0'], 'train.steps: expected a whole number >= 1, found 0'),
        ([SINGLE, '--config.train.steps=-3'], 'found -3'),
        ([SINGLE, '--config.train.steps=many'], 'train.steps=many: expected a whole number'),
        ([SINGLE, '--config.epsilon=8/2'], 'epsilon: expected a number >= 0 and <= 1, found 4.0'),
        ([SINGLE, '--config.epsilon=8/0'], '8/0'),
        ([SINGLE, '--config.epsilon=8'], 'epsilon: expected a number >= 0 and <= 1, found 8.0'),
        ([SINGLE, '--config.model.depth=18'], 'model.depth: expected 6n + 4'),
        ([SINGLE, '--config.ensemble.size=0'], 'ensemble.size: expected a whole number >= 1'),
        ([SINGLE, '--config.ensemble.combine=mean'], "ensemble.combine: unknown 'mean'"),
        ([SINGLE, '--config.attack.name=pdg'], "did you mean 'pgd'?"),
        ([SINGLE, '--config.data.name=cifar'], "did you mean 'cifar10'?"),
        ([SINGLE, '--config.attack.stpes=3'], "did you mean 'attack.steps'?"),
        ([SINGLE, '--config.atack.steps=3'], "did you mean 'attack.steps'?"),
        ([SINGLE, '--config.train=3'], '--config.train=3'),
        ([SINGLE, "--config.eval.attacks=('clean',)", "--config.eval.attacks=('pgd5',)"],
         'eval.attacks is given more than once'),
        ([SINGLE, '--mode=trian'], "planes, export, import, describe (did you mean 'train'?)"),
        ([SINGLE, '--wrkdir=x'], 'wrkdir'),
        ([SINGLE, 'extra'], "'extra'"),
        (['--config=configs/nothing.py'], 'configs/nothing.py'),
        (['--config.seed=3'], 'config.seed'),
    ],
)  # fmt: skip
def test_mistakes_on_the_command_line(args, told):
    result = run_main(*args)
    assert told in last_error(result)
    assert len(result.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize(
    'body, told',
    [
        ('config.trian.steps = 3', 'trian'),
        ('config.train.steps = "many"', 'steps'),
        ('with config.unlocked(): config.extra = 3', 'unknown config field extra'),
        ('raise RuntimeError("broken")', 'broken'),
        ('config.train.steps =', 'invalid syntax'),
    ],
)
def test_mistakes_in_a_config_file(tmp_path, body, told):
    file = tmp_path / 'mine.py'
    file.write_text(
        'from configs import default\n'
        'def get_config():\n'
        '    config = default.get_config()\n'
        f'    {body}\n'
        '    return config\n'
    )
    assert told in last_error(run_main(f'--config={file}', f'--workdir={tmp_path}/run'))


class Trap:
    def __reduce__(self):
        return print, ('unpickled',)


@pytest.mark.parametrize(
    'change, told',
    [
        ({'image_train': np.zeros((20, 8, 8, 1))}, 'image_train: found float64'),
        ({'image_train': np.full((20, 8, 8, 1), np.nan)}, 'NaN'),
        ({'image_test': np.zeros((4, 8, 8, 1), np.int16)}, 'image_test: found int16'),
        ({'label_test': np.array([0, 1, 2, 1])}, 'label_test: found label 2'),
        ({'label_train': np.arange(20) - 1}, 'label_train: found label -1'),
        ({'label_train': np.array([Trap()] * 20)}, 'never unpickled'),
    ],
)
def test_mistakes_in_the_data(tmp_path, change, told):
    np.savez(tmp_path / 'mine.npz', **(ARRAYS | change))
    fields = TINY | {'data.name': 'npz', 'data.path': tmp_path / 'mine.npz'}
    result = run_main(SINGLE, *overrides(fields), f'--workdir={tmp_path}/run')
    assert told in last_error(result)
    assert 'unpickled\n' not in result.stdout
    assert not (tmp_path / 'run').exists()


def test_missing_data_say_how_to_get_them(tmp_path):
    command = [SINGLE, f'--config.data.data_dir={tmp_path}', f'--workdir={tmp_path}/run']
    result = run_main(*command, tensorflow=True)
    message = last_error(result)
    assert '--config.data.data_dir=DIR' in message
    assert '--config.data.download=True' in message


def test_trains_evaluates_describes_and_guards_its_workdir(tmp_path):
    # Relative, as users give it, though Orbax takes only absolute paths.
    workdir = f'--workdir={os.path.relpath(tmp_path, ROOT)}/run'
    trained_with = overrides(TINY | {'eval.inline': False})
    # As users have it, with TensorFlow, and compiled at length.
    trained = run_main(SINGLE, *trained_with, workdir, xla_flags='', tensorflow=True)
    assert trained.returncode == 0, trained.stderr
    assert not (tmp_path / 'run' / 'eval').exists()
    # From here on the workdir is enough.
    evaluated = run_main('--mode=evaluate', workdir)
    assert evaluated.returncode == 0, evaluated.stderr
    lines = evaluated.stdout.splitlines()
    assert [line.split()[:4] for line in lines[:2]] == [
        ['step', '2', 'n', '30'],
        ['step', '4', 'n', '30'],
    ]
    # Each job says where its results are, and what shows them.
    assert lines[2].split() == ['results:', workdir.partition('=')[2]]
    assert '--mode=evaluate' in lines[3]
    assert '--mode=report' in lines[4]
    assert trained.stdout.splitlines()[-3:] == lines[2:]
    content = json.loads((tmp_path / 'run' / 'eval' / '4.json').read_text())
    assert content['system'] == 'SingleAdv'
    shown = lines[1].split()
    assert float(shown[-1]) == pytest.approx(content['attacks'][-1]['accuracy'], abs=1e-4)
    described = run_main('--mode=describe', workdir)
    assert 'WRN-10-1' in described.stdout, described.stderr
    more = run_main('--mode=evaluate', workdir, "--config.eval.attacks=('clean','pgd2')")
    assert 'pgd2' in more.stdout, more.stderr
    # Fields that were None can be given, and others' configs are refused, here too.
    changes = ('--config.data.data_dir=/nowhere', '--config.device=cpu')
    other = run_main('--mode=evaluate', workdir, *changes)
    assert other.returncode == 0, other.stderr
    other = run_main('--mode=evaluate', workdir, '--config=configs/ensemble2adv.py')
    assert 'ensemble.size: 1 -> 2' in last_error(other)
    refused = run_main(SINGLE, *trained_with, '--config.seed=5', workdir)
    assert 'belongs to a run with another config (seed: 0 -> 5)' in last_error(refused)


@pytest.mark.parametrize(
    'mode, platforms, device, told',
    [
        (
            'train',
            'cpu',
            'tpu',
            'device: expected tpu, found cpu (JAX_PLATFORMS=cpu); --config.dev',
        ),
        ('describe', 'nothing', 'auto', 'device: JAX finds none to compute on (JAX_PLATFORMS=noth'),
    ],
)
def test_a_device_that_is_not_there_is_refused(
    monkeypatch, tmp_path, mode, platforms, device, told
):
    monkeypatch.setenv('JAX_PLATFORMS', platforms)
    fields = overrides(TINY | {'device': device})
    result = run_main(SINGLE, *fields, f'--mode={mode}', f'--workdir={tmp_path}/run')
    assert told in last_error(result)
    assert 'compiling' not in result.stderr
    assert not (tmp_path / 'run').exists()


@pytest.mark.parametrize(
    'path, level, shown',
    [
        (train.__file__, python_logging.INFO, True),
        # Of an environment that `make` put into a checkout with this name.
        ('/home/me/ensadv/.venv/lib/site-packages/jax/_src/bridge.py', python_logging.INFO, False),
        ('/home/me/ensadv/.venv/lib/site-packages/jax/_src/bridge.py', python_logging.ERROR, True),
    ],
)
def test_of_others_only_warnings_are_shown(monkeypatch, path, level, shown):
    handler = logging.get_absl_handler()
    monkeypatch.setattr(handler, 'filters', [])
    monkeypatch.setattr(sys, 'unraisablehook', sys.unraisablehook)
    monkeypatch.setattr(threading, 'excepthook', threading.excepthook)
    verbosity = logging.get_verbosity()
    try:
        command_line.set_up_logging()
    finally:
        logging.set_verbosity(verbosity)
    record = python_logging.LogRecord('absl', level, path, 1, 'a line', (), None)
    assert bool(handler.filter(record)) == shown


def test_a_config_file_is_read_as_it_is_written(monkeypatch, tmp_path):
    """Python's cache takes a file of the same size and second for the one before."""
    monkeypatch.setattr(sys, 'dont_write_bytecode', False)
    file = tmp_path / 'mine.py'
    for seed in (1, 2):
        file.write_text(
            'from configs import default\n'
            'def get_config():\n'
            '    config = default.get_config()\n'
            f'    config.seed = {seed}\n'
            '    return config\n'
        )
        os.utime(file, (0, 0))
        assert command_line._run_config_file(str(file), default.get_config).seed == seed


def test_nothing_to_evaluate(tmp_path):
    result = run_main('--mode=evaluate', SINGLE, f'--workdir={tmp_path}')
    assert 'no run is here' in last_error(result)


def test_a_diverging_run_ends_with_a_line_and_code_1(tmp_path):
    fields = TINY | {'train.learning_rate': 1e30, 'train.steps': 20, 'eval.inline': False}
    result = run_main(
        '--config=configs/baseline.py', *overrides(fields), f'--workdir={tmp_path}/run'
    )
    assert 'not finite between steps' in last_error(result, code=1)


@pytest.mark.parametrize(
    'system, expected',
    [
        ('baseline', ['36,479,194', '36,479,194', 'clean training']),
        ('ensemble4adv', ['36,479,194', '145,916,776', 'step_size 0.007843 (2/255)']),
        # AutoAttack: 1,900 gradients, each as dear as 2 predictions, and 5,900 predictions.
        ('doubleadv', ['82,040,154', '82,040,154', 'from step 90,000  0.0008', '2.076e+05 G']),
    ],
)
def test_describe_tells_the_size_of_the_papers_systems(system, expected):
    result = run_main('--mode=describe', f'--config=configs/{system}.py')
    assert result.returncode == 0, result.stderr
    position = 0
    for text in expected:
        position = result.stdout.index(text, position) + 1


@pytest.mark.parametrize(
    'shape, changes, told',
    [
        ((28, 28, 1), {}, None),
        ((32, 32, 3), {'train.batch_size': 101}, 'expected at most the 100 training examples'),
        ((4, 32, 1), {}, "data.pad: expected less than the images' 4 pixels, found 4"),
    ],
)
def test_describe_refuses_what_does_not_fit_the_data(shape, changes, told):
    config = small.get_config()
    config.update_from_flattened_dict(changes)
    dataset = {'name': 'npz', 'image_shape': shape, 'num_classes': 3, 'num_train': 100}
    dataset |= {'mean': [0.0] * shape[-1], 'std': [1.0] * shape[-1]}
    if told is None:
        assert f'images {shape}, 3 classes' in describe.describe(config, dataset)
    else:
        with pytest.raises(ConfigError, match=told):
            describe.describe(config, dataset)


def test_describe_tells_the_recipe():
    config = small.get_config()
    assert describe._objective(config) == 'adversarial weight 1'
    assert describe._learning_rate(config) == {
        'from step 0': '0.1', 'from step 350': '0.02', 'from step 450': '0.004',
    }  # fmt: skip
    config.train.update(
        objective='trades', label_smoothing=0.1, awp_gamma=0.005, awp_start=50, steps=401,
        schedule='linear', warmup_steps=1,
    )  # fmt: skip
    assert describe._objective(config) == (
        'TRADES with beta 6, label smoothing 0.1, AWP with gamma 0.005 from step 50'
    )
    found = describe._learning_rate(config)
    assert found.pop('schedule') == 'linear'
    assert list(found.items())[:3] == [
        ('at step 0', '0'), ('at step 1', '0.1'), ('at step 100', '0.07525'),
    ]  # fmt: skip
    assert [*found] == [f'at step {step}' for step in (0, 1, 100, 200, 300, 400)]
    (attack, *_) = describe._training_attack(config).values()
    assert attack.endswith('loss divergence from the clean prediction')
    config.train.adversarial_weight = 0.0
    assert describe._objective(config).startswith('clean, label smoothing')
    config.ensemble.size = 2
    config.train.diversity = 'dverge'
    assert describe._objective(config).startswith(
        'clean, DVERGE with epsilon 0.07, steps 10, layer random, start 0, label smoothing'
    )


@pytest.mark.parametrize(
    'labels, n, told', [([0] * 50 + [1] * 50 + [2] * 50, 50, True), ([0, 1, 2] * 50, 50, False)]
)
def test_few_examples_of_a_sorted_test_split_are_told(monkeypatch, labels, n, told):
    images = np.zeros((150, 4, 4, 1), np.uint8)
    dataset = datasets.Dataset('npz', images, np.array(labels), images, np.array(labels), 3)
    config = small.get_config()
    config.eval.num_examples = n
    warnings = []
    monkeypatch.setattr(build.logging, 'warning', lambda text, *args: warnings.append(text % args))
    assert [len(part) for part in build.test_split(config, dataset)] == [n, n]
    assert bool(warnings) == told
    if told:
        assert 'the first 50 test examples are of 1 of 3 classes' in warnings[0]


def test_describe_counts_operations_right_and_says_what_computes():
    """WRN-28-10 takes 5.2 billion multiply-adds for a CIFAR image, zeros at borders included."""
    result = run_main('--mode=describe', SINGLE, '--config.model.dtype=bfloat16', devices=2)
    line = next(line for line in result.stdout.splitlines() if line.split()[:1] == ['forward'])
    assert 9 < float(line.split()[1]) < 10.6
    convolutions = '; convolutions are '
    for job, dtype, end in (
        ('training  ', 'bfloat16', '\n'), ('evaluation', 'float32', convolutions)
    ):  # fmt: skip
        assert (
            f'\n  {job}  on 2 devices (cpu), in {dtype}, JAX {jax.__version__}{end}'
            in result.stdout
        )


def test_trains_and_evaluates_without_tensorflow_on_the_cpu_if_asked(monkeypatch, tmp_path):
    monkeypatch.setenv('JAX_PLATFORMS', 'tpu')
    rng = np.random.default_rng(0)
    images = {k: rng.integers(0, 256, ARRAYS[k].shape, np.uint8) for k in ARRAYS if 'im' in k}
    np.savez(tmp_path / 'mine.npz', **(ARRAYS | images))
    fields = TINY | {
        'data.name': 'npz', 'data.path': tmp_path / 'mine.npz', 'eval.num_examples': 4,
        'device': 'cpu', 'eval.dtype': 'bfloat16',
    }  # fmt: skip
    result = run_main(SINGLE, *overrides(fields), f'--workdir={tmp_path}/run')
    assert result.returncode == 0, result.stderr
    assert list((tmp_path / 'run').glob('events.*'))
    assert '[4] ' in result.stderr
    computation = lambda dtype: f'on 1 device (cpu), in {dtype}, JAX {jax.__version__}'
    told = [
        f'SingleAdv: training {computation("float32")}; convolutions are ',
        f'SingleAdv: evaluation {computation("bfloat16")}\n',
    ]
    places = [result.stderr.index(text) for text in (told[0], '[2] ', told[1], 'step 2: clean')]
    assert places == sorted(places)
    assert all(result.stderr.count(text) == 1 for text in told)
    content = json.loads((tmp_path / 'run' / 'eval' / '4.json').read_text())
    assert [attack['name'] for attack in content['attacks']] == ['clean', 'ifgsm2']


def test_tfds_data_without_tensorflow_say_so(tmp_path):
    result = run_main(SINGLE, f'--workdir={tmp_path}/run')
    assert 'needs TensorFlow Datasets' in last_error(result)
