"""Decision planes of networks: where the worst points are, what is predicted, and the job."""

import shutil

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import run_main, tiny_config
from etils import epath
from test_evaluator import RIPPLES, Ripples, bench_of, biases, network_of, ripples, settings_of

from ensadv import build, config_checks, losses, study
from ensadv.attacks.threat_model import ThreatModel
from ensadv.errors import ConfigError, UserError
from ensadv.evaluation import attack_settings, decision_planes, planes
from ensadv.evaluation.evaluator import Evaluator
from ensadv.models import ensemble
from ensadv.storage import checkpoints, files, plane_files
from ensadv.storage import workdir as workdir_lib

pytestmark = pytest.mark.usefixtures('small_network')

ASKED = {'planes__images': (7, 2), 'planes__attack': 'ifgsm2', 'planes__resolution': 12}


@pytest.mark.parametrize('name', ['ifgsm7', 'pgd7'])
def test_worst_points_are_where_evaluation_found_its_margins(name):
    images, labels = ripples(30)
    changes = RIPPLES | {'eval__pgd__restarts': 2, 'eval__ifgsm__schedule': 'cosine'}
    # Large steps, that leave the hills again: the last iterate is not the worst.
    changes |= {'epsilon': 0.05, 'eval__ifgsm__step_size': 0.1, 'eval__pgd__step_size': 0.1}
    settings = settings_of(name, **changes)
    bench, variables = bench_of(Ripples(), (4, 4, 1), 7)
    verdicts = bench.evaluate(variables, settings, images, labels, 'test')
    compiled = len(bench._compiled)
    x_adv = bench.points(variables, settings, images, labels, 'test').worst
    assert len(bench._compiled) == compiled
    margin = losses.margin(bench.log_probs(variables, x_adv, 'test'), labels)
    np.testing.assert_allclose(margin, verdicts.margin, atol=1e-5)
    assert np.sum(verdicts.last_margin > verdicts.margin + 1e-3) > 5
    assert np.abs(x_adv - images / np.float32(255)).max() <= 0.05 + 1e-6
    # Each is attacked from its own start, whoever else is.
    places = np.array([29, 3, 11])
    some = bench.points(variables, settings, images, labels, 'test', places=places).worst
    np.testing.assert_allclose(some, x_adv[places], atol=1e-5)


