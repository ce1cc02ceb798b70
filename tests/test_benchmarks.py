"""The benchmarks' parts. What compares with PyTorch is skipped where it is not installed."""

import importlib
import subprocess
import sys

import jax
import numpy as np
import optax
import pytest
from conftest import ROOT, tiny_config

from ensadv import attacks, build, ensemble

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
    adam = attacks.pgd(0.03) if raw else optax.chain(optax.scale_by_sign(), attacks.pgd(0.03))
    ours = attacks.attack(
        log_probs, jax.random.split(jax.random.key(0), 5), run.x, run.y, step=adam, num_steps=3,
        epsilon=run.epsilon, start_from='none',
    )  # fmt: skip
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
