"""The files of a run's workdir, except weights: config.json and eval/<step>.json, .npz."""

import io
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epath
from ml_collections import ConfigDict

from ensadv import config as config_lib
from ensadv.errors import ConfigError, UserError


def write_bytes(path: epath.Path, content: bytes) -> None:
    """Writes a file that appears complete or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.parent / f'.{path.name}.tmp'
    beside.write_bytes(content)
    beside.replace(path)


def write_json(path: epath.Path, content: Any) -> None:
    """Writes JSON, one line per innermost object, complete or not at all."""
    write_bytes(path, (json.dumps(content, indent=1) + '\n').encode())


def read_json(path: epath.Path) -> Any:
    """Reads JSON.

    Raises:
      UserError: if the file is not JSON.
    """
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f'{path}: not valid JSON ({error})') from error


def write_arrays(path: epath.Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes a compressed .npz, complete or not at all."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    write_bytes(path, buffer.getvalue())


def read_arrays(path: epath.Path) -> dict[str, np.ndarray]:
    """Reads an .npz of plain arrays; nothing is unpickled."""
    with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as arrays:
        return dict(arrays)


def read_record(workdir: epath.Path) -> dict[str, Any] | None:
    """Returns config.json's content ('config', 'dataset', ...), or None where there is none."""
    path = workdir / 'config.json'
    return read_json(path) if path.exists() else None


def claim(workdir: epath.Path, config: ConfigDict, record: Mapping[str, Any]) -> None:
    """Makes `workdir` the run's own by writing config.json, or goes on in it.

    Args:
      workdir: created if missing.
      config: the run's resolved config.
      record: what else config.json says; its 'dataset' must have a 'fingerprint'.

    Raises:
      ConfigError: if the workdir belongs to a run that would compute something else.
    """
    old = read_record(workdir)
    new_config = config_lib.to_dict(config)
    if old is not None:
        changed = config_lib.changed_fields(old['config'], new_config)
        if old['dataset']['fingerprint'] != record['dataset']['fingerprint']:
            changed.append('the data themselves (fingerprint)')
        if changed:
            raise ConfigError(
                f'--workdir={workdir}: belongs to a run with another config '
                f'({"; ".join(changed)}); use that config or another workdir'
            )
    elif workdir.exists() and not workdir.is_dir():
        raise UserError(f'--workdir={workdir}: is a file, expected a directory')
    content = {'config': new_config, **record}
    if content != old:
        write_json(workdir / 'config.json', content)


def evaluation_path(workdir: epath.Path, step: int, suffix: str) -> epath.Path:
    """Returns the path of eval/<step>.json or .npz."""
    return workdir / 'eval' / f'{step}{suffix}'


def read_evaluations(workdir: epath.Path) -> dict[int, dict[str, Any]]:
    """Returns the content of every eval/<step>.json, by step, in order."""
    folder = workdir / 'eval'
    if not folder.exists():
        return {}
    paths = {int(path.stem): path for path in folder.glob('[0-9]*.json')}
    return {step: read_json(paths[step]) for step in sorted(paths)}
