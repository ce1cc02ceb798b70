"""What --mode=members found: eval/<step>_members.json and .npz. No JAX."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epath

from ensadv.storage import files, records, workdir


def path_of(folder: epath.Path, step: int, suffix: str = '.json') -> epath.Path:
    """Returns the path of a step's file in a workdir."""
    return workdir.evaluation_path(folder, step, f'_members{suffix}')


def write(folder: epath.Path, content: Mapping[str, Any], ledger: Mapping[str, np.ndarray]) -> None:
    """Writes both files, in place of earlier ones of the step; the JSON, which counts, last."""
    files.write_arrays(path_of(folder, content['step'], '.npz'), ledger)
    files.write_json(path_of(folder, content['step']), content)


def read(folder: epath.Path, step: int) -> dict[str, Any] | None:
    """Reads a step's JSON; returns None where there is none.

    Raises:
      UserError: if it is damaged.
    """
    path = path_of(folder, step)
    return files.read_checked_json(path, records.members_mismatch, '--mode=members')
