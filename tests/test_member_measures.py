"""What an ensemble's members do: measures whose answers are known, their statistics, the job."""

import dataclasses
import json
import math
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import tiny_config
from etils import epath
from matplotlib.figure import Figure
from report_runs import member, run_config, write_run
from test_follow import make_run

import main
from ensadv import build, config_checks, losses, study
from ensadv.attacks.threat_model import ThreatModel
from ensadv.errors import ConfigError, UserError
from ensadv.evaluation import any_model, member_measures, member_statistics, members
from ensadv.evaluation.member_statistics import content, erring, estimate, poisson_binomial
from ensadv.models import ensemble
from ensadv.models.ensemble import Network
from ensadv.report import drawing, member_figures, write
from ensadv.report import members as members_report
from ensadv.report.collect import collect
from ensadv.storage import files, member_files, workdir

SHAPE, N, CLASSES = (4, 3, 2), 12, 4
THREAT = ThreatModel('linf', 0.03)
PGD = {
    'attack': 'pgd', 'steps': 6, 'step_size': 0.01, 'schedule': 'constant', 'restarts': 1,
    'start': 'gaussian', 'sigma': 0.01, 'loss': 'cross_entropy', 'epsilon': 0.03, 'seed': 0,
}  # fmt: skip
W = np.array(jax.random.normal(jax.random.key(0), (3, 25, CLASSES)))  # the last row is the bias
W[:, -1] = 0
# What ignores its input, and predicts class 0.
CONSTANT = np.zeros_like(W[0])
CONSTANT[-1, 0] = 1
IMAGES = np.asarray(jax.random.randint(jax.random.key(1), (N, *SHAPE), 60, 196), np.uint8)


def linear(w, x):
    return (x.reshape(len(x), -1) - 0.5) @ w[:-1] + w[-1]


LABELS = np.asarray(linear(W[0], IMAGES / np.float32(255)).argmax(-1), np.int32)
LABELS[:2] = (LABELS[:2] + 1) % CLASSES  # errors without an attack
# One for all tests, whatever the weights: nothing is compiled anew.
NETWORK = Network(lambda w, x: jax.vmap(linear, (0, None))(w, x), 'probs', None)
PARTS = {}


def subject(*weights, network=NETWORK, labels=LABELS, **changes):
    """What is measured of members with these weights, on one compilation of each number of them."""
    weights = np.stack(weights)
    k = len(weights)
    like = (id(network), weights.shape)
    if like not in PARTS:
        PARTS[like] = member_measures.parts_of(network, weights, k, N)
    parts, without = (
        [
            part._replace(variables=ensemble.part(network, weights, chosen)[1])
            for part, chosen in zip(found, places, strict=True)
        ]
        for found, places in zip(
            PARTS[like],
            (
                [*([i] for i in range(k)), list(range(k))],
                [[j for j in range(k) if j != i] for i in range(k)] if k > 2 else [],
            ),
            strict=True,
        )
    )
    made = member_measures.Subject(
        parts, without, IMAGES, labels, np.arange(N, dtype=np.int32), THREAT, {'pgd6': PGD},
        directions=2, radius=4.0, seed=0,
    )  # fmt: skip
    return dataclasses.replace(made, **changes)


def test_identical_members_fall_together_and_transfer_is_an_attack_on_oneself():
    ledger = member_measures.measure(subject(W[0], W[0], W[0]))
    found = content(ledger, ['pgd6'], THREAT.epsilon)
    margins = ledger['pgd6_transfer']
    np.testing.assert_allclose(margins, np.broadcast_to(margins[:1, :1], margins.shape), atol=1e-4)
    for place in ('clean', 'step_1', 'step_3', 'step_6'):
        np.testing.assert_allclose(ledger[f'cosine_{place}'], 1, atol=1e-5)
        np.testing.assert_allclose(ledger[f'sign_{place}'], 1)
    under = found['attacks']['pgd6']
    assert under['no_gradient'] == [0, 0, 0, 0]
    on_whole = under['on_whole']
    assert on_whole['disagreement']['value'] == on_whole['kl']['value'] == 0
    none, *some, everyone = on_whole['erring']['observed']
    assert [each['value'] for each in some] == [0, 0]
    assert 0 < none['value'] < 1
    assert none['value'] + everyone['value'] == 1
    # Less than as often if each erred by itself.
    assert on_whole['erring']['independent'][-1]['value'] < everyone['value']
    # What is left without a member is as robust.
    assert under['without'][1]['count'] == under['transfer'][3][3]['count'] == none['count']
    np.testing.assert_allclose(ledger['pgd6_without'][1], margins[3, 3], atol=1e-4)


