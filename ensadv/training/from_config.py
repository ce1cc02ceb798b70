"""From config values to what a training step is made of."""

import dataclasses
from collections.abc import Callable, Mapping
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
    return _attack(config, registry.training_settings(config.attack))


def two_step_attack(config: ConfigDict) -> Callable[..., jax.Array]:
    """Returns what a network is tried with that is trained on one step: two of half epsilon.

    They begin where the training attack does; where that is outside of the ball, with the same
    noise as wide as the ball.
    """
    found = {'start': 'uniform'} | registry.training_settings(config.attack)
    changes = {'attack': 'ifgsm', 'steps': 2, 'step_size': config.epsilon / 2}
    return _attack(config, found | changes)


def _attack(config: ConfigDict, settings: Mapping[str, Any]) -> Callable[..., jax.Array]:
    # The network gives log-probabilities.
    made = registry.make(settings, loss=losses.LOSSES[settings['loss']])
    threat = ThreatModel.of(config)

    def of_training(log_prob_fn, rng, x, y, num_steps=made.steps):
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
