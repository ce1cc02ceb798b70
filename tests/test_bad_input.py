"""Whatever the user gives: one line and exit code 2, never a traceback or a hang.

Hypothesis makes several hundred inputs, always the same ones. For more of them:
BAD_INPUT_EXAMPLES=20 python -m pytest tests/test_bad_input.py   (20 times as many)
"""

import io
import json
import os
import pathlib
import pickle
import re
import shutil
import tempfile
import threading
import zipfile

import numpy as np
import pytest
from conftest import TINY, overrides, tiny_config
from etils import epath
from fork_server import GOT_THROUGH, Result, Server, started
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from report_runs import run_config, write_examples, write_run
from test_report import planes

from configs import default
from ensadv import config as config_lib
from ensadv.command_line import EXAMPLE
from ensadv.data import datasets
from ensadv.evaluation import transfer_sets
from ensadv.storage import plane_files, tensor_files, workdir

TIMES = int(os.environ.get('BAD_INPUT_EXAMPLES', '1'))
FIELDS = config_lib.field_types(default.get_config())
SINGLE = '--config=configs/singleadv.py'
QUICK = '--config=configs/quickstart.py'
DESCRIBE = ('--mode=describe', SINGLE)
LONGEST = 700
EPSILON = 0.15


def examples(count: int) -> settings:
    # Neither the clock nor earlier runs decide: CI sees what everyone sees.
    return settings(
        max_examples=count * TIMES,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


@pytest.fixture(scope='module')
def program():
    with started() as server:
        yield server


@pytest.fixture(scope='module')
def folders(tmp_path_factory):
    """Makes folders, one for each example."""
    root = tmp_path_factory.mktemp('bad_input')

    def make() -> pathlib.Path:
        return pathlib.Path(tempfile.mkdtemp(dir=root))

    return make


def assert_told(result: Result, *names: str) -> None:
    """Asserts that a mistake was told as it should be, and names one of these."""
    # What is said before the data are read is no part of it.
    lines = result.stderr.splitlines(keepends=True)
    told = ''.join(line for line in lines if not line.endswith('] reading data\n'))
    result = result._replace(stderr=told)
    assert result.code == 2, result
    # Before a mistake is seen the log may have told what was read.
    *log, error = result.stderr.splitlines() or ['']
    assert all(re.match(r'[IW]\d{4} ', line) for line in log), result
    assert error.startswith('error: '), result
    assert error.isprintable(), result
    assert 'Traceback' not in result.stderr, result
    assert len(error) < LONGEST, result
    assert not names or any(name in error for name in names), (result, names)


def assert_told_or_fine(result: Result, *names: str) -> None:
    """Asserts that the input was taken, or told to be a mistake."""
    if result.code in (0, GOT_THROUGH):
        assert 'Traceback' not in result.stderr, result
    else:
        assert_told(result, *names)


# Overrides

NUMBERS = [
    '0', '1', '-1', '-0', '0.5', '7.0', '1e5', '1e-400', '1e309', '-1e309', 'nan', 'inf', '-inf',
    '8/255', '8/0', '-8/255', '8/255/3', '1/1e-320', '0/0', 'nan/1', '9' * 30, '9' * 5000,
    '0x' + 'f' * 4000, '0x10', '1_000', '2147483647', '2147483648', '-9223372036854775809',
    '1000', '1e38', '1e39', '5e-324', '1j', '٣',
]  # fmt: skip
TEXTS = [
    '', ' ', 'None', 'True', 'true', 'clean', 'pgd20', 'pgd' + '9' * 5000, 'blackbox', 'npz',
    'validation', 'vgg', 'gating', 'separate', '"', "'", "'a", 'a\nb', '\r', '\t', '\x1b[2J',
    '\x7f', '🐈', 'é', '\udc80', '\u2028', '%s', '{epsilon}', '~nobody/x', '/', '..', 'x' * 5000,
    '/' + 'x' * 5000, '-', '--', '=', '-' * 5000 + '1', '[' * 5000, 'lambda: 0', 'a,b', 'a,,b',
    ',',
]  # fmt: skip
TUPLES = [
    '()', '(', '(,)', '[]', '{}', '{[]: 1}', '{1: 2}', "b'ab'", '(1,)', '(1.5,)', '(True,)',
    '(None,)', '(-1,)', "('a',)", "(['a'],)", '([1], [1])', '({},)', "('clean', 'clean')",
    "('clean', 5)", "('pgd0',)", "('pgd1000001',)", f"('pgd{'9' * 5000}',)", "('pgd²',)", "('',)",
    '(1, 1)', '(3, 2)', f'({"9" * 30},)', f'(0x{"f" * 5000},)', '(1e400,)', "('singleadv',)",
    "('a b',)", "('__init__',)", "('default',)", "('singleadv', 'baseline')",
    '(' + '1,' * 2000 + ')', "('\\n',)", "('\\x00',)", f"({'x' * 3000!r},)",
]  # fmt: skip
VALUES = st.one_of(
    st.sampled_from(NUMBERS),
    st.sampled_from(TEXTS),
    st.sampled_from(TUPLES),
    st.integers().map(str),
    st.floats().map(repr),
    st.lists(st.integers() | st.text(max_size=5) | st.floats() | st.none()).map(
        lambda values: repr(tuple(values))
    ),
    # An argument of a process has no NUL, and nothing but UTF-8 or what stands for other bytes.
    st.text(st.characters(exclude_characters='\0', exclude_categories=['Cs'])),
)
NAMES = st.sampled_from(sorted(FIELDS))
OVERRIDES = st.lists(st.tuples(NAMES, VALUES), min_size=1, max_size=2)


@examples(120)
@given(OVERRIDES, st.booleans())
# What once ended in a traceback, a hang or several lines.
@example([('train.steps', '0x' + 'f' * 5000)], False)
@example([('eval.attacks', f"('pgd{'9' * 5000}',)")], False)
@example([('eval.attacks', '-' * 5000 + '1')], False)
@example([('blackbox.sources', "(['a'],)")], False)
@example([('planes.images', '([1],)')], False)
@example([('study.planes', '([1], 2)')], False)
@example([('system', 'a\nb')], False)
@example([('data.path', 'x' * 100_000)], False)
def test_overrides(program, fields, apart):
    args = [f'--config.{name}={value}' for name, value in fields]
    if apart:
        args = [part for name, value in fields for part in (f'--config.{name}', value)]
    # A flag of True or False takes no value that stands apart: the value is then what is named, and
    # as a flag, if it begins like one.
    values = [value.lstrip('-') for _, value in fields if value.lstrip('-')]
    assert_told_or_fine(program.run(*DESCRIBE, *args), *FIELDS, '--', *values)


@pytest.mark.parametrize('mode', ['train', 'study', 'blackbox'])
def test_overrides_of_every_field_in_jobs(program, folders, mode):
    """No value gets a job as far as its work, and then into a traceback."""

    @examples(20)
    @given(st.data())
    def check(draw):
        field = draw.draw(NAMES.filter(lambda name: name != 'data.name'))
        value = draw.draw(VALUES)
        config = SINGLE if mode == 'train' else QUICK
        small = TINY if mode == 'train' else {}
        result = program.run(
            f'--mode={mode}', config, *overrides(small), '--compilation_cache=',
            f'--workdir={folders()}/run', f'--config.{field}={value}',
        )  # fmt: skip
        assert_told_or_fine(result, *FIELDS, '--')

    check()


@examples(15)
@given(st.data())
def test_misspelt_fields(program, draw):
    name = draw.draw(NAMES)
    place = draw.draw(st.integers(0, len(name) - 1))
    letter = draw.draw(st.sampled_from(['', 'x', '.', '[0]', ' ', '-', '__class__', '\n']))
    misspelt = name[:place] + letter + name[place + 1 :]
    if misspelt not in FIELDS:
        result = program.run(*DESCRIBE, f'--config.{misspelt}=1')
        assert_told(result, 'unknown config field', 'Unknown command line flag')


FLAGS = [
    '--mode=describe', '--mode=trian', '--mode=', '--mode', '--workdir=', '--workdir',
    '--workdir=/dev/null', QUICK, '--config=', '--config', '--config=/',
    '--config=a:b', '--config=configs/default.py:x', '--noconfig', '--config.seed=3',
    '--config.seed', '--config.', '--config.=3', '--config.train=3',
    "--config.train={'steps': 3}", '--config.lock=3', '--config.eval.attacks[0]=clean',
    '--noconfig.train.steps', '--noconfig.data.download', '--config.data.download',
    '--config.data.download=maybe', '--ledgers=', '--ledgers=a', '--ledgers=a,b', '--ledgers=/,/',
    '--wrkdir=3', '--verbosity=x', '--verbosity=1' + '0' * 30, '--flagfile=/nowhere',
    '--flagfile=/', '--stderrthreshold=x', '--nohelp=3', 'extra', '', '-', '--', '---', '=',
    '--=', '--=3', '-x', '-h', '--undefok=wrkdir', '\x1b', '🐈', '\udc80',
]  # fmt: skip


@examples(40)
@given(st.lists(st.sampled_from(FLAGS), max_size=4))
@example([QUICK, '--mode=describe', '--noconfig.data.download'])
@example(['--mode=describe', QUICK, '--config.data.path', '--', 'extra'])
def test_flags(program, args):
    assert_told_or_fine(program.run(*args))


def test_a_fraction_is_a_number_in_every_form(program, tmp_path):
    file = tmp_path / 'shows.py'
    file.write_text(
        'from configs import default\ndef get_config():\n    return default.get_config()\n'
    )
    for form in (['--config.epsilon=8/0'], ['--config.epsilon', '8/0']):
        assert_told(program.run(f'--config={file}', *form), '--config.epsilon=8/0: division')
    for form in (['--config.epsilon=510/255'], ['--config.epsilon', '510/255'],
                 ['-config.epsilon', '510/255', '--mode=describe']):  # fmt: skip
        assert_told(program.run(f'--config={file}', *form), 'epsilon: expected a number >= 0 and')
        assert 'found 2.0' in program.run(f'--config={file}', *form).stderr
    # Elsewhere it is a text.
    result = program.run(*DESCRIBE, '--config.data.path=1/2')
    assert_told(result, 'data.path: only for data.name=npz')
    result = program.run(*DESCRIBE, '--config.data.name=npz', '--config.data.path=1/2')
    assert_told(result, 'data.path: cannot read ')


@pytest.mark.parametrize(
    'args, told',
    [
        ('--config.train.steps=100,000', 'expected a whole number; without commas, as 100000'),
        ('--config.train.steps=1.5', '--config.train.steps=1.5: expected a whole number'),
        ('--config.train.steps=1e16', 'expected a whole number'),  # not every one is a float
        ('--config.seed=42,43', '--config.seed=42,43: expected a whole number'),
        ('--config.epsilon=0,1', 'with a point, as 0.1'),
        ('--config.epsilon=8', 'pixels are in [0, 1]: 8/255, not 8'),
        ('--config.attack.sigma=16', 'pixels are in [0, 1]'),
        ('--config.eval.inline=maybe', '--config.eval.inline=maybe: expected True or False'),
        ('--config.eval.inline False', 'takes it after =, as --config.eval.inline=False'),
        ('--config.eval.attacks=PGD20', "did you mean 'pgd20'?"),
        ("--config.eval.attacks=('clean','pgd20'", 'with commas between them'),
        ('--config.data.name=CIFAR10', "did you mean 'cifar10'?"),
        ('--train.steps=3', "did you mean '--config.train.steps'?"),
        ('--steps=3', "did you mean '--config.train.steps'?"),
        ('--batch-size=3', "did you mean '--config.train.batch_size'?"),
        ('--lr=0.1', "did you mean '--config.train.learning_rate'?"),
        ('--config.train.lr=0.1', "did you mean 'train.learning_rate'?"),
        ('--config.config.seed=3', "did you mean 'seed'?"),
        ('train.steps=3', 'did you mean --config.train.steps=3?'),
        ('--config=singleadv', 'did you mean --config=configs/singleadv.py?'),
        ('--config=configs/ensemble2ad.py', 'did you mean --config=configs/ensemble2adv.py?'),
        ('--config=mine', 'in configs there are baseline, '),
        ('configs/singleadv.py', 'did you mean --config=configs/singleadv.py?'),
        ('--mode=eval', "did you mean 'evaluate'?"),
        ('evaluate', 'did you mean --mode=evaluate?'),
        ('--mode=evaluate', '--workdir: needed'),
    ],
)
def test_newcomers_mistakes_are_told_with_what_was_meant(program, args, told):
    config = [] if '--mode=evaluate' in args else [SINGLE]
    assert_told(program.run('--mode=describe', *config, *args.split(' ')), told)


@pytest.mark.parametrize(
    'args, told',
    [
        ('--mode=import', '--from: needed'),
        ('--mode=import --from=none.npz', '--architecture: needed'),
        ('--mode=import --from=none.npz --architecture=WRN-28', 'expected WRN-DEPTH-WIDTH'),
        ('--mode=import --from=none.npz --architecture=WRN-28-1-tanh', 'relu, silu'),
        ('--mode=import --from=none.npz --architecture=WRN-27-1', 'model.depth: expected 6n + 4'),
        ('--mode=import --from=none.safetensors', 'none.safetensors: cannot be read'),
        ('--mode=import --from=none.npz --architecture=WRN-10-1', 'none.npz: cannot be read'),
        ('--mode=export', 'no run is here'),
    ],
)
def test_mistakes_of_exports_and_imports(program, tmp_path, args, told):
    common = f'--workdir={tmp_path}/run', '--compilation_cache='
    assert_told(program.run(*args.split(), *common), told)


@pytest.mark.parametrize(
    'content, told',
    [
        ('{"config": {"seed": 1}, "network": {}}', '--config: '),
        ('{"config": {"sed": 1}, "network": {}}', 'unknown config field sed'),
        ('{"config": 3, "network": {}}', 'expected a file as --mode=export writes it'),
        ('{', 'expected a file as --mode=export writes it'),
    ],
)
def test_an_exported_file_has_a_config_of_its_own(program, tmp_path, content, told):
    file = tmp_path / 'weights.safetensors'
    file.write_bytes(tensor_files.to_safetensors({'a': np.zeros(1)}, {'ensadv': content}))
    common = f'--workdir={tmp_path}/run', '--compilation_cache='
    config = [SINGLE] if told == '--config: ' else []
    assert_told(program.run('--mode=import', f'--from={file}', *config, *common), told)


def test_a_study_is_not_trained_as_one_run(program, tmp_path):
    result = program.run(QUICK, f'--workdir={tmp_path}/run', '--compilation_cache=')
    assert_told(result, 'this is for --mode=study')


def test_the_command_alone_and_help(program):
    assert_told(program.run(), f'--config: needed, as in {EXAMPLE}')
    # Which is one that works, and needs no data.
    assert program.run(*EXAMPLE.split()[2:], '--mode=describe').code == GOT_THROUGH
    for flag in ('--help', '-h'):
        result = program.run(SINGLE, flag)
        assert (result.code, result.stderr) == (0, '')
        for word in ('--mode=planes', '--ledgers', '--config.FIELD=VALUE', '--helpfull'):
            assert word in result.stdout
        assert len(result.stdout.splitlines()) < 30


def test_a_misspelt_field_of_a_config_file_is_one_line(program, tmp_path):
    for line, told in (
        (
            'config.train.stpes = 5',
            "unknown config field train.stpes (did you mean 'train.steps'?)",
        ),
        ('config.trian.steps = 5', "unknown config field trian (did you mean 'train'?)"),
        ('config.train.lr = 5', "did you mean 'train.learning_rate'?"),
    ):
        file = tmp_path / 'mine.py'
        file.write_bytes(with_line(line))
        result = program.run('--mode=describe', f'--config={file}')
        assert_told(result, f'--config={file}: line 5: {told}' if 'unk' in told else told)
        assert len(result.stderr) < 200 + len(str(file))


def test_where_a_run_was_expected_the_near_ones_are_named(program, tmp_path, run_folder):
    shutil.copytree(run_folder, tmp_path / 'singleadv_seed0')
    for mode in ('evaluate', 'planes', 'describe', 'train', 'report'):
        result = program.run(f'--mode={mode}', f'--workdir={tmp_path}/singelav_seed0')
        assert_told(result, f'did you mean {tmp_path}/singleadv_seed0?')
        assert os.listdir(tmp_path) == ['singleadv_seed0']


def test_a_follower_waits_for_the_run_that_it_follows(program, tmp_path, run_folder):
    path = tmp_path / 'run'
    command = ['--mode=evaluate', f'--workdir={path}', '--config.eval.follow=yes']
    result = program.run(*command, '--config.eval.follow_timeout=0.1')
    assert result.code == 1
    assert result.stderr.count('waiting until training begins here') == 1
    assert 'error: --workdir=' in result.stderr
    assert 'no training began here in 0.1 s' in result.stderr
    # What can be told at once is.
    assert_told(program.run(*command, '--config.eval.folow_timeout=1'), 'eval.follow_timeout')
    begins = threading.Timer(0.5, shutil.copytree, (run_folder, path))
    begins.start()
    result = program.run(*command, '--config.planes.attack=clean')
    begins.join()
    # It has the run's config by now, and the overrides on it.
    first, last = result.stderr.splitlines()
    assert 'waiting until training begins here' in first
    assert last.startswith('error: planes.attack: clean has no steps')


def test_a_moved_run_is_judged_by_the_set_that_moved_with_it(program, tmp_path, run_folder):
    old, new = tmp_path / 'old', tmp_path / 'new'
    shutil.copytree(run_folder, old / 'run')
    transfer_set(old / 'blackbox' / 'blackbox.npz')
    file = old / 'run' / 'config.json'
    record = json.loads(file.read_text())
    record['config']['eval']['blackbox_path'] = str(old / 'blackbox' / 'blackbox.npz')
    record['config']['epsilon'] = EPSILON
    file.write_text(json.dumps({k: v for k, v in record.items() if k != 'crc32'}))
    assert run_job(program, 'describe', old / 'run').code == GOT_THROUGH
    old.rename(new)
    assert run_job(program, 'describe', new / 'run').code == GOT_THROUGH
    (new / 'blackbox' / 'blackbox.npz').unlink()
    assert_told(run_job(program, 'describe', new / 'run'), str(old / 'blackbox' / 'blackbox.npz'))


@pytest.mark.parametrize(
    'fields, told',
    [
        ({'eval.num_examples': 361}, 'eval.num_examples: expected at most the 360 test examples'),
        ({'data.validation_examples': 1437}, 'allowed are 0..1436'),
        ({'eval.blackbox_path': '/nothing.npz'}, 'eval.blackbox_path: /nothing.npz: found no such'),
        ({'eval.attacks': 'clean,blackbox'}, 'eval.blackbox_path: needed'),
        ({'study.systems': 'singleadv,doubleav'}, "did you mean 'doubleadv'?"),
        ({'study.systems': 'singleadv', 'eval.attacks': 'blackbox', 'blackbox.sources': 'vg'},
         "did you mean 'vgg'?"),
    ],
)  # fmt: skip
def test_describe_refuses_what_training_would(program, fields, told):
    result = program.run('--mode=describe', '--config=configs/small.py', *overrides(
        {'data.name': 'digits'} | fields))  # fmt: skip
    assert_told(result, told)


def test_a_study_tells_which_fields_of_the_command_line_do_not_count(program, tmp_path):
    (tmp_path / 'file').write_text('')
    fields = {'study.systems': 'singleadv,wrn28_10_trades', 'data.cutmix': 0, 'data.cutout': 0}
    args = '--mode=study', QUICK, *overrides(fields), f'--workdir={tmp_path}/file'
    lines = program.run(*args).stderr.splitlines()
    (told,) = (line for line in lines if 'on the command line' in line)
    assert 'wrn28_10_trades has data.cutmix=1.0, not 0.0' in told


@pytest.mark.parametrize(
    'value, told',
    [
        ('{tmp}/file', 'is a file, expected a directory'),
        ('{tmp}/file/run', '{tmp}/file is a file'),
        ('{tmp}/' + 'x' * 300, 'File name too long'),
        ('{tmp}/loop/run', 'symbolic links'),
        ('', '--workdir: needed'),
    ],
)
@pytest.mark.parametrize('mode', ['train', 'study', 'evaluate', 'report', 'planes'])
def test_workdirs(program, tmp_path, mode, value, told):
    (tmp_path / 'file').write_text('')
    (tmp_path / 'loop').symlink_to('loop')
    path = value.format(tmp=tmp_path)
    config = SINGLE if mode != 'study' else QUICK
    result = program.run(f'--mode={mode}', config, '--compilation_cache=', f'--workdir={path}')
    assert_told(result, told.format(tmp=tmp_path))
    assert '--workdir' in result.stderr


def test_a_workdir_where_nothing_may_be_written(program):
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o555)
        nobody = 65534 if os.getuid() == 0 else None  # root may write everywhere
        args = [f'--workdir={folder}/a/run', '--compilation_cache=', *overrides(TINY)]
        assert_told(program.run(SINGLE, *args, uid=nobody), f'no permission to write in {folder}')


