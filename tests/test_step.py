"""One step against formulas written out again, on a network small enough to be sure of."""

import functools
import pathlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from etils import epath
from small_network import SmallNetwork

from ensadv.models import ensemble
from ensadv.storage import checkpoints
from ensadv.training import objectives
from ensadv.training.step import initial_state, train_step


class Linear(nn.Module):
    """Batch norm and a linear layer, with the interface of the members' networks."""

    @nn.compact
    def __call__(self, x, train):
        x = x.reshape(len(x), -1)
        x = nn.BatchNorm(use_running_average=not train, momentum=0.5, name='norm')(x)
        return nn.Dense(3, name='linear')(x)


X = jax.random.uniform(jax.random.key(0), (8, 2, 2, 1))
X_ADV = jnp.clip(X + 0.1, 0, 1)
Y = jnp.arange(8) % 3
KEYS = jax.random.split(jax.random.key(1), 8)
OPTIMIZER = optax.sgd(0.5)


def shift(log_prob_fn, rng, x, y):
    """An attack whose result is known."""
    del log_prob_fn, rng, y
    return jnp.clip(x + 0.1, 0, 1)


def state_of(k=2):
    return initial_state(Linear(), jax.random.key(2), k, (2, 2, 1), OPTIMIZER)


def step(state, attack=shift, **settings):
    settings = {'objective': objectives.paper(1.0), 'combine': 'probs'} | settings
    return train_step(
        state, (X, Y), KEYS, model=Linear(), optimizer=OPTIMIZER, attack=attack, **settings
    )


def normalised(x):
    x = x.reshape(8, -1)
    return (x - x.mean(0)) / jnp.sqrt(x.var(0) + 1e-5)


def loss_by_hand(params, x):
    """Cross-entropy of the mean softmax over members; each batch normalised by itself."""
    probs = 0
    for i in range(2):
        inputs = normalised(x) * params['norm']['scale'][i] + params['norm']['bias'][i]
        logits = inputs @ params['linear']['kernel'][i] + params['linear']['bias'][i]
        probs += jax.nn.softmax(logits) / 2
    return -jnp.mean(jnp.log(probs[jnp.arange(8), Y]))


@pytest.mark.parametrize('weight', [0.0, 1.0, 3.0])
def test_loss_and_update_are_those_of_algorithm_1(weight):
    state = state_of()

    def objective(params):
        clean, adversarial = loss_by_hand(params, X), loss_by_hand(params, X_ADV)
        return (clean + weight * adversarial) / (1 + weight), (clean, adversarial)

    (loss, (clean, adversarial)), gradient = jax.value_and_grad(objective, has_aux=True)(
        state.params
    )
    new, metrics = step(state, objective=objectives.paper(weight))
    np.testing.assert_allclose(metrics['loss'], loss, rtol=1e-5)
    np.testing.assert_allclose(metrics['clean_loss'], clean, rtol=1e-5)
    if weight:
        np.testing.assert_allclose(metrics['adversarial_loss'], adversarial, rtol=1e-5)
    squares = [jnp.sum(g**2) for g in jax.tree.leaves(gradient)]
    np.testing.assert_allclose(metrics['gradient_norm'], jnp.sqrt(sum(squares)), rtol=1e-4)
    expected = jax.tree.map(lambda w, g: w - 0.5 * g, state.params, gradient)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), new.params, expected)
    squares = [jnp.sum(w**2) for w in jax.tree.leaves(expected)]
    np.testing.assert_allclose(metrics['parameter_norm'], jnp.sqrt(sum(squares)), rtol=1e-5)
    assert new.step == 1


def test_clean_training_never_calls_the_attack():
    def forbidden(*_):
        raise AssertionError('attacked')

    _, metrics = step(state_of(), attack=forbidden, objective=objectives.paper(0.0))
    assert 'adversarial_loss' not in metrics
    with pytest.raises(AssertionError, match='attacked'):
        step(state_of(), attack=forbidden)


def test_running_averages_take_the_clean_and_then_the_adversarial_batch():
    state = state_of()
    new, _ = step(state)
    clean, adversarial = (x.reshape(8, -1).mean(0) for x in (X, X_ADV))
    expected = 0.5 * (0.5 * 0 + 0.5 * clean) + 0.5 * adversarial
    for i in range(2):
        np.testing.assert_allclose(new.batch_stats['norm']['mean'][i], expected, rtol=1e-5)


