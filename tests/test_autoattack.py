"""The attacks of AutoAttack: answers known beforehand, and the wiring from a config to them."""

import dataclasses
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import tiny_config
from etils import epath
from test_follow import config_for, make_run

from ensadv import config_checks, losses
from ensadv.attacks import driver, fab, registry, square
from ensadv.attacks.apgd import APGD
from ensadv.attacks.fab import FAB
from ensadv.attacks.square import Square
from ensadv.attacks.threat_model import ThreatModel
from ensadv.errors import ConfigError
from ensadv.evaluation import attack_settings, evaluator
from ensadv.evaluation import evaluate as evaluate_lib
from ensadv.evaluation.result_files import ResultFiles
from ensadv.models.ensemble import Network
from ensadv.report import table1
from ensadv.report.collect import collect

SHAPE = (6, 5, 2)  # not square, two channels
WEIGHTS = jax.random.normal(jax.random.key(0), (6 * 5 * 2, 4))
X = jax.random.uniform(jax.random.key(1), (40, *SHAPE), minval=0.0, maxval=1.0)
KEYS = jax.random.split(jax.random.key(2), 40)


def linear(x):
    return (x.reshape(len(x), -1) - 0.5) @ WEIGHTS


Y = jnp.argmax(linear(X), axis=-1)


def exact_distances(norm, weights=WEIGHTS):
    """By bisection over the radius: the least within which some class beats the label's."""
    flat = np.asarray(X, np.float64).reshape(len(X), -1)
    weights = np.asarray(weights, np.float64)
    least = np.full(len(X), np.inf)
    for i, other in itertools.product(range(len(X)), range(4)):
        label = int(Y[i])
        if other == label:
            continue
        w = weights[:, other] - weights[:, label]
        gap = (flat[i] - 0.5) @ w
        room = np.where(w > 0, 1 - flat[i], flat[i])
        speed = np.abs(w) if norm == 'l2' else np.ones_like(w)
        low, high = 0.0, 100.0
        if gap + np.sum(np.abs(w) * room) < 0:
            continue
        for _ in range(100):
            time = (low + high) / 2
            reached = gap + np.sum(np.abs(w) * np.minimum(speed * time, room)) >= 0
            low, high = (low, time) if reached else (time, high)
        move = np.minimum(speed * high, room)
        least[i] = min(least[i], np.max(move) if norm == 'linf' else np.linalg.norm(move))
    return least


ATTACKS = {
    'apgd_ce': APGD(steps=50, loss='cross_entropy'),
    'apgd_dlr': APGD(steps=50, loss='dlr'),
    'apgd_margin': APGD(steps=50, loss='margin'),
    'fab': FAB(steps=30),
    'square': Square(steps=1500),
}


@pytest.mark.parametrize('norm, epsilon', [('linf', 0.015), ('l2', 0.12)])
@pytest.mark.parametrize('name', ATTACKS)
def test_reaches_the_exact_robust_accuracy_of_a_linear_model(name, norm, epsilon):
    exact = exact_distances(norm)
    threat = ThreatModel(norm, epsilon)
    found = driver.worst_case(ATTACKS[name], linear, threat, KEYS, X, Y)
    falls = np.asarray(found.margin <= 0)
    assert 0.2 < np.mean(exact <= epsilon) < 0.9
    assert np.all(threat.distance(found.x_adv, X) <= epsilon * (1 + 1e-5))
    assert jnp.all((found.x_adv >= 0) & (found.x_adv <= 1))
    # Nothing falls that cannot, and what is not at the very edge falls. A random search finds less.
    assert not np.any(falls & (exact > epsilon * 1.0001))
    found = np.mean(falls[exact <= 0.97 * epsilon])
    assert found >= 0.6 if name == 'square' else found == 1


@pytest.mark.parametrize('norm', ['linf', 'l2'])
def test_fab_finds_the_exact_distance_to_the_nearest_boundary(norm):
    exact = exact_distances(norm)
    threat = ThreatModel(norm, 0.1)
    attack = FAB(steps=40)
    state = attack.init(linear, threat, KEYS, X, Y)
    step = jax.jit(lambda state: attack.step(linear, threat, state, X, Y)[0])
    for _ in range(40):
        state = step(state)
    # Its overshoot leaves it a little beyond the boundary.
    assert np.all(state.nearest >= exact * (1 - 1e-5))
    assert np.all(state.nearest <= exact * 1.01)


