import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import tiny_config

from ensadv import losses, prng
from ensadv.attacks import driver
from ensadv.attacks.first_order import IFGSM, NFGSM, PGD
from ensadv.attacks.threat_model import ThreatModel
from ensadv.training import from_config

EPSILON = 0.1
WEIGHTS = jax.random.normal(jax.random.key(0), (2 * 3 * 1, 2))
X = jax.random.uniform(jax.random.key(1), (5, 2, 3, 1), minval=0.2, maxval=0.8)
Y = jnp.array([0, 1, 0, 1, 1])
KEYS = jax.random.split(jax.random.key(2), 5)


def linear(x):
    return jax.nn.log_softmax(x.reshape(len(x), -1) @ WEIGHTS)


def worst_of_linear():
    """x + epsilon * sign(w): away from the label's weights, toward the other class's."""
    away = (WEIGHTS[:, 1] - WEIGHTS[:, 0]) * jnp.where(Y == 0, 1, -1)[:, None]
    return X + EPSILON * jnp.sign(away).reshape(X.shape)


THREAT = ThreatModel('linf', EPSILON)
KINDS = {'ifgsm': IFGSM, 'pgd': PGD}


def attack(name, num_steps, step_size, **settings):
    one = KINDS[name](steps=num_steps, step_size=step_size, **settings)
    return lambda predict, *given: driver.last_iterate(one, predict, THREAT, *given)


@pytest.mark.parametrize('name', ['ifgsm', 'pgd'])
@pytest.mark.parametrize('loss', ['cross_entropy', 'margin'])
def test_reaches_the_worst_case_of_a_linear_model(name, loss):
    x_adv = attack(name, 40, 0.02, sigma=0.05, loss=loss)(linear, KEYS, X, Y)
    np.testing.assert_allclose(x_adv, worst_of_linear(), atol=1e-6)


def test_one_step_without_start_is_fgsm():
    gradient = jax.grad(lambda x: -jnp.sum(linear(x)[jnp.arange(5), Y]))(X)
    x_adv = attack('ifgsm', 1, 0.03, start='none')(linear, KEYS, X, Y)
    np.testing.assert_allclose(x_adv, X + 0.03 * jnp.sign(gradient), atol=1e-7)


def test_n_fgsm_is_noise_and_a_step_that_leave_the_ball_and_not_the_box():
    """Algorithm 1 of de Jorge et al. (2022), the noise from another call with the same keys."""
    one = NFGSM(noise=0.2, step_size=0.15)
    noise = THREAT.uniform_moves(KEYS, X)
    assert 0.9 < np.abs(noise).max() <= 1
    noisy = np.clip(X + 0.2 * noise, 0, 1)
    away = worst_of_linear() - X
    x_adv = driver.last_iterate(one, linear, THREAT, KEYS, X, Y)
    np.testing.assert_allclose(x_adv, np.clip(noisy + 0.15 * np.sign(away), 0, 1), atol=1e-6)
    assert np.abs(x_adv - X).max() > 2.5 * EPSILON
    assert np.any((x_adv == 0) | (x_adv == 1))
    with pytest.raises(ValueError, match='N-FGSM is defined for linf'):
        driver.last_iterate(one, linear, ThreatModel('l2', 0.1), KEYS, X, Y)
    # As an attack on a network its points do not count where they are outside of the ball.
    outcome = driver.worst_case(one, linear, THREAT, KEYS, X, Y)
    far = THREAT.distance(x_adv, X) > EPSILON
    clean = losses.margin(linear(X), Y)
    np.testing.assert_allclose(outcome.margin[far], clean[far], atol=1e-6)


def test_pgd_is_optax_adam_with_a_projection():
    adam = optax.adam(0.02, eps=1e-16)
    x_adv, state = X, adam.init(X)
    for _ in range(3):
        gradient = jax.grad(lambda x: jnp.sum(linear(x)[jnp.arange(5), Y]))(x_adv)
        update, state = adam.update(gradient, state)
        x_adv = jnp.clip(x_adv + update, X - EPSILON, X + EPSILON)
    found = attack('pgd', 3, 0.02, start='none')(linear, KEYS, X, Y)
    np.testing.assert_allclose(found, x_adv, atol=1e-6)


