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