@pytest.mark.parametrize('norm', ['linf', 'l2'])
def test_targets_together_find_what_the_untargeted_attack_does(norm):
    threat = ThreatModel(norm, 0.015 if norm == 'linf' else 0.12)
    exact = exact_distances(norm)
    for make in (lambda r: APGD(steps=50, loss='targeted_dlr', rank=r),
                 lambda r: FAB(steps=30, targeted=True, rank=r)):  # fmt: skip
        margins = [
            driver.worst_case(make(rank), linear, threat, KEYS, X, Y).margin for rank in (1, 2, 3)
        ]
        falls = np.min(margins, axis=0) <= 0
        assert not np.any(falls & (exact > threat.epsilon * 1.0001))
        assert np.all(falls[exact <= 0.97 * threat.epsilon])
        assert any(np.any(margins[0] > other) for other in margins[1:])


def test_apgd_halves_its_step_at_its_checkpoints():
    threat = ThreatModel('linf', 0.05)
    attack = APGD(steps=100, loss='margin')
    state = attack.init(linear, threat, KEYS, X, Y)
    step = jax.jit(lambda state: attack.step(linear, threat, state, X, Y)[0])
    sizes = []
    for _ in range(100):
        state = step(state)
        sizes.append(np.asarray(state.step_size))
    changes = {i for i in range(1, 100) if np.any(sizes[i] != sizes[i - 1])}
    assert changes
    assert changes <= {22, 41, 57, 70, 80, 87, 93, 99}
    assert sizes[0] == pytest.approx(0.1)
    # On a linear model the best point is found long before, so all but the first halve.
    assert np.all(sizes[-1] <= 0.1 / 2**6)


@pytest.mark.parametrize(
    'loss, rank', [('dlr', None), ('targeted_dlr', 1), ('normalised_cross_entropy', None)]
)
@pytest.mark.parametrize('factor', [1e-4, 1e4])
def test_apgd_is_not_deceived_by_the_scale_of_logits(loss, rank, factor):
    threat = ThreatModel('linf', 0.015)
    attack = APGD(steps=50, loss=loss, rank=rank)
    margins = [
        driver.worst_case(attack, lambda x, f=f: f * linear(x), threat, KEYS, X, Y).margin > 0
        for f in (1, factor)
    ]
    assert np.mean(margins[0] != margins[1]) <= 0.05


@pytest.mark.parametrize('classes', [2, 3])
def test_with_few_classes_the_margin_stands_for_the_ratio(classes):
    logits = jnp.array([[3.0, 1.0, 0.5][:classes]])
    label, target = jnp.array([0]), jnp.array([1])
    assert losses.targeted_dlr(logits, label, target) == -2
    expected = -2 if classes == 2 else -2 / 2.5
    np.testing.assert_allclose(losses.dlr(logits, label), expected)


def test_squares_windows_shrink_as_the_reference_has_it():
    threat = ThreatModel('linf', 0.1)
    assert square.sides(threat, (32, 32, 3)) == (29, 20, 14, 10, 7, 5, 4, 3, 2, 1)
    assert square.sides(ThreatModel('l2', 0.1), (32, 32, 3))[:4] == (29, 21, 15, 11)


def test_a_proposal_of_square_changes_one_window_by_twice_epsilon():
    threat, x = ThreatModel('linf', 0.1), jnp.full((2, 8, 8, 1), 0.5)
    draws = square.Draws(
        jnp.array([3, 3]), jnp.array([[[1, 2], [0, 0]], [[4, 0], [0, 0]]]),
        jnp.array([[1.0], [-1.0]]), jnp.array([False, False]),
    )  # fmt: skip
    side = square.sides(threat, (8, 8, 1))[3]
    point = square.linf_proposal(threat, x - 0.1, x, draws)
    expected = np.full((2, 8, 8, 1), 0.4)
    expected[0, 1 : 1 + side, 2 : 2 + side] = 0.6
    np.testing.assert_allclose(point, expected, atol=1e-6)


@pytest.mark.parametrize('norm', ['linf', 'l2'])
def test_a_move_to_a_plane_that_the_box_does_not_reach_goes_to_its_corner(norm):
    w = jnp.array([1.0, -2.0]).reshape(1, 1, 1, 2)
    point = jnp.array([0.25, 0.5]).reshape(1, 1, 1, 2)
    move = fab._move_to_plane(ThreatModel(norm, 0.1), w, jnp.array([-100.0]), point, point)
    np.testing.assert_allclose(point + move, jnp.array([1.0, 0.0]).reshape(1, 1, 1, 2), atol=1e-6)


# The evaluation.


def staged(name, **changes):
    config = tiny_config(eval__attacks=('clean', name), eval__long_attacks=())
    config.epsilon = 0.02
    config.eval.autoattack.update({'gradient_steps': 20, 'queries': 60} | changes)
    config_checks.validate(config)
    return attack_settings.evaluation_settings(config, name)