def test_workdirs_whose_names_are_patterns(program, tmp_path):
    path = write_run(tmp_path / 'run[1]', run_config(), {40: {'clean': 0.5, 'ifgsm5': 0.4}})
    assert list(workdir.read_evaluations(epath.Path(path))) == [40]


# Config files

EXPRESSIONS = [
    'None', '3', '-1', '0', "''", "'x'", '1.5', 'True', '[]', '()', '{}', "{'a': 1}", 'object()',
    'lambda: 0', "float('nan')", "float('inf')", '10**400', '-10**5000', "b'x'", 'set()', '1j',
    'range(3)', "'\\0'", "'a\\nb'", 'config', 'type(config)()', 'np.int64(3)', 'np.zeros(3)',
    'np.float32(0.5)', '(object(),)', '([],)', '(None,)', '(np.int64(1),)', '(10**5000,)',
    "('\\ud800',)", "'x' * 10**6", "('x' * 10**6,)", 'config.epsilon', "config.get_ref('epsilon')",
    "config.get_ref('epsilon') / 0", 'ml_collections.config_dict.placeholder(int)',
    'ml_collections.config_dict.required_placeholder(str)', 'sys.exit', '1 / 0',
]  # fmt: skip
GROUPS = sorted({name.rpartition('.')[0] for name in FIELDS} - {''})
RETURNED = [
    'None', '3', "''", '{}', '{"seed": 3}', '[]', 'config.to_dict()', 'type(config)()',
    'ml_collections.FrozenConfigDict(config)', 'config.train', 'default', 'lambda: config',
]  # fmt: skip
BODIES = [
    '', 'def get_config(', 'def get_config():\n  pass', 'get_config = 3', 'import nothing',
    'raise SystemExit(0)', 'raise SystemExit("bye")', 'import sys; sys.exit(3)', '1/0',
    'def get_config():\n  return get_config()', 'def get_config(a, b):\n  return a',
    'def get_config():\n raise ValueError("a\\nb")', 'def get_config():\n raise ValueError',
    'def get_config():\n raise KeyError("x" * 10**6)', 'raise MemoryError', 'assert False',
    'class get_config: pass', 'x = ' + '(' * 500, '\x00',
    'x = ' + '-' * 5000 + '1', '\tx\n  y', '# -*- coding: nonsense -*-', 'raise RecursionError',
    'raise UnicodeDecodeError("a", b"", 0, 1, "\\ud800")', 'x = "\\ud800"; raise ValueError(x)',
]  # fmt: skip