@pytest.mark.parametrize('start', ['gaussian', 'uniform', 'none'])
@pytest.mark.parametrize('name', ['ifgsm', 'pgd'])
@pytest.mark.parametrize('num_steps', [0, 3])
@pytest.mark.parametrize(
    'norm, epsilon', [('linf', 0.0), ('linf', 0.1), ('linf', 1.0), ('l2', 0.3)]
)
def test_always_in_the_ball_and_in_the_pixel_box(start, name, num_steps, norm, epsilon):
    for seed in range(3):
        key = jax.random.key(seed)
        # Rounded, so that many pixels lie on the border of the box.
        x = jnp.round(jax.random.uniform(key, (7, 4, 4, 2)) * 4) / 4
        w = jax.random.normal(key, (32, 3))
        keys = jax.random.split(key, 7)
        f = lambda x, w=w: jax.nn.log_softmax(x.reshape(7, -1) @ w)
        one = KINDS[name](steps=num_steps, step_size=0.3, start=start, sigma=0.5)
        threat = ThreatModel(norm, epsilon)
        x_adv = driver.last_iterate(one, f, threat, keys, x, jnp.arange(7) % 3)
        assert np.all((x_adv >= 0) & (x_adv <= 1))
        moves = (np.float64(x_adv) - np.float64(x)).reshape(7, -1)
        lengths = np.linalg.norm(moves, axis=1, ord=np.inf if norm == 'linf' else 2)
        assert np.max(lengths) <= epsilon + 1e-7
        np.testing.assert_allclose(threat.distance(x_adv, x), lengths, atol=1e-6)
        if num_steps == 0 and start != 'none' and epsilon:
            assert np.any(x_adv != x)


def test_starts_have_the_distribution_they_are_named_after():
    x = jnp.full((2000, 2, 2, 1), 0.5)
    keys = jax.random.split(jax.random.key(0), 2000)
    threat = ThreatModel('linf', 0.2)
    gaussian, uniform = threat.gaussian_start(keys, x, 0.05) - x, threat.uniform_start(keys, x) - x
    assert abs(np.std(gaussian) - 0.05) < 0.002
    assert np.max(np.abs(gaussian)) > 0.15
    assert abs(np.std(uniform) - 0.2 / np.sqrt(3)) < 0.003
    assert np.max(np.abs(uniform)) <= 0.2
    with pytest.raises(ValueError, match='start'):
        IFGSM(steps=1, step_size=0.1, start='normal')


def test_l2_starts_have_the_distribution_they_are_named_after():
    x = jnp.full((2000, 2, 2, 1), 0.5)
    keys, threat = jax.random.split(jax.random.key(0), 2000), ThreatModel('l2', 0.2)
    gaussian = np.linalg.norm((threat.gaussian_start(keys, x, 0.05) - x).reshape(2000, 4), axis=1)
    assert abs(np.sqrt(np.mean(gaussian**2)) - 0.05) < 0.002  # sigma is the whole move's
    uniform = threat.uniform_start(keys, x) - x
    radii = np.sort(np.linalg.norm(uniform.reshape(2000, 4), axis=1)) / 0.2
    # In a ball of d dimensions a share of r^d lies within r.
    np.testing.assert_allclose(radii**4, np.linspace(0, 1, 2000), atol=0.05)
    assert np.max(np.abs(np.mean(uniform, axis=0))) < 0.01


def test_l2_reaches_the_worst_case_of_a_linear_model():
    """x + epsilon w / |w|, for images that it leaves in the box."""
    threat, x = ThreatModel('l2', 0.15), jnp.clip(X, 0.3, 0.7)
    away = (WEIGHTS[:, 1] - WEIGHTS[:, 0]) * jnp.where(Y == 0, 1, -1)[:, None]
    worst = x + 0.15 * (away / jnp.linalg.norm(away, axis=1, keepdims=True)).reshape(X.shape)
    one = IFGSM(steps=60, step_size=0.02, sigma=0.05)
    found = driver.worst_case(one, linear, threat, KEYS, x, Y)
    np.testing.assert_allclose(found.x_adv, worst, atol=1e-3)
    faint = driver.worst_case(one, lambda x: linear(x) * 1e-25, threat, KEYS, x, Y)
    np.testing.assert_allclose(faint.x_adv, worst, atol=1e-3)
    by_adam = driver.last_iterate(
        PGD(steps=1, step_size=0.02, start='none'), linear, threat, KEYS, x, Y
    )
    np.testing.assert_allclose(threat.distance(by_adam, x), 0.02, rtol=1e-4)