NETWORK = Network(lambda w, x: ((x.reshape(len(x), -1) - 0.5) @ w)[None], 'probs', WEIGHTS)
IMAGES = np.asarray(jnp.round(X * 255), np.uint8)
LABELS = np.where(np.arange(40) < 5, (np.asarray(Y) + 1) % 4, np.asarray(Y)).astype(np.int32)


def evaluate(
    name, batch=40, images=IMAGES, labels=LABELS, network=NETWORK, weights=WEIGHTS, **given
):
    settings = staged(name)
    stages = registry.stages(settings, 4, len(jax.eval_shape(network.member_logits, weights, X)))
    return evaluator.Evaluator(network, batch).staged_attack(
        weights, settings, images, labels, name, stages=stages, **given
    )


def test_autoattacks_stages_are_the_references():
    settings = staged('autoattack')
    names = [stage.name for stage in registry.stages(settings, 10)]
    targets = range(1, 10)
    expected = ['apgd_ce', *(f'apgd_t {i}' for i in targets), *(f'fab_t {i}' for i in targets)]
    assert names == [*expected, 'square']
    assert [s.name for s in registry.stages(settings, 2)] == [
        'apgd_ce', 'apgd_t 1', 'fab_t 1', 'square'
    ]  # fmt: skip
    found = {
        stage.name: (stage.settings['steps'], stage.settings.get('restarts', 1))
        for stage in registry.stages(staged('autoattack_plus'), 10)
    }
    assert found['apgd_ce'] == found['apgd_dlr'] == (100, 5)
    assert found['fab'] == (100, 1)
    assert found['fab restarts'] == (100, 4)
    assert found['square'] == (5000, 1)
    default = dataclasses.asdict(registry.AutoAttackSettings())
    assert default == {'gradient_steps': 100, 'targets': 9, 'queries': 5000, 'examples': None}
    assert 'examples' not in settings  # of results, whose identity it would change


# An ensemble of which one member is by a factor surer than the other, who alone would decide.
PAIR = jnp.stack([WEIGHTS, jax.random.normal(jax.random.key(5), WEIGHTS.shape)])


@pytest.mark.parametrize('name', ['mora20', 'members20'])
@pytest.mark.parametrize('combine', ['probs', 'logits'])
def test_a_member_that_is_too_sure_hides_nothing_from_the_attacks_on_members(name, combine):
    member_logits = lambda w, x: jnp.einsum('bi,kic->kbc', x.reshape(len(x), -1) - 0.5, w)
    network = Network(member_logits, combine, PAIR)
    factors = jnp.array([1e4, 1]) if combine == 'probs' else jnp.array([1, 1e-4])
    weights = PAIR * factors[:, None, None]
    labels = np.asarray(Y, np.int32)
    found = evaluate(name, network=network, weights=weights, labels=labels)
    assert [stage['name'] for stage in found.stages] == [
        f'{name[:-2]} {i}' for i in ((1, 2, 3) if name == 'mora20' else (1, 2))
    ]
    exact = exact_distances('linf')  # of the first, who decides
    settled = np.abs(exact / 0.02 - 1) > 0.1  # images are rounded to 8 bits
    assert 0.3 < np.mean(exact[settled] <= 0.02) < 0.9
    np.testing.assert_array_equal(found.margin[settled] <= 0, exact[settled] <= 0.02)
    assert found.has_gradient.all()


def test_each_stage_attacks_what_stands_and_the_ledger_tells_which_felled_it():
    found = evaluate('autoattack')
    assert [s['name'] for s in found.stages] == [
        'apgd_ce', 'apgd_t 1', 'apgd_t 2', 'apgd_t 3', 'fab_t 1', 'fab_t 2', 'fab_t 3', 'square'
    ]  # fmt: skip
    clean = np.asarray(jnp.argmax(linear(IMAGES / np.float32(255)), -1)) == LABELS
    np.testing.assert_array_equal(found.felled_by == 0, ~clean)
    attacked = int(np.sum(clean))
    for number, stage in enumerate(found.stages):
        assert stage['attacked'] == attacked
        assert stage['felled'] == np.sum(found.felled_by == number + 1)
        attacked -= stage['felled']
    np.testing.assert_array_equal(found.felled_by == driver.NEVER, found.margin > 0)
    assert 0 < attacked < np.sum(clean)
    assert found.stages[-1]['accuracy'] == pytest.approx(attacked / 40)
    assert found.has_gradient.all()


