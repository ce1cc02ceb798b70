"""The import job: weights of a Wide ResNet in PyTorch, or of an exported ensemble, become a run."""

import hashlib
import sys
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from ensadv import architectures, build
from ensadv import config as config_lib
from ensadv.data import datasets
from ensadv.errors import UserError
from ensadv.exchange import export, naming
from ensadv.runtime import distributed, progress
from ensadv.storage import checkpoints, files, records, tensor_files, workdir
from ensadv.training import costs

_TRIED = 100  # test images whose accuracy is told


def run(config: ConfigDict, path: epath.Path, source: str, architecture: str | None) -> None:
    """Makes a run of a file of weights, whose only snapshot has them.

    The workdir appears whole or not at all.

    Args:
      config: the run's; the weights stand for its step train.steps.
      path: the workdir, which must not be there, or be empty.
      source: the file; or FILE:ENTRY of what torch.save wrote.
      architecture: as the command line names it, or None.

    Raises:
      UserError: if the file's tensors are not the config's network.
      StorageError: if the workdir cannot be written.
    """
    if distributed.num_processes() > 1:
        raise UserError('--mode=import: runs in one process')
    files.check_is_free(path, '--workdir')
    file, entry = tensor_files.split(source)
    tensors = tensor_files.read(file, entry, lambda names: naming.find(names) is not None)
    tensors = {name.replace('/', '.'): array for name, array in tensors.items()}
    found = naming.find(tensors)
    if found is None:
        raise UserError(
            f'--from={source}: no Wide ResNet as it is known here, by the names of its layers '
            f'({"; ".join(naming.NAMINGS)}); found {_first(tensors)}'
        )
    config = build.resolve(config)
    _settle_network(config, found, source, architecture)
    dataset = build.dataset(config)
    description = build.describe_data(config, dataset)
    exported = tensor_files.exported(file)
    if exported is not None:
        _check_exported(config, description, exported['network'], source)
    network = build.network(config, description)
    try:
        variables, standardisation = naming.from_pytorch(tensors, found, network.variables)
    except naming.MismatchError as error:
        group = config.model
        words = architectures.words(group.name, group.depth, group.width, group.activation)
        size = f'{config.ensemble.size} x ' * (config.ensemble.size > 1)
        raise UserError(f'--from={source}: not the tensors of {size}{words}: {error}') from None
    if not all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(variables)):
        raise UserError(f'--from={source}: expected finite numbers, found NaN or infinity')
    _settle_standardisation(config, standardisation, description, source)
    imported = {
        'file': file.name,
        'digest': hashlib.sha256(file.read_bytes()).hexdigest(),
        'naming': records.EXPORTED if _is_trained_as(config, exported) else found.naming,
        'step': config.train.steps,
    }
    _write(config, path, variables, description, imported)
    print(f'{path}: {file} is the snapshot of step {config.train.steps:,}')
    _tell_accuracy(config, dataset, description, variables)


def _settle_network(
    config: ConfigDict, found: naming.Found, source: str, architecture: str | None
) -> None:
    """Sets what a naming says of the network beside its weights."""
    known = naming.NAMINGS[found.naming]
    if known.padding != 'symmetric':
        config.model.padding = known.padding
    says_activation = architecture and 'activation' in architectures.parse(architecture)
    if known.has_any_activation and config.model.activation == 'relu' and not says_activation:
        group = config.model
        raise UserError(
            f'--from={source}: networks with these names ({found.naming}) have SiLU (Swish) or '
            f'ReLU, which no file says; expected --architecture=WRN-{group.depth}-{group.width}-'
            'silu or -relu'
        )


def _check_exported(
    config: ConfigDict, dataset: Mapping[str, Any], theirs: Mapping[str, Any], source: str
) -> None:
    """Refuses a config whose network is another than that which a file was exported from."""
    mine = export.network_settings(config, dataset)
    differing = [
        f'{name} {theirs.get(name)}, not {value}'
        for name, value in mine.items()
        if theirs.get(name) != value
    ]
    if differing:
        raise UserError(
            f'--from={source}: was exported from another network than the config asks for '
            f"({'; '.join(differing)}); without --architecture it is the file's"
        )


def _is_trained_as(config: ConfigDict, exported: Mapping[str, Any] | None) -> bool:
    """Returns whether a config says of training what a file was exported with."""
    if exported is None:
        return False
    mine, theirs = map(config_lib.settings, (config_lib.to_dict(config), exported['config']))
    groups = ('train.', 'attack.')
    return all(
        mine.get(field) == value for field, value in theirs.items() if field.startswith(groups)
    )


def _settle_standardisation(
    config: ConfigDict, found: Mapping[str, np.ndarray], dataset: Mapping[str, Any], source: str
) -> None:
    """Sets model.mean and model.std, which the file has, or the user says."""
    if len(found) == 2:
        numbers = {kind: tuple(map(float, values)) for kind, values in found.items()}
        said = {'mean': config.model.mean, 'std': config.model.std}
        as_said = (said[kind] is None or np.allclose(said[kind], numbers[kind]) for kind in said)
        if len(numbers['mean']) != dataset['image_shape'][-1] or not all(as_said):
            raise UserError(
                f'--from={source}: its own mean {numbers["mean"]} and deviation {numbers["std"]} '
                'are not those of model.mean and model.std, or of other channels than the data'
            )
        config.model.update(numbers)
    elif config.model.mean is None:
        raise UserError(
            f'--from={source}: does not say by which mean and deviation its network standardises '
            'images in [0, 1]; expected both, as in --config.model.mean=0.4914,0.4822,0.4465 '
            '--config.model.std=0.2471,0.2435,0.2616, or 0 and 1 where it takes them as they are'
        )


def _write(
    config: ConfigDict,
    path: epath.Path,
    variables: Mapping[str, Any],
    description: Mapping[str, Any],
    imported: Mapping[str, Any],
) -> None:
    """Writes the workdir."""
    facts = {
        'imported': imported,
        'dataset': description,
        'parameters': costs.size(variables['params']),
        'operations': costs.operations(config, description)._asdict(),
    }
    session = {'workdir': str(path), 'step': imported['step'], **build.environment()}
    averaged = {'averaged': variables} if config.train.ema_decay else {}
    with files.appearing(path, 'config.json') as folder:
        snapshots = checkpoints.open_snapshots(folder)
        snapshots.save(imported['step'], {**variables, **averaged}, wait=True)
        snapshots.close()
        workdir.write_record(folder, config, facts, session | {'command': sys.argv})


def _tell_accuracy(
    config: ConfigDict,
    dataset: datasets.Dataset,
    description: Mapping[str, Any],
    variables: Mapping[str, Any],
) -> None:
    """Says how many test images are right: few where activation, padding or mean are not its."""
    images, labels = dataset.image_test[:_TRIED], dataset.label_test[:_TRIED]
    network = build.network(config, description)
    with progress.waiting(f'predicting the first {len(labels)} test images'):
        log_probs = jax.jit(network.log_probs)(variables, images / np.float32(255))
    correct = int(np.sum(np.argmax(log_probs, axis=1) == labels))
    print(
        f'{correct} of the first {len(labels)} test images are classified correctly; if it should '
        'be more, its activation, its standardisation or its forward pass is another'
    )


def _first(tensors: Mapping[str, np.ndarray]) -> str:
    names = list(tensors)
    return f'{", ".join(names[:4])}{", ..." * (len(names) > 4)}' or 'no tensors'