def test_l2_projection_leaves_what_is_within_as_it_is():
    threat = ThreatModel('l2', 0.5)
    move = jnp.zeros(X.shape).at[:, 0, 0, 0].set(0.3)
    inside = jnp.clip(X + move, 0, 1)
    np.testing.assert_array_equal(threat.project(inside, X), inside)
    np.testing.assert_array_equal(threat.project(X, X), X)
    far = threat.project(jnp.full_like(X, 0.5) + 100 * move, jnp.full_like(X, 0.5))
    np.testing.assert_allclose(far[0].ravel(), [1.0, *[0.5] * 5], atol=1e-6)


def test_each_example_is_attacked_by_itself():
    f = attack('pgd', 3, 0.02, sigma=0.05)
    together = f(linear, KEYS, X, Y)
    for i in range(5):
        alone = f(linear, KEYS[i : i + 1], X[i : i + 1], Y[i : i + 1])
        np.testing.assert_allclose(alone[0], together[i], atol=1e-6)


# A landscape with a trap: class 1 wins only on a thin shell that a long attack steps over, so the
# worst iterate is not the last.
def shell(x):
    distance = jnp.abs(jnp.mean(x, axis=(1, 2, 3)) - 0.5)
    z = 1 - 4 * jnp.exp(-(((distance - 0.02) / 0.005) ** 2)) + 0.5 * distance
    return jax.nn.log_softmax(jnp.stack([z, jnp.zeros_like(z)], axis=-1))


def test_keeps_the_worst_iterate_and_reports_the_last():
    x, y, keys = (
        jnp.full((1, 2, 2, 1), 0.51),
        jnp.zeros(1, int),
        jax.random.split(jax.random.key(0), 1),
    )
    # The steps are so large that the second one has left the shell.
    one = IFGSM(steps=4, step_size=0.011, start='none')
    visited = [x]
    for n in range(1, 5):
        visited.append(attack('ifgsm', n, 0.011, start='none')(shell, keys, x, y))
    margins = [float(losses.margin(shell(v), y)[0]) for v in visited]
    assert margins[-1] > min(margins)
    outcome = driver.worst_case(one, shell, THREAT, keys, x, y)
    np.testing.assert_allclose(outcome.margin[0], min(margins), atol=1e-5)
    np.testing.assert_allclose(outcome.last_margin[0], margins[-1], atol=1e-5)
    np.testing.assert_allclose(outcome.x_adv, visited[int(np.argmin(margins))], atol=1e-6)


@pytest.mark.parametrize('start', ['none', 'uniform'])
def test_the_clean_image_counts_and_is_judged_once(start):
    """A network that errs near the image alone, and an attack that steps over that at once."""
    x, y = jnp.full((1, 2, 2, 1), 0.5), jnp.zeros(1, int)
    judged = []

    def f(points):
        jax.debug.callback(lambda points: judged.append(np.array_equal(points, x)), points)
        lead = 50 * jnp.abs(points.mean((1, 2, 3)) - 0.501) - 1
        return jax.nn.log_softmax(jnp.stack([lead / 2, -lead / 2], axis=-1))

    one, threat = IFGSM(steps=1, step_size=0.1, start=start, sigma=0.0), ThreatModel('linf', 0.3)
    keys = jax.random.split(jax.random.key(3), 1)
    progress = driver.begin(one, f, threat, keys, x, y)
    progress = driver.advance(one, f, threat, progress, x, y, num_steps=1)
    jax.effects_barrier()
    np.testing.assert_allclose(progress.margin, -0.95, rtol=1e-4)
    assert progress.fooled_at[0] == 0
    assert progress.last_margin[0] > 0
    assert judged.count(True) == 1
    assert len(judged) == {'none': 2, 'uniform': 3}[start]


def test_more_steps_and_restarts_never_look_weaker():
    w = jax.random.normal(jax.random.key(5), (6, 4))
    f = lambda x: jax.nn.log_softmax(jnp.sin(20 * x.reshape(len(x), -1)) @ w)

    def margins(num_steps, restarts):
        one = IFGSM(steps=num_steps, step_size=0.05, restarts=restarts, start='uniform')
        return driver.worst_case(one, f, THREAT, KEYS, X, Y).margin

    assert np.all(margins(3, 1) <= losses.margin(f(X), Y))
    assert np.all(margins(6, 1) <= margins(3, 1))
    assert np.all(margins(3, 4) <= margins(3, 1))
    assert np.any(margins(3, 4) < margins(3, 1))


