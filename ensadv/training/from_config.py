"""From config values to what a training step is made of."""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import optax
from ml_collections import ConfigDict

from ensadv import losses
from ensadv.attacks import driver, registry
from ensadv.attacks.threat_model import ThreatModel
from ensadv.training import optim
from ensadv.training.objectives import OBJECTIVES, Objective


def schedule(config: ConfigDict) -> optax.Schedule:
    """Returns the learning rate as a function of the step."""
    train = config.train
    return optim.learning_rate(
        train.learning_rate, tuple(train.learning_rate_steps), train.learning_rate_factor
    )


def optimizer(config: ConfigDict) -> optax.GradientTransformation:
    """Returns what turns gradients into updates."""
    train = config.train
    return optim.sgd(
        schedule(config),
        momentum=train.momentum,
        nesterov=train.nesterov,
        weight_decay=train.weight_decay,
    )


def training_attack(config: ConfigDict) -> Callable[..., jax.Array]:
    """Returns the attack inside training, `attack(log_prob_fn, rng, x, y) -> x_adv`."""
    attack = config.attack
    # The network gives log-probabilities.
    found = {'attack': attack.name, **attack.to_dict(), 'loss': losses.LOSSES[attack.loss]}
    made, threat = registry.make(found), ThreatModel.of(config)

    def of_training(log_prob_fn, rng, x, y, num_steps=attack.steps):
        one = dataclasses.replace(made, steps=num_steps)
        return driver.last_iterate(one, log_prob_fn, threat, rng, x, y)

    return of_training


def objective(config: ConfigDict) -> Objective:
    """Returns what training descends."""
    return OBJECTIVES['paper'](config.train.adversarial_weight)


def step_settings(config: ConfigDict, model: nn.Module) -> dict[str, Any]:
    """Returns how a training step computes, by the names that `step.train_step` has for it."""
    return {
        'model': model,
        'optimizer': optimizer(config),
        'combine': config.ensemble.combine,
        'attack': training_attack(config),
        'attack_batch_norm': config.attack.batch_norm,
        'objective': objective(config),
        'ema_decay': config.train.ema_decay,
    }
