"""From config fields to what is computed: attacks and a step of linear networks, worked out anew.

All of it is NumPy in float64. The groups of the config differ in every field, so that one taken for
another is seen.
"""

import dataclasses
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import tiny_config
from etils import epath
from scipy.special import log_softmax, logsumexp

from ensadv import build
from ensadv.evaluation import attack_settings, blackbox, evaluator, results
from ensadv.models import ensemble
from ensadv.models.wide_resnet import WideResNet
from ensadv.runtime import distributed
from ensadv.training import from_config, objectives, streams
from ensadv.training.step import initial_state, train_step

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (20, 2, 2, 3), np.uint8)
X = IMAGES.reshape(20, 12) / 255
Y = np.arange(20, dtype=np.int32) % 3
WEIGHTS = RNG.normal(0, 2, (2, 12, 3))  # of two members, far apart
FIELDS = {
    'epsilon': 0.1,
    'ensemble.size': 2,
    'train.learning_rate_steps': (1,),
    'train.learning_rate_factor': 0.2,
    'attack.name': 'ifgsm',
    'attack.steps': 3,
    'attack.step_size': 0.02,
    'attack.start': 'none',
    'attack.sigma': 0.03,
    'attack.loss': 'cross_entropy',
    'attack.fgsm.step_size': 0.06,
    'attack.fgsm.start': 'none',
    'attack.n_fgsm.step_size': 0.17,  # to beyond the ball
    'attack.n_fgsm.noise': 0.0,
    'eval.ifgsm.step_size': 0.013,
    'eval.ifgsm.sigma': 0.021,
    'eval.ifgsm.start': 'none',
    'eval.pgd.step_size': 0.017,
    'eval.pgd.sigma': 0.04,
    'eval.pgd.start': 'none',
    'eval.seed': 5,
    'blackbox.step_size': 0.024,
    'blackbox.sigma': 0.06,
    'blackbox.start': 'none',
    'blackbox.seed': 9,
    'blackbox.steps': 4,
    'blackbox.rounds': 2,
}


class Linear(nn.Module):
    classes: int = 3

    @nn.compact
    def __call__(self, x, train):
        del train
        self.variable('batch_stats', 'none', jnp.zeros, ())
        return nn.Dense(self.classes, use_bias=False, name='linear')(x.reshape(len(x), -1))


def config_of(**changes):
    config = tiny_config()
    config.update_from_flattened_dict(FIELDS)
    config.update_from_flattened_dict({k.replace('__', '.'): v for k, v in changes.items()})
    return config


# The ensemble, its gradients and the attacks, by hand. Weights are [k, pixels, classes].


def log_probs(weights, x):
    """The log of the mean probability, [B, classes]."""
    members = log_softmax(np.einsum('bd,kdc->kbc', x, weights), axis=-1)
    return logsumexp(members, axis=0) - np.log(len(weights))


def slope(weights, x, classes):
    """The gradient of a class's log-probability by the image, [B, pixels]."""
    shares, slopes = [], []
    for member in weights:
        probs = np.exp(log_softmax(x @ member, axis=-1))
        shares.append(probs[np.arange(len(x)), classes])
        slopes.append(member.T[classes] - probs @ member.T)
    return np.einsum('kb,kbd->bd', shares, slopes) / np.sum(shares, axis=0)[:, None]


def rival(log_probs, y):
    """The strongest class but the label."""
    return np.argmax(np.where(np.eye(log_probs.shape[1], dtype=bool)[y], -np.inf, log_probs), 1)


def margin(log_probs, y):
    rows = np.arange(len(y))
    return log_probs[rows, y] - log_probs[rows, rival(log_probs, y)]


def cross_entropy_slope(weights, x, y):
    return -slope(weights, x, y)


def margin_slope(weights, x, y):
    return slope(weights, x, rival(log_probs(weights, x), y)) - slope(weights, x, y)


SLOPES = {'cross_entropy': cross_entropy_slope, 'margin': margin_slope}


