"""The audit: ten defences that hide gradients or numbers, and honest ones."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.fft
from etils import epath
from test_follow import config_for, make_run

from ensadv import config as config_lib
from ensadv import study
from ensadv.attacks.threat_model import ThreatModel
from ensadv.errors import UserError
from ensadv.evaluation import audit, audit_attacks, audit_checks, evaluate, on_device
from ensadv.evaluation.audit_attacks import FurtherAttacks
from ensadv.evaluation.audit_checks import Subject
from ensadv.evaluation.evaluator import Evaluator
from ensadv.models import functions
from ensadv.models.ensemble import Network
from ensadv.report import write
from ensadv.storage import audits, workdir

SHAPE, N = (6, 5, 2), 60
THREAT = ThreatModel('linf', 4 / 255)
W = jax.random.normal(jax.random.key(0), (2, 60, 4))
# Two members that are much alike, as members are that learned the same.
WEIGHTS = jnp.stack([W[0], 0.9 * W[0] + 0.4 * W[1]])
IMAGES = np.asarray(jax.random.randint(jax.random.key(1), (N, *SHAPE), 0, 256), np.uint8)
PGD = {
    'attack': 'pgd', 'steps': 20, 'step_size': 2 / 255, 'schedule': 'constant', 'restarts': 1,
    'start': 'gaussian', 'sigma': 2 / 255, 'loss': 'cross_entropy', 'epsilon': 4 / 255, 'seed': 0,
}  # fmt: skip


def linear(w, x):
    return (x.reshape(len(x), -1) - 0.5) @ w


LABELS = np.asarray(linear(WEIGHTS[0], IMAGES / np.float32(255)).argmax(-1), np.int32)


def one(predict):
    return Network(lambda w, x: predict(w[0], x)[None], 'probs', WEIGHTS)


def both(w, x):
    return jnp.stack([linear(w[0], x), linear(w[1], x)])


def subject(network, **changes):
    """What is reported is the given attack's, PGD's of 20 steps."""
    settings = {**PGD, **changes}
    evaluator = Evaluator(network, 60)
    places = np.arange(N, dtype=np.int32)
    margin = evaluator.evaluate(WEIGHTS, settings, IMAGES, LABELS, 'test').margin
    results = [{'name': 'pgd20', 'settings': settings}]
    return Subject(evaluator, WEIGHTS, IMAGES, LABELS, places, THREAT, results, (margin > 0)[None])


def named(checks, name):
    return next(check for check in checks if check.name == name)


@jax.custom_vjp
def as_if_smooth(x):
    return jnp.round(x * 8) / 8


as_if_smooth.defvjp(lambda x: (as_if_smooth(x), None), lambda _, g: (g,))


def coarse_frequencies(x):
    """Rounds an image's frequencies, as JPEG does, with a gradient as if it did not."""
    rows, columns = (scipy.fft.dct(np.eye(n), norm='ortho').astype(np.float32) for n in SHAPE[:2])
    frequencies = jnp.einsum('bhwc,hi,wj->bijc', x, rows, columns)
    return jnp.einsum('bijc,hi,wj->bhwc', as_if_smooth(frequencies), rows, columns)


def by_batch(w, x):
    return linear(w, (x - x.mean(0)) / (x.std(0) + 0.1) * 0.3 + 0.5)


def bfloat16(w, x):
    return linear(w.astype(jnp.bfloat16), x.astype(jnp.bfloat16)).astype(jnp.float32)


PLANTED = {
    'logits times 1e3': (lambda w, x: 1e3 * linear(w, x), 'scale'),
    'logits times 1e-3': (lambda w, x: 1e-3 * linear(w, x), 'scale'),
    'gradients stopped': (lambda w, x: linear(w, jax.lax.stop_gradient(x)), 'gradients'),
    'gradient of one pixel': (
        lambda w, x: linear(w, jax.lax.stop_gradient(x).at[:, 0, 0].set(x[:, 0, 0])),
        'pixels with gradients',
    ),
    'input quantised': (lambda w, x: linear(w, jnp.round(x * 8) / 8), 'gradients'),
    'frequencies rounded': (lambda w, x: linear(w, coarse_frequencies(x)), 'finite differences'),
    'batch statistics': (by_batch, 'batch'),
    'bfloat16': (bfloat16, 'precision'),
}


