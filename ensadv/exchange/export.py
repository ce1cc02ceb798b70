"""The export job: a run's ensemble as a folder that PyTorch alone can use."""

import hashlib
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict

import ensadv
from ensadv import architectures, build
from ensadv import config as config_lib
from ensadv.errors import UserError
from ensadv.evaluation import finished_runs
from ensadv.exchange import card, naming
from ensadv.runtime import distributed, progress
from ensadv.storage import files, tensor_files

_IMAGES = 16  # whose log-probabilities are kept, to compare with
_PROGRAMS = ('model.py', 'check.py')
# What a run began with, for whoever imports it: no paths of the machine that it was made on, and
# nothing of what only evaluation or a study asks for.
_GROUPS = ('system', 'seed', 'norm', 'epsilon', 'data', 'model', 'batch_norm', 'ensemble', 'train',
           'attack')  # fmt: skip
_PATHS = ('data.data_dir', 'data.path', 'data.extra', 'ensemble.members_from')


def run(config: ConfigDict, path: epath.Path, to: epath.Path) -> None:
    """Writes the weights of a finished run's last snapshot, and what uses and describes them.

    The folder appears whole or not at all.

    Args:
      config: the run's; eval.weights picks trained or averaged weights.
      path: its workdir.
      to: the folder, which must not be there, or be empty.

    Raises:
      UserError: if the run is not finished, or has members or a network that cannot be exported.
      StorageError: if the folder cannot be written.
    """
    if distributed.num_processes() > 1:
        raise UserError('--mode=export: runs in one process')
    _check(config, path)
    files.check_is_free(to, '--to')
    run = finished_runs.find(path, '--workdir', config)
    run.config.eval.weights = config.eval.weights
    dataset = build.dataset(run.config)
    images = dataset.image_test[:_IMAGES].astype(np.float32) / np.float32(255)
    with progress.waiting('predicting what the exported model has to predict'):
        network, variables = finished_runs.load_one(run, 'float32')
        log_probs = jax.jit(network.log_probs)(variables, images)
    tensors = naming.to_pytorch(jax.device_get(variables))
    mean, std = build.standardisation(run.config, run.record['dataset'])
    for name, values in (('mean', mean), ('std', std)):
        tensors[name] = np.asarray(values, np.float32)[:, None, None]
    weights = tensor_files.to_safetensors(tensors, _metadata(run))
    reference = {'images': np.moveaxis(images, -1, 1), 'log_probs': np.asarray(log_probs)}
    described = card.make(run, hashlib.sha256(weights).hexdigest(), len(images))
    with files.appearing(to, 'README.md') as folder:
        (folder / 'weights.safetensors').write_bytes(weights)
        (folder / 'reference.safetensors').write_bytes(tensor_files.to_safetensors(reference, {}))
        for name in _PROGRAMS:
            (folder / name).write_bytes((pathlib.Path(__file__).parent / name).read_bytes())
        for name, text in described.items():
            (folder / name).write_text(text)
    which = config_lib.weights(run.config)
    print(
        f'{to}: the {which} weights of step {run.step:,}, the last snapshot of {path}\n'
        f'to check them, where PyTorch is: python {to}/check.py'
    )


def _check(config: ConfigDict, path: epath.Path) -> None:
    if own := architectures.own(config.model.name):
        raise UserError(
            f'--mode=export: {path} is of {own.file}:{own.name}, a network of your own, whose '
            f'PyTorch is not known; expected one of {", ".join(architectures.ARCHITECTURES)}'
        )
    if members := config.ensemble.members_from:
        raise UserError(
            f'--mode=export: {path} is an ensemble of runs; export each of its members: {members}'
        )


def network_settings(config: ConfigDict, dataset: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the arguments of model.py's Ensemble.

    Args:
      config: the run's.
      dataset: 'image_shape' and 'num_classes'.
    """
    return {
        'network': config.model.name,
        'depth': config.model.depth,
        'width': config.model.width,
        'channels': dataset['image_shape'][-1],
        'classes': dataset['num_classes'],
        'members': config.ensemble.size,
        'combine': config.ensemble.combine,
        'activation': config.model.activation,
        'padding': config.model.padding,
        'epsilon': config.batch_norm.epsilon,
        'gate_width': config.ensemble.gate_width,
    }


def _metadata(run: finished_runs.Run) -> dict[str, str]:
    """Returns what weights.safetensors says of itself, for model.py and for --mode=import."""
    config = {key: value for key, value in run.record['config'].items() if key in _GROUPS}
    for field in _PATHS:
        group, name = field.split('.')
        config[group] = {key: value for key, value in config[group].items() if key != name}
    content = {
        'version': ensadv.__version__,
        'step': run.step,
        'network': network_settings(run.config, run.record['dataset']),
        'config': config,
    }
    # One entry, since safetensors writes several in any order: the same run has the same bytes.
    return {tensor_files.EXPORTED: json.dumps(content)}