@st.composite
def config_files(draw) -> bytes:
    kind = draw(st.sampled_from(['field', 'field', 'field', 'returned', 'body', 'binary', 'cut']))
    if kind == 'body':
        return draw(st.sampled_from(BODIES)).encode()
    if kind == 'binary':
        return draw(st.binary(max_size=100))
    name = draw(st.sampled_from([*FIELDS, *GROUPS, 'nothing', 'train.nothing']))
    how = draw(st.sampled_from(['with config.unlocked(), config.ignore_type():\n        ', '']))
    line = f'{how}config.{name} = {draw(st.sampled_from(EXPRESSIONS))}'
    if kind == 'field' and draw(st.booleans()) and '.' in name:
        line = f'with config.unlocked():\n        del config.{name}'
    returned = draw(st.sampled_from(RETURNED)) if kind == 'returned' else 'config'
    content = (
        'import sys\nimport ml_collections\nimport numpy as np\nfrom configs import default\n'
        'def get_config():\n'
        '    config = default.get_config()\n'
        f'    {line if kind != "returned" else "pass"}\n'
        f'    return {returned}\n'
    ).encode()
    return content[: draw(st.integers(0, len(content)))] if kind == 'cut' else content


def with_line(line: str) -> bytes:
    return (
        'import sys\nfrom configs import default\n'
        f'def get_config():\n    config = default.get_config()\n    {line}\n    return config\n'
    ).encode()