def points(kind, num_steps, step_size, epsilon, climbed, schedule=lambda share: 1, norm='linf'):
    """An attack's points from the clean images on, [steps + 1, B, pixels]."""
    x, found = X, [X]
    first, second = np.zeros_like(x), np.zeros_like(x)
    for step in range(num_steps):
        gradient = climbed(x)
        first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient**2
        adam = first / (1 - 0.9 ** (step + 1)) / np.sqrt(second / (1 - 0.999 ** (step + 1)))
        update = {'ifgsm': np.sign(gradient), 'pgd': adam}[kind]
        if norm == 'l2':
            update = {'ifgsm': gradient, 'pgd': adam}[kind]
            update = update / np.linalg.norm(update, axis=1, keepdims=True)
        x = x + step_size * schedule(step / num_steps) * update
        if norm == 'l2':
            far = np.linalg.norm(x - X, axis=1, keepdims=True)
            x = np.clip(X + (x - X) * np.minimum(1, epsilon / np.maximum(far, 1e-12)), 0, 1)
        else:
            x = np.clip(np.clip(x, X - epsilon, X + epsilon), 0, 1)
        found.append(x)
    return np.stack(found)


def attacked(config, weights=WEIGHTS):
    """Where training's attack of these weights ends."""
    attack, epsilon = config.attack, config.epsilon
    climbed = lambda x: SLOPES[attack.loss](weights, x, Y)
    kind, steps, step_size = attack.name, attack.steps, attack.step_size
    if kind in ('fgsm', 'n_fgsm'):
        epsilon = 1 if kind == 'n_fgsm' else epsilon
        kind, steps, step_size = 'ifgsm', 1, attack[kind].step_size
    return points(kind, steps, step_size, epsilon, climbed, norm=config.norm)[-1]


TRAINING = pytest.mark.parametrize(
    'changes',
    [
        {},
        {'attack__name': 'pgd'},
        {'attack__name': 'fgsm'},
        {'attack__name': 'fgsm', 'attack__fgsm__step_size': 0.125, 'attack__loss': 'margin'},
        {'attack__name': 'fgsm', 'norm': 'l2', 'epsilon': 0.3, 'attack__fgsm__step_size': 0.2},
        {'attack__name': 'n_fgsm'},
        {'attack__steps': 4},
        {'attack__steps': 9, 'attack__step_size': 0.05},
        {'attack__loss': 'margin'},
        {'epsilon': 0.03},
        {'norm': 'l2', 'epsilon': 0.3, 'attack__step_size': 0.1},
        {'norm': 'l2', 'epsilon': 0.3, 'attack__step_size': 0.1, 'attack__name': 'pgd'},
        {'epsilon': 0.5, 'attack__step_size': 0.3, 'attack__loss': 'margin', 'attack__name': 'pgd'},
    ],
    ids=str,
)


@TRAINING
def test_the_training_attack_is_the_configs(changes):
    config = config_of(**changes)
    predict = lambda x: jax.nn.log_softmax(x.reshape(len(x), -1) @ jnp.float32(WEIGHTS[0]))
    keys = jax.random.split(jax.random.key(0), len(Y))
    found = from_config.training_attack(config)(
        predict, keys, jnp.float32(X.reshape(IMAGES.shape)), Y
    )
    np.testing.assert_allclose(found.reshape(X.shape), attacked(config, WEIGHTS[:1]), atol=2e-5)


@pytest.mark.parametrize('name', ['ifgsm', 'pgd'])
def test_the_attack_climbs_the_divergence_from_a_distribution(name):
    """As TRADES has it, from the clean prediction; here from another, where its start is not 0."""
    config = config_of(attack__name=name, train__objective='trades')
    predict = lambda x: jax.nn.log_softmax(x.reshape(len(x), -1) @ jnp.float32(WEIGHTS[0]))
    keys = jax.random.split(jax.random.key(0), len(Y))
    p = np.exp(log_probs(WEIGHTS[1:], X))
    found = from_config.training_attack(config)(
        predict, keys, jnp.float32(X.reshape(IMAGES.shape)), jnp.float32(p)
    )
    # Of sum_y p(y) (log p(y) - log q(y)) by the image, on which q depends.
    climbed = lambda x: (
        -sum(p[:, [label]] * slope(WEIGHTS[:1], x, np.full(len(Y), label)) for label in range(3))
    )
    expected = points(name, 3, config.attack.step_size, config.epsilon, climbed)[-1]
    np.testing.assert_allclose(found.reshape(X.shape), expected, atol=2e-5)