def test_the_number_of_steps_may_be_traced():
    @jax.jit
    def traced(num_steps):
        return attack('pgd', num_steps, 0.02, sigma=0.05)(linear, KEYS, X, Y)

    for n in (1, 4):
        direct = attack('pgd', n, 0.02, sigma=0.05)(linear, KEYS, X, Y)
        np.testing.assert_allclose(traced(n), direct, atol=1e-6)


def test_small_gradients_do_not_stall_pgd():
    """A confident network's gradients, far below Adam's usual epsilon of 1e-8."""
    faint = lambda x: linear(x) * 1e-12
    x_adv = attack('pgd', 40, 0.02, start='none')(faint, KEYS, X, Y)
    np.testing.assert_allclose(x_adv, worst_of_linear(), atol=1e-6)


def confident(gap):
    """Two classes, of which the first leads by `gap` and the sum of the pixels."""

    def log_prob_fn(x):
        lead = (gap + x.sum((1, 2, 3))) / 2
        return jax.nn.log_softmax(jnp.stack([lead, -lead], axis=-1))

    return log_prob_fn


def attack_confident(gap):
    x, y = jnp.full((1, 2, 2, 1), 0.5), jnp.zeros(1, int)
    keys = jax.random.split(jax.random.key(0), 1)
    one = PGD(steps=20, step_size=0.02, start='none')
    return driver.worst_case(one, confident(gap), THREAT, keys, x, y)


@pytest.mark.parametrize('gap', [20, 45, 60])
def test_pgd_goes_on_where_the_network_is_very_confident(gap):
    """The squares of its gradients, as small as exp(-60), are no float32 numbers."""
    outcome = attack_confident(gap)
    np.testing.assert_allclose(outcome.margin, gap + 2 - 0.4, rtol=1e-5)
    assert outcome.informed.all()


@pytest.mark.parametrize('gap', [75, 200])
def test_a_gradient_too_faint_to_follow_is_none(gap):
    assert not attack_confident(gap).informed.any()


def logits(x):
    """Five classes, and a summand that log-probabilities do not show: the same for all of them."""
    z = x.reshape(len(x), -1) @ jax.random.normal(jax.random.key(7), (6, 5))
    return z + 20 * jnp.sum(x, axis=(1, 2, 3))[:, None]


def log_probs(x):
    return jax.nn.log_softmax(logits(x))


@pytest.mark.parametrize('loss', ['cross_entropy', 'margin'])
def test_logits_and_log_probabilities_come_to_the_same(loss):
    of = attack('pgd', 5, 0.03, sigma=0.05, loss=loss)
    one, other = (of(f, KEYS, X, Y) for f in (logits, log_probs))
    np.testing.assert_allclose(one, other, atol=1e-4)
    assert np.max(np.abs(one - X)) > 0.09


def test_verdicts_on_logits_are_those_on_log_probabilities():
    pgd = PGD(steps=5, step_size=0.03, sigma=0.05, restarts=2)
    one, other = (driver.worst_case(pgd, f, THREAT, KEYS, X, Y) for f in (logits, log_probs))
    np.testing.assert_allclose(one.margin, other.margin, atol=1e-4)
    np.testing.assert_allclose(one.x_adv, other.x_adv, atol=1e-4)


def test_given_functions_take_the_outputs_as_they_are():
    """Be they no logits at all."""
    predict = lambda x: {'score': jnp.sum(x, axis=(1, 2, 3))}
    one = IFGSM(steps=10, step_size=0.02, start='none', loss=lambda outputs, y: -outputs['score'])
    outcome = driver.worst_case(
        one, predict, THREAT, KEYS, X, Y, judge=lambda outputs, y: outputs['score']
    )
    np.testing.assert_allclose(outcome.x_adv, X - EPSILON, atol=1e-6)


def test_training_climbs_log_probabilities_as_they_are():
    """Normalised once more, the numbers of runs would change in their last digits."""
    config = tiny_config(attack__loss='cross_entropy', attack__start='none')
    of = lambda loss: driver.last_iterate(
        IFGSM(steps=2, step_size=config.attack.step_size, start='none', loss=loss),
        logits, ThreatModel.of(config), KEYS, X, Y,
    )  # fmt: skip
    found = from_config.training_attack(config)(logits, KEYS, X, Y)
    np.testing.assert_array_equal(found, of(losses.cross_entropy))
    assert np.any(found != of('cross_entropy'))