def test_of_two_classes_opposite_members_have_opposite_gradients():
    two = W[0, :, :2]
    made = subject(two, -two, labels=LABELS % 2)
    made.whole.evaluator.log_probs(made.whole.variables, IMAGES / np.float32(255), 'test')
    found = member_measures._agreement(made, 'clean', IMAGES / np.float32(255))
    np.testing.assert_allclose(found['cosine_clean'][0, 1], -1, atol=1e-5)
    np.testing.assert_allclose(found['sign_clean'][0, 1], 0)


def test_a_member_that_ignores_its_input_has_no_gradient_and_transfers_nothing():
    ledger = member_measures.measure(subject(W[0], CONSTANT))
    found = content(ledger, ['pgd6'], THREAT.epsilon)
    assert found['gradients']['clean']['undefined'] == [0, N]
    assert found['gradients']['clean']['cosine'] == {
        'value': None, 'low': None, 'high': None, 'n': 0,
    }  # fmt: skip
    under = found['attacks']['pgd6']
    assert under['no_gradient'] == [0, N, 0]
    np.testing.assert_allclose(ledger['pgd6_transfer'][1], ledger['clean_margin'], atol=1e-6)
    # Its own examples leave it where it was, and so does every move.
    assert np.all(ledger['pgd6_transfer'][:, 1] == ledger['clean_margin'][1])
    assert under['transfer'][0][0]['count'] < found['clean']['accuracy'][0]['count']
    (right,) = np.nonzero(LABELS == 0)
    assert np.all(np.isinf(ledger['distance_random'][1][:, right]))
    assert np.all(np.isnan(ledger['distance_adversarial'][1]))  # there is no direction
    assert found['distances']['adversarial']['distance'][1]['n'] == 0
    # Of two members the other one is left.
    np.testing.assert_array_equal(ledger['pgd6_without'][1], ledger['pgd6_transfer'][0, 0])


@pytest.mark.parametrize('norm, epsilon', [('linf', 0.05), ('l2', 0.3)])
def test_the_boundary_of_a_linear_network_is_where_it_is(norm, epsilon):
    made = subject(W[0], W[1], threat=ThreatModel(norm, epsilon))
    x = IMAGES / np.float32(255)
    moves = np.asarray(
        member_measures.on_device.directions(made.threat, 7, made.places, x), np.float64
    )
    length = np.abs(moves).max((1, 2, 3)) if norm == 'linf' else np.sqrt((moves**2).sum((1, 2, 3)))
    np.testing.assert_allclose(length, 1, rtol=1e-5)
    part = made.parts[0]
    part.evaluator.log_probs(part.variables, x, 'test')
    right = np.asarray(linear(W[0], x)).argmax(-1) == LABELS
    assert list(np.flatnonzero(~right)) == [0, 1]
    found = member_measures._first_errors(made, part, x, moves.astype(np.float32), right)
    logits = np.asarray(linear(W[0].astype(np.float64), x), np.float64)
    slopes = moves.reshape(N, -1) @ W[0, :-1]
    own = np.arange(N), LABELS
    with np.errstate(divide='ignore', invalid='ignore'):
        crossing = (logits[own][:, None] - logits) / (slopes - slopes[own][:, None])
    expected = np.where(crossing > 0, crossing, np.inf).min(1)
    within = right & (expected < 4 * epsilon)
    assert 2 < within.sum() < N - 2
    np.testing.assert_allclose(found[within], expected[within], atol=epsilon / 4 / 64)
    assert np.all(np.isinf(found[right & (expected > 4 * epsilon)]))
    assert np.all(np.isnan(found[~right]))