@examples(80)
@given(config_files(), st.sampled_from([(), ('--config.epsilon=0.1',), ('--config.seed=1',)]))
@example(b'def get_config(): return None', ())
@example(b'def get_config(): return {}', ())
@example(b'raise SystemExit(0)', ())
@example(with_line('config.train = None'), ('--config.train.steps=3',))
@example(with_line('config.train.steps = 10**5000'), ())
@example(with_line('config.epsilon = None'), ())
@example(with_line('config.attack.sigma = config.get_ref("epsilon") / 0'), ())
@example(with_line('config.eval.attacks = None'), ())
@example(with_line('with config.ignore_type(): config.data.path = 3'), ())
@example(with_line('with config.ignore_type(): config.eval.attacks = object()'), ())
@example(with_line('with config.unlocked(): config.train.all = config'), ())
def test_config_files(program, folders, content, args):
    file = folders() / 'mine.py'
    file.write_bytes(content)
    result = program.run('--mode=describe', f'--config={file}', *args)
    assert_told_or_fine(result, str(file), *FIELDS)


@pytest.mark.parametrize('name', ['', 'nothing.py', 'folder', 'mine.txt', 'fifo', 'mine.py:a:b'])
def test_paths_of_config_files(program, tmp_path, name):
    (tmp_path / 'folder').mkdir()
    os.mkfifo(tmp_path / 'fifo')
    (tmp_path / 'mine.txt').write_text('no config')
    (tmp_path / 'mine.py').write_bytes(with_line('pass'))
    path = tmp_path / name if name else ''
    assert_told(program.run('--mode=describe', f'--config={path}'), f'--config={path}: ')