def test_an_objective_may_compare_both_passes_and_the_members():
    """As TRADES does, and regularisers over members; its attack's target is the prediction."""
    state, seen = state_of(), {}

    def loss(predict, x, x_adv, y):
        clean, adversarial = predict(x), predict(x_adv)
        divergence = jnp.sum(jnp.exp(clean.log_probs) * (clean.log_probs - adversarial.log_probs))
        agreement = jnp.sum(clean.member_logits[0] * clean.member_logits[1])
        return divergence + agreement, {'agreement': agreement}

    def spy(log_prob_fn, rng, x, target):
        seen['target'], seen['log_probs'] = target, log_prob_fn(x)
        return shift(log_prob_fn, rng, x, target)

    objective = objectives.Objective(
        (objectives.Term(3, loss),), scale=0.5, attack_target=lambda predict, x, y: predict(x)
    )
    new, metrics = step(state, attack=spy, objective=objective)

    def members_by_hand(params, x):
        each = [
            (normalised(x) * params['norm']['scale'][i] + params['norm']['bias'][i])
            @ params['linear']['kernel'][i]
            + params['linear']['bias'][i]
            for i in range(2)
        ]
        return each, jnp.log(sum(map(jax.nn.softmax, each)) / 2)

    def by_hand(params):
        (one, other), clean = members_by_hand(params, X)
        _, adversarial = members_by_hand(params, X_ADV)
        divergence = jnp.sum(jnp.exp(clean) * (clean - adversarial))
        return 1.5 * (divergence + jnp.sum(one * other))

    value, gradient = jax.value_and_grad(by_hand)(state.params)
    np.testing.assert_array_equal(seen['target'], seen['log_probs'])
    np.testing.assert_allclose(metrics['loss'], value, rtol=1e-4)
    assert {*metrics} == {'loss', 'agreement', 'gradient_norm', 'parameter_norm'}
    expected = jax.tree.map(lambda w, g: w - 0.5 * g, state.params, gradient)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), new.params, expected)


def test_a_checkpoint_has_averages_only_where_there_are_some(tmp_path):
    """So that what was written before there was a place for them can be read."""
    state = state_of()
    assert [key.name for (key, *_), _ in jax.tree_util.tree_leaves_with_path(state)] == sorted(
        ['step'] + ['params'] * 4 + ['batch_stats'] * 2, key=['step', 'params', 'batch_stats'].index
    )
    averaged = {'params': state.params, 'batch_stats': state.batch_stats}
    for number, kept in ((1, state), (2, state.replace(averaged=averaged))):
        saved = checkpoints.open_checkpoints(epath.Path(tmp_path) / str(number), keep=1)
        saved.save(number, kept, wait=True)
        _, restored = saved.restore_newest(jax.eval_shape(lambda kept=kept: kept))
        assert (restored.averaged is None) == (number == 1)
        jax.tree.map(np.testing.assert_array_equal, restored, kept)
        saved.close()
    files = [path.read_text() for path in pathlib.Path(tmp_path).rglob('_METADATA')]
    assert sorted('averaged' in text for text in files) == [False, True]


@pytest.mark.parametrize('batch_norm', ['running', 'batch'])
def test_the_attack_sees_the_ensemble_with_the_statistics_it_is_told(batch_norm):
    state = state_of()
    seen = {}

    def spy(log_prob_fn, rng, x, y):
        del rng, y
        seen['log_probs'] = log_prob_fn(x)
        return x

    step(state, attack=spy, attack_batch_norm=batch_norm)
    probs = 0
    for i in range(2):
        inputs = normalised(X) if batch_norm == 'batch' else X.reshape(8, -1) / np.sqrt(1 + 1e-5)
        linear = jax.tree.map(lambda leaf, i=i: leaf[i], state.params['linear'])
        probs += jax.nn.softmax(inputs @ linear['kernel'] + linear['bias']) / 2
    np.testing.assert_allclose(seen['log_probs'], jnp.log(probs), atol=1e-5)


def test_no_gradient_flows_through_the_attack():
    """Algorithm 1 takes x_N as given."""

    def scaling(log_prob_fn, rng, x, y):
        del rng
        # Depends on the weights, and so would change their gradient.
        return x + 0.1 * jax.grad(lambda x: log_prob_fn(x)[jnp.arange(8), y].sum())(x)

    state = state_of()
    variables = {'params': state.params, 'batch_stats': state.batch_stats}
    f = lambda x: ensemble.combine(ensemble.apply(Linear(), variables, x), 'probs')
    x_adv = scaling(f, KEYS, X, Y)
    ours, _ = step(state, attack=scaling)
    given, _ = step(state, attack=lambda *_: x_adv)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), ours.params, given.params
    )


@pytest.mark.skipif(jax.default_backend() != 'cpu', reason='elsewhere the order is left to XLA')
def test_one_pass_has_its_activations_in_memory_at_a_time():
    def bytes_of_a_step(adversarial_weight):
        model = SmallNetwork(num_classes=3)
        x, y, keys = jnp.zeros((64, 32, 32, 3)), jnp.zeros(64, int), jnp.stack([KEYS[0]] * 64)
        init = functools.partial(initial_state, model, KEYS[0], 1, x.shape[1:], optimizer=OPTIMIZER)
        step = functools.partial(
            train_step,
            model=model,
            optimizer=OPTIMIZER,
            attack=shift,
            combine='probs',
            objective=objectives.paper(adversarial_weight),
        )
        compiled = jax.jit(step).lower(jax.eval_shape(init), (x, y), keys).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    # Both passes at once take twice the memory.
    assert bytes_of_a_step(1.0) < 1.5 * bytes_of_a_step(0.0)
