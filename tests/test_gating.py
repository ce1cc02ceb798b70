"""Gated members against the mixture written out, p(y|x) = sum_i w_i(x) p(y|x, theta_i)."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ensadv.attacks import driver
from ensadv.attacks.first_order import IFGSM
from ensadv.attacks.threat_model import ThreatModel
from ensadv.models import ensemble
from ensadv.models.gated import Gated
from ensadv.models.wide_resnet import WideResNet
from ensadv.training import objectives
from ensadv.training.step import initial_state, train_step

MEMBER = WideResNet(num_classes=4, mean=(0.4,), std=(0.3,), depth=10, width=1)
MODEL = Gated(MEMBER, width=3)
SHAPE = (8, 8, 1)
X = jax.random.uniform(jax.random.key(1), (6, *SHAPE))
Y = jnp.arange(6) % 4

outputs = jax.jit(lambda variables, x: ensemble.apply(MODEL, variables, x))


@pytest.fixture(scope='module')
def variables():
    """Two members, as they are initialised."""
    return jax.jit(lambda: ensemble.init(MODEL, jax.random.key(0), 2, SHAPE))()


def with_gate(variables, **linear):
    """Replaces the kernel, the bias or both of the gates' last layer."""
    gate = variables['params']['gate']
    gate = gate | {'linear': gate['linear'] | linear}
    return variables | {'params': variables['params'] | {'gate': gate}}


def perturbed(variables):
    """Gives the gates' last layer weights with which they prefer a member on each image."""
    kernel = 5 * jax.random.normal(jax.random.key(2), (2, 6, 1))
    return with_gate(variables, kernel=kernel)


def member_probs(variables):
    """Returns [2, B, classes] of the bare networks, without Gated."""
    bare = {'params': variables['params']['member'], 'batch_stats': variables['batch_stats']}
    bare['batch_stats'] = bare['batch_stats']['member']
    return jax.nn.softmax(ensemble.apply(MEMBER, bare, X))


def scores(variables, x=X, model=MODEL):
    """Returns [2, B]: the mass of a gated member's probabilities is exp(score)."""
    return jax.nn.logsumexp(ensemble.apply(model, variables, x), axis=-1)


def log_probs(variables, x=X, how='gating'):
    return ensemble.combine(outputs(variables, x), how)


def test_untrained_gates_weigh_members_equally(variables):
    np.testing.assert_allclose(log_probs(variables), log_probs(variables, how='probs'), atol=1e-6)
    np.testing.assert_allclose(
        np.exp(log_probs(variables)), member_probs(variables).mean(0), atol=1e-6
    )


def test_weights_are_the_softmax_of_the_scores(variables):
    three_to_one = with_gate(variables, bias=jnp.array([[np.log(3)], [0.0]], jnp.float32))
    first, second = member_probs(variables)
    np.testing.assert_allclose(
        np.exp(log_probs(three_to_one)), 0.75 * first + 0.25 * second, atol=1e-6
    )


def test_weights_depend_on_the_image(variables):
    variables = perturbed(variables)
    weights = np.exp(jax.nn.log_softmax(scores(variables), axis=0))
    assert np.ptp(weights[0]) > 0.01
    expected = (weights[..., None] * member_probs(variables)).sum(0)
    found = np.exp(log_probs(variables))
    np.testing.assert_allclose(found, expected, atol=1e-6)
    np.testing.assert_allclose(found.sum(-1), 1, atol=1e-5)


@pytest.mark.parametrize('how', ['probs', 'logits'])
def test_other_combinations_ignore_the_scores(variables, how):
    shifted = with_gate(variables, bias=jnp.array([[7.0], [-2.0]]))
    np.testing.assert_allclose(
        log_probs(shifted, how=how), log_probs(variables, how=how), atol=1e-5
    )


def test_scores_however_large_leave_everything_finite(variables):
    extreme = with_gate(variables, bias=jnp.array([[1e4], [-1e4]]))
    value, gradient = jax.value_and_grad(lambda x: log_probs(extreme, x)[jnp.arange(6), Y].sum())(X)
    assert np.isfinite(value)
    assert np.all(np.isfinite(gradient))
    # Of a sum of 1e4 and a log-probability, float32 keeps three decimal places.
    np.testing.assert_allclose(np.exp(log_probs(extreme)), member_probs(variables)[0], atol=1e-3)


def test_the_gate_sees_the_standardised_image_and_computes_in_float32(variables):
    variables = perturbed(variables)
    bare = MODEL.clone(member=MEMBER.clone(mean=(0.0,), std=(1.0,)))
    half = MODEL.clone(member=MEMBER.clone(dtype=jnp.dtype('bfloat16')))
    expected = scores(variables)
    np.testing.assert_allclose(scores(variables, (X - 0.4) / 0.3, bare), expected, atol=1e-5)
    np.testing.assert_allclose(scores(variables, X, half), expected, atol=1e-5)


def test_gradients_reach_the_image_and_every_weight(variables):
    variables = perturbed(variables)

    def loss(params, x):
        return log_probs(variables | {'params': params}, x)[jnp.arange(6), Y].sum()

    of_params, of_x = jax.jit(jax.grad(loss, argnums=(0, 1)))(variables['params'], X)
    for path, leaf in jax.tree.leaves_with_path(of_params):
        assert np.all(np.any(leaf != 0, axis=tuple(range(1, leaf.ndim)))), path
    assert np.all(np.isfinite(of_x))
    # An attack can turn the gates too: the scores depend on the image through them alone.
    of_scores = jax.jit(jax.grad(lambda x: scores(variables, x).sum()))(X)
    assert np.abs(of_scores).max() > 1e-3


def test_a_training_step_changes_members_and_gates():
    optimizer = optax.sgd(0.1)
    # Initialised as ever, but for gates that already tell images apart: at zero, their last layer
    # keeps gradients from the layers below it.
    state = initial_state(MODEL, jax.random.key(3), 2, SHAPE, optimizer)
    state = state.replace(params=perturbed({'params': state.params})['params'])
    ifgsm, threat = IFGSM(steps=2, step_size=0.05, sigma=0.1), ThreatModel('linf', 0.15)
    attack = lambda predict, *given: driver.last_iterate(ifgsm, predict, threat, *given)
    step = jax.jit(
        partial(
            train_step,
            model=MODEL,
            optimizer=optimizer,
            combine='gating',
            attack=attack,
            objective=objectives.paper(1.0),
        )
    )
    new, metrics = step(state, (X, Y), jax.random.split(jax.random.key(4), 6))
    assert {*new.params} == {'gate', 'member'}
    for name, tree in (('params', state.params), ('batch_stats', state.batch_stats)):
        for path, (old, changed) in jax.tree.leaves_with_path(
            jax.tree.map(lambda *leaves: leaves, tree, getattr(new, name)),
            is_leaf=lambda node: isinstance(node, tuple),
        ):
            assert np.all(np.isfinite(changed)), path
            assert np.any(old != changed), path
    assert all(np.isfinite(value) for value in metrics.values())
