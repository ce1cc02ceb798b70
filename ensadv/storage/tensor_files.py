"""Files of named tensors, as other programs write and read them. Nothing is ever unpickled."""

import io
import json
import re
import struct
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import numpy as np
from etils import epath

from ensadv.errors import UserError
from ensadv.storage import files

SAFETENSORS, NPZ = '.safetensors', '.npz'
PICKLED = ('.pt', '.pth', '.pt7', '.bin', '.ckpt', '.tar')  # as torch.save writes them
EXPORTED = 'ensadv'  # the entry of a .safetensors' metadata that --mode=export writes
_LARGEST_HEADER = 100_000_000  # bytes, as the format's own library allows


def to_safetensors(tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> bytes:
    """Returns the content of a .safetensors file."""
    from safetensors import numpy as safetensors

    arrays = {name: np.ascontiguousarray(array) for name, array in tensors.items()}
    return safetensors.save(arrays, dict(metadata))


def read_metadata(path: epath.Path) -> dict[str, str]:
    """Returns what a .safetensors file says of its tensors; {} of files of other kinds.

    Raises:
      UserError: if it cannot be read, or is no such file.
    """
    if path.suffix != SAFETENSORS:
        return {}
    try:
        files.check_is_file(path)
        with path.open('rb') as file:
            (length,) = struct.unpack('<Q', file.read(8))
            header = json.loads(file.read(length)) if length <= _LARGEST_HEADER else None
        metadata = header.get('__metadata__', {})
    except (ValueError, RecursionError, AttributeError, struct.error) as error:
        raise _not_read(path, 'a .safetensors file', error) from error
    except OSError as error:
        raise UserError(f'{path}: cannot be read ({error.strerror or error})') from error
    is_text = isinstance(metadata, dict) and all(isinstance(v, str) for v in metadata.values())
    return metadata if is_text else {}


def split(source: str) -> tuple[epath.Path, str]:
    """Returns the file of a FILE or FILE:ENTRY, and the entry, or ''; see `read`."""
    kinds = '|'.join(map(re.escape, PICKLED))
    match = re.fullmatch(rf'(.*(?:{kinds})):([^/:]+)', source)
    path, entry = match.groups() if match else (source, '')
    return files.absolute(path), entry


def exported(path: epath.Path) -> dict[str, Any] | None:
    """Returns what a file that --mode=export wrote says of itself; None of any other file.

    Returns:
      Its 'config', the run's, and 'network', the arguments of model.py's Ensemble, among others.

    Raises:
      UserError: if the file cannot be read.
    """
    metadata = read_metadata(path)
    if EXPORTED not in metadata:
        return None
    try:
        content = json.loads(metadata[EXPORTED])
        return {**content, 'config': {**content['config']}, 'network': {**content['network']}}
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise _not_read(path, 'a file as --mode=export writes it', error) from error


def read(
    path: epath.Path, entry: str, is_network: Callable[[Collection[str]], bool]
) -> dict[str, np.ndarray]:
    """Reads a network's tensors from a file.

    Args:
      path: a .safetensors, an .npz, or what torch.save wrote, which torch has to be there for; it
        is read by its loader of weights alone (`weights_only`), which runs nothing of the file's.
      entry: of a file by torch.save: which of its entries has the tensors, as in 'ema.model'; for
        '' it is the only one that has a network's.
      is_network: whether tensors of these names may be a network's; asked of a file's entries.

    Returns:
      Arrays by name, floating ones as float32.

    Raises:
      UserError: if it cannot be read, or is no such file, or has no tensors.
    """
    kinds = (SAFETENSORS, NPZ, *PICKLED)
    if path.suffix not in kinds:
        raise UserError(f'{path}: expected a file of tensors, one of {", ".join(kinds)}')
    if entry and path.suffix not in PICKLED:
        raise UserError(f'{path}:{entry}: only what torch.save wrote has entries')
    try:
        files.check_is_file(path)
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f'{path}: cannot be read ({error.strerror or error})') from error
    if path.suffix == SAFETENSORS:
        found = _safetensors(path, content)
    elif path.suffix == NPZ:
        try:
            found = files.read_arrays(path)
        except Exception as error:  # whatever zipfile and NumPy raise
            raise _not_read(path, 'an .npz of plain arrays', error) from error
    else:
        found = _by_torch(path, content, entry, is_network)
    return {name: _as_float32(array) for name, array in found.items()}


def _safetensors(path: epath.Path, content: bytes) -> dict[str, np.ndarray]:
    from safetensors import SafetensorError
    from safetensors import numpy as safetensors

    try:
        return safetensors.load(content)
    except (SafetensorError, KeyError, ValueError, TypeError) as error:
        raise _not_read(path, 'a .safetensors file', error) from error


def _by_torch(
    path: epath.Path, content: bytes, entry: str, is_network: Callable[[Collection[str]], bool]
) -> dict[str, np.ndarray]:
    try:
        import torch
    except ImportError as error:
        raise UserError(
            f'{path}: only PyTorch reads such a file without running what is in it, and it is not '
            'installed: pip install torch, or write the tensors where it is, as in '
            'numpy.savez(file, **{name: tensor.numpy() for name, tensor in state_dict.items()})'
        ) from error
    try:
        tree = torch.load(io.BytesIO(content), map_location='cpu', weights_only=True)
    except Exception as error:  # whatever torch, pickle and zipfile raise
        raise UserError(
            f'{path}: PyTorch does not read it as weights alone, and nothing in it is run '
            f'({_first_line(error)}); write its tensors alone where it can be trusted: '
            'torch.save(model.state_dict(), file)'
        ) from error
    tables = dict(_tables(tree, ''))
    if not entry or entry not in tables:
        tables = {name: found for name, found in tables.items() if is_network(found)}
        if entry or len(tables) != 1:
            names = ', '.join(name or 'the file itself' for name in tables) or 'none'
            raise UserError(
                f'{path}: expected {f"tensors in {entry}" if entry else "one network"}; entries '
                f'that may be a network: {names}; {path.name}:ENTRY names one'
            )
        (entry,) = tables
    as_array = lambda tensor: tensor.float() if tensor.dtype == torch.bfloat16 else tensor
    return {name: as_array(tensor.detach()).numpy() for name, tensor in tables[entry].items()}


def _tables(tree: Any, name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields each mapping in a tree of mappings that has tensors: its path, and the tensors."""
    import torch

    if isinstance(tree, Mapping):
        named = {key: value for key, value in tree.items() if isinstance(key, str)}
        tensors = {key: value for key, value in named.items() if isinstance(value, torch.Tensor)}
        if tensors:
            yield name, tensors
        for key, value in named.items():
            yield from _tables(value, f'{name}.{key}' if name else key)


def _as_float32(array: np.ndarray) -> np.ndarray:
    is_float = np.issubdtype(array.dtype, np.floating) or array.dtype.name == 'bfloat16'
    return array.astype(np.float32) if is_float else array


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or ['']
    return f'{type(error).__name__}: {lines[0][:150]}'


def _not_read(path: epath.Path, expected: str, error: BaseException) -> UserError:
    return UserError(f'{path}: expected {expected} ({_first_line(error)})')