@pytest.mark.parametrize('name', PLANTED)
def test_a_broken_defence_is_found_by_the_check_that_names_its_cause(name):
    predict, cause = PLANTED[name]
    everything = np.ones((1, N), bool)
    found = Subject(
        Evaluator(one(predict), 60), WEIGHTS, IMAGES, LABELS, np.arange(N), THREAT, [], everything
    )
    check = named(audit_checks.check_network(found), cause)
    assert check.verdict == 'failed', check
    assert check.remedy
    assert check.n


def test_what_is_reported_of_attacks_in_stages_is_apgd_with_as_many_steps_and_not_queries():
    autoattack = {'attack': 'autoattack', 'gradient_steps': 70, 'queries': 5000}
    square = {'attack': 'square', 'steps': 5000}
    for settings, steps in (([autoattack, square], 70), ([square], 100), ([autoattack, PGD], 20)):
        results = [{'name': each['attack'], 'settings': each} for each in settings]
        found = Subject(None, WEIGHTS, IMAGES, LABELS, np.arange(N), THREAT, results, None)
        assert found.reported['steps'] == steps
        assert found.reported['attack'] == ('pgd' if PGD in settings else 'apgd')


def test_random_noise_on_the_input_is_found():
    def noisy(x, key):
        return linear(WEIGHTS[0], x + 0.1 * jax.random.normal(key, x.shape))

    model = functions.model(noisy, SHAPE, name='noisy')
    found = Subject(
        Evaluator(model.network, N), list(model.weights), IMAGES, LABELS, np.arange(N), THREAT, [],
        np.ones((1, N), bool),
    )  # fmt: skip
    assert audit_checks.check_randomness(found).verdict == 'failed'


def test_an_epsilon_below_the_stated_one_is_found():
    found = subject(one(linear), epsilon=0.01)
    check = audit_checks.check_threat_model(found)
    assert check.verdict == 'failed'
    assert '4/255' in check.evidence
    assert '2.55/255' in check.evidence


def test_an_attack_that_was_stopped_early_is_found():
    found = subject(one(linear), steps=1, step_size=0.003, sigma=0.0)
    check = audit_attacks.check_steps(found, FurtherAttacks(found, found.standing))
    assert check.verdict == 'failed', check
    found = subject(one(linear))
    assert (
        audit_attacks.check_steps(found, FurtherAttacks(found, found.standing)).verdict == 'passed'
    )


def test_a_saturated_member_is_found_by_examples_made_on_each_member():
    network = Network(lambda w, x: both(w, x) * jnp.array([1e4, 1])[:, None, None], 'probs', W)
    found = dataclasses.replace(subject(network), variables=W)
    margin = found.evaluator.evaluate(W, PGD, IMAGES, LABELS, 'test').margin
    found = dataclasses.replace(found, stands=(margin > 0)[None])
    check = audit_attacks.check_members(found, FurtherAttacks(found, found.standing))
    assert check.verdict == 'failed', check


def test_no_check_fails_on_an_honest_ensemble():
    found = subject(Network(both, 'probs', WEIGHTS))
    told = []
    checks, standing = audit.make(found, told.append)
    assert told == checks
    assert [check for check in checks if check.verdict == 'failed'] == []
    assert [check.name for check in checks if check.verdict == 'not made'] == ['transfer']
    assert not np.any(standing & ~found.standing)
    assert 0 < np.mean(standing) < 0.9


def test_where_nothing_stands_no_further_attack_is_made():
    found = Subject(
        Evaluator(one(linear), N), WEIGHTS, IMAGES, LABELS, np.arange(N), THREAT,
        [{'name': 'pgd20', 'settings': PGD}], np.zeros((1, N), bool),
    )  # fmt: skip
    checks = list(audit_attacks.check_attacks(found, FurtherAttacks(found, found.standing)))
    assert {check.verdict for check in checks} == {'not made'}


