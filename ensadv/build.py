"""From config values to the core's objects, for the jobs."""

import contextlib
import hashlib
import importlib.metadata
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from etils import epath
from ml_collections import ConfigDict

import ensadv
from ensadv import architectures, prng, python_files
from ensadv import config as config_lib
from ensadv.data import checks, datasets
from ensadv.data import extra as extra_data
from ensadv.errors import ConfigError
from ensadv.models import conv, ensemble, own_networks
from ensadv.models.gated import Gated
from ensadv.runtime import distributed, switches
from ensadv.storage import environments


def resolve(config: ConfigDict) -> ConfigDict:
    """Returns the config with what depends on the machine made explicit, so that it can be kept.

    A run that goes on elsewhere then computes in the type that it began with, or is refused.
    """
    config = config.copy_and_resolve_references()
    config_lib.keep_network(config)
    if config.model.dtype == 'auto':
        is_float32 = jax.default_backend() == 'cpu' or not _takes(config, 'dtype')
        config.model.dtype = 'float32' if is_float32 else 'bfloat16'
    return config


def _takes(config: ConfigDict, argument: str) -> bool:
    """Returns whether the config's network has a setting that all of this program's have."""
    own = architectures.own(config.model.name)
    return not own or own_networks.takes(own, _text(config, own), argument)


def _text(config: ConfigDict, own: architectures.Own) -> str:
    return config.model.source or python_files.read(own.file)


@contextlib.contextmanager
def on_all_processes(mode: str, config: ConfigDict, workdir: epath.Path) -> Iterator[None]:
    """Starts JAX, on all processes there are; what is inside they do together.

    Args:
      mode, config, workdir: of the command, which has to be the same everywhere.

    Raises:
      UserError: if config.device is not there, or the commands differ.
    """
    distributed.take_device(config.device)
    distributed.initialize()
    with distributed.together():
        distributed.check_device(config.device)
        resolved = config_lib.to_dict(config.copy_and_resolve_references())
        command = {'mode': mode, 'workdir': str(workdir), 'version': ensadv.__version__}
        distributed.check_same('the command', command | {'config': resolved})
        used = environments.switches(switches.recorded())
        distributed.check_same('XLA_FLAGS or a switch of JAX', used)
        yield


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


def computation(config: ConfigDict, dtype: str) -> str:
    """Returns what a job computes with, in words; `dtype` is its compute type."""
    found = environment()
    count, kind = found['devices']['count'], found['devices']['kind']
    processes = distributed.num_processes()
    # Of a model that is given nothing is known.
    by_ours = 'model' in config and _takes(config, 'conv')
    library = conv.library(config.model.conv, dtype) if by_ours else ''
    return (
        f'on {count} device{"s" * (count > 1)} ({kind})'
        f'{f" of {processes} processes" if processes > 1 else ""}, in {dtype}, '
        f'JAX {found["versions"]["jax"]}{f"; convolutions are {library}" if library else ""}'
    )


def dataset(config: ConfigDict) -> datasets.Dataset:
    """Returns the data, with the validation split held out, and tells once what they are.

    Raises:
      data.DataError: see `data.load` and `data.hold_out`.
    """
    group = config.data
    whole = datasets.load(
        group.name, data_dir=group.data_dir, path=group.path, download=group.download
    )
    found = datasets.hold_out(whole, group.validation_examples)
    if distributed.is_main():
        checks.tell(found, group.path or group.name)
    return found


def extra(
    config: ConfigDict, image_shape: tuple[int, int, int], num_classes: int
) -> extra_data.Extra | None:
    """Returns the extra training images, or None; see `data.extra.load`."""
    paths = tuple(config.data.extra)
    return extra_data.load(paths, tuple(image_shape), num_classes) if paths else None


def test_places(config: ConfigDict, there: int) -> np.ndarray:
    """Returns the places in the test split that are evaluated, int32 [n], ascending.

    Args:
      config: the run's.
      there: test examples in all.

    Raises:
      UserError: for examples that are not there, and for a file that holds no such places.
    """
    if config.eval.indices:
        places = datasets.read_places(config.eval.indices)
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


def test_split(config: ConfigDict, dataset: datasets.Dataset) -> tuple[np.ndarray, np.ndarray]:
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
    places = datasets.read_places(config.eval.indices)
    return hashlib.sha256(places.astype('<i4').tobytes()).hexdigest()


def describe_data(config: ConfigDict, dataset: datasets.Dataset) -> dict[str, Any]:
    """Returns what a run writes down about its data, and which test examples judge it."""
    return dataset.describe() | {'indices': indices_digest(config)}


def standardisation(
    config: ConfigDict, dataset: Mapping[str, Any]
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Returns by which mean and deviation, of each channel, the networks standardise images.

    Args:
      config: the run's.
      dataset: 'mean' and 'std', of the training images, and 'image_shape'.

    Raises:
      ConfigError: if the config has them of other channels than the data have.
    """
    found = config.model.mean
    if found is None:
        return tuple(dataset['mean']), tuple(dataset['std'])
    channels = dataset['image_shape'][-1]
    if len(found) not in (1, channels):
        raise ConfigError(
            f'model.mean: expected one number or {channels}, one for each channel, found '
            f'{len(found)}'
        )
    return tuple(
        tuple(map(float, each)) * (channels // len(each)) for each in (found, config.model.std)
    )


def model(
    config: ConfigDict, dataset: Mapping[str, Any], *, dtype: str, remat: bool = False
) -> nn.Module:
    """Returns a member's network, with its gate where members are combined by gating.

    Args:
      config: the run's.
      dataset: 'num_classes', 'mean', 'std' and 'image_shape', as `data.Dataset.describe` gives
        them.
      dtype: compute type: float32 or bfloat16.
      remat: whether backward passes compute activations again, see `models.base`.
    """
    mean, std = standardisation(config, dataset)
    settings = {
        'num_classes': dataset['num_classes'],
        'mean': mean,
        'std': std,
        'dtype': jnp.dtype(dtype),
        'conv': config.model.conv,
        'remat': remat,
        'activation': config.model.activation,
        'norm_momentum': config.batch_norm.momentum,
        'norm_epsilon': config.batch_norm.epsilon,
        'norm_axis': distributed.AXIS if config.batch_norm.sync else None,
    }
    if own := architectures.own(config.model.name):
        member = own_networks.make(own, _text(config, own), settings, dataset['image_shape'])
    else:
        sizes = {'depth': config.model.depth, 'width': config.model.width}
        if config.model.padding != 'symmetric':  # which only Wide ResNets have
            sizes['padding'] = config.model.padding
        member = architectures.network(config.model.name)(**settings, **sizes)
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
    )