def test_a_clean_image_may_be_the_worst_point():
    class Fixed(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            del train
            biases(self)
            bias = self.param('bias', lambda _: jnp.array([0.0, 1.0]))
            return jnp.broadcast_to(bias, (len(x), 2))

    images = np.random.default_rng(0).integers(0, 256, (3, 4, 4, 1), np.uint8)
    network, variables = network_of(Fixed())
    x_adv = (
        Evaluator(network, 2)
        .points(variables, settings_of('ifgsm3'), images, np.zeros(3, np.int32), 'test')
        .worst
    )
    np.testing.assert_allclose(x_adv, images / np.float32(255), atol=1e-7)


def test_log_probs_are_the_networks_whatever_the_batches():
    network, variables = network_of(Ripples())
    x = np.random.default_rng(0).random((17, 4, 4, 1), np.float32)
    found = Evaluator(network, 5).log_probs(variables, x, 'test')
    np.testing.assert_allclose(found, network.log_probs(variables, x), atol=1e-5)


class Halves(nn.Module):
    """Class 1 where weights . x exceeds the offset, else class 0."""

    weights: tuple[float, ...]
    offset: float

    @nn.compact
    def __call__(self, x, train):
        del train
        biases(self)
        scale = self.param('scale', lambda _: jnp.array(1.0))
        z = scale * (x.reshape(len(x), -1) @ jnp.array(self.weights) - self.offset)
        return jnp.stack([-z, z], axis=-1)


def model_of(weights, offset):
    network, variables = network_of(Halves(tuple(weights), offset), (2, 2, 1), k=1)
    return decision_planes.Model('halves', Evaluator(network, 50), variables)


def test_a_linear_models_decisions_are_known_everywhere():
    # 0.2 from the box's wall to the right, and nowhere near another.
    images = np.full((2, 2, 2, 1), 128, np.uint8)
    images[:, 0, 0] = 204
    x = images / np.float32(255)
    right, up = np.eye(4, dtype=np.float32)[[0, 3]].reshape(2, 2, 2, 1)
    ends = ((0.1 * right, 0.1 * up), (0.1 * up, -0.1 * right))
    spanned = []
    for image, (first, second) in zip(x, ends, strict=True):
        points = np.stack([image, image + first, image + second])
        spanned.append((planes.through(*points, ThreatModel('linf', 0.3), seed=0), points))
    # Of the first plane (x, y) are the first and last pixel's changes; of the second (y, -x).
    upper = model_of([0, 0, 0, 1], 128 / 255 + 0.05)  # where the last pixel rose by 0.05
    slanted = model_of([1, 0, 0, -2], 204 / 255 - 2 * 128 / 255 + 0.011)
    # The second one's only member is itself.
    rows = [decision_planes.Row('', *of) for of in ((0, False, 0), (0, False, 1), (1, False, 1))]
    classes, margins, point_classes = decision_planes.classify(
        [upper, slanted], rows, spanned, images, np.array([0, 1]), 1.2, 40
    )
    # The unit is 0.6. The window is 0.72 wide around the image, its pixels 0.018: none is on a
    # boundary.
    middles = -0.36 + 0.018 * (np.arange(40) + 0.5)
    first, last = np.meshgrid(middles, middles)  # the first varies to the right, the last upwards
    for i, (change, rose) in enumerate(((first, last), (-last, first))):
        # Outside of [0, 1] as well, where the first pixel rose by more than 0.2.
        logits = [rose - 0.05, *2 * [change - 2 * rose - 0.011]]
        for row, logit in enumerate(logits):
            np.testing.assert_array_equal(classes[i, row], logit > 0)
            # Class 1 has this logit and class 0 the negative one; the labels are 0 and 1.
            np.testing.assert_allclose(margins[i, row], (4 * i - 2) * logit, atol=1e-5)
    # A later row is higher up.
    assert (classes[0, 0, 0, 0], classes[0, 0, -1, 0]) == (0, 1)
    expected = [[[0, 0, 1], [0, 1, 0], [0, 1, 0]], [[0, 1, 0], [0, 0, 0], [0, 0, 0]]]
    np.testing.assert_array_equal(point_classes, expected)


@pytest.fixture(scope='module')
def root(tmp_path_factory):
    """Two runs as training leaves them, of one and of two members; their weights are random."""
    root = epath.Path(tmp_path_factory.mktemp('planes'))
    for name in ('one', 'two'):
        config = asked(root, name)
        facts = build.dataset(config).describe()
        model = build.model(config, facts, dtype='float32')
        key, k = jax.random.key(config.seed), config.ensemble.size
        variables = ensemble.init(model, key, k, tuple(facts['image_shape']))
        snapshots = checkpoints.open_snapshots(root / name)
        snapshots.save(2, variables, wait=True)
        snapshots.close()
        session = {'step': 0, **build.environment(), 'command': []}
        facts = {'dataset': facts, 'parameters': 1}
        workdir_lib.write_record(root / name, config, facts, session)
    return root


def asked(root, name, **changes):
    """Returns a run's config, and asks for small planes."""
    system, seed = {'one': ('baseline', 0), 'two': ('ensemble2', 1)}[name]
    changes = {'train__steps': 2} | ASKED | changes
    if 'planes__other' in changes:
        changes['planes__other'] = str(root / changes['planes__other'])
    return tiny_config(system, seed=seed, **changes)


@pytest.fixture(scope='module')
def two_runs(root):
    """The planes of both runs."""
    return study.draw_planes(asked(root, 'one', planes__other='two'), root / 'one')


def weights_of(config, path, member=None):
    network = build.network(config, build.dataset(config).describe())
    variables = checkpoints.open_snapshots(path).restore(2, network.variables)
    if member is not None:
        variables = jax.tree.map(lambda leaf: leaf[member][None], variables)
    return Evaluator(network, 8), variables


def check_against(made, attacked, rows, config):
    """Compares planes with what attacks and predictions give that are made one by one."""
    unit = 0.15 * 8
    dataset = build.dataset(config)
    settings = attack_settings.evaluation_settings(config, 'ifgsm2')
    places = np.array(config.planes.images)
    images, labels = dataset.split('test')
    x = images[places] / np.float32(255)
    examples = [
        bench.points(variables, settings, images, labels, 'test', places=places).worst
        for bench, variables in attacked
    ]
    np.testing.assert_array_equal(made.images, images[places])
    np.testing.assert_array_equal(made.labels, labels[places])
    moves = np.stack(examples, axis=1).reshape(2, 2, -1) - x.reshape(2, 1, -1)
    # Lengths and angles are what coordinates in the plane keep.
    gram = np.einsum('mid,mjd->mij', moves, moves)
    found = np.einsum('mid,mjd->mij', made.points[:, 1:], made.points[:, 1:])
    np.testing.assert_allclose(found * unit**2, gram, atol=1e-4)
    np.testing.assert_array_equal(made.points[:, 0], 0)
    for row, (bench, variables) in enumerate(rows):
        for point, pictures in enumerate((x, *examples)):
            log_probs = bench.log_probs(variables, pictures, 'test')
            np.testing.assert_array_equal(made.point_classes[:, row, point], log_probs.argmax(1))
    assert len(set(made.point_classes.ravel().tolist())) > 1
    assert made.classes.shape == (2, len(rows), 12, 12)
    assert 0 <= made.classes.min() <= made.classes.max() <= 9
    is_label = made.classes == made.labels[:, None, None, None]
    np.testing.assert_array_equal(made.margins > 0, is_label)
    assert 0 < np.sum(made.inside) < made.inside.size
    # Where the images of digits are black at the border, less than all of the ball is permitted.
    within = (made.images < 0.15 * 255) | (made.images > 0.85 * 255)
    assert made.saturated.tolist() == np.sum(within, axis=(1, 2, 3)).tolist()
    assert np.nanmax(np.abs(made.region)) <= 1


def test_planes_of_two_runs(root, two_runs):
    path = two_runs
    assert path == root / 'one' / 'planes' / 'one-two.npz'
    assert path.with_suffix('.png').read_bytes()[1:4] == b'PNG'
    assert path.with_suffix('.pdf').read_bytes()[:4] == b'%PDF'
    made = plane_files.read(path)
    assert made.attacked == ('Baseline, seed 0', 'Ensemble2, seed 1')
    assert made.names == (
        *made.attacked, 'Ensemble2, seed 1, member 1', 'Ensemble2, seed 1, member 2',
    )  # fmt: skip
    assert (made.member.tolist(), made.clean.tolist()) == ([0, 0, 1, 2], [True] * 4)
    assert (made.shown, made.is_response) == ([0, 1], False)
    models = [
        weights_of(asked(root, 'one'), root / 'one'),
        weights_of(asked(root, 'two'), root / 'two'),
    ]
    members = [weights_of(asked(root, 'two'), root / 'two', member) for member in (0, 1)]
    check_against(made, models, [*models, *members], asked(root, 'one'))
    record = made.record
    assert [run['step'] for run in record['runs']] == [2, 2]
    assert [run['workdir'] for run in record['runs']] == [str(root / n) for n in ('one', 'two')]
    assert record['settings']['steps'] == 2
    assert (record['epsilon'], record['num_classes'], record['dataset']) == (0.15, 10, 'digits')
    assert (made.places.tolist(), made.window) == ([7, 2], 3)


def test_the_images_are_chosen_where_none_is_named(root, caplog):
    config = asked(root, 'two', planes__images=())
    dataset = build.dataset(config)
    images, _ = dataset.split('test')
    places, saturated = decision_planes._images(config, dataset)
    within = np.sum((images < 0.15 * 255) | (images > 0.85 * 255), axis=(1, 2, 3))
    # No digit is without black pixels.
    # Of those with as many the first.
    assert places.tolist() == sorted(range(360), key=lambda i: (within[i], i))[:3]
    assert saturated.tolist() == within[places].tolist()
    assert saturated.min() > 0
    assert f'planes.images: test images {", ".join(map(str, places))}, which' in caplog.text


def test_planes_of_a_runs_members(root):
    config = asked(root, 'two')
    path = decision_planes.run(config, root / 'two')
    assert path == root / 'two' / 'planes' / 'members.npz'
    made = plane_files.read(path)
    assert made.names == ('member 1', 'member 2', 'Ensemble2, seed 1')
    assert (made.member.tolist(), made.shown) == ([1, 2, 0], [0, 1, 2])
    assert made.attacked == ('member 1', 'member 2')
    members = [weights_of(config, root / 'two', member) for member in (0, 1)]
    check_against(made, members, [*members, weights_of(config, root / 'two')], config)


def test_what_is_made_is_not_made_again(root, two_runs, tmp_path, monkeypatch):
    one = epath.Path(tmp_path) / 'one'
    shutil.copytree(root / 'one', one)
    path = one / 'planes' / two_runs.name
    before = path.read_bytes()
    made = plane_files.read(path)
    calls = []
    monkeypatch.setattr(decision_planes, '_make', lambda *args: calls.append(args) or made)
    path.with_suffix('.png').unlink()
    result = run_main(
        '--mode=planes', f'--workdir={one}', f'--config.planes.other={root / "two"}',
        '--config.planes.images=(7, 2)', '--config.planes.attack=ifgsm2',
        '--config.planes.resolution=12', small=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == [
        str(path.with_suffix(suffix)) for suffix in ('.npz', '.png', '.pdf')
    ]
    assert (path.read_bytes(), path.with_suffix('.png').exists()) == (before, True)
    decision_planes.run(asked(root, 'one', planes__other='two'), one)
    for number, changes in enumerate(
        (
            {'planes__images': (2, 7)},
            {'planes__attack': 'ifgsm3'},
            {'planes__resolution': 13},
            {'planes__window': 4.0},
            {'eval__ifgsm__step_size': 0.01},
        ),
    ):
        assert len(calls) == number
        # Beside what is there, and only once.
        for _ in range(2):
            file = decision_planes.run(asked(root, 'one', planes__other='two', **changes), one)
            assert file.name == f'{path.stem}_{number + 2}.npz'
            plane_files.write(file, made._replace(record=calls[-1][2]))
    assert path.read_bytes() == before
    record = workdir_lib.read_record(one)
    record['config']['train']['momentum'] = 0.5
    files.write_json(one / 'config.json', record)
    changed = asked(root, 'one', planes__other='two', train__momentum=0.5)
    decision_planes.run(changed, one)
    assert len(calls) == 6
    path.write_bytes(b'damaged')
    decision_planes.run(changed, one)
    assert len(calls) == 7


@pytest.mark.parametrize(
    'changes, told',
    [
        ({}, 'planes.other: needed for .*one, a run with one member'),
        ({'planes__other': 'one'}, 'planes.other: expected another run than --workdir'),
        ({'planes__other': 'none'}, 'planes.other: .*none: no run is here'),
        ({'planes__other': 'ensemble'}, 'planes.other: .*: is an ensemble of runs'),
        ({'planes__other': 'data'}, 'planes.other: .*: expected a run on the same data'),
        ({'planes__other': 'epsilon'}, 'same epsilon as .*, 0.15, found 0.2'),
        ({'planes__other': 'unfinished'}, 'a snapshot at step 9, found snapshots at'),
        ({'planes__other': 'two', 'planes__images': (2, 360)}, r'0\.\.359, found 360'),
        ({'planes__other': 'two', 'epsilon': 0.2}, r'another config \(epsilon: 0.15 -> 0.2'),
    ],
)  # fmt: skip
def test_what_has_no_planes_is_refused(root, changes, told):
    edits = {
        'ensemble': lambda record: record | {'members': []},
        'data': lambda record: record | {'dataset': record['dataset'] | {'fingerprint': 'other'}},
        'epsilon': lambda record: record | {'config': record['config'] | {'epsilon': 0.2}},
        'unfinished': lambda record: (
            record
            | {'config': record['config'] | {'train': record['config']['train'] | {'steps': 9}}}
        ),
    }
    name = changes.get('planes__other')
    if name in edits and not (root / name).exists():
        shutil.copytree(root / 'two', root / name)
        record = workdir_lib.read_record(root / name)
        files.write_json(root / name / 'config.json', edits[name](record))
    with pytest.raises(UserError, match=told) as caught:
        decision_planes.run(asked(root, 'one', **changes), root / 'one')
    assert '\n' not in str(caught.value)


def test_the_runs_own_data_are_those_that_are_there_now(root, tmp_path):
    two = epath.Path(tmp_path) / 'two'
    shutil.copytree(root / 'two', two)
    record = workdir_lib.read_record(two)
    record['dataset']['fingerprint'] = 'another'
    files.write_json(two / 'config.json', record)
    with pytest.raises(UserError, match='was made on other data than digits holds now'):
        decision_planes.run(asked(root, 'two'), two)


def test_mistakes_are_one_line_on_the_command_line(root):
    result = run_main('--mode=planes', f'--workdir={root / "one"}', small=True)
    assert result.returncode == 2
    assert result.stderr.startswith('error: planes.other: needed for')
    assert len(result.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize(
    'field, value, told',
    [
        ('images', (1, 1), r'each once, .* or \(\) to have them chosen, found \(1, 1\)'),
        ('images', (-1,), r'found \(-1,\)'),
        ('attack', 'clean', 'clean has no steps; expected one of ifgsm, pgd with'),
        ('attack', 'pdg20', "unknown attack 'pdg20' .did you mean 'pgd20'"),
        ('window', 1.9, '>= 2 and <= 1000, found 1.9'),
        ('resolution', 1, '>= 2 and <= 10000, found 1'),
    ],
)
def test_settings_that_are_not_allowed(field, value, told):
    config = tiny_config(**{f'planes__{field}': value})
    with pytest.raises(ConfigError, match=f'^planes.{field}: .*{told}'):
        config_checks.validate(config)
