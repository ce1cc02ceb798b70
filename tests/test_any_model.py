"""Models that are given as functions: known answers, resuming, mistakes, and their report."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT, run_main, tiny_config
from etils import epath
from report_runs import DIGITS, run_config, write_run

import ensadv
from ensadv import prng, python_files
from ensadv.errors import UserError
from ensadv.evaluation import any_model, evaluator
from ensadv.evaluation.result_files import ResultFiles
from ensadv.models import functions
from ensadv.report import computation, table1
from ensadv.report.collect import collect
from ensadv.storage import files
from ensadv.storage import workdir as workdir_lib

SHAPE = (6, 6, 1)
WEIGHTS = np.asarray(jax.random.normal(jax.random.key(0), (36, 3)))
# In the middle of the box, which so limits nothing.
IMAGES = np.random.default_rng(0).integers(64, 192, (40, *SHAPE), np.uint8)
EPSILON = 0.02
THREAT = ensadv.ThreatModel('linf', EPSILON)
DOC = (ROOT / 'docs' / 'any_model.md').read_text()


def linear(images):
    return (images.reshape(len(images), -1) - 0.5) @ WEIGHTS


LABELS = np.asarray(jnp.argmax(linear(IMAGES / np.float32(255)), axis=1))


def distances():
    """Of each image the exact least epsilon, in L-infinity, at which another class wins."""
    logits = (IMAGES.reshape(40, -1) / 255 - 0.5) @ WEIGHTS.astype(np.float64)
    found = np.full((40, 3), np.inf)
    for i, label in enumerate(LABELS):
        for other in {0, 1, 2} - {label}:
            slope = np.sum(np.abs(WEIGHTS[:, other] - WEIGHTS[:, label]))
            found[i, other] = (logits[i, label] - logits[i, other]) / slope
    return found.min(axis=1)


def test_an_attack_on_a_linear_model_finds_what_is_known_and_goes_on_after_a_kill(
    tmp_path, monkeypatch
):
    workdir, whole = tmp_path / 'killed', tmp_path / 'whole'
    evaluate = lambda path: ensadv.evaluate(
        linear, IMAGES, LABELS, THREAT, 'apgd_t12', workdir=path, batch_size=16, name='mine'
    )
    write, made = ResultFiles.write_stages, []

    def killed(self, step, unit, labels, verdicts):
        write(self, step, unit, labels, verdicts)
        made.append(verdicts.stages[-1]['name'])
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(ResultFiles, 'write_stages', killed)
        for _ in range(2):
            with pytest.raises(KeyboardInterrupt):
                evaluate(workdir)
    found, unbroken = evaluate(workdir), evaluate(whole)
    assert made == ['apgd_t 1', 'apgd_t 2']
    ledgers = [files.read_arrays(epath.Path(p) / 'eval' / '0.npz') for p in (workdir, whole)]
    assert ledgers[0].keys() == ledgers[1].keys()
    for key, array in ledgers[0].items():
        np.testing.assert_array_equal(array, ledgers[1][key])

    falls, exact = ~found.correct['apgd_t12'], distances()
    assert 0.2 < np.mean(exact <= EPSILON) < 0.8
    assert np.all(falls[exact <= 0.95 * EPSILON])
    assert not np.any(falls & (exact > 1.001 * EPSILON))
    assert found.accuracy == {'clean': 1.0, 'apgd_t12': pytest.approx(1 - np.mean(falls))}
    assert found.robust_accuracy == found.accuracy['apgd_t12']
    assert str(found) == str(unbroken)
    assert re.search(r'apgd_t12 +\d+\.\d\d %  \d+ of 40$', str(found))

    # What is there belongs to this model, by these names and data.
    other = {'name': 'mine', 'workdir': workdir, 'attacks': 'clean'}
    for predict, images, changes, reason in (
        (lambda x: 1.5 * linear(x), IMAGES, {}, 'predicts otherwise on the first 40 images'),
        (linear, IMAGES, {'name': 'other'}, 'system: mine -> other'),
        (linear, IMAGES, {'seed': 1}, 'seed: 0 -> 1'),
        (linear, IMAGES[::-1], {}, 'other data'),
    ):
        with pytest.raises(UserError, match=reason):
            ensadv.evaluate(predict, images, LABELS, THREAT, **other | changes)
    assert ensadv.evaluate(linear, IMAGES, LABELS, THREAT, **other).accuracy == found.accuracy


def test_floats_that_are_bytes_are_taken_and_the_floor_is_over_all_attacks():
    floats = IMAGES / np.float32(255)
    labels = np.where(np.arange(40) == 0, (LABELS + 1) % 3, LABELS)
    found = ensadv.evaluate(linear, floats, labels, THREAT, ['clean'])
    assert found.accuracy == {'clean': 39 / 40}
    assert found.workdir is None
    assert 'robust' not in str(found)  # nobody attacked
    # An image that stands where an attack found no gradient counts, if another one attacked it.
    margin = np.array([1.0, 1.0, -1.0, 1.0], np.float32)
    results = {key: {'name': f'pgd{key}', 'key': key, 'no_gradient': 0} for key in '12'}
    both = any_model.Evaluation(
        results | {'1': results['1'] | {'no_gradient': 1}},
        {'1': np.array([False, True, False, True]), '2': np.array([True, True])},
        {'1': margin, '2': np.ones(2, np.float32)},
        None,
    )
    assert both.robust.tolist() == [True, True]
    one = dataclasses.replace(both, margin={'1': margin, '2': np.array([1.0, -1.0])})
    assert one.robust.tolist() == [True, False]
    assert [line.split()[:2] for line in str(both).splitlines()[:4]] == [
        ['attack', 'accuracy'], ['robust', '100.00'], ['1', '50.00'], ['2', '100.00']
    ]  # fmt: skip
    assert '1: 1 images stand only because no gradient was found' in str(both)


def test_an_audit_is_of_the_same_model_and_images(monkeypatch):
    check = {'name': 'scale', 'verdict': 'failed', 'evidence': 'Too large.', 'remedy': 'Divide.'}
    asked = []

    def audit_network(config, path, network, variables, step, split, places):
        asked.append((config.audit.examples, len(split[0]), len(places)))
        logits = network.member_logits(variables, split[0] / np.float32(255))[0]
        np.testing.assert_allclose(logits, linear(IMAGES / np.float32(255)), atol=1e-5)
        return {'n': 7, 'checks': [check, check | {'name': 'steps', 'verdict': 'passed'}]}

    monkeypatch.setattr(any_model.audit_lib, 'audit_network', audit_network)
    found = ensadv.evaluate(linear, IMAGES, LABELS, THREAT, 'clean', audit=7)
    assert asked == [(7, 40, 40)]
    assert str(found).splitlines()[-2:] == [
        'audit of 7 images: failed: scale', '  scale: Too large. Divide.'
    ]  # fmt: skip


def refused(
    *, predict=linear, images=IMAGES, labels=LABELS, threat=THREAT, attacks='clean', **more
):
    with pytest.raises(UserError) as caught:
        ensadv.evaluate(predict, images, labels, threat, attacks, **more)
    assert '\n' not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    'given, reason',
    [
        ({'images': IMAGES + 0.0}, 'multiples of 1/255, found others, from 64 to 191'),
        ({'images': IMAGES / 256}, 'rounds pixels in'),
        ({'images': IMAGES.astype(int)}, 'images: expected uint8, found int64'),
        ({'images': IMAGES[0]}, r'expected uint8 \[n, H, W, C\], found uint8 \[6, 6, 1\]'),
        ({'labels': LABELS + 1}, r'labels: expected 0\.\.2, since the function gives 3 logits'),
        ({'labels': LABELS[:5]}, r'labels: expected integers \[40\]'),
        ({'labels': np.eye(3)[LABELS]}, 'labels: expected integers'),
        ({'threat': 8 / 255}, 'threat_model: expected one, as ensadv.ThreatModel'),
        ({'attacks': 'pgd'}, "attacks: unknown attack 'pgd'"),
        ({'attacks': 'pgd20(loss=margin)'}, 'has a name of its own'),
        ({'attacks': ['pgd5', 'pgd5']}, 'expected each once'),
        ({'seed': -1}, 'seed: expected a whole number'),
        ({'batch_size': 0}, 'batch_size: expected a whole number'),
        ({'predict': lambda x: x}, 'of B = 2 images found float32'),
        ({'predict': lambda x: (linear(x),)}, 'found tuple'),
        ({'predict': lambda x: linear(x)[:, :1]}, 'at least two'),
        ({'predict': lambda x: jax.nn.softmax(linear(x))}, 'returns probabilities'),
        ({'predict': lambda x: jnp.log(linear(x))}, 'returns NaN or infinity for'),
        ({'predict': lambda x: float(x[0])}, r'that jax\.jit takes.*; line \d+: '),
        ({'predict': lambda x, key: linear(x), 'attacks': 'pgd5'}, 'takes a key.*autoattack_rand'),
    ],
)  # fmt: skip
def test_what_cannot_be_meant_is_refused_with_one_line(given, reason):
    assert re.search(reason, refused(**given))


def test_weights_are_no_constants_of_the_programs():
    wide = jnp.asarray(np.tile(WEIGHTS, 20))
    model = functions.model(jax.jit(lambda x: x.reshape(len(x), -1) @ wide), SHAPE, name='f')
    assert [weight.shape for weight in model.weights] == [(36, 60)]
    assert (model.num_classes, model.is_random) == (60, False)
    x = jnp.ones((5, *SHAPE))
    program = jax.make_jaxpr(model.network.member_logits)(model.weights, x)
    assert all(jnp.size(const) < 100 for const in program.consts)
    given = model.network.member_logits([2 * model.weights[0]], x)
    np.testing.assert_allclose(given[0], 2 * x.reshape(5, -1) @ wide, rtol=1e-5)


def test_a_draw_is_the_images_own():
    predict = lambda images, key: linear(images) + jax.random.normal(key, (len(images), 3))
    x = jnp.asarray(IMAGES / np.float32(255))

    @jax.jit
    def drawn(x):
        network, other = (functions.model(predict, SHAPE, seed=s, name='f').network for s in (3, 4))
        one = lambda network: network.member_logits([], x)[0]
        return one(network), network.draws([], x, 3) - linear(x), one(other)

    together, draws, other = drawn(x)
    # The same in another place of the batch, among others.
    np.testing.assert_array_equal(together[7:], drawn(jnp.roll(x, -7, axis=0))[0][:33])
    noise = np.asarray(together - linear(x))
    assert len(np.unique(noise)) == noise.size
    assert abs(noise.mean()) < 0.3
    assert abs(noise.std() - 1) < 0.2
    everything = np.concatenate([np.asarray(draws).ravel(), noise.ravel()])
    assert len(np.unique(everything)) == everything.size
    assert np.all(np.asarray(other) != np.asarray(together))
    # One bit of one pixel makes another draw.
    some = np.array([x[0]] * 3 + [x[1]])
    some[1, 5, 5] += 1e-7
    some[2] = some[2].transpose(1, 0, 2)
    keys = jax.jit(jax.vmap(lambda image: prng.of_image(prng.key(0), image)))(some)
    assert len(np.unique(np.asarray(jax.random.key_data(keys)), axis=0)) == 4


def test_a_mean_over_draws_sees_what_one_draw_hides():
    """A linear model whose weights are drawn anew, around ones that are small beside the noise."""
    signal = np.where(np.arange(64) % 2, 1.0, -1.0).astype(np.float32)
    # The label's logit leads by 0.6 of what the exact attack on the mean takes away.
    lead = 0.6 * 64 * EPSILON

    def predict(images, key):
        weights = signal + 4 * jax.random.normal(key, (64,))
        score = (images.reshape(len(images), -1) - 128 / 255) @ weights
        return jnp.stack([lead + score, jnp.zeros_like(score)], axis=1)

    images, labels = np.full((30, 8, 8, 1), 128, np.uint8), np.zeros(30, np.int32)
    images[:, 0, 0, 0] += np.arange(30, dtype=np.uint8) % 4  # no two draw alike
    model = functions.model(predict, (8, 8, 1), name='f')
    standing = {}
    for draws in (1, 30):
        settings = {'attack': 'apgd', 'loss': 'cross_entropy', 'steps': 12, 'restarts': 1}
        stage = any_model.registry.Stage('apgd_ce', settings | {'draws': draws})
        found = evaluator.Evaluator(model.network, 30).staged_attack(
            [], {**THREAT.to_json(), 'seed': 0}, images, labels, 'rand', stages=[stage]
        )
        assert found.stages[0]['attacked'] == 30
        standing[draws] = np.mean(found.margin > 0)
    assert standing[1] > standing[30] + 0.3
    assert standing[30] < 0.4


@pytest.mark.parametrize(
    'content, path, reason',
    [
        ('', '{file}', r'expected FILE\.py:FUNCTION'),
        ('', '{file}x:predict', r'expected FILE\.py:FUNCTION'),
        ('', 'nowhere.py:predict', 'found no such file'),
        ('def predcit(x):\n    pass\n', '{file}:predict', "did you mean 'predcit'"),
        ('predict = 1\n', '{file}:predict', 'found no function predict in the file; it has none'),
        ('\nimport nothing_here\n', '{file}:predict', 'line 2: ModuleNotFoundError'),
        ('\n\nraise SystemExit(3)\n', '{file}:predict', 'line 3: SystemExit: 3'),
        ('x = (\n', '{file}:predict', 'SyntaxError'),
    ],
)
def test_a_file_without_a_model_is_refused(tmp_path, monkeypatch, content, path, reason):
    monkeypatch.syspath_prepend(tmp_path)
    file = tmp_path / 'my_model.py'
    file.write_text(content)
    with pytest.raises(UserError, match=reason):
        python_files.function(path.format(file=file))


def test_a_model_stands_in_the_report_beside_runs(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    file = tmp_path / 'my_model.py'
    (code,) = re.findall(r'^```python\n(# my_model\.py\n.*?)^```$', DOC, re.MULTILINE | re.DOTALL)
    file.write_text(code)
    given = [f'--model={file}:predict', '--config=configs/small.py',
             '--config.eval.attacks=clean', '--config.data.name=digits',
             '--config.eval.long_attacks=()', '--config.eval.num_examples=100',
             '--config.epsilon=0.15', '--config.eval.examples=0']  # fmt: skip
    mode, workdir = '--mode=evaluate', tmp_path / 'runs' / 'my_model'
    result = run_main(mode, f'--workdir={workdir}', *given, devices=2)
    assert (result.returncode, result.stdout.splitlines()[0]) == (
        0, 'step 0  n 100  clean 0.9300'
    ), result.stderr  # fmt: skip
    record = workdir_lib.read_record(epath.Path(workdir))
    assert 'train' not in record['config']
    run = run_config(eval__attacks=('clean',), eval__long_attacks=())
    write_run(
        tmp_path / 'runs' / 'run', run, {40: {'clean': 0.5}},
        dataset=DIGITS | {'fingerprint': record['dataset']['fingerprint']},
    )  # fmt: skip
    # Alone, too.
    (only,) = table1.tables(collect(epath.Path(workdir), ()))[0].table.rows
    assert only.cells[0] == 'my_model:predict'
    collection = collect(epath.Path(tmp_path / 'runs'), ())
    assert collection.apart == []
    rows = {row.cells[0]: row.cells for row in table1.tables(collection)[0].table.rows}
    assert rows['my_model:predict'] == ('my_model:predict', '-', '-', '93.0', '1')
    assert rows['SingleAdv'] == ('SingleAdv', '1', '1,000', '50.0', '1')
    assert computation.of_system(collection.systems['my_model:predict']).parameters is None

    # The workdir alone names the model, and its file has to be the same.
    config = tiny_config(data__name='digits')
    source = any_model.Source(*python_files.function(f'{file}:predict'))
    file.write_text(code + '\n')
    changed = any_model.Source(*python_files.function(f'{file}:predict'))
    assert changed.digest != source.digest
    config.system, config.epsilon, config.eval.num_examples = 'custom', 0.15, 100
    with pytest.raises(UserError, match='the file is another one now'):
        any_model.run(config, epath.Path(workdir), changed)
    with pytest.raises(UserError, match='belongs to the model predict'):
        workdir_lib.check_config(epath.Path(workdir), config)
    with pytest.raises(UserError, match='belongs to a run'):
        any_model.run(config, epath.Path(tmp_path / 'runs' / 'run'), source)