# config.json, and the other files of a run


@pytest.fixture(scope='module')
def run_folder(tmp_path_factory) -> pathlib.Path:
    """A run that was never trained, on the digits that there are."""
    root = tmp_path_factory.mktemp('run')
    last = {'clean': 0.9, 'ifgsm5': 0.6, 'pgd20': 0.5, 'pgd500': 0.4}
    digits = datasets.load('digits')
    config = run_config(model__dtype='float32')
    path = write_run(root / 'run', config, {20: last, 40: last}, dataset=digits.describe())
    write_examples(path, config, 40)
    plane_files.write(epath.Path(path) / 'planes' / 'members.npz', planes())
    return path


JSON_VALUES = st.one_of(
    st.sampled_from([
        None, True, 0, -1, 3, 10**30, 10**400, 1.5, float('nan'), float('inf'), '', 'x', 'pgd20',
        '\0', 'a\nb', '\x1b', [], [1], ['pgd20'], [[]], [None], {}, {'a': 1}, 'x' * 3000,
    ]),
    st.integers(),
    st.text(max_size=3),
)  # fmt: skip


def places_of(value, path=()) -> list[tuple]:
    """Returns the paths to all parts of a JSON value."""
    if not isinstance(value, dict | list):
        return [path]
    parts = value.items() if isinstance(value, dict) else enumerate(value)
    return [path] + [place for key, part in parts for place in places_of(part, (*path, key))]