PIXELS = np.asarray(X)


@pytest.mark.parametrize('whole', [driver.last_iterate, driver.worst_case])
@pytest.mark.parametrize(
    'change, told',
    [
        ({'x': (PIXELS * 255).astype(np.uint8)}, r'x: expected floats.* found uint8.* x / 255'),
        ({'x': PIXELS * 255}, r'x: expected pixels in \[0, 1\], found .* to 20'),
        ({'x': PIXELS - 0.5}, r'x: expected pixels in \[0, 1\], found -0'),
        ({'x': PIXELS * np.nan}, 'x: expected pixels'),
        ({'y': np.array([0, 1, 2, 1, 0])}, r'y: expected labels in 0..1, found 0 to 2'),
        ({'y': np.array([0, 1, -1, 1, 0])}, r'y: expected labels in 0..1, found -1 to 1'),
        ({'y': np.zeros(5)}, 'y: expected integer labels'),
        ({'y': np.zeros(4, int)}, 'y: expected integer labels of shape'),
        ({'rng': jax.random.key(0)}, 'rng: expected a key for each of 5'),
        ({'epsilon': 8}, r'epsilon: expected a number in \[0, 1\]'),
        ({'epsilon': -0.1}, 'epsilon'),
        ({'norm': 'l1'}, "norm: expected one of linf, l2, found 'l1'"),
        ({'step_size': 2}, 'step_size: expected a number'),
        ({'sigma': 4.0}, 'sigma: expected a number'),
        ({'sigma': None}, 'sigma: needed'),
        ({'loss': 'ce'}, "loss: expected one of cross_entropy, margin, found 'ce'"),
        ({'predict': lambda x: jnp.sum(x)}, 'predict: expected logits or log-probabilities'),
    ],
)
def test_what_cannot_be_meant_is_refused(whole, change, told):
    given = {'predict': linear, 'rng': KEYS, 'x': PIXELS, 'y': Y, 'norm': 'linf', 'epsilon': 0.1}
    settings = {'steps': 1, 'step_size': 0.02, 'sigma': 0.05, 'loss': 'cross_entropy'}
    settings |= {name: value for name, value in change.items() if name in settings}
    given |= {name: value for name, value in change.items() if name not in settings}
    norm, epsilon = given.pop('norm'), given.pop('epsilon')
    with pytest.raises(ValueError, match=told):
        whole(PGD(**settings), threat=ThreatModel(norm, epsilon), **given)


@pytest.mark.parametrize('start', [{'start': 'none'}, {'sigma': 0.0}])
def test_restarts_that_would_be_equal_are_refused(start):
    with pytest.raises(ValueError, match='restarts: 3 equal ones'):
        PGD(steps=1, step_size=0.02, restarts=3, **start)
    PGD(steps=1, step_size=0.02, restarts=1, **start)


def test_inside_jit_what_is_known_is_checked_and_the_rest_is_taken():
    one = lambda step_size: PGD(steps=1, step_size=step_size, sigma=0.05)
    margins = lambda x, size: driver.worst_case(one(size), linear, THREAT, KEYS, x, Y).margin

    too_large = X * 255
    assert np.all(np.isfinite(jax.jit(margins)(too_large, 8.0)))
    with pytest.raises(ValueError, match='x: expected pixels'):
        jax.jit(lambda size: margins(too_large, size))(0.1)
    with pytest.raises(ValueError, match='step_size'):
        jax.jit(lambda x: margins(x, 8.0))(X)


@pytest.mark.parametrize('kind', ['rbg', 'unsafe_rbg', 'threefry2x32'])
@pytest.mark.parametrize('raw', [False, True])
def test_other_kinds_of_keys_leave_an_example_to_itself(kind, raw):
    with jax.default_prng_impl(kind):
        keys = jax.random.split(jax.random.PRNGKey(3) if raw else jax.random.key(3), 5)
        one = PGD(steps=1, step_size=0.02, sigma=0.05)
        begin = lambda keys, x: driver.begin(one, linear, THREAT, keys, x, Y[: len(x)]).state.x
        together, alone = begin(keys, X), begin(keys[3:4], X[3:4])
        np.testing.assert_allclose(together[3], alone[0], atol=1e-6)
        assert len(np.unique(together - X)) > 20


def test_keys_of_our_kind_stay_what_they_are():
    assert prng.of_examples(KEYS) is KEYS
