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
from ensadv.training import objectives, optim
from ensadv.training.objectives import Objective


def schedule(config: ConfigDict) -> optax.Schedule:
    """Returns the learning rate as a function of the step."""
    train = config.train
    return optim.learning_rate(
        train.schedule,
        train.learning_rate,
        num_steps=train.steps,
        warmup_steps=train.warmup_steps,
        steps=tuple(train.learning_rate_steps),
        factor=train.learning_rate_factor,
    )


def optimizer(config: ConfigDict) -> optax.GradientTransformation:
    """Returns what turns gradients into updates."""
    train = config.train
    return optim.sgd(
        schedule(config),
        momentum=train.momentum,
        nesterov=train.nesterov,
        weight_decay=train.weight_decay,
        decays=optim.are_kernels if train.weight_decay_on == 'kernels' else None,
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
    """Returns what training descends: without an adversarial weight the clean loss."""
    train = config.train
    name = train.objective if train.adversarial_weight else 'paper'
    return objectives.awp(objectives.OBJECTIVES[name](train), train.awp_gamma, train.awp_start)


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