@pytest.mark.parametrize(
    'changes, deviation, kurtosis',
    [
        ({'start': 'gaussian'}, 0.03, 3),
        ({'start': 'uniform'}, 0.1 / np.sqrt(3), 1.8),
        ({'name': 'fgsm', 'fgsm__start': 'uniform'}, 0.1 / np.sqrt(3), 1.8),
        ({'name': 'n_fgsm', 'n_fgsm__noise': 0.25}, 0.25 / np.sqrt(3), 1.8),
    ],
)
def test_the_training_attack_starts_as_the_config_says(changes, deviation, kurtosis):
    steps = {f'attack__{group}step_size': 1e-7 for group in ('', 'fgsm__', 'n_fgsm__')}
    config = config_of(**steps, **{f'attack__{field}': value for field, value in changes.items()})
    x = jnp.full((500, 2, 2, 3), 0.5)
    keys = jax.random.split(jax.random.key(0), len(x))
    y = jnp.zeros(len(x), int)
    predict = lambda x: jax.nn.log_softmax(x.reshape(len(x), -1) @ jnp.float32(WEIGHTS[0]))
    noise = np.asarray(from_config.training_attack(config)(predict, keys, x, y)) - 0.5
    np.testing.assert_allclose(noise.std(), deviation, rtol=0.04)
    assert abs(np.mean(noise**4) / deviation**4 - kurtosis) < 0.3
    # What the watch tries begins there too, or with the same noise where the ball ends before it.
    tried = from_config.two_step_attack(config)(predict, keys, x, y, num_steps=0) - 0.5
    if config.attack.name != 'ifgsm' or config.attack.start != 'gaussian':
        noise = noise * (0.1 / np.sqrt(3) / deviation)
    np.testing.assert_allclose(tried, noise, atol=1e-6)


def test_the_watch_tries_two_steps_of_half_epsilon():
    config = config_of(attack__name='fgsm', attack__loss='margin')
    predict = lambda x: jax.nn.log_softmax(x.reshape(len(x), -1) @ jnp.float32(WEIGHTS[0]))
    keys = jax.random.split(jax.random.key(0), len(Y))
    found = from_config.two_step_attack(config)(
        predict, keys, jnp.float32(X.reshape(IMAGES.shape)), Y
    )
    climbed = lambda x: margin_slope(WEIGHTS[:1], x, Y)
    expected = points('ifgsm', 2, 0.05, 0.1, climbed)[-1]
    np.testing.assert_allclose(found.reshape(X.shape), expected, atol=2e-5)


@pytest.mark.parametrize(
    'changes',
    [
        {},
        {'train__adversarial_weight': 3.0},
        {'ensemble__combine': 'logits', 'attack__name': 'pgd', 'attack__loss': 'margin'},
        {'train__nesterov': True, 'train__momentum': 0.6, 'train__weight_decay': 0.05},
        {'train__learning_rate': 0.03, 'train__momentum': 0.0},
    ],
    ids=str,
)
def test_training_steps_are_the_configs(changes):
    """Attack, combination, weight of the adversarial loss, and all of the optimizer's settings."""
    config = config_of(**changes)
    train, joined = config.train, config.ensemble.combine == 'logits'
    settings = from_config.step_settings(config, Linear())
    state = initial_state(Linear(), jax.random.key(0), 2, IMAGES.shape[1:], settings['optimizer'])
    state = state.replace(params={'linear': {'kernel': jnp.float32(WEIGHTS)}})
    keys = jax.random.split(jax.random.key(0), len(Y))
    batch = jnp.float32(X.reshape(IMAGES.shape)), jnp.asarray(Y)
    make_step = jax.jit(partial(train_step, **settings))

    weights, velocity, rows, rho = WEIGHTS, 0, np.arange(len(Y)), train.adversarial_weight
    for rate in (train.learning_rate, train.learning_rate / 5):
        state, metrics = make_step(state, batch, keys)
        # The mean logits are those of one linear network.
        judged = weights.mean(0, keepdims=True) if joined else weights
        gradient, loss = 0, {}
        for name, x, share in (('clean', X, 1), ('adversarial', attacked(config, judged), rho)):
            loss[name] = -log_probs(judged, x)[rows, Y].mean()
            np.testing.assert_allclose(metrics[f'{name}_loss'], loss[name], rtol=1e-4)
            right = np.mean(margin(log_probs(judged, x), Y) > 0)
            np.testing.assert_allclose(metrics[f'{name}_accuracy'], right, rtol=1e-5)
            members = np.exp(log_softmax(np.einsum('bd,kdc->kbc', x, judged), axis=-1))
            of_label = members[:, rows, Y]
            by_logits = (members - np.eye(3)[Y]) * (of_label / of_label.sum(0))[..., None]
            gradient = gradient + share * np.einsum('bd,kbc->kdc', x, by_logits) / len(Y)
        mean_loss = (loss['clean'] + rho * loss['adversarial']) / (1 + rho)
        np.testing.assert_allclose(metrics['loss'], mean_loss, rtol=1e-4)
        gradient = gradient / (1 + rho) / (2 if joined else 1) + train.weight_decay * weights
        velocity = gradient + train.momentum * velocity
        update = gradient + train.momentum * velocity if train.nesterov else velocity
        weights = weights - rate * update
    kernel = state.params['linear']['kernel']
    np.testing.assert_allclose(kernel, weights, atol=1e-4 * train.learning_rate)
    # Weights of zero: every example is a tie, and so an error.
    _, metrics = make_step(state.replace(params={'linear': {'kernel': 0 * kernel}}), batch, keys)
    assert metrics['clean_accuracy'] == metrics['adversarial_accuracy'] == 0


