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
from ml_collections import ConfigDict

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
        config=ConfigDict({'epsilon': 0.1}),
        network=None,
        variables=None,
        peer=torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 3)).eval(),
        images=rng.integers(0, 256, (5, 2, 2, 3), np.uint8),
        y=np.arange(5, dtype=np.int32) % 3,
        batch_size=2,
        title='',
    )


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
def test_foolboxs_adam_without_signs_is_ours(strength, run):
    linear = run.peer[1]
    weight, bias = (p.detach().numpy() for p in (linear.weight, linear.bias))
    # The peer flattens NCHW.
    flatten = lambda x: x.transpose(0, 3, 1, 2).reshape(len(x), -1)
    log_probs = lambda x: jax.nn.log_softmax(flatten(x) @ weight.T + bias)
    pgd = PGD(steps=3, step_size=0.03, start='none')
    threat, keys = ThreatModel('linf', 0.1), jax.random.split(jax.random.key(0), 5)
    ours = driver.last_iterate(pgd, log_probs, threat, keys, run.x, run.y)
    attack = strength.foolbox_attack(run, 'pgd', 'none', 3, 0.03, raw_gradient=True)
    np.testing.assert_allclose(ours, attack(run.x, run.y, run.x), atol=1e-5)


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('more, passes', [(-20, True), (5, True), (6, False)])
def test_half_a_point_is_allowed_and_no_more(strength, more, passes):
    stands = lambda count: strength.Judged(*[np.arange(1000) < count] * 2)
    judged = {strength.OURS: stands(500 + more), strength.FOOLBOX: stands(510)}
    judged[strength.TORCHATTACKS] = stands(500)
    assert strength.points(judged) == pytest.approx(more / 10)
    assert strength.passes(judged) == passes


@pytest.mark.filterwarnings('ignore')
def test_what_falls_with_every_seed_is_told_from_what_falls_with_some(strength):
    pytest.importorskip('pyautoattack')
    parity = importlib.import_module('benchmarks.autoattack_parity')
    results = lambda ours, theirs: {
        'ensadv': {'felled_by': ours, 'seconds': [2.0]},
        'reference': {'felled_by': theirs, 'seconds': [4.0]},
    }
    seeds = [results([0, 1, -1, -1], [0, 1, 1, -1]), results([0, -1, -1, -1], [0, 1, 1, -1])]
    lines, worst = parity.report(['square'], seeds)
    assert [cell.strip() for cell in lines[3].split('|')[1:-1]] == [
        'after square', '62.50 (50.00 to 75.00)', '25.00 (25.00 to 25.00)', '2, 0', '0.50',
        '1, 3', '2, 3', '2.0', '4.0',
    ]  # fmt: skip
    assert worst == 37.5


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
    return {'seconds': {names[side]: times for side, times in seconds.items()}, 'found': FOUND}


@pytest.mark.parametrize(
    'peers, ratio',
    [
        # The faster of the two is the peer, by medians and not by means or the least.
        ({'eager': [1.0, 1.0, 1.0], 'compiled': [3.0, 2.0, 2.0]}, '0.5'),
        ({'eager': [6.0, 6.0, 6.0], 'compiled': [0.1, 4.0, 9.0]}, '2'),
        ({'eager': [2.0, 2.0, 2.0]}, '1'),  # where nothing compiles
    ],
)
def test_a_step_is_compared_with_the_faster_peer(tables, peers, ratio):
    result = step_result(ours=[0.5, 2.0, 50.0], **peers)
    (row,) = cells(tables.steps_table([(NETWORK, result)]))
    assert row['PyTorch at its best / ensadv'] == ratio
    assert row['ensadv, s'] == '2.000 (0.500..50.000)'
    assert (row['compiled, s'] == '-') == ('compiled' not in peers)


def test_a_row_without_memory_says_so_and_the_others_stay(tables):
    rows = [({**NETWORK, 'batch': 8}, None)]
    rows.append((NETWORK, step_result(ours=[1.0], eager=[2.0])))
    first, second = cells(tables.steps_table(rows))
    assert (first['batch'], first['ensadv, s']) == ('8', 'out of memory')
    assert (second['batch'], second['PyTorch eager, s']) == ('64', '2.000')


def test_differences_are_the_largest_of_all_rows(tables):
    found = tables.largest([*FOUND, ['weights', 5e-6, 1e-4], ['loss', 0.1, 1.0]])
    assert found == {'weights': (5e-6, 1e-4), 'loss': (0.1, 1.0)}


