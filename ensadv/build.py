"""From config values to the core's objects, for the jobs."""

import hashlib
import importlib.metadata
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import logging
from ml_collections import ConfigDict

import ensadv
from ensadv import (
    attacks,
    conv,
    data,
    data_checks,
    ensemble,
    losses,
    optim,
    parallel,
    parts,
    prng,
    switches,
    transfer,
)
from ensadv.config import parse_attack
from ensadv.errors import ConfigError
from ensadv.models.gated import Gated
from ensadv.models.vgg import VGG
from ensadv.models.wide_resnet import WideResNet

MODELS = {'wide_resnet': WideResNet, 'vgg': VGG}


def resolve(config: ConfigDict) -> ConfigDict:
    """Returns the config with what depends on the machine made explicit, so that it can be kept.

    A run that goes on elsewhere then computes in the type that it began with, or is refused.
    """
    config = config.copy_and_resolve_references()
    if config.model.dtype == 'auto':
        config.model.dtype = 'float32' if jax.default_backend() == 'cpu' else 'bfloat16'
    return config


def environment() -> dict[str, Any]:
    """Returns the devices, packages' versions and switches that this process computes with."""
    devices = jax.devices()
    packages = ('jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'numpy')
    versions = {package: importlib.metadata.version(package) for package in packages}
    return {
        'devices': {'count': len(devices), 'kind': devices[0].device_kind},
        'versions': {'ensadv': ensadv.__version__, **versions},
        **switches.recorded(),
    }


def environment_changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Returns 'name: before -> now' for each thing in which two sessions' environments differ."""

    def flat(session):
        devices = {'devices': f'{session["devices"]["count"]} x {session["devices"]["kind"]}'}
        return devices | session['versions'] | switches.of(session)

    old, new = flat(before), flat(now)
    names = [name for name in sorted({*old, *new}) if old.get(name) != new.get(name)]
    return [f'{name}: {old.get(name, "none")} -> {new.get(name, "none")}' for name in names]


def computation(config: ConfigDict, dtype: str) -> str:
    """Returns what a job computes with, in words; `dtype` is its compute type."""
    found = environment()
    count, kind = found['devices']['count'], found['devices']['kind']
    processes = parallel.num_processes()
    library = conv.library(config.model.conv, dtype)
    return (
        f'on {count} device{"s" * (count > 1)} ({kind})'
        f'{f" of {processes} processes" if processes > 1 else ""}, in {dtype}, '
        f'JAX {found["versions"]["jax"]}{f"; convolutions are {library}" if library else ""}'
    )


def dataset(config: ConfigDict) -> data.Dataset:
    """Returns the data, with the validation split held out, and tells once what they are.

    Raises:
      data.DataError: see `data.load` and `data.hold_out`.
    """
    group = config.data
    whole = data.load(group.name, data_dir=group.data_dir, path=group.path, download=group.download)
    found = data.hold_out(whole, group.validation_examples)
    if parallel.is_main():
        data_checks.tell(found, group.path or group.name)
    return found


def test_places(config: ConfigDict, there: int) -> np.ndarray:
    """Returns the places in the test split that are evaluated, int32 [n], ascending.

    Args:
      config: the run's.
      there: test examples in all.

    Raises:
      UserError: for examples that are not there, and for a file that holds no such places.
    """
    if config.eval.indices:
        places = data.read_places(config.eval.indices)
        if places[-1] >= there:
            raise ConfigError(
                f'eval.indices: {config.eval.indices}: expected places in the test split, '
                f'0..{there - 1}, found {places[-1]}'
            )
        return places
    n = config.eval.num_examples or there
    if n > there:
        raise ConfigError(
            f'eval.num_examples: expected at most the {there} test examples, found {n}'
        )
    return np.arange(n, dtype=np.int32)


def test_split(config: ConfigDict, dataset: data.Dataset) -> tuple[np.ndarray, np.ndarray]:
    """Returns the images and labels of `test_places`."""
    places = test_places(config, len(dataset.label_test))
    # A slice takes no memory, and the first ones are what is mostly evaluated.
    chosen = places if config.eval.indices else slice(len(places))
    images, labels = (array[chosen] for array in dataset.split('test'))
    classes, evaluated = len(np.unique(dataset.label_test)), len(np.unique(labels))
    if config.eval.num_examples and 2 * evaluated < min(len(places), classes):
        logging.warning(
            'eval.num_examples: the first %d test examples are of %d of %d classes: the test split '
            'is sorted, so they do not stand for it. Shuffle the file',
            len(places),
            evaluated,
            classes,
        )
    return images, labels


def indices_digest(config: ConfigDict) -> str | None:
    """Returns the SHA-256 of the places in config.eval.indices; None if there are none."""
    if not config.eval.indices:
        return None
    places = data.read_places(config.eval.indices)
    return hashlib.sha256(places.astype('<i4').tobytes()).hexdigest()


def describe_data(config: ConfigDict, dataset: data.Dataset) -> dict[str, Any]:
    """Returns what a run writes down about its data, and which test examples judge it."""
    return dataset.describe() | {'indices': indices_digest(config)}


def model(
    config: ConfigDict, dataset: Mapping[str, Any], *, dtype: str, remat: bool = False
) -> nn.Module:
    """Returns a member's network, with its gate where members are combined by gating.

    Args:
      config: the run's.
      dataset: 'num_classes', 'mean' and 'std', as `data.Dataset.describe` gives them.
      dtype: compute type: float32 or bfloat16.
      remat: whether backward passes compute activations again, see `models.base`.
    """
    member = MODELS[config.model.name](
        num_classes=dataset['num_classes'],
        mean=tuple(dataset['mean']),
        std=tuple(dataset['std']),
        depth=config.model.depth,
        width=config.model.width,
        dtype=jnp.dtype(dtype),
        conv=config.model.conv,
        remat=remat,
        norm_momentum=config.batch_norm.momentum,
        norm_epsilon=config.batch_norm.epsilon,
        norm_axis=parallel.AXIS if config.batch_norm.sync else None,
    )
    if config.ensemble.combine == 'gating':
        return Gated(member=member, width=config.ensemble.gate_width)
    return member


def network(config: ConfigDict, dataset: Mapping[str, Any]) -> ensemble.Network:
    """Returns a run's ensemble as it is evaluated.

    Args:
      config: the run's.
      dataset: 'num_classes', 'mean', 'std' and 'image_shape'.
    """
    module = model(config, dataset, dtype=config.eval.dtype)
    shape, k = tuple(dataset['image_shape']), config.ensemble.size
    return ensemble.Network(
        partial(ensemble.apply, module),
        config.ensemble.combine,
        jax.eval_shape(lambda: ensemble.init(module, prng.key(0), k, shape)),
        images_at_a_time(config),
    )


def images_at_a_time(config: ConfigDict) -> int:
    """Returns how many 32x32 images an attack takes at a time on a CPU, at least.

    With oneDNN's convolutions more, as they are quick and threads take time to start, but no more
    than have 1,024 channels together before the network makes them smaller. The time of a step of
    IFGSM-7 with 8, 16, 32 and 64 images at a time, over the least: WRN-10-2 (32 channels), batch
    64: 1.12, 1.05, 1.00, 1.02; WRN-16-4 (64), batch 32: 1.03, 1.00, 1.04 (two cores of an Intel
    Xeon, medians of 5 and 7 turns). Evaluation by IFGSM-20, of 360 images and the WRN-10-2, with
    9, 12, 18, 36 and 60: 1.16, 1.11, 1.03, 1.00, 1.01 (medians of 3).
    """
    if not conv.uses_onednn(config.model.conv):
        return parts.FEWEST_IMAGES
    channels = 16 * config.model.width  # of both networks
    return max(parts.FEWEST_IMAGES, min(32, 1024 // channels))


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
    of_batch = partial(
        attacks.attack,
        step=attacks.STEPS[attack.name](attack.step_size),
        num_steps=attack.steps,
        epsilon=config.epsilon,
        start_from=attack.start,
        sigma=attack.sigma,
        # The network gives log-probabilities.
        loss=losses.LOSSES[attack.loss],
    )
    if attack.batch_norm == 'batch':  # the images' statistics are of all of them
        return of_batch

    def in_parts(log_prob_fn, rng, x, y, **settings):
        of_part = partial(of_batch, log_prob_fn, **settings)
        return parts.by_network(of_part, rng, x, y, fewest=images_at_a_time(config))

    return in_parts


def step_settings(config: ConfigDict, model: nn.Module) -> dict[str, Any]:
    """Returns how a training step computes, by the names that `steps.train_step` has for it."""
    return {
        'model': model,
        'optimizer': optimizer(config),
        'combine': config.ensemble.combine,
        'attack': training_attack(config),
        'attack_batch_norm': config.attack.batch_norm,
        'adversarial_weight': config.train.adversarial_weight,
    }


def attack_names(config: ConfigDict) -> tuple[str, ...]:
    """Returns the attacks of every snapshot; with a transfer set blackbox is one of them."""
    names = tuple(config.eval.attacks)
    if config.eval.blackbox_path and 'blackbox' not in names:
        names += ('blackbox',)
    return names


def evaluation_settings(config: ConfigDict, name: str) -> dict[str, Any]:
    """Returns all that decides an evaluation attack's outcome, as eval/<step>.json has it.

    Raises:
      UserError: for blackbox, if its transfer set is missing; for eval.indices, see
        `data.read_places`.
    """
    kind, steps = parse_attack(name)
    settings = {'attack': kind, 'combine': config.ensemble.combine, 'dtype': config.eval.dtype}
    if digest := indices_digest(config):  # the results of other examples are other results
        settings['indices'] = digest
    if kind == 'clean':
        return settings
    settings['epsilon'] = config.epsilon
    if kind == 'blackbox':
        if not config.eval.blackbox_path:
            raise ConfigError(
                'eval.blackbox_path: needed for the attack blackbox; --mode=blackbox with '
                '--config=configs/blackbox.py makes such a file'
            )
        record = transfer.read_record(config.eval.blackbox_path, config.epsilon)
        # The digest, and not the path, decides the outcome.
        return settings | {'digest': record['digest'], 'share_fooled': record['share_fooled']}
    group = config.eval[kind]
    settings |= {
        'steps': steps,
        'step_size': group.step_size,
        'schedule': group.schedule,
        'start': group.start,
        'sigma': group.sigma,
        'restarts': group.restarts,
        'loss': group.loss,
        'seed': config.eval.seed,
    }
    if name in config.eval.long_attacks:
        settings['iterate_examples'] = config.eval.iterate_examples
    return settings


def attack_step(settings: Mapping[str, Any], num_steps: int | jax.Array) -> Any:
    """Returns the attack's step, for an attack of so many steps (which may be traced)."""
    step_size = attacks.schedule(settings['schedule'], settings['step_size'], num_steps)
    return attacks.STEPS[settings['attack']](step_size)