def test_slopes_and_noise_are_of_the_threat_models_norm():
    everything = np.ones((1, N), bool)
    threat = ThreatModel('l2', 0.12)
    found = Subject(
        Evaluator(one(linear), N), WEIGHTS, IMAGES, LABELS, np.arange(N), threat, [], everything
    )
    assert all(check.verdict == 'passed' for check in audit_checks.check_network(found))
    x = audit_checks.pixels(found)
    moved = on_device.noisy(threat, 0, np.arange(N), x)
    assert np.all(threat.distance(moved, x) <= 0.12 * 1.0001)
    assert np.mean(threat.distance(moved, x)) > 0.1


# The job.


def _audit_an_ensemble_of_runs(run, tmp_path, seen):
    config = config_for(
        train__steps=2, eval__attacks=('clean', 'ifgsm5'), eval__long_attacks=(),
        eval__examples=0, audit__examples=4, ensemble__members_from=str(run),
        ensemble__training='separate',
    )  # fmt: skip
    ensemble = epath.Path(tmp_path / 'ensemble')
    evaluate.run_members(config, ensemble)
    stored = workdir.read_record(ensemble)['config']
    config = config_lib.from_dict(stored, config)
    audit.run(config, ensemble)
    assert audits.read(ensemble, 2)['attacks'] == ['clean', 'ifgsm5']
    np.testing.assert_array_equal(seen[-1].stands, seen[0].stands)
    found, expected = (s.log_probs(audit_checks.pixels(s)) for s in (seen[-1], seen[0]))
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_a_runs_audit_is_of_its_own_results_and_stands_in_json_page_and_report(
    small_network, tmp_path, monkeypatch, capsys
):
    config = config_for(
        train__steps=2, eval__attacks=('clean', 'ifgsm5'), eval__long_attacks=(),
        eval__examples=0, audit__examples=4,
    )  # fmt: skip
    run = epath.Path(tmp_path / 'run')
    make_run(config, run, steps=(2,))
    assert not audit.is_made(config, run)
    with pytest.raises(UserError, match='no attack on step 2 to audit yet'):
        audit.run(config, run)
    evaluate.run(config, run)
    seen = []

    def made(subject, tell):
        seen.append(subject)
        checks = [
            audit_checks.check(subject, 'scale', False, 'All is well.', 'Unseen.'),
            audit_checks.check(subject, 'loss', True, 'It fells <2> more.', 'Add apgd_nce.', n=3),
        ]
        list(map(tell, checks))
        return checks, np.zeros(4, bool)

    monkeypatch.setattr(audit, 'make', made)
    page = study.make_audit(config, run)
    ledger = workdir.read_ledger(run / 'eval' / '2.npz')
    expected = np.stack([ledger['clean_correct'], ledger['ifgsm5_correct']])[:, :4]
    np.testing.assert_array_equal(seen[0].stands, expected)
    assert seen[0].threat == ThreatModel.of(config)
    assert seen[0].reported['attack'] == 'ifgsm'
    np.testing.assert_array_equal(seen[0].labels, ledger['label'][:4])
    content = audits.read(run, 2)
    assert content['reported'] == np.mean(np.all(expected, axis=0))
    _audit_an_ensemble_of_runs(run, tmp_path, seen)
    assert (content['found'], content['n']) == (0, 4)
    assert audits.verdict(content) == 'failed: loss'
    assert audit.is_made(config, run)
    text = page.read_text()
    assert 'It fells &lt;2&gt; more.' in text
    assert 'Add apgd_nce.' in text
    assert 'Unseen.' not in text  # remedies are for what failed
    # Failed checks come first.
    assert text.index('fells') < text.index('All is well')

    write.write(run)
    report = (run / 'report' / 'report.html').read_text()
    assert 'failed: loss' in report
    assert 'It fells &lt;2&gt; more. Add apgd_nce.' in report
    # Of an attack that came later the audit knows nothing.
    config.eval.attacks = ('clean', 'ifgsm5', 'ifgsm2')
    evaluate.run(config, run)
    assert not audit.is_made(config, run)
    write.write(run)
    assert 'failed: loss (of fewer attacks)' in (run / 'report' / 'report.html').read_text()
    # A damaged one is none.
    audits.path_of(run, 2).write_text('{}')
    with pytest.raises(UserError, match='_audit'):
        audits.read(run, 2)
    write.write(run)