@st.composite
def edits(draw):
    """Returns a function that damages a JSON file, and how; Hypothesis shows the latter."""
    kind = draw(st.sampled_from(['set', 'set', 'set', 'delete', 'delete', 'add', 'text']))
    if kind == 'text':
        texts = ['', '{', '[]', '[', 'null', '3', '"', '{"config": {}}', '\x00', '[' * 50_000,
                 '{"config": 3}', '{"a":' * 50_000, '{"config":{"seed":' * 2000, 'NaN',
                 '{"architectures": ["Bert"]}', '1' * 5000, '\ufeff{}']  # fmt: skip
        return kind, None, draw(st.sampled_from(texts) | st.integers(0, 3000))
    return kind, draw(st.integers(0, 10_000)), draw(JSON_VALUES)


def edit(file: pathlib.Path, how) -> None:
    kind, place, value = how
    text = file.read_text()
    if kind == 'text':
        file.write_text(text[:value] if isinstance(value, int) else value)
        return
    content = {'': json.loads(text)}
    places = places_of(content)[1:]
    *path, last = places[place % len(places)]
    parent = content
    for key in path:
        parent = parent[key]
    if kind == 'set' or not path:
        parent[last] = value
    elif kind == 'delete':
        del parent[last]
    elif isinstance(parent, dict):
        parent['new field'] = value
    else:
        parent.append(value)
    file.write_text(json.dumps(content['']))


JOBS = {
    'describe': (),
    'evaluate': ('--config.eval.follow=False',),
    'train': (),
    'train anew': (SINGLE, *overrides(TINY)),
    'planes': (),
    'report': (),
}


def run_job(program: Server, job: str, path: pathlib.Path) -> Result:
    mode = job.partition(' ')[0]
    return program.run(f'--mode={mode}', f'--workdir={path}', '--compilation_cache=', *JOBS[job])


@examples(80)
@given(edits(), st.sampled_from(sorted(JOBS)))
def test_config_json(program, folders, run_folder, how, job):
    path = folders() / 'run'
    shutil.copytree(run_folder, path)
    edit(path / 'config.json', how)
    assert_told_or_fine(run_job(program, job, path), str(path), *FIELDS)


@pytest.mark.parametrize('job', JOBS)
@pytest.mark.parametrize(
    'content',
    [b'[]', b'{"architectures": ["Bert"]}', b'\xff', b'[' * 100_000, b'{"config": {}}', None],
)
def test_config_json_of_something_else(program, tmp_path, job, content):
    if content is None:
        (tmp_path / 'config.json').mkdir()
    else:
        (tmp_path / 'config.json').write_bytes(content)
    assert_told_or_fine(run_job(program, job, tmp_path), str(tmp_path))
    if job != 'report':
        assert_told(run_job(program, job, tmp_path), str(tmp_path / 'config.json'))


@examples(25)
@given(edits())
def test_results_in_a_report(program, folders, run_folder, how):
    path = folders() / 'run'
    shutil.copytree(run_folder, path)
    edit(path / 'eval' / '40.json', how)
    assert_told_or_fine(run_job(program, 'report', path), str(path))


# .npz files


class Trap:
    """What unpickling it would make."""

    def __init__(self, marker: pathlib.Path):
        self.marker = marker

    def __reduce__(self):
        return pathlib.Path.touch, (self.marker,)


def npz(arrays, **options) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays, **options)
    return buffer.getvalue()


def npy(array) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def header(shape: str, descr: str = "'|u1'", order: str = 'False') -> bytes:
    """An .npy file with nothing but a header."""
    text = f"{{'descr': {descr}, 'fortran_order': {order}, 'shape': {shape}}}".encode()
    return b'\x93NUMPY\x01\x00' + len(text).to_bytes(2, 'little') + text


HEADERS = [
    header('(1000000, 1000000, 1000, 3)'), header('(4294967296, 4294967296)'), header('(-1,)'),
    header('(9223372036854775807,)', "'<i8'"), header('()'), header('(1.5,)'), header('None'),
    header('(3,)', "'O'"), header('(3,)', "[('a', 'O')]"), header('(3,)', "'<U99999999'"),
    header('(3,)', '3'), header('(3,)', "'nonsense'"), header('(' * 300), header('(3,)', "'|V0'"),
    header('(4,)', "'|b1'", '5'), b'\x93NUMPY\x09\x00', b'\x93NUMPY', b'\x93NUMPY\x01\x00\xff\xff',
]  # fmt: skip
KINDS = ('cut', 'flip', 'content', 'member', 'drop', 'array')
ARRAYS_OF_ANYTHING = [
    np.zeros(3), np.zeros(()), np.array('x'), np.array('[]'), np.array('{}'), np.zeros((0,)),
    np.zeros((2, 2), np.int32), np.zeros(3, bool), np.zeros(3, '<m8[s]'), np.zeros(3, '<M8[s]'),
    np.zeros(3, 'i4,f8'), np.array([b'x']), np.full(3, np.nan, np.float16), np.zeros(3, np.int64),
    np.array('[' * 10_000), np.zeros((1, 0, 5, 3), np.uint8), np.array(['a', 'b']),
]  # fmt: skip


