"""An attack of one's own, in one file: random search, which needs no gradients."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import tiny_config

from ensadv import config as config_lib
from ensadv import config_checks, losses
from ensadv.attacks import attack, registry
from ensadv.evaluation import attack_settings, evaluator
from ensadv.models.ensemble import Network


class State(NamedTuple):
    x: jax.Array
    best: jax.Array
    margin: jax.Array
    rng: jax.Array


@dataclasses.dataclass(frozen=True)
class RandomSearch:
    """Draws a point of the ball at each step, and goes on from the best one."""

    steps: int = registry.whole(1, registry.MAX_STEPS)
    radius: float = registry.length(1 / 2)
    restarts: int = registry.whole(1, default=1)

    def init(self, predict, threat, rng, x, y):
        return State(threat.uniform_start(rng, x), x, jnp.full(len(x), jnp.inf), rng)

    def step(self, predict, threat, state, x, y):
        outputs = predict(state.x)
        margin = losses.margin(outputs, y)
        better = margin < state.margin
        best = jnp.where(better[:, None, None, None], state.x, state.best)
        rng, draw = jnp.moveaxis(jax.vmap(jax.random.split)(state.rng), 1, 0)
        point = threat.project(threat.gaussian_start(draw, best, self.radius), x)
        state = State(point, best, jnp.minimum(margin, state.margin), rng)
        return state, attack.Query(outputs, jnp.ones(len(x), bool))


@pytest.fixture
def config(monkeypatch):
    monkeypatch.setattr(registry, 'KINDS', dict(registry.KINDS))
    registry.register('random', RandomSearch)
    found = tiny_config(eval__attacks=('clean', 'random8', 'random40'), eval__long_attacks=())
    config_checks.validate(found)
    return found


def test_its_settings_are_config_fields_that_follow_epsilon_and_are_checked(config):
    assert config.eval.random.to_dict() == {'radius': config.epsilon / 2, 'restarts': 1}
    settings = attack_settings.evaluation_settings(config, 'random40')
    expected = {'attack': 'random', 'steps': 40, 'radius': config.epsilon / 2, 'restarts': 1}
    assert settings.items() >= expected.items()
    config.eval.random.radius = 8.0
    with pytest.raises(config_lib.ConfigError, match=r'eval\.random\.radius: expected a number'):
        config_checks.validate(config)


def test_it_evaluates_in_batches_as_any_other_and_more_steps_fool_more(config):
    weights = jax.random.normal(jax.random.key(0), (8 * 8, 3))
    predict = lambda weights, x: (x.reshape(len(x), -1) @ weights)[None]
    network = Network(predict, 'probs', weights)
    images = np.random.default_rng(0).integers(0, 256, (50, 8, 8, 1), np.uint8)
    labels = np.asarray(jnp.argmax(predict(weights, images / np.float32(255))[0], -1), np.int32)
    margins = {}
    for name, batch in (('random8', 50), ('random40', 50), ('random40', 16)):
        settings = attack_settings.evaluation_settings(config, name)
        found = evaluator.Evaluator(network, batch).evaluate(
            weights, settings, images, labels, name
        )
        assert found.has_gradient.all()
        margins[name, batch] = found.margin
    np.testing.assert_allclose(margins['random40', 16], margins['random40', 50], atol=1e-5)
    assert np.all(margins['random40', 50] <= margins['random8', 50])
    assert np.any(margins['random40', 50] < margins['random8', 50])
    settings |= {'iterate_examples': 5}
    long = evaluator.Evaluator(network, 16).long_attack(weights, settings, images, labels, 'long')
    np.testing.assert_array_equal(long.margin > 0, margins['random40', 50] > 0)
