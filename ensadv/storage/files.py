"""Files that appear complete or not at all: bytes, JSON and arrays."""

import contextlib
import errno
import io
import json
import os
import tempfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath

from ensadv.errors import StorageError, UserError

_CHECKSUM = 'crc32'  # of a JSON file's other fields, without which a flipped digit looks right


def absolute(path: str) -> epath.Path:
    """Returns a path as the user gave it, absolute, since Orbax takes no other."""
    expanded = epath.Path(path).expanduser()
    return expanded if expanded.is_absolute() else epath.Path(Path.cwd()) / expanded


def write_bytes(path: epath.Path, content: bytes) -> None:
    """Writes a file that appears complete or not at all, also when the power fails.

    Raises:
      StorageError: if it cannot be written.
    """
    beside = path.parent / f'.{path.name}.tmp'
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with beside.open('wb') as file:
            file.write(content)
            file.flush()
            # Only a local file has a number. Without this its new name may be on disk before it.
            with contextlib.suppress(AttributeError, io.UnsupportedOperation):
                os.fsync(file.fileno())
        beside.replace(path)
    except Exception as error:  # storages other than a local disk have errors of their own
        with contextlib.suppress(Exception):
            beside.unlink(missing_ok=True)
        raise storage_error(path, getattr(error, 'strerror', None) or str(error)) from error


def check_is_free(path: epath.Path, flag: str) -> None:
    """Raises UserError if something is at a path already, but for an empty folder."""
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UserError(f'{flag}={path}: is there already; name a new folder')


@contextlib.contextmanager
def appearing(path: epath.Path, last: str) -> Iterator[epath.Path]:
    """Gives a new folder, which becomes that of a path when all in it is written.

    On a local disk that is a renaming. Object stores rename no folders: there its files are copied,
    and `last` comes last.

    Args:
      path: free, see `check_is_free`.
      last: name of a file in it, without which nobody takes it for whole.

    Raises:
      StorageError: if it cannot be written; nothing is left then.
    """
    if '://' in str(path):
        with tempfile.TemporaryDirectory() as local:
            folder = Path(local)
            yield epath.Path(folder)
            with _removed_if_it_fails(path, path):
                files = [file for file in folder.rglob('*') if not file.is_dir()]
                for file in sorted(files, key=lambda file: file == folder / last):
                    copy = path / file.relative_to(folder).as_posix()
                    copy.parent.mkdir(parents=True, exist_ok=True)
                    copy.write_bytes(file.read_bytes())
        return
    beside = path.parent / f'.{path.name}.tmp'
    with _removed_if_it_fails(beside, path):
        beside.rmtree(missing_ok=True)  # what a killed process left
        beside.mkdir(parents=True)
        yield beside
        if path.exists():
            path.rmdir()
        beside.rename(path)


@contextlib.contextmanager
def _removed_if_it_fails(folder: epath.Path, path: epath.Path) -> Iterator[None]:
    try:
        yield
    except BaseException as error:
        with contextlib.suppress(Exception):
            folder.rmtree(missing_ok=True)
        if isinstance(error, OSError):
            raise storage_error(path, error.strerror or str(error)) from error
        raise


def storage_error(path: epath.Path, reason: str) -> StorageError:
    """Returns what to tell where `path` cannot be written."""
    return StorageError(
        f'{path}: cannot be written: {reason}. What was written before is whole: once there is '
        'space and permission, the same command goes on from it'
    )


def reason(error: BaseException) -> str:
    """Returns why something cannot be read or written, in a line.

    Orbax, CLU and TensorStore wrap what the storage said.
    """
    while error.__cause__ is not None:
        error = error.__cause__
    text = str(error).strip()
    for cause in map(os.strerror, (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)):
        if cause in text:
            return cause
    return f'{type(error).__name__}: {text.splitlines()[0][:200] if text else ""}'


def write_json(path: epath.Path, content: Mapping[str, Any]) -> None:
    """Writes JSON, complete or not at all, with a checksum of itself.

    Raises:
      StorageError: if it cannot be written.
    """
    content = {name: value for name, value in content.items() if name != _CHECKSUM}
    text = json.dumps({**content, _CHECKSUM: _checksum(content)}, indent=1)
    write_bytes(path, f'{text}\n'.encode())


def read_json(path: epath.Path) -> Any:
    """Reads what `write_json` wrote, or any other JSON.

    Raises:
      UserError: if the file cannot be read, is not JSON, or its checksum is another.
    """
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f'{path}: cannot be read ({error.strerror or error})') from error
    except (ValueError, RecursionError) as error:  # the latter of what is nested too deeply
        raise UserError(f'{path}: not valid JSON ({error})') from error
    if isinstance(content, dict) and _CHECKSUM in content:
        written = content.pop(_CHECKSUM)
        if written != _checksum(content):
            raise UserError(
                f'{path}: is not what was written (its {_CHECKSUM} is another): damaged, or '
                'changed by hand'
            )
    return content


def read_checked_json(
    path: epath.Path, mismatch: Callable[[Any], str | None], writer: str
) -> dict[str, Any] | None:
    """Reads JSON of a known form; returns None where there is no file.

    Args:
      path: of the file.
      mismatch: returns why some content is not of the form, or None.
      writer: what writes such files, for the error.

    Raises:
      UserError: if it is damaged, or of another form.
    """
    if not path.exists():
        return None
    content = read_json(path)
    if reason := mismatch(content):
        raise UserError(f'{path}: not what {writer} writes: {reason}')
    return content


def _checksum(content: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())


def write_arrays(path: epath.Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes a compressed .npz, complete or not at all."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    write_bytes(path, buffer.getvalue())


def check_is_file(path: epath.Path) -> None:
    """Raises OSError for what is there but no file: to read a pipe or a device might never end."""
    if os.path.exists(path) and not os.path.isfile(path):  # epath takes all but directories
        raise OSError('is no file')


def read_arrays(path: epath.Path) -> dict[str, np.ndarray]:
    """Reads an .npz of plain arrays; nothing is unpickled."""
    check_is_file(path)
    with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as arrays:
        # What is no .npy file in it comes as bytes.
        return {name: np.asarray(array) for name, array in arrays.items()}


def put_aside(path: epath.Path) -> None:
    """Renames a damaged file, so that it is neither read again nor in the way."""
    with contextlib.suppress(FileNotFoundError):  # another process did
        path.replace(path.parent / f'{path.name}.damaged')
