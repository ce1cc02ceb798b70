import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import default
from ensadv.training import from_config, optim


@pytest.mark.parametrize(
    'step, expected',
    [(0, 0.1), (29_999, 0.1), (30_000, 0.02), (60_000, 0.004), (89_999, 0.004), (90_000, 8e-4),
     (499_999, 8e-4)],
)  # fmt: skip
def test_learning_rate_of_the_paper(step, expected):
    np.testing.assert_allclose(
        from_config.schedule(default.get_config())(step), expected, rtol=1e-6
    )


@pytest.mark.parametrize('nesterov', [False, True])
def test_sgd_equals_the_formula(nesterov):
    """Torch's SGD with weight decay, as the Wide ResNets were trained with."""
    optimizer = optim.sgd(
        optim.learning_rate(0.5, (2,), 0.1), momentum=0.9, nesterov=nesterov, weight_decay=0.01
    )
    w, velocity = 2.0, 0.0
    params = {'w': jnp.array(w)}
    state = optimizer.init(params)
    for step, gradient in enumerate([1.0, -0.5, 0.25, 2.0]):
        rate = 0.5 if step < 2 else 0.05
        decayed = gradient + 0.01 * w
        velocity = 0.9 * velocity + decayed
        w -= rate * (decayed + 0.9 * velocity if nesterov else velocity)
        updates, state = optimizer.update({'w': jnp.array(gradient)}, state, params)
        params = optax.apply_updates(params, updates)
        np.testing.assert_allclose(params['w'], w, rtol=1e-6)


@pytest.mark.parametrize('decay', [0.5, 0.9999])
def test_a_moving_average_weighs_the_values_so_far(decay):
    """With weights decay^age that sum to one, as a loop has them."""
    values = np.array([3.0, -1.0, 4.0, 1.0, -5.0])
    averaged = 100.0
    for step in range(1, 6):
        averaged = optim.moving_average(averaged, values[step - 1], jnp.int32(step), decay)
        weights = decay ** np.arange(step - 1, -1, -1)
        expected = np.sum(weights * values[:step]) / np.sum(weights)
        np.testing.assert_allclose(averaged, expected, rtol=1e-5)
