import jax
import jax.numpy as jnp
import numpy as np

from ensadv import losses

LOG_PROBS = jnp.log(jnp.array([[0.7, 0.2, 0.1], [0.25, 0.5, 0.25], [0.4, 0.4, 0.2]]))
LABELS = jnp.array([0, 2, 1])


def test_cross_entropy_and_margin_by_hand():
    np.testing.assert_allclose(
        losses.cross_entropy(LOG_PROBS, LABELS), -np.log([0.7, 0.25, 0.4]), rtol=1e-6
    )
    np.testing.assert_allclose(
        losses.margin(LOG_PROBS, LABELS), np.log([0.7 / 0.2, 0.25 / 0.5, 1.0]), atol=1e-6
    )


def test_distributions_are_targets_too():
    one_hot = jnp.eye(3)[LABELS]
    labels = losses.cross_entropy(LOG_PROBS, LABELS)
    np.testing.assert_array_equal(losses.cross_entropy(LOG_PROBS, one_hot), labels)
    mixed = jnp.array([[0.5, 0.5, 0.0], [0.2, 0.2, 0.6], [0.0, 0.0, 1.0]])
    expected = [-np.log(0.7 * 0.2) / 2, -0.8 * np.log(0.25) - 0.2 * np.log(0.5), -np.log(0.2)]
    np.testing.assert_allclose(losses.cross_entropy(LOG_PROBS, mixed), expected, rtol=1e-6)
    np.testing.assert_array_equal(losses.labels_of(mixed), [0, 2, 2])
    assert losses.labels_of(LABELS) is LABELS


def test_the_gradient_of_the_divergence_is_its_slope():
    """Against finite differences, in float64."""
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        z = jnp.asarray(rng.normal(0, 3, (2, 4, 5)))
        kl = lambda z: jnp.sum(losses.kl_divergence(*jax.nn.log_softmax(z)))
        p, q = np.exp(jax.nn.log_softmax(z))
        np.testing.assert_allclose(kl(z), np.sum(p * np.log(p / q)), rtol=1e-12)
        gradient = jax.grad(kl)(z)
        for place in np.ndindex(z.shape):
            moved = [kl(z.at[place].add(h)) for h in (1e-5, -1e-5)]
            slope = (moved[0] - moved[1]) / 2e-5
            np.testing.assert_allclose(gradient[place], slope, rtol=1e-6, atol=1e-8)


def test_the_divergence_of_networks_that_are_sure():
    """Probabilities of exactly 0 and 1 in float32; the largest logits are 400 and 1e4 apart."""
    z = jnp.array([[[400.0, 0, 0], [1e4, 0, -1e4], [3.0, 3, -2e4]],
                   [[0.0, 400, 0], [1e4, 0, -1e4], [3.0, 3, 3]]])  # fmt: skip
    kl = lambda z: losses.kl_divergence(*jax.nn.log_softmax(z))
    np.testing.assert_allclose(kl(z), [400, 0, np.log(1.5)], rtol=1e-6)
    gradient = jax.grad(lambda z: jnp.sum(kl(z)))(z)
    # By the logits of q it is q - p.
    q_less_p = [[-1, 1, 0], [0, 0, 0], [-1 / 6, -1 / 6, 1 / 3]]
    np.testing.assert_allclose(gradient[1], q_less_p, atol=1e-6)
    assert np.all(np.isfinite(gradient))
    log_p = jnp.array([[0.0, -jnp.inf]])
    assert losses.kl_divergence(log_p, log_p) == 0
    assert np.all(np.isfinite(jax.grad(lambda p: losses.kl_divergence(p, p)[0])(log_p)))


def test_boosted_cross_entropy_by_hand():
    found = losses.boosted_cross_entropy(LOG_PROBS, LABELS)
    expected = -np.log([0.7 * 0.8, 0.25 * 0.5, 0.4 * 0.6])
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    # A network that is sure of another class: p(rival) is 1 in float32.
    loss = lambda z: losses.boosted_cross_entropy(jax.nn.log_softmax(z[None]), jnp.array([0]))[0]
    value, gradient = jax.value_and_grad(loss)(jnp.array([0.0, 200.0, -300.0]))
    np.testing.assert_allclose(value, 400, rtol=1e-6)
    np.testing.assert_allclose(gradient, [-2, 2, 0], atol=1e-6)


def test_ties_and_nan_are_errors():
    log_probs = jnp.array([[-1.0, -1.0, -2.0], [jnp.nan, -1.0, -1.0], [-1.0, jnp.nan, -2.0]])
    margin = losses.margin(log_probs, jnp.zeros(3, int))
    assert margin[0] == 0
    assert margin[1] == margin[2] == -jnp.inf
    assert not np.any(margin > 0)


def test_both_losses_grow_as_the_label_loses():
    toward_label = jax.grad(
        lambda z: jnp.sum(losses.LOSSES['margin'](jax.nn.log_softmax(z), LABELS))
    )
    for name, loss in losses.LOSSES.items():
        gradient = jax.grad(lambda z, f=loss: jnp.sum(f(jax.nn.log_softmax(z), LABELS)))(LOG_PROBS)
        assert np.all(np.take_along_axis(np.asarray(gradient), LABELS[:, None], 1) < 0), name
    # The margin's gradient knows only the label and its strongest rival.
    np.testing.assert_allclose(toward_label(LOG_PROBS)[0], [-1, 1, 0], atol=1e-6)