def test_rows_are_attacks_on_their_part_and_columns_its_predictions():
    made = subject(*W)
    ledger = member_measures.measure(made)
    chosen = [[0], [1], [2], [0, 1, 2]]
    margins = ledger['pgd6_transfer']
    for row in (1, 3):
        bench, weights = made.parts[row].evaluator, W[chosen[row]]
        own = bench.evaluate(weights, PGD, IMAGES, LABELS, 'test').margin
        np.testing.assert_allclose(margins[row, row], own, atol=1e-4)
        points = bench.points(weights, PGD, IMAGES, LABELS, 'test').worst
        for column, judges in enumerate(chosen):
            p = np.mean(jax.nn.softmax(NETWORK.member_logits(W[judges], points)), axis=0)
            assert list(margins[row, column] > 0) == list(p.argmax(-1) == LABELS)
    # On the way as in one go.
    stopping = bench.points(weights, PGD, IMAGES, LABELS, 'test', stops=(1, 3, 6))
    np.testing.assert_allclose(stopping.worst, points, atol=1e-6)
    last = bench.evaluate(weights, PGD, IMAGES, LABELS, 'test').last_margin
    there = bench.log_probs(weights, stopping.iterates[2], 'test')
    np.testing.assert_allclose(losses.margin(jnp.asarray(there), LABELS), last, atol=1e-4)
    few = bench.points(weights, {**PGD, 'steps': 3}, IMAGES, LABELS, 'test', stops=(3,))
    np.testing.assert_allclose(few.iterates[0], stopping.iterates[1], atol=1e-6)
    assert np.all(stopping.has_gradient)
    without = made.without[2].evaluator.evaluate(W[:2], PGD, IMAGES, LABELS, 'test').margin
    np.testing.assert_allclose(ledger['pgd6_without'][2], without, atol=1e-4)
    # Divergence and gradients are what NumPy makes of them.
    logits = np.asarray(NETWORK.member_logits(W, IMAGES / np.float32(255)), np.float64)
    log_p = logits - np.log(np.sum(np.exp(logits), axis=-1, keepdims=True))
    p = np.exp(log_p)
    expected = np.sum(p[0] * (log_p[0] - log_p[2]), axis=-1)
    np.testing.assert_allclose(ledger['clean_kl'][0, 2], expected, rtol=1e-4, atol=1e-6)
    errors = p - np.eye(CLASSES)[LABELS]
    gradients = np.einsum('knc,kdc->knd', errors, W[:, :-1].astype(np.float64))
    a, b = gradients[0], gradients[2]
    cosine = np.sum(a * b, -1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)
    np.testing.assert_allclose(ledger['cosine_clean'][0, 2], cosine, atol=1e-4)
    np.testing.assert_allclose(ledger['sign_clean'][0, 2], np.mean(a * b > 0, -1), atol=1e-5)
    json.dumps(content(ledger, list(made.attacks), THREAT.epsilon), allow_nan=False)


def test_members_of_other_architectures_and_with_gates_are_parts_too():
    deep = Network(lambda w, x: jnp.tanh(NETWORK.member_logits(w, x)), 'probs', None)
    network = ensemble.of_networks([NETWORK, deep, NETWORK], 'logits')
    weights = [W[:1], W[1:2], W[2:]]
    x = IMAGES / np.float32(255)
    some, chosen = ensemble.part(network, weights, [1, 2])
    expected = [deep.log_probs(W[1:2], x), NETWORK.log_probs(W[2:], x)]
    np.testing.assert_allclose(some.member_logits(chosen, x), np.stack(expected), atol=1e-6)
    assert some.combine == 'logits'
    gated = NETWORK._replace(combine='gating')
    some, chosen = ensemble.part(gated, W, [1])
    expected = jax.nn.log_softmax(linear(W[1], x))
    np.testing.assert_allclose(some.log_probs(chosen, x), expected, atol=1e-5)


# Statistics.


@pytest.fixture(autouse=True)
def _few_draws(monkeypatch, request):
    if 'interval' not in request.node.name:
        monkeypatch.setattr(member_statistics, '_DRAWS', 40)


def test_a_share_has_wilsons_interval_also_where_all_values_are_equal():
    found = estimate(np.arange(100) < 10)
    assert (found['value'], found['n'], found['count']) == (0.1, 100, 10)
    assert found['low'] == pytest.approx(0.0552, abs=1e-4)
    assert found['high'] == pytest.approx(0.1744, abs=1e-4)
    z = 1.959964
    for values in (np.zeros(50), np.zeros((3, 50), bool)):
        found = estimate(values)
        assert found['low'] == 0
        assert found['high'] == pytest.approx(z**2 / (50 + z**2), rel=1e-4)