def test_a_network_is_the_configs():
    fields = {
        'batch_norm__momentum': 0.8, 'batch_norm__epsilon': 1e-3, 'batch_norm__sync': True,
        'model__depth': 16, 'model__width': 3, 'model__conv': 'separate', 'eval__dtype': 'bfloat16',
        'model__dtype': 'float32', 'model__activation': 'silu',
    }  # fmt: skip
    description = {'num_classes': 7, 'mean': [0.4], 'std': [0.3]}
    model = build.model(config_of(**fields), description, dtype='bfloat16', remat=True)
    assert isinstance(model, WideResNet)
    found = {field.name: getattr(model, field.name) for field in dataclasses.fields(model)}
    expected = {
        'num_classes': 7, 'mean': (0.4,), 'std': (0.3,), 'depth': 16, 'width': 3,
        'dtype': jnp.dtype('bfloat16'), 'conv': 'separate', 'remat': True, 'norm_momentum': 0.8,
        'norm_epsilon': 1e-3, 'norm_axis': distributed.AXIS, 'activation': 'silu',
    }  # fmt: skip
    assert expected == {name: found[name] for name in expected}
    # Evaluation computes in a type of its own.
    network = build.network(config_of(**fields), description | {'image_shape': [8, 8, 1]})
    assert network.member_logits.args[0] == model.clone(remat=False)


def test_batches_are_drawn_as_the_config_says():
    fields = {
        'train__batch_size': 20, 'data__extra_fraction': 0.33, 'data__pad': 3, 'data__flip': False,
        'data__cutout': 2, 'data__cutmix': 0.4,
    }  # fmt: skip
    description = {'num_classes': 7, 'mean': [0.4]}
    found = streams.sampling(config_of(**fields), description)
    assert found == streams.Sampling(
        batch_size=20, num_extra=7, pad=3, flip=False, cutout=2, cutmix=0.4, mean=(0.4,),
        num_classes=7,
    )  # fmt: skip
    assert not streams.sampling(config_of(data__name='tfds:emnist/letters'), description).flip
    assert streams.sampling(config_of(data__name='tfds:fashion_mnist'), description).flip


def test_shares_of_labels_are_trained_on():
    """As CutMix makes them; an accuracy counts against the largest."""
    log_probs = jnp.log(jnp.array([[0.5, 0.3, 0.2], [0.1, 0.2, 0.7]]))
    shares = jnp.array([[0.4, 0.6, 0.0], [0.0, 0.25, 0.75]])
    predict = lambda x: objectives.Prediction(log_probs[None], log_probs)
    (term,) = objectives.paper(0.0).terms
    loss, metrics = term.loss(predict, None, None, shares)
    expected = -(np.asarray(shares) * np.asarray(log_probs)).sum(1)
    np.testing.assert_allclose(loss, expected.mean(), rtol=1e-6)
    assert metrics['clean_accuracy'] == 0.5