@st.composite
def damages(draw):
    kind = draw(st.sampled_from(KINDS))
    value = {
        'cut': st.floats(0, 1),
        'flip': st.lists(st.tuples(st.floats(0, 1), st.integers(0, 7)), min_size=1, max_size=4),
        'content': st.sampled_from(['', 'zip', 'npy', 'pickle', 'objects npy', 'text', 'Zip64']),
        'member': st.sampled_from([*HEADERS, b'', b'text', 'objects', 'encrypted']),
        'drop': st.none(),
        'array': st.integers(0, len(ARRAYS_OF_ANYTHING) - 1),
    }[kind]
    return kind, draw(st.integers(0, 20)), draw(value)


def damage(file: pathlib.Path, how, marker: pathlib.Path) -> None:
    """Damages an .npz file; `marker` appears if anything in it is unpickled."""
    kind, place, value = how
    content = file.read_bytes()
    objects = npy(np.array([Trap(marker)] * 20, object))
    if kind == 'cut':
        file.write_bytes(content[: int(value * len(content))])
    elif kind == 'flip':
        changed = bytearray(content)
        for share, bit in value:
            changed[min(int(share * len(content)), len(content) - 1)] ^= 1 << bit
        file.write_bytes(changed)
    elif kind == 'content':
        other = io.BytesIO()
        with zipfile.ZipFile(other, 'w') as archive:
            archive.writestr('readme.txt', 'nothing')
        file.write_bytes({
            '': b'', 'zip': other.getvalue(), 'npy': npy(np.zeros(3)), 'text': b'nothing',
            'pickle': pickle.dumps(Trap(marker)), 'objects npy': objects,
            'Zip64': b'PK\x05\x06' + b'\xff' * 18,
        }[value])  # fmt: skip
    else:
        with np.load(file) as stored:
            members = {name: npy(stored[name]) for name in stored}
        name = sorted(members)[place % len(members)]
        if kind == 'drop':
            del members[name]
        elif kind == 'array':
            members[name] = npy(ARRAYS_OF_ANYTHING[value])
        else:
            members[name] = objects if value == 'objects' else value
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, 'w') as archive:
            for each, part in members.items():
                archive.writestr(f'{each}.npy', b'' if part == 'encrypted' else part)
        content = buffer.getvalue()
        if value == 'encrypted':  # the flag of the members' headers that says so
            content = content.replace(
                b'PK\x01\x02\x14\x03\x14\x00\x00', b'PK\x01\x02\x14\x03\x14\x00\x01'
            )
        file.write_bytes(content)


def arrays_of_data() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        'image_train': rng.integers(0, 256, (20, 8, 8, 1), np.uint8),
        'label_train': np.arange(20) % 3,
        'image_test': rng.integers(0, 256, (6, 8, 8, 1), np.uint8),
        'label_test': np.arange(6) % 3,
    }


def train_on(program: Server, file: pathlib.Path, folder: pathlib.Path, **changes) -> Result:
    fields = TINY | {'data.name': 'npz', 'data.path': file, 'eval.num_examples': 6} | changes
    return program.run(
        SINGLE, *overrides(fields), '--compilation_cache=', f'--workdir={folder}/run'
    )


def transfer_set(file: pathlib.Path) -> None:
    digits = datasets.load('digits')
    n = 30
    config = config_lib.to_dict(tiny_config('baseline', seed=9))
    record = {
        'epsilon': EPSILON,
        'fingerprint': digits.fingerprint,
        'sources': [{'system': 'Baseline', 'seed': 9, 'config': config}],
    }
    indices = np.arange(n, dtype=np.int32)
    made = transfer_sets.TransferSet(
        digits.image_test[:n], digits.label_test[:n], indices, np.ones(n, bool), record
    )
    transfer_sets.write(file, made)


@examples(40)
@given(damages())
@example(('member', 0, HEADERS[0]))
@example(('array', 1, 8))  # time spans were taken for integers
@example(('member', 0, 'objects'))
@example(('content', 0, 'pickle'))
@example(('content', 0, 'objects npy'))
def test_damaged_data(program, folders, how):
    folder = folders()
    file, marker = folder / 'mine.npz', folder / 'marker'
    file.write_bytes(npz(arrays_of_data()))
    damage(file, how, marker)
    assert_told_or_fine(train_on(program, file, folder), str(file), 'data.')
    assert not marker.exists()


@examples(40)
@given(damages(), st.booleans())
@example(('member', 2, b'text'), False)  # came as bytes, not as an array
@example(('member', 0, 'objects'), False)
@example(('content', 0, 'pickle'), False)
@example(('content', 0, 'objects npy'), False)
def test_damaged_ledgers(program, folders, run_folder, how, other):
    folder = folders()
    files, marker = [folder / 'a.npz', folder / 'b.npz'], folder / 'marker'
    for file in files:
        shutil.copy(run_folder / 'eval' / '40.npz', file)
    damage(files[other], how, marker)
    result = program.run('--mode=compare', f'--ledgers={files[0]},{files[1]}')
    assert_told_or_fine(result, *map(str, files), 'ledgers')
    assert not marker.exists()