def test_a_mean_has_the_interval_that_its_deviation_has():
    values = np.random.default_rng(1).normal(3, 2, (2, 400))
    values[1] = values[0]  # what an image has twice counts once
    found = estimate(values)
    half = 1.96 * values[0].std() / 20
    assert found['value'] == pytest.approx(values[0].mean())
    assert found['high'] - found['value'] == pytest.approx(half, rel=0.15)
    assert found['value'] - found['low'] == pytest.approx(half, rel=0.15)
    values[:, 0] = np.nan
    assert estimate(values)['n'] == 399


def test_a_median_takes_what_is_beyond_all_that_was_looked_at():
    values = np.arange(41.0)
    values[35:] = np.inf
    found = estimate(values, np.median)
    assert found['value'] == 20
    assert 8 < found['low'] < 20 < found['high'] < 35
    values[18:] = np.inf
    assert estimate(values, np.median)['value'] is None
    assert estimate(values, np.median)['low'] is not None


def test_independent_members_err_together_as_coins_do():
    tosses = poisson_binomial(np.full(4, 0.3))
    expected = [math.comb(4, i) * 0.3**i * 0.7 ** (4 - i) for i in range(5)]
    np.testing.assert_allclose(tosses, expected)
    errs = np.array([[1, 1, 0, 0, 0, 0, 0, 0], [1, 0, 1, 1, 0, 0, 0, 0]], bool)
    found = erring(errs)
    assert [each['count'] for each in found['observed']] == [4, 3, 1]
    np.testing.assert_allclose(
        [each['value'] for each in found['independent']],
        [6 / 8 * 5 / 8, 2 / 8 * 5 / 8 + 6 / 8 * 3 / 8, 2 / 8 * 3 / 8],
    )
    assert all(each['low'] <= each['value'] <= each['high'] for each in found['independent'])


# The job.


@pytest.fixture
def run(small_network, tmp_path, monkeypatch):
    """A finished run with weights of chance, the config that measures it, and what was measured."""
    config = tiny_config(
        'ensemble2adv', train__steps=2, members__examples=5, members__attacks=('pgd6', 'apgd_ce2')
    )
    path, seen = epath.Path(tmp_path) / 'run', []
    make_run(config, path, steps=(2,))

    def measure(subject):
        seen.append(subject)
        found = ledger_of(2, 0)
        return found | {key.replace('pgd6', 'apgd_ce2'): each for key, each in found.items()}

    monkeypatch.setattr(member_measures, 'measure', measure)
    return path, config, seen


def test_a_runs_members_are_measured_once_and_shown(run, capsys):
    path, config, seen = run
    assert not members.is_made(config, path)
    written = study.measure_members(config, path)
    assert written == path / 'eval' / '2_members.json'
    (subject,) = seen
    assert [part.name for part in subject.parts] == ['member 1', 'member 2', 'the ensemble']
    shapes = [jax.tree.leaves(part.variables)[0].shape[0] for part in subject.parts]
    assert shapes == [1, 1, 2]
    assert subject.without == []
    assert len(subject.images) == len(subject.labels) == len(subject.places) == 5
    assert subject.attacks['pgd6']['steps'] == 6
    apgd = subject.attacks['apgd_ce2']
    assert (apgd['attack'], apgd['loss'], apgd['steps']) == ('apgd', 'cross_entropy', 2)
    assert apgd['epsilon'] == subject.threat.epsilon == 0.15
    found = member_files.read(path, 2)
    ledger = files.read_arrays(written.with_suffix('.npz'))
    count = found['attacks']['pgd6']['transfer'][0][2]['count']
    assert count == np.sum(ledger['pgd6_transfer'][0, 2] > 0)
    assert written.with_suffix('.png').exists()
    assert '| accuracy, PGD6 on the ensemble' in capsys.readouterr().out
    # What is there is not made again, unless it is asked for something else, or damaged.
    assert members.is_made(config, path)
    assert members.run(config, path)[1] == found
    assert len(seen) == 1
    config.members.examples = 4
    assert not members.is_made(config, path)
    config.members.examples = 5
    written.write_text('{}')
    assert not members.is_made(config, path)