@pytest.mark.parametrize('batch_norm', ['running', 'batch'])
def test_the_training_attack_has_the_statistics_of_the_config(batch_norm):
    config = config_of(attack__batch_norm=batch_norm)
    assert from_config.step_settings(config, Linear())['attack_batch_norm'] == batch_norm


SCHEDULES = {
    'constant': lambda share: 1,
    'linear': lambda share: 1 - share,
    'cosine': lambda share: (1 + np.cos(np.pi * share)) / 2,
}


def bench_of(weights, combine):
    """Returns an evaluator of linear networks, and their variables."""
    variables = {'params': {'linear': {'kernel': jnp.float32(weights)}}}
    variables['batch_stats'] = {'none': jnp.zeros(len(weights))}
    network = ensemble.Network(
        partial(ensemble.apply, Linear(weights.shape[-1])),
        combine,
        jax.eval_shape(lambda: variables),
    )
    return evaluator.Evaluator(network, 250), distributed.replicate(variables)


@pytest.mark.parametrize(
    'name, changes',
    [
        ('clean', {}),
        ('ifgsm3', {}),
        ('ifgsm5', {'eval__ifgsm__loss': 'margin', 'eval__ifgsm__schedule': 'linear'}),
        ('ifgsm9', {'eval__ifgsm__step_size': 0.06, 'epsilon': 0.15}),
        ('pgd3', {'eval__pgd__restarts': 2}),  # the same again, since it starts at the image
        ('pgd7', {'eval__pgd__loss': 'margin', 'eval__pgd__schedule': 'cosine'}),
        ('pgd5', {'eval__pgd__step_size': 0.05, 'epsilon': 0.06}),
        ('ifgsm6', {'norm': 'l2', 'epsilon': 0.4, 'eval__ifgsm__step_size': 0.15}),
    ],
)
def test_an_evaluation_attack_is_the_configs(name, changes):
    config = config_of(**changes)
    bench, variables = bench_of(WEIGHTS, 'probs')
    found = bench.evaluate(
        variables, attack_settings.evaluation_settings(config, name), IMAGES, Y, name
    )
    if name == 'clean':
        np.testing.assert_allclose(found.margin, margin(log_probs(WEIGHTS, X), Y), atol=1e-4)
        return
    kind, num_steps = name[:-1], int(name[-1])
    group = config.eval[kind]
    climbed = lambda x: SLOPES[group.loss](WEIGHTS, x, Y)
    given = kind, num_steps, group.step_size, config.epsilon, climbed, SCHEDULES[group.schedule]
    visited = points(*given, norm=config.norm)
    margins = np.stack([margin(log_probs(WEIGHTS, x), Y) for x in visited])
    np.testing.assert_allclose(found.margin, margins.min(0), atol=1e-3)
    np.testing.assert_allclose(found.last_margin, margins[-1], atol=1e-3)


def test_a_tie_has_fallen_from_the_start():
    settings = attack_settings.evaluation_settings(
        config_of(eval__long_attacks=('ifgsm2',)), 'ifgsm2'
    )
    bench, variables = bench_of(np.zeros((1, 12, 3)), 'probs')
    found = bench.long_attack(variables, settings, IMAGES, Y, 'test')
    np.testing.assert_array_equal(found.margin, 0)
    np.testing.assert_array_equal(found.fooled_at, 0)
    assert not found.stands.any()


def test_accuracy_is_of_the_lowest_margin_and_of_what_was_attacked(tmp_path):
    config = config_of(eval__attacks=('ifgsm3',))
    made = results.Results(config, epath.Path(tmp_path), 'test', lambda _: None)
    made._environment = {}
    verdicts = evaluator.Verdicts(
        margin=np.array([1, -1, 1, 0]),
        last_margin=np.array([1, 1, 1, 1]),
        has_gradient=np.array([True, True, False, True]),
    )
    result = made._result(made.units[0], verdicts)
    found = [result[name] for name in ('correct', 'accuracy', 'last_iterate_accuracy')]
    assert found == [1, 0.25, 0.75]
    assert result['no_gradient'] == 1


def noisy_images():
    """1,000 images far from the pixel box's walls, and their labels."""
    images = np.random.default_rng(1).integers(90, 160, (1000, 2, 2, 3), np.uint8)
    return images, np.arange(1000, dtype=np.int32) % 2