@examples(40)
@given(damages())
@example(('member', 0, 'objects'))
@example(('content', 0, 'pickle'))
@example(('content', 0, 'objects npy'))
def test_damaged_transfer_sets(program, folders, how):
    folder = folders()
    file, marker = folder / 'blackbox.npz', folder / 'marker'
    transfer_set(file)
    damage(file, how, marker)
    fields = TINY | {'eval.blackbox_path': file}
    result = program.run(
        SINGLE, *overrides(fields), '--compilation_cache=', f'--workdir={folder}/run'
    )
    assert_told_or_fine(result, str(file), 'eval.blackbox_path')
    assert not marker.exists()


@examples(25)
@given(damages(), st.sampled_from(['eval/40.npz', 'eval/40_examples.npz', 'planes/members.npz']))
@example(('member', 0, 'objects'), 'eval/40.npz')
@example(('content', 0, 'pickle'), 'eval/40.npz')
@example(('content', 0, 'objects npy'), 'eval/40.npz')
def test_damaged_arrays_in_a_report(program, folders, run_folder, how, name):
    folder = folders()
    path, marker = folder / 'run', folder / 'marker'
    shutil.copytree(run_folder, path)
    damage(path / name, how, marker)
    result = run_job(program, 'report', path)
    assert result.code == 0, result  # the rest is worth a report
    assert not marker.exists()


# Data that are read well, and are not what they should be

DTYPES = st.sampled_from([
    'u1', 'i1', 'i2', '>i2', 'i4', '>i4', 'i8', '>i8', 'u2', 'u4', 'u8', 'f2', 'f4', '>f8', 'g',
    'c8', '?', 'S1', 'U1', 'm8[s]', 'M8[s]', 'i4,i4',
])  # fmt: skip
SHAPES = st.sampled_from([
    (), (0,), (1,), (6,), (20,), (21,), (6, 1), (20, 8, 8), (20, 8, 8, 0), (0, 8, 8, 1),
    (6, 8, 8, 1), (20, 1, 1, 1), (20, 2, 3, 5), (20, 8, 8, 3), (20, 8, 8, 1, 1), (7, 8, 8, 1),
    (20, 9, 7, 1), (6, 9, 7, 1), (6, 1, 1, 1),
])  # fmt: skip
FILLED = st.sampled_from([0, 1, 2, 3, -1, 255, 256, 65535, 65536, 2**31, 2**63 - 1, 0.5, 'nan'])
CHANGES = st.tuples(
    st.sampled_from(['image_train', 'label_train', 'image_test', 'label_test']),
    st.one_of(
        st.tuples(st.just('dtype'), DTYPES),
        st.tuples(st.just('shape'), SHAPES),
        st.tuples(st.just('filled'), FILLED),
        st.tuples(st.just('order'), st.just('F')),
    ),
)


def changed(arrays, changes) -> dict[str, np.ndarray]:
    arrays = dict(arrays)
    for name, (kind, value) in changes:
        array = arrays[name]
        if kind == 'dtype':
            plain = array.dtype.kind in 'biuf' and value != 'i4,i4'
            array = array.astype(value) if plain else np.zeros(array.shape, value)
        elif kind == 'shape':
            array = np.resize(array, value)
        elif kind == 'order':
            array = np.asfortranarray(array)
        elif value == 'nan':
            array = np.full(array.shape, np.nan)
        else:
            byte = array.dtype == np.uint8 and value in range(256)
            array = np.full(array.shape, value, np.uint8 if byte else type(value))
        arrays[name] = array
    return arrays


@examples(50)
@given(st.lists(CHANGES, min_size=1, max_size=3))
def test_data_arrays(program, folders, changes):
    folder = folders()
    file = folder / 'mine.npz'
    with np.errstate(all='ignore'):
        file.write_bytes(npz(changed(arrays_of_data(), changes)))
    result = train_on(program, file, folder)
    assert_told_or_fine(result, str(file), 'data.', 'train.batch_size', 'eval.num_examples')


def test_the_order_and_byte_order_of_arrays_make_no_difference(program, tmp_path):
    changes = [
        ('image_train', ('order', 'F')), ('label_train', ('dtype', '>i4')),
        ('label_test', ('dtype', 'u1')),
    ]  # fmt: skip
    file = tmp_path / 'mine.npz'
    file.write_bytes(npz(changed(arrays_of_data(), changes)))
    assert train_on(program, file, tmp_path).code == GOT_THROUGH


def test_the_inputs_that_are_damaged_are_fine_before(program, tmp_path, run_folder):
    """Or the tests above would test nothing."""
    (tmp_path / 'mine.npz').write_bytes(npz(arrays_of_data()))
    assert train_on(program, tmp_path / 'mine.npz', tmp_path).code == GOT_THROUGH
    transfer_set(tmp_path / 'set' / 'blackbox.npz')
    fields = TINY | {'eval.blackbox_path': tmp_path / 'set' / 'blackbox.npz'}
    result = program.run(SINGLE, *overrides(fields), f'--workdir={tmp_path}/run')
    assert result.code == GOT_THROUGH, result
    ledger = run_folder / 'eval' / '40.npz'
    result = program.run('--mode=compare', f'--ledgers={ledger},{ledger}')
    assert result.code == 0, result
    assert 'pgd500' in result.stdout
    path = tmp_path / 'copy'
    shutil.copytree(run_folder, path)
    assert run_job(program, 'describe', path).code == GOT_THROUGH
    assert run_job(program, 'train', path).code == GOT_THROUGH
    assert run_job(program, 'report', path).code == 0
    page = (path / 'report' / 'report.html').read_text()
    for shown in ('figure_examples', 'figure4', 'Decision regions'):
        assert shown in page
    assert 'unfinished' not in page
    assert 'Left out' not in page
