"""From config values to what a training step is made of."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import optax
from ml_collections import ConfigDict

from ensadv import config as config_lib
from ensadv import losses, values
from ensadv.attacks import driver, registry
from ensadv.attacks.threat_model import ThreatModel
from ensadv.models import features
from ensadv.training import diversity, objectives, optim
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
    """Returns what training descends: without an adversarial weight the clean loss.

    Terms that promote diversity count as much as the clean loss.
    """
    train = config.train
    name, method = train.objective if train.adversarial_weight else 'paper', train.diversity
    cross_entropy_of = config_lib.cross_entropy_of(train.cross_entropy_of, method)
    made = objectives.OBJECTIVES[name](
        train,
        members=cross_entropy_of == 'members',
        penalty=diversity.adp(train.adp_alpha, train.adp_beta) if method == 'adp' else None,
    )
    added = ()
    if method == 'gal' and train.gal_weight:
        added = (objectives.Term(1, diversity.gal(train.gal_weight)),)
    elif method == 'trs' and (train.trs_similarity or train.trs_smoothness):
        loss = diversity.trs(train.trs_similarity, train.trs_smoothness, train.trs_radius)
        added = (objectives.Term(1, loss),)
    terms = made.terms + added
    if method == 'dverge':
        loss = diversity.dverge(
            train.dverge_epsilon, train.dverge_steps, train.dverge_layer, train.dverge_start,
            config.seed,
        )  # fmt: skip
        terms = (objectives.Term(1, loss), *terms[1:])  # in place of the clean one
    return objectives.awp(made._replace(terms=terms), train.awp_gamma, train.awp_start)


def check_layer(config: ConfigDict, model: nn.Module, image_shape: Sequence[int]) -> None:
    """Raises ConfigError unless the network has the layer that is distilled.

    Args:
      config: validated.
      model: a member's network.
      image_shape: (H, W, C).
    """
    layer = config.train.dverge_layer
    if config.train.diversity == 'dverge' and layer != diversity.LAYER:
        values.check_choice(
            'train.dverge_layer', layer, (diversity.LAYER, *features.names(model, image_shape))
        )


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