def test_the_batch_alters_no_verdict_and_a_killed_one_goes_on_to_the_same_end():
    kept = []
    whole = evaluate('autoattack', save=kept.append)
    assert [len(verdicts.stages) for verdicts in kept] == list(range(1, 9))
    np.testing.assert_array_equal(evaluate('autoattack', batch=7).felled_by, whole.felled_by)
    for reached in (1, 5):
        text = json.dumps(kept[reached - 1].to_lists())
        done = evaluator.StagedVerdicts.of_lists(json.loads(text))
        again = []
        found = evaluate('autoattack', done=done, save=again.append)
        assert len(again) == 8 - reached
        np.testing.assert_array_equal(found.margin, whole.margin)
        np.testing.assert_array_equal(found.felled_by, whole.felled_by)


@pytest.mark.parametrize('wrong', ['all', 'none', 'one image'])
def test_a_stage_that_nothing_is_left_for_ends_well(wrong):
    labels = (np.asarray(Y) + 1) % 4 if wrong == 'all' else np.asarray(Y)
    count = 1 if wrong == 'one image' else 40
    found = evaluate('apgd_ce', images=IMAGES[:count], labels=labels[:count].astype(np.int32))
    assert len(found.margin) == count
    assert found.stages[0]['attacked'] == (0 if wrong == 'all' else count)


@pytest.mark.parametrize(
    'entry, field',
    [('autoattack50', 'autoattack50'), ('apgd_ce0', 'apgd_ce0'), ('pgd', "'pgd'")],
)
def test_refuses_numbers_of_steps_that_mean_nothing(entry, field):
    with pytest.raises(ConfigError, match=field):
        registry.entry(entry)


def test_names_with_and_without_steps():
    assert registry.entry('apgd_t').kind == 'apgd_t'
    assert registry.entry('apgd_t20').steps == 20
    assert staged('apgd_ce50')['steps'] == 50
    assert staged('fab_t')['targets'] == 9
    own = registry.entry('autoattack_short(queries=100)')
    assert (own.kind, own.suffix, own.changes) == ('autoattack', '_short', {'queries': 100})


def test_a_killed_evaluation_keeps_its_stages_and_ends_with_the_same_files(
    small_network, tmp_path, monkeypatch, capsys
):
    config = config_for(
        train__steps=2, eval__attacks=('clean',), eval__long_attacks=('apgd_t4',),
        eval__apgd_t__targets=3, eval__apgd_t__examples=12, eval__examples=0,
    )  # fmt: skip
    write, made = ResultFiles.write_stages, []

    def killed(self, step, unit, labels, verdicts):
        write(self, step, unit, labels, verdicts)
        made.append(verdicts.stages[-1]['name'])
        raise KeyboardInterrupt

    found = {}
    for name in ('whole', 'killed'):
        workdir = epath.Path(tmp_path / name)
        make_run(config, workdir, steps=(2,))
        if name == 'killed':
            monkeypatch.setattr(ResultFiles, 'write_stages', killed)
        for _ in range(9):
            try:
                evaluate_lib.run(config, workdir)
                break
            except KeyboardInterrupt:
                pass
        assert not list((workdir / 'eval').glob('*.stages.npz'))
        with np.load(workdir / 'eval' / '2.npz') as ledger:
            found[name] = dict(ledger)
    # Also when all were made, but not yet added to the results.
    assert made == ['apgd_t 1', 'apgd_t 2', 'apgd_t 3']
    assert found['whole'].keys() == found['killed'].keys()
    for key, array in found['whole'].items():
        np.testing.assert_array_equal(found['killed'][key], array)
    # It was made on the first 12 of the 30 examples, and robust accuracy is over these.
    margins = {name: found['whole'][f'{name}_margin'] for name in ('clean', 'apgd_t4')}
    assert [len(margin) for margin in margins.values()] == [30, 12]
    assert len(found['whole']['label']) == 30
    assert len(found['whole']['apgd_t4_felled_by']) == 12
    correct = int(np.sum((margins['clean'][:12] > 0) & (margins['apgd_t4'] > 0)))
    content = json.loads((tmp_path / 'whole' / 'eval' / '2.json').read_text())
    assert content['robust'] == {
        'n': 12, 'correct': correct, 'accuracy': correct / 12, 'no_gradient': 0,
        'attacks': ['clean', 'apgd_t4'],
    }  # fmt: skip
    assert content['attacks'][1]['n'] == 12
    shown = capsys.readouterr().out.splitlines()[-1]
    assert shown.startswith(f'step 2  n 30  robust {correct / 12:.4f} (n 12)  clean ')
    assert shown.endswith(' (n 12)')
    # The report has it, with the number of steps in its name.
    (run,) = collect(epath.Path(tmp_path / 'whole'), ()).runs
    assert [table1.attack_name(name) for name in run.attacks(2)] == ['clean', 'APGD-T4']
    assert table1.attack_name('autoattack') == 'AutoAttack'