@pytest.mark.parametrize(
    'name, changes, deviation, lowest_of',
    [
        ('ifgsm1', {'start': 'gaussian'}, 0.021, 1),
        ('pgd1', {'start': 'gaussian', 'restarts': 4}, 0.04, 4),
        ('pgd1', {'start': 'uniform', 'restarts': 2}, 0.1 / np.sqrt(3), 2),
    ],
)  # fmt: skip
def test_an_evaluation_attack_starts_as_the_config_says(name, changes, deviation, lowest_of):
    """A linear network's margin moves by the noise, of which the restarts keep the lowest."""
    kind, (images, labels) = name[:-1], noisy_images()
    changes = {'step_size': 1e-8} | changes
    config = config_of(**{f'eval__{kind}__{field}': value for field, value in changes.items()})
    weights = WEIGHTS[:1, :, :2]
    bench, variables = bench_of(weights, 'probs')
    evaluate = lambda config: bench.evaluate(
        variables, attack_settings.evaluation_settings(config, name), images, labels, name
    )
    found = evaluate(config)
    clean = margin(log_probs(weights, images.reshape(-1, 12) / 255), labels)
    moved = (found.last_margin - clean) / np.linalg.norm(weights[0] @ [1, -1]) / deviation
    # Of the lowest of so many standard normal numbers.
    mean, spread = {1: (0, 1), 2: (-0.5642, 0.8256), 4: (-1.0294, 0.7012)}[lowest_of]
    assert abs(moved.mean() - mean) < 0.13
    assert abs(moved.std() - spread) < 0.1
    if name == 'ifgsm1':  # the seed is the evaluation's, and not the run's
        config.seed += 1
        np.testing.assert_array_equal(evaluate(config), found)
        config.eval.seed += 1
        assert np.all(evaluate(config).last_margin != found.last_margin)


@pytest.mark.parametrize('number', [0, 1])
def test_the_transfer_sets_attack_is_the_configs(number):
    """At first on the mean logits; then longer, on the member that stands the most firmly."""
    config = config_of()
    settings = blackbox._rounds(config)[number]
    bench, variables = bench_of(WEIGHTS, 'logits')
    x_adv = bench.points(variables, settings, IMAGES, Y, 'test').worst

    def of_members(x):
        return np.stack([margin(x @ member, Y) for member in WEIGHTS])

    def on_the_mean(x):
        return cross_entropy_slope(WEIGHTS.mean(0, keepdims=True), x, Y)

    def on_the_firmest(x):
        slopes = [margin_slope(member[None], x, Y) for member in WEIGHTS]
        return np.stack(slopes)[of_members(x).argmax(0), np.arange(len(Y))]

    climbed, schedule, num_steps = [
        (on_the_mean, 'constant', 4),
        (on_the_firmest, 'cosine', 8),
    ][number]
    visited = points('pgd', num_steps, 0.024, 0.1, climbed, SCHEDULES[schedule])
    lowest = np.argmin([of_members(x).max(0) for x in visited], axis=0)
    expected = visited[lowest, np.arange(len(Y))]
    np.testing.assert_allclose(x_adv.reshape(X.shape), expected, atol=1e-4)


def test_the_transfer_sets_attack_starts_as_the_config_says():
    images, labels = noisy_images()
    config = config_of(blackbox__start='gaussian', blackbox__step_size=1e-8)
    settings = blackbox._rounds(config)[0]
    bench, variables = bench_of(WEIGHTS[:1, :, :2], 'logits')
    attack = lambda settings: bench.points(variables, settings, images, labels, 'test').worst
    noise = attack(settings) - images / np.float32(255)
    # Half of the starts are worse than the clean image, and kept.
    kept = np.abs(noise).max((1, 2, 3)) > 1e-4
    assert abs(kept.mean() - 0.5) < 0.07
    # Cut off by the ball, which a tenth of the pixels would leave.
    cut = np.clip(0.06 * np.random.default_rng(2).standard_normal(100_000), -0.1, 0.1)
    np.testing.assert_allclose(noise[kept].std(), cut.std(), rtol=0.04)
    np.testing.assert_allclose(np.abs(noise).max(), 0.1, rtol=1e-4)
    other = config_of(blackbox__start='gaussian', blackbox__step_size=1e-8, blackbox__seed=10)
    assert np.any(attack(blackbox._rounds(other)[0]) != attack(settings))