def test_an_ensemble_of_runs_has_these_for_members(run, tmp_path):
    _, config, seen = run
    ensemble, paths = epath.Path(tmp_path) / 'ensemble', []
    for seed in (0, 1, 2):
        paths.append(epath.Path(tmp_path) / f'single{seed}')
        make_run(tiny_config('singleadv', train__steps=2, seed=seed), paths[-1], steps=(2,))
    facts = {'dataset': build.dataset(config).describe(), 'parameters': 0}
    facts['members'] = [member(path) for path in paths]
    config = tiny_config(
        'separate2adv', ensemble__members_from=','.join(map(str, paths)), ensemble__size=3,
        members__examples=5, members__attacks=('pgd6',),
    )  # fmt: skip
    session = {'step': 0, **build.environment(), 'command': []}
    workdir.write_record(ensemble, config, facts, session)
    folder, content = members.run(config, ensemble)
    assert (folder, content['k'], content['step']) == (ensemble, 3, 2)
    (subject,) = seen
    assert [part.name for part in subject.without] == [f'all but member {i}' for i in (1, 2, 3)]
    weights = [jax.tree.leaves(part.variables) for part in subject.parts]
    for mine, place in zip(weights[:3], range(3), strict=True):
        number = len(mine)
        of_whole = weights[3][place * number : (place + 1) * number]
        assert all(np.array_equal(a, b) for a, b in zip(mine, of_whole, strict=True))
    left = jax.tree.leaves(subject.without[1].variables)
    assert all(np.array_equal(a, b) for a, b in zip(left, weights[0] + weights[2], strict=True))


def test_what_has_no_members_is_refused(tmp_path, monkeypatch):
    path = epath.Path(tmp_path) / 'single'
    config = tiny_config('singleadv', train__steps=2)
    make_run(config, path, steps=())
    # By the command, as by the function.
    monkeypatch.setattr(main, 'FLAGS', types.SimpleNamespace(compilation_cache=''))
    monkeypatch.setattr(main.switches, 'pin', lambda: None)
    for name, found in (('config', config), ('workdir_path', path), ('model_path', None)):
        monkeypatch.setattr(main.command_line, name, lambda found=found, **_: found)
    with pytest.raises(UserError, match='SingleAdv has one member; --mode=members is for two'):
        main.run('members')
    source = any_model.Source(None, 'predict', 'mine.py')
    with pytest.raises(UserError, match='a model is one network'):
        study.measure_members(config, path, source)


@pytest.mark.parametrize(
    'attacks, told',
    [
        ((), 'each once'),
        (('pgd20', 'pgd20'), 'each once'),
        (('clean',), 'attacks nothing'),
        (('autoattack',), 'made of several stages'),
        (('apgd_t',), 'made of several stages'),
        (('pgd',), "unknown attack 'pgd'"),
    ],
)
def test_attacks_are_of_one_stage(attacks, told):
    with pytest.raises(ConfigError, match=told) as error:
        config_checks.validate(tiny_config(members__attacks=attacks))
    assert 'members.attacks: ' in str(error.value)


# The report.


def ledger_of(k, seed, n=20):
    """What a measurement might have found, from chance."""
    rng = np.random.default_rng(seed)
    draw = lambda *shape: rng.normal(size=(*shape, n))
    found = {'clean_margin': draw(k + 1) + 2, 'pgd6_transfer': draw(k + 1, k + 1)}
    found |= {'pgd6_without': draw(k), 'pgd6_has_gradient': np.ones((k + 1, n), bool)}
    for where in ('clean', 'pgd6'):
        found |= {f'{where}_class': rng.integers(4, size=(k + 1, n)), f'{where}_kl': draw(k, k)}
    for where in ('clean', 'step_6'):
        found |= {f'cosine_{where}': draw(k, k), f'sign_{where}': draw(k, k)}
    found |= {'distance_adversarial': draw(k + 1) ** 2, 'distance_random': draw(k + 1, 2) ** 2}
    return found


def content_of(k, seed, **settings):
    made = {'attacks': {'pgd6': PGD}, 'radius': 4.0, 'combine': 'probs', **settings}
    found = content(ledger_of(k, seed), ['pgd6'], 0.05)
    return {'system': 'Some', 'step': 40, 'k': k, 'n': 20, 'settings': made, **found}


