"""The benchmarks' parts. What compares with PyTorch is skipped where it is not installed."""

import importlib
import itertools
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT, tiny_config

from ensadv import build
from ensadv.attacks import driver
from ensadv.attacks.first_order import PGD
from ensadv.attacks.threat_model import ThreatModel
from ensadv.models import ensemble

DESCRIPTION = {'num_classes': 10, 'mean': (0.3,), 'std': (0.4,)}


@pytest.fixture
def strength():
    """benchmarks/attack_strength.py, as a module."""
    for name in ('torch', 'eagerpy', 'foolbox', 'torchattacks'):
        pytest.importorskip(name)
    return importlib.import_module('benchmarks.attack_strength')


@pytest.fixture
def run(strength):
    """Five noisy images, and a linear network in PyTorch."""
    torch = importlib.import_module('torch')
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    return strength.Run(
        log_probs=None,
        variables=None,
        peer=torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 3)).eval(),
        x=rng.random((5, 2, 2, 3), np.float32),
        y=np.arange(5, dtype=np.int32) % 3,
        epsilon=0.1,
        batch_size=2,
        title='',
    )


def test_a_missing_library_is_one_line():
    program = (
        "import runpy, sys; sys.modules['eagerpy'] = None; "
        "runpy.run_path('benchmarks/attack_strength.py', run_name='__main__')"
    )
    done = subprocess.run(
        [sys.executable, '-c', program], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr.count('\n') == 1
    assert 'pip install -r requirements-benchmark.txt' in done.stderr


@pytest.mark.parametrize('how', ['probs', 'logits'])
def test_the_peer_computes_what_our_ensemble_does(how):
    torch = pytest.importorskip('torch')
    peer_pytorch = importlib.import_module('benchmarks.peer_pytorch')
    rng = np.random.default_rng(0)
    model = build.model(tiny_config(), DESCRIPTION, dtype='float32')
    shapes = jax.eval_shape(lambda: ensemble.init(model, jax.random.key(0), 2, (8, 8, 1)))
    # Nothing is zero or one, so that nothing can be forgotten or mixed up.
    weight = lambda leaf: 0.3 * rng.standard_normal(leaf.shape, np.float32)
    average = lambda leaf: 0.5 + rng.random(leaf.shape, np.float32)
    variables = {
        'params': jax.tree.map(weight, shapes['params']),
        'batch_stats': jax.tree.map(average, shapes['batch_stats']),
    }
    x = rng.random((3, 8, 8, 1), np.float32)
    ours = jax.jit(lambda v, x: ensemble.combine(ensemble.apply(model, v, x), how))(variables, x)
    peer = peer_pytorch.Ensemble(10, 1, 2, combine=how, **DESCRIPTION).eval()
    peer_pytorch.load(peer, variables['params'], variables['batch_stats'])
    with torch.no_grad():
        theirs = peer(peer_pytorch.images(x)).numpy()
    np.testing.assert_allclose(ours, theirs, atol=1e-4)
    assert np.ptp(theirs) > 0.1


@pytest.mark.filterwarnings('ignore')  # of the libraries, as they are imported
@pytest.mark.parametrize('library', ['foolbox', 'foolbox, Adam', 'torchattacks'])
@pytest.mark.parametrize('start', ['none', 'uniform'])
def test_the_libraries_start_where_they_are_told(strength, run, library, start):
    moved = np.clip(run.x + 0.09, 0, 1).astype(np.float32)
    if library == 'torchattacks':
        attack = strength.torchattacks_attack(run, start, 1, 0.0)
    else:
        kind = 'pgd' if 'Adam' in library else 'ifgsm'
        attack = strength.foolbox_attack(run, kind, start, 1, 0.0)
    x_adv = strength.in_batches(attack, run.batch_size, run.x, run.y, moved)
    np.testing.assert_allclose(x_adv, moved if start == 'uniform' else run.x, atol=1e-6)


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('raw', [False, True])
def test_foolboxs_adam_is_ours_on_signs_and_without_them_ours(strength, run, raw):
    linear = run.peer[1]
    weight, bias = (p.detach().numpy() for p in (linear.weight, linear.bias))
    # The peer flattens NCHW.
    flatten = lambda x: x.transpose(0, 3, 1, 2).reshape(len(x), -1)
    log_probs = lambda x: jax.nn.log_softmax(flatten(x) @ weight.T + bias)
    pgd = (PGD if raw else strength.AdamOfSigns)(steps=3, step_size=0.03, start='none')
    threat, keys = ThreatModel('linf', run.epsilon), jax.random.split(jax.random.key(0), 5)
    ours = driver.last_iterate(pgd, log_probs, threat, keys, run.x, run.y)
    attack = strength.foolbox_attack(run, 'pgd', 'none', 3, 0.03, raw_gradient=raw)
    np.testing.assert_allclose(ours, attack(run.x, run.y, run.x), atol=1e-5)


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('more, passes', [(-20, True), (5, True), (6, False)])
def test_half_a_point_is_allowed_and_no_more(strength, more, passes):
    stands = lambda count: strength.Judged(*[np.arange(1000) < count] * 2)
    judged = {strength.OURS: stands(500 + more), strength.FOOLBOX: stands(510)}
    judged[strength.TORCHATTACKS] = stands(500)
    judged[strength.OURS_SIGNS] = stands(400)  # ours too, so it does not count as theirs
    assert strength.points(judged) == pytest.approx(more / 10)
    assert strength.passes(judged) == passes


@pytest.fixture
def tables():
    return importlib.import_module('benchmarks.speed_tables')


@pytest.fixture
def workers():
    """benchmarks/speed_workers.py, as a module."""
    for name in ('torch', 'foolbox', 'torchattacks'):
        pytest.importorskip(name)
    return importlib.import_module('benchmarks.speed_workers')


def cells(lines):
    """Returns the first table among a report's lines: [{column: cell}, ...]."""
    first = next(i for i, line in enumerate(lines) if line.startswith('|'))
    rows = []
    for line in lines[first:]:
        if not line.startswith('|'):
            break
        rows.append([cell.strip() for cell in line.strip('|').split('|')])
    columns, _, *rows = rows
    assert all(len(row) == len(columns) for row in rows)
    return [dict(zip(columns, row, strict=True)) for row in rows]


NETWORK = {'depth': 10, 'width': 2, 'members': 2, 'batch': 64, 'attack_steps': 7}
FOUND = [['weights', 1e-6, 1e-4]]


def step_result(**seconds):
    names = {'ours': 'ensadv', 'eager': 'PyTorch', 'compiled': 'PyTorch, torch.compile'}
    seconds = {names[side]: times for side, times in seconds.items()}
    once = dict.fromkeys(seconds, 1.0)
    return {'seconds': seconds, 'first': once, 'cores': once, 'found': FOUND}


@pytest.mark.parametrize(
    'peers, ratio, verdict',
    [
        # The faster of the two is the peer, by medians and not by means or the least.
        ({'eager': [1.0, 1.0, 1.0], 'compiled': [3.0, 2.0, 2.0]}, '0.5', 'not met'),
        ({'eager': [6.0, 6.0, 6.0], 'compiled': [0.1, 4.0, 9.0]}, '2', 'met'),
        ({'eager': [2.0, 2.0, 2.0]}, '1', 'met'),  # where nothing compiles
        ({'eager': [1.99, 1.99, 1.99]}, '0.995', 'not met'),
    ],
)
def test_a_step_is_judged_by_the_faster_peer(tables, peers, ratio, verdict):
    result = step_result(ours=[0.5, 2.0, 50.0], **peers)
    (row,) = cells(tables.steps_table([(NETWORK, result)], 1.0))
    assert row['PyTorch at its best / ensadv'] == ratio
    assert row['verdict'] == verdict
    assert row['ensadv, s'] == '2.000 (0.500..50.000)'
    assert (row['compiled, s'] == '-') == ('compiled' not in peers)


def test_a_row_without_memory_says_whose_and_the_others_stay(tables):
    rows = [({**NETWORK, 'batch': 8}, {'out_of_memory': 'PyTorch'})]
    rows.append((NETWORK, step_result(ours=[1.0], eager=[2.0])))
    first, second = cells(tables.steps_table(rows, 1.0))
    assert (first['batch'], first['ensadv, s']) == ('8', 'out of memory: PyTorch')
    assert (second['batch'], second['verdict']) == ('64', 'met')


def test_differences_are_the_largest_of_all_rows(tables):
    found = tables.largest([*FOUND, ['weights', 5e-6, 1e-4], ['loss', 0.1, 1.0]])
    assert found == {'weights': (5e-6, 1e-4), 'loss': (0.1, 1.0)}


def attack_result(ours, theirs):
    side = lambda seconds, accuracy: {
        'seconds': seconds, 'accuracy': accuracy, 'first': 0.0, 'batch': 50, 'compiled': False
    }  # fmt: skip
    return {
        'title': 'a network', 'n': 200, 'epsilon': 0.1, 'step_size': 0.05, 'difference': 0.0,
        'sides': {'ensadv': side([1.0], ours), 'foolbox': side([4.0], theirs)},
    }  # fmt: skip


@pytest.mark.parametrize(
    'ours, theirs, verdict, same',
    [
        (0.505, 0.5, 'met', 'same (+0.50 points)'),
        (0.51, 0.5, 'not met: weaker', 'NOT the same: ensadv leaves 1.00 points more'),
        (0.4, 0.5, 'met', 'ensadv stronger by 10.00 points'),
    ],
)
def test_speed_does_not_count_where_the_attack_is_weaker(tables, ours, theirs, verdict, same):
    lines = tables.attacks_table([('pgd500', 3.0, attack_result(ours, theirs))])
    mine, peer = cells(lines)
    assert (mine['by'], mine['verdict'], peer['by']) == ('ensadv', '-', 'foolbox')
    assert (peer['verdict'], peer['same verdict']) == (verdict, same)
    assert peer['it / ensadv'] == '4'


def test_members_may_cost_their_number_times_a_little(tables):
    seconds = [[1.0], [2.1], [4.3]]
    rows = cells(tables.scaling_table([('members', (1, 2, 4), seconds, 1.05)]))
    assert [row['times the first'] for row in rows] == ['1', '2.1', '4.3']
    assert [row['verdict'] for row in rows] == ['-', 'met', 'not met']


def test_devices_share_the_cores_so_time_is_not_divided_by_them(tables):
    rows = cells(tables.scaling_table([('devices', (1, 2), [[1.0], [1.1]], None)]))
    assert [row['per unit'] for row in rows] == ['-', '-']


def main_result(per_step, first, anew, new_files, gap=0.02):
    # The first call compiles; of what follows, `gap` seconds are between calls of one second.
    calls = [[0.0, 9.0], [9.0, 10.0], [10.0 + gap, 11.0 + gap]]
    run = {'requests': 9, 'hits': 4, 'new_files': ['a'], 'calls': calls}
    run |= {'seconds_per_step': per_step, 'first_metrics': first}
    again = run | {'hits': 9 - anew, 'new_files': new_files, 'first_metrics': 1.0}
    bare = [[0.9, 0.9, 7.0], [1.1]]
    return {'network': NETWORK, 'log_every': 2, 'bare': bare, 'runs': [run, again]}


@pytest.mark.parametrize(
    'result, verdicts',
    [
        (main_result(1.02, 60.0, 0, []), ['met', 'met', 'met', 'met']),
        (main_result(1.04, 60.5, 1, [], 0.07), ['not met', 'not met', 'not met', 'not met']),
        # What is in the cache is the witness, whatever JAX says.
        (main_result(0.5, 9.0, 0, ['new']), ['met', 'met', 'met', 'not met']),
    ],
)
def test_main_is_judged_by_time_start_and_what_it_compiles_again(tables, result, verdicts):
    rows = cells(tables.main_table(result))
    assert rows[3]['measured'] in ('1.00, 1.00', '3.50, 3.50')
    assert [row['verdict'] for row in rows if row['target'] != '-'] == verdicts


def test_memory_is_the_steps_own(tables):
    mib = 2**20
    sides = {
        'PyTorch': {'peak': 500 * mib, 'level': 300 * mib},
        'ensadv': {'peak': 900 * mib, 'level': 800 * mib},
        'ensadv, remat': {'out_of_memory': 'ensadv'},
    }
    rows = cells(tables.memory_table([(NETWORK, sides, {'ensadv': [1.0]})]))
    assert [row['step at its peak, MiB'] for row in rows] == ['200', '100', 'out of memory: ensadv']
    assert [row["PyTorch's peak / it"] for row in rows] == ['1', '2', '-']
    assert [row['s per step'] for row in rows] == ['-', '1.000', '-']


@pytest.mark.parametrize(
    'line, step',
    [
        ('I0101 10:00:00.1 7 logging_writer.py:48] [20] clean_loss=1.0, loss=2.3', 20),
        ('I0101 10:00:00.1 7 metrics.py:60] [4] loss=2.3, learning_rate=0.1', 4),
        ('I0101 10:00:00.1 7 logging_writer.py:48] [20] steps_per_sec=1.5', None),
        ("I0101 10:00:00.1 7 metrics.py:63] [Hyperparameters] {'loss': 1}", None),
    ],
)
def test_lines_with_metrics_are_found_in_the_log(line, step):
    assert importlib.import_module('benchmarks.speed_children').step_of(line) == step


def test_programs_kept_are_counted_without_their_times_of_use(tmp_path):
    speed = importlib.import_module('benchmarks.speed')
    for name in ('x86/jit_a-1-cache', 'x86/jit_a-1-atime'):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.touch()
    assert speed.kept(tmp_path) == {'jit_a-1-cache'}
    assert speed.kept(tmp_path / 'missing') == set()


@pytest.mark.parametrize('code, ends_with', [(1, 1), (2, 2), (7, 1), (-9, 1)])
def test_a_failed_measurement_ends_the_program(monkeypatch, code, ends_with):
    children = importlib.import_module('benchmarks.speed_children')
    done = subprocess.CompletedProcess([], code, stdout='')
    monkeypatch.setattr(children.subprocess, 'run', lambda *_, **__: done)
    with pytest.raises(SystemExit) as exit_info:
        children.measure('cpu', 'step')
    assert exit_info.value.code == ends_with
    assert children.measure('cpu', 'step', may_fail=True) is None


def test_what_differs_is_not_timed(workers, monkeypatch):
    step = workers.adversarial_step
    monkeypatch.setattr(step, 'Ours', lambda config: None)
    monkeypatch.setattr(step, 'compare', lambda *_: [('weights', float('nan'), 1e-4)])
    monkeypatch.setattr(step, 'measure', lambda *_: pytest.fail('was timed'))
    monkeypatch.setattr(workers, 'set_up', lambda device: None)
    with pytest.raises(SystemExit, match='do not compute the same: weights'):
        workers.step(NETWORK, 1)


class Side:
    """A side of a step that computes nothing and logs (name, number of steps)."""

    def __init__(self, log, name, loss=1.0, compiled=False, fails=None):
        self._log, self._name, self._loss, self._fails = log, name, loss, fails
        self.compiled = compiled
        self.config = tiny_config(model__dtype='float32')

    def noise(self):
        return None

    def step(self, num_steps=1, start=None):
        if self._fails:
            raise self._fails
        self._log.append((self._name, num_steps))
        return {'clean_loss': self._loss, 'adversarial_loss': self._loss}


def test_steps_are_made_in_turns_and_timed_each(workers, monkeypatch):
    log = []
    # Every step takes a second.
    clock = lambda: float(sum(steps for _, steps in log))
    monkeypatch.setattr(workers.adversarial_step.time, 'perf_counter', clock)
    peers = {'a': Side(log, 'a'), 'b': Side(log, 'b', compiled=True)}
    ours = Side(log, 'ensadv')
    _, seconds, _, found = workers.adversarial_step.measure(ours, peers, 3, 2)
    assert log[-9:] == [('ensadv', 2), ('a', 2), ('b', 2)] * 3
    assert seconds == {'ensadv': [1.0] * 3, 'a': [1.0] * 3, 'b': [1.0] * 3}
    assert len(found) == 4


def test_a_peer_that_does_not_compile_is_left_out(workers, capsys):
    log = []
    peers = {'a': Side(log, 'a'), 'b': Side(log, 'b', compiled=True, fails=ValueError('no g++'))}
    _, seconds, _, _ = workers.adversarial_step.measure(Side(log, 'ensadv'), peers, 1, 1)
    assert list(seconds) == ['ensadv', 'a']
    assert 'no g++' in capsys.readouterr().err


def test_an_eager_peer_that_fails_and_a_full_memory_are_told(workers):
    measure = workers.adversarial_step.measure
    full = RuntimeError('RESOURCE_EXHAUSTED: Out of memory')
    for side in (Side([], 'a', fails=ValueError('no')), Side([], 'b', compiled=True, fails=full)):
        with pytest.raises((ValueError, RuntimeError), match=r'no|memory'):
            measure(Side([], 'ensadv'), {'a': side}, 1, 1)


def test_a_timed_step_with_another_loss_ends_the_program(workers):
    with pytest.raises(SystemExit, match='do not compute the same: clean loss'):
        workers.adversarial_step.measure(Side([], 'ensadv'), {'a': Side([], 'a', loss=2.0)}, 1, 1)


@pytest.mark.parametrize(
    'n, sizes', [(200, [200, 100, 50]), (2000, [500, 250, 125]), (3, [3, 2, 1]), (1, [1])]
)
def test_batch_sizes_are_tried_from_the_largest_on(workers, n, sizes):
    assert workers.speed_attacks.batch_sizes(n) == sizes


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize(
    'library, kind', [('foolbox', 'pgd'), ('foolbox', 'ifgsm'), ('torchattacks', 'ifgsm')]
)
def test_the_libraries_verdicts_are_those_of_the_images_in_order(workers, run, library, kind):
    settings = {'attack': kind, 'step_size': 0.05, 'steps': 3}
    side = workers.speed_attacks._TheirAttack(run, library, settings, False, 'cpu')
    side.choose([2])
    side()
    whole = side._verdicts(run.peer, 3, 5, 5)
    np.testing.assert_array_equal(side.correct, whole)
    # An attack of no steps leaves the images as they are.
    torch = importlib.import_module('torch')
    clean = run.peer(torch.tensor(run.x.transpose(0, 3, 1, 2))).argmax(1).numpy() == run.y
    np.testing.assert_array_equal(side._verdicts(run.peer, 0, 5, 2), clean)


def test_the_time_to_an_accuracy_is_that_of_the_first_snapshot_with_it():
    gpu = importlib.import_module('benchmarks.speed_gpu')
    evaluation = lambda pgd20: {
        'attacks': [{'name': 'clean', 'accuracy': 0.9}, {'name': 'pgd20', 'accuracy': pgd20}]
    }
    evaluations = {20: evaluation(0.46), 10: evaluation(0.44), 30: evaluation(0.5)}
    times = {10: 100.0, 20: 200.0, 30: 300.0}
    lines = gpu.training_table(gpu.Plan(), evaluations, times, 10)
    assert 'reached after 200 s, at step 20' in '\n'.join(lines)
    rows = cells(lines)
    assert [(row['epoch'], row['s'], row['PGD20, %']) for row in rows] == [
        ('1', '100', '44.0'), ('2', '200', '46.0'), ('3', '300', '50.0')
    ]  # fmt: skip
    lines = gpu.training_table(gpu.Plan(), {10: evaluation(0.44)}, times, 10)
    assert 'not reached: at best 44.0 %' in '\n'.join(lines)


@pytest.mark.parametrize(
    'args, words',
    [(['--workdir=/nowhere'], 'no run is here'), (['--tables', '6'], 'invalid choice')],
)
def test_a_mistake_on_the_command_line_is_told_before_anything_is_measured(args, words):
    for name in ('torch', 'foolbox', 'torchattacks'):
        pytest.importorskip(name)
    done = subprocess.run(
        [sys.executable, 'benchmarks/speed.py', *args],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert words in done.stderr.splitlines()[-1]
    assert not done.stdout


def test_layers_are_the_convolutions_of_the_network():
    pytest.importorskip('torch')
    layers = importlib.import_module('benchmarks.speed_layers').layers(16, 2)
    images = {'image_shape': [32, 32, 3], 'num_classes': 10, 'mean': [0.5] * 3, 'std': [0.2] * 3}
    network = build.network(tiny_config(model__depth=16, model__width=2), images)
    weights = network.variables['params']
    found = sorted(leaf.shape[1:] for leaf in jax.tree.leaves(weights) if leaf.ndim == 5)
    expected = [((side, side, *io),) * n for (_, *io, side, _), n in layers.items()]
    assert sorted(shape for shapes in expected for shape in shapes) == found


def test_operations_of_the_convolutions_in_a_step(monkeypatch):
    pytest.importorskip('torch')
    layers = importlib.import_module('benchmarks.speed_layers')
    first = (32, 3, 16, 3, 1)
    assert layers.operations(first, 2) == 2 * 2 * 32 * 32 * 9 * 3 * 16
    assert layers.operations((32, 16, 32, 1, 2), 1) == 2 * 16 * 16 * 16 * 32
    monkeypatch.setattr(layers, 'layers', lambda depth, width: {first: 1, (8, 4, 4, 1, 1): 3})
    # 9 times forward and 2 the weights' gradient; the input's 7 times, of what is no image 9.
    other = 2 * 8 * 8 * 4 * 4
    expected = (9 + 7 + 2) * layers.operations(first, 1) + 3 * (9 + 9 + 2) * other
    assert layers.operations_in_a_step(10, 1, 1) == expected


@pytest.mark.filterwarnings('ignore')  # of the libraries, as they are imported
@pytest.mark.usefixtures('workers')
def test_operations_of_the_convolutions_in_an_attack(monkeypatch):
    profile = importlib.import_module('benchmarks.speed_profile_attack')
    layers = {(32, 3, 16, 3, 1): 1, (8, 4, 4, 1, 1): 3}
    monkeypatch.setattr(profile.speed_layers, 'layers', lambda depth, width: layers)
    # Of two members and 5 images: 3 times forward, 2 times backward.
    one_pass = 2 * 32 * 32 * 9 * 3 * 16 + 3 * 2 * 8 * 8 * 4 * 4
    assert profile.operations(10, 1, members=2, n=5, steps=2) == 2 * 5 * (3 + 2) * one_pass


@pytest.mark.filterwarnings('ignore')
@pytest.mark.usefixtures('workers')
def test_a_profile_says_what_the_convolutions_and_their_waits_are():
    profile = importlib.import_module('benchmarks.speed_profile')
    product = ['A B', '300', '350']
    found = {'ensadv': {profile.REST: 1.5}, 'other': {profile.REST: 2.0}}
    lines = profile.describe(
        found,
        {'ensadv': 0.5, 'other': 2.0},
        'attack',
        1e11,
        product,
        (1000, 60e-6, 50e-6, 40e-6),
    )
    assert f'| {profile.REST} | 1.500 | 2.000 |' in lines
    assert '| seconds per attack | 0.500 | 2.000 |' in lines
    assert '| GFLOP/s | 200 | 50 |' in lines
    assert 'are 100 GFLOP. A B: 300 GFLOP/s by XLA, 350 by PyTorch.' in lines[-3]
    assert '1000 convolutions of oneDNN' in lines[-1]
    assert 'in all 150 ms' in lines[-1]
    without = profile.describe(found, {'ensadv': 1.0}, 'step', 1e11, product, None)
    assert len(without) == len(lines) - 2


@pytest.mark.filterwarnings('ignore')  # of the libraries, as they are imported
@pytest.mark.usefixtures('workers')
def test_samples_are_counted_by_kind_of_code():
    profile = importlib.import_module('benchmarks.speed_profile')
    report = """
# Overhead  Shared Object       Symbol
    40.00%  [JIT] tid 14779     [.] jit_avx512_core_gemm_f32_kern
    20.00%  libjax_common.so    [.] Eigen::internal::gemm_pack_colmajor_block<float, long, a::b>
    10.00%  [kernel.kallsyms]   [k] clear_page_erms
    15.50%  [JIT] tid 14779     [.] 0x00007f15ff377113
     4.50%  [JIT] tid 14779     [.] 0x00007f15ff377114
     2.00%  libjax_common.so    [.] Eigen::ThreadPoolTempl<tsl::thread::EigenEnvironment>::Steal
"""
    shares = profile.shares(report)
    assert sum(shares.values()) == pytest.approx(0.92)
    assert {kind: round(share, 3) for kind, share in shares.items()} == {
        'matrix products and convolutions': 0.4,
        'packing of matrices': 0.2,
        'kernel of the operating system': 0.1,
        profile.REST: 0.2,
        'threads that look for work': 0.02,
    }


@pytest.mark.parametrize(
    'distances, expected', [((90, 120), 'near'), ((260, 300), 'far'), ((90, 300), None)]
)
def test_turns_count_where_the_cores_stayed(distances, expected):
    assert importlib.import_module('benchmarks.core_placement').placement(distances) == expected


def test_full_queue_counts_what_is_wrong(monkeypatch):
    full_queue = importlib.import_module('benchmarks.full_queue')
    images = [jnp.full((1, 4, 4, 2), i, jnp.float32) for i in range(12)]
    monkeypatch.setattr(full_queue, '_flood', lambda: (jnp.ones((3, 3, 2, 2)), images))
    calls = itertools.count()

    def right_at_first(a, b):
        off = lambda: np.float32(next(calls) > 0)
        return a + b + jax.pure_callback(off, jax.ShapeDtypeStruct((), jnp.float32))

    shapes = ((3,), (3,))
    assert full_queue._wrong(jnp.add, shapes, 2) == (0, 0)
    wrong, flood = full_queue._wrong(right_at_first, shapes, 2)
    assert wrong > 0
    assert flood == 0


def test_operations_of_full_queue():
    operations = importlib.import_module('benchmarks.full_queue')._operations()
    ours = {name for name in operations if name.startswith("ensadv's")}
    assert len(ours) > 3
    for operation, shapes in operations.values():
        jax.eval_shape(operation, *[jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes])
