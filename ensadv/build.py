"""From config values to the core's objects, for the jobs."""

import importlib.metadata
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

import ensadv
from ensadv import attacks, data, optim, parallel
from ensadv.config import parse_attack
from ensadv.models.wide_resnet import WideResNet


def resolve(config: ConfigDict) -> ConfigDict:
    """Returns the config with what depends on the machine made explicit, so that it can be kept.

    A run that goes on elsewhere then computes in the type that it began with, or is refused.
    """
    config = config.copy_and_resolve_references()
    if config.model.dtype == 'auto':
        config.model.dtype = 'float32' if jax.default_backend() == 'cpu' else 'bfloat16'
    return config


def environment() -> dict[str, Any]:
    """Returns the devices and the packages' versions that this process computes with."""
    devices = jax.devices()
    packages = ('jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'numpy')
    versions = {package: importlib.metadata.version(package) for package in packages}
    return {
        'devices': {'count': len(devices), 'kind': devices[0].device_kind},
        'versions': {'ensadv': ensadv.__version__, **versions},
    }


def dataset(config: ConfigDict) -> data.Dataset:
    """Returns the data, read once; raises data.DataError."""
    group = config.data
    return data.load(group.name, data_dir=group.data_dir, path=group.path, download=group.download)


def model(config: ConfigDict, dataset: Mapping[str, Any], *, dtype: str) -> nn.Module:
    """Returns a member's network.

    Args:
      config: the run's.
      dataset: 'num_classes', 'mean' and 'std', as `data.Dataset.describe` gives them.
      dtype: compute type: float32 or bfloat16.
    """
    return WideResNet(
        num_classes=dataset['num_classes'],
        mean=tuple(dataset['mean']),
        std=tuple(dataset['std']),
        depth=config.model.depth,
        width=config.model.width,
        dtype=jnp.dtype(dtype),
        conv=config.model.conv,
        norm_momentum=config.batch_norm.momentum,
        norm_epsilon=config.batch_norm.epsilon,
        norm_axis=parallel.AXIS if config.batch_norm.sync else None,
    )


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
    return partial(
        attacks.attack,
        step=attacks.STEPS[attack.name](attack.step_size),
        num_steps=attack.steps,
        epsilon=config.epsilon,
        start_from=attack.start,
        sigma=attack.sigma,
        loss=attack.loss,
    )


def evaluation_settings(config: ConfigDict, name: str) -> dict[str, Any]:
    """Returns all that decides an evaluation attack's outcome, as eval/<step>.json has it."""
    kind, steps = parse_attack(name)
    settings = {'attack': kind, 'combine': config.ensemble.combine, 'dtype': config.eval.dtype}
    if kind != 'clean':
        settings |= {
            'epsilon': config.epsilon,
            'steps': steps,
            'step_size': config.eval[f'{kind}_step_size'],
            'start': config.eval.start,
            'sigma': config.eval.sigma,
            'restarts': config.eval.restarts,
            'loss': config.eval.loss,
            'seed': config.eval.seed,
        }
    return settings


def worst_case(settings: Mapping[str, Any]) -> Callable[..., attacks.Outcome] | None:
    """Returns the attack of `evaluation_settings`, short of its number of steps; None for clean."""
    if settings['attack'] == 'clean':
        return None
    return partial(
        attacks.worst_case,
        step=attacks.STEPS[settings['attack']](settings['step_size']),
        epsilon=settings['epsilon'],
        start_from=settings['start'],
        sigma=settings['sigma'],
        restarts=settings['restarts'],
        loss=settings['loss'],
    )