@pytest.mark.parametrize('ours, shown', [(0.505, '4'), (0.51, 'ensadv is weaker'), (0.4, '4')])
def test_speed_does_not_count_where_the_attack_is_weaker(tables, ours, shown):
    result = {
        'title': 'a network', 'n': 200, 'batch': 50, 'epsilon': 0.1, 'step_size': 0.05,
        'difference': 0.0,
        'sides': {
            'ensadv': {'seconds': [1.0], 'accuracy': ours},
            'foolbox': {'seconds': [4.0], 'accuracy': 0.5},
        },
    }  # fmt: skip
    mine, peer = cells(tables.attacks_table([('pgd500', result)]))
    assert (mine['by'], mine['it / ensadv']) == ('ensadv', '-')
    assert (peer['by'], peer['it / ensadv']) == ('foolbox', shown)


def test_memory_is_the_steps_own(tables):
    mib = 2**20
    sides = {
        'PyTorch': {'peak': 500 * mib, 'level': 300 * mib, 'seconds': [2.0]},
        'ensadv': {'peak': 900 * mib, 'level': 800 * mib, 'seconds': [1.0]},
        'ensadv, remat': None,
    }
    rows = cells(tables.memory_table([(NETWORK, sides)]))
    assert [row['peak of a step, MiB'] for row in rows] == ['200', '100', 'out of memory']
    assert [row['s per step'] for row in rows] == ['2.000', '1.000', '-']


def test_convolutions_are_compared_where_both_have_memory(tables):
    timed = lambda seconds: {'seconds': [seconds]}
    rows = [(NETWORK, [timed(3.0), timed(2.0)]), (NETWORK, [None, timed(2.0)])]
    both, one = cells(tables.convolutions_table(rows))
    assert both['grouped / separate'] == '1.5'
    assert (one['grouped, s'], one['separate, s']) == ('out of memory', '2.000')
    assert one['grouped / separate'] == '-'


@pytest.mark.parametrize('code, ends_with', [(1, 1), (2, 2), (7, 1), (-9, 1)])
def test_a_failed_measurement_ends_the_program(monkeypatch, code, ends_with):
    speed = importlib.import_module('benchmarks.speed')
    done = subprocess.CompletedProcess([], code, stdout='')
    monkeypatch.setattr(speed.subprocess, 'run', lambda *_, **__: done)
    with pytest.raises(SystemExit) as exit_info:
        speed.measure(speed.Plan(), 'step')
    assert exit_info.value.code == ends_with


def test_what_differs_is_not_timed(workers, monkeypatch):
    step = workers.adversarial_step
    monkeypatch.setattr(step, 'Ours', lambda config: None)
    monkeypatch.setattr(step, 'compare', lambda *_: [('weights', float('nan'), 1e-4)])
    monkeypatch.setattr(step, 'measure', lambda *_: pytest.fail('was timed'))
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
    seconds, found = workers.adversarial_step.measure(ours, peers, 3, 2)
    assert log[-9:] == [('ensadv', 2), ('a', 2), ('b', 2)] * 3
    assert seconds == {'ensadv': [1.0] * 3, 'a': [1.0] * 3, 'b': [1.0] * 3}
    assert len(found) == 4


def test_a_peer_that_does_not_compile_is_left_out(workers, capsys):
    log = []
    peers = {'a': Side(log, 'a'), 'b': Side(log, 'b', compiled=True, fails=ValueError('no g++'))}
    seconds, _ = workers.adversarial_step.measure(Side(log, 'ensadv'), peers, 1, 1)
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


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('kind', ['pgd', 'ifgsm'])
def test_the_libraries_verdicts_are_those_of_the_images_in_order(workers, run, kind, monkeypatch):
    theirs = lambda step_size: workers.speed_attacks._theirs(
        run, {'attack': kind, 'step_size': step_size, 'steps': 3}
    )
    monkeypatch.setattr(run, 'network', ensemble.Network(None, 'probs', None))
    torch = importlib.import_module('torch')
    with torch.no_grad():
        clean = run.peer(torch.tensor(run.x.transpose(0, 3, 1, 2))).argmax(1).numpy() == run.y
    attacks = theirs(0.05)
    assert list(attacks) == ['foolbox', 'torchattacks'][: 1 + (kind == 'ifgsm')]
    for library, attack in theirs(0.0).items():
        # Steps of no length leave the images as they are.
        np.testing.assert_array_equal(attack(), clean)
        assert not np.any(attacks[library]() & ~clean)


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