def test_the_table_has_a_column_for_each_system_and_the_spread_of_runs():
    one, two, three = content_of(2, 0), content_of(3, 1), content_of(3, 2)
    two['attacks']['pgd6']['no_gradient'] = [0, 4, 0, 0]
    two['distances']['random']['distance'][-1] = {'value': None, 'low': 3.5, 'high': None, 'n': 20}
    table = members_report.table({'A': [one], 'B': [two, three]})
    rows = {row.cells[0]: row.cells[1:] for row in table.rows}
    assert rows['members'] == ('2', '3')
    assert rows['runs'] == ('1', '2')
    clean = one['clean']['accuracy'][-1]
    expected = f'{100 * clean["value"]:.1f} [{100 * clean["low"]:.1f}, {100 * clean["high"]:.1f}]'
    values = [100 * each['clean']['accuracy'][-1]['value'] for each in (two, three)]
    spread = f'{np.mean(values):.1f} ± {np.std(values, ddof=1):.1f}'
    assert rows['accuracy, clean images: the ensemble'] == (expected, spread)
    assert rows['distance to an error, random direction: the ensemble'][1] == '> 4 (1 of 2 runs)'
    assert 'B: not really attacked, for want of a gradient, are 4 images of member 2' in ' '.join(
        table.notes
    )
    rows = members_report.csv_rows({'A': [('0', one)]})
    cell = one['attacks']['pgd6']['transfer'][0][2]
    assert ('A', '0', 'PGD6 on 1, judged all', *(cell[k] for k in members_report.CSV_HEADER[3:])) \
        in rows  # fmt: skip
    assert len({row[:3] for row in rows}) == len(rows)


def test_the_figure_shows_the_matrices_and_both_histograms():
    systems = {f'System {i}': [content_of(2 + i % 3, i)] for i in range(5)}
    systems['System 0'].append(content_of(2, 9))
    figure = member_figures.members(systems, 'pgd6')
    drawn = [axes for axes in figure.axes if axes.get_visible()]
    matrices = {a.get_title().replace('\n', ' '): a for a in drawn if a.get_title()}
    assert set(matrices) == {'System 0 (2 runs)', *list(systems)[1:]}
    texts = [text.get_text() for text in matrices['System 3'].texts]
    cells = systems['System 3'][0]['attacks']['pgd6']['transfer']
    assert texts == [f'{100 * cell["value"]:.0f}' for row in cells for cell in row]
    bars = [axes for axes in drawn if axes.containers]
    assert len(bars) == 5
    values = systems['System 4'][0]['attacks']['pgd6']['on_whole']['erring']
    heights = [patch.get_height() for patch in bars[4].patches]
    np.testing.assert_allclose(heights, [100 * each['value'] for each in values['observed']])
    dots = bars[4].lines[-1].get_ydata()
    np.testing.assert_allclose(dots, [100 * each['value'] for each in values['independent']])


def test_the_report_has_a_section_of_what_was_measured_alike(tmp_path, monkeypatch):
    dot = drawing.png(Figure((0.1, 0.1)))
    monkeypatch.setattr(drawing, '_written', lambda figure, **options: dot)
    for system, seed, made in (
        ('baseline', 0, None),
        ('ensemble2', 0, content_of(2, 0)),
        ('ensemble2', 1, content_of(2, 1)),
        ('ensemble2adv_gating', 0, content_of(2, 2, combine='gating')),
        ('ensemble4', 0, content_of(4, 3, radius=9.0)),
    ):
        path = tmp_path / f'{system}_seed{seed}'
        config = run_config(system, seed=seed, eval__attacks=('clean',), eval__long_attacks=())
        write_run(path, config, {40: {'clean': 0.9}})
        if made:
            member_files.write(epath.Path(path), made, {})
    write.write(epath.Path(tmp_path))
    page = (tmp_path / 'report' / 'report.html').read_text()
    section = page.partition('<section id="members"')[2].partition('</section>')[0]
    assert 'figure_members' in section
    header = section.partition('<thead>')[2].partition('</thead>')[0]
    assert 'Ensemble2' in header
    assert 'Ensemble2Adv-Gating' in header or 'Gating' in header
    assert 'Ensemble4' not in header
    assert 'left out: ensemble4_seed0' in section
    assert (tmp_path / 'report' / 'members.csv').exists()
    # A damaged file is none.
    for run in ('ensemble2_seed0', 'ensemble2_seed1', 'ensemble2adv_gating_seed0',
                'ensemble4_seed0'):  # fmt: skip
        member_files.path_of(epath.Path(tmp_path) / run, 40).write_text('{}')
    assert members_report.by_system(collect(epath.Path(tmp_path), ())) == ({}, [])
