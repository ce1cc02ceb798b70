"""Extra training images, such as generated ones: files that stay on disk, in memory maps."""

import dataclasses
import functools
import glob
import hashlib
import io
import mmap
import os
import pathlib
import struct
import zipfile
from typing import Any

import numpy as np
from absl import logging

from ensadv.data import readers
from ensadv.data.readers import require

# Names of images and labels in a file. Published sets of generated images have the first (Rebuffi
# et al., 2021; Wang et al., 2023).
_PAIRS = (
    ('image', 'label'),
    ('images', 'labels'),
    ('image_train', 'label_train'),
    ('arr_0', 'arr_1'),
)
_MOST_COMPRESSED = 4 * 2**30  # bytes of a member that are unpacked into memory
_SAMPLED = 4096  # images that are looked at before training
_ALLOWED = 'allowed are .npz files, image*.npy with label*.npy beside them, or folders of them'


@dataclasses.dataclass(frozen=True, eq=False)
class Extra:
    """Images and labels of one or more files, in the order of the files.

    Attributes:
      parts: the files' images, uint8 [n, H, W, C] each, most of them memory maps.
      labels: of all of them, int32 [n].
    """

    parts: tuple[np.ndarray, ...]
    labels: np.ndarray

    @functools.cached_property
    def _ends(self) -> np.ndarray:
        return np.cumsum([len(part) for part in self.parts])

    @property
    def nbytes(self) -> int:
        """Bytes of all images."""
        return sum(part.nbytes for part in self.parts)

    def images(self, indices: np.ndarray) -> np.ndarray:
        """Returns some images, uint8 [m, H, W, C], for indices int [m]."""
        found = np.empty((len(indices), *self.parts[0].shape[1:]), np.uint8)
        of_part = np.searchsorted(self._ends, indices, side='right')
        for number in np.unique(of_part):
            here, part = of_part == number, self.parts[number]
            found[here] = part[indices[here] - (self._ends[number] - len(part))]
        return found

    def all_images(self) -> np.ndarray:
        """Returns all images in memory, uint8 [n, H, W, C]."""
        return np.concatenate(self.parts)

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256, as hex digits, of shape, all labels, and evenly spread images.

        Of up to 4,096 images all count. To read all of 20 million would take minutes at each start.
        """
        n = len(self.labels)
        digest = hashlib.sha256(f'{n} {self.parts[0].shape[1:]}\n'.encode())
        digest.update(np.ascontiguousarray(self.labels, '<i4'))
        digest.update(self.sample)
        return digest.hexdigest()

    @functools.cached_property
    def sample(self) -> np.ndarray:
        """Up to 4,096 of the images, evenly spread, uint8 [m, H, W, C]."""
        n = len(self.labels)
        return self.images(np.linspace(0, n - 1, min(n, _SAMPLED)).astype(np.int64))

    def describe(self) -> dict[str, Any]:
        """Returns what a run records of them, as JSON keeps it."""
        return {'num': len(self.labels), 'fingerprint': self.fingerprint}


@functools.lru_cache(maxsize=1)  # runs of a study share them
def load(paths: tuple[str, ...], image_shape: tuple[int, int, int], num_classes: int) -> Extra:
    """Opens files of images; only labels are read.

    Args:
      paths: local files, folders of them, or patterns such as 'part*.npz'. An .npz file holds
        images and labels under the names of one of `_PAIRS`. An .npy file of images has 'image' in
        its name; its labels are where that is 'label'.
      image_shape: (H, W, C) that all have to have.
      num_classes: of the labels.

    Raises:
      DataError: naming the file, in one line.
    """
    opened = [_open(file) for path in paths for file in _files(path)]
    labels = []
    for where, images, own in opened:
        readers.check_images(images, f'{where}: images')
        found = images.shape[1:]
        require(found == image_shape, f'{where}: found images {found}, data.name has {image_shape}')
        readers.check_labels(own, images, f'{where}: labels')
        allowed = f'data.name allows 0..{num_classes - 1}'
        require(own.max() < num_classes, f'{where}: labels: found {own.max()}, {allowed}')
        labels.append(own.astype(np.int32))
    return Extra(tuple(images for _, images, _ in opened), np.concatenate(labels))


def _files(path: str) -> list[str]:
    """Returns the files that hold images, in the order of their names."""
    where = f'data.extra: {path}'
    require('://' not in path, f'{where}: expected a local file: copy it to a disk of this machine')
    path = os.path.expanduser(path)
    if os.path.isfile(path):
        return [path]
    if os.path.isdir(path):
        there = [os.path.join(path, name) for name in os.listdir(path)]
    else:
        there = glob.glob(path)
    files = sorted(filter(_holds_images, there))
    require(bool(files), f'{where}: found no file of images, {_ALLOWED}')
    for file in files:
        require(os.path.isfile(file), f'{where}: {file} is no file')
    return files


def _holds_images(file: str) -> bool:
    name = os.path.basename(file)
    return name.endswith('.npz') or (name.endswith('.npy') and 'image' in name)


def _open(file: str) -> tuple[str, np.ndarray, np.ndarray]:
    """Returns how to name a file, its images, and its labels, which are read."""
    where = f'data.extra: {file}'
    folder, name = os.path.split(file)
    with readers.errors_as(f'{where}: cannot be read', 'damaged, or not what its name says'):
        if name.endswith('.npz'):
            return where, *_open_npz(file, where)
        is_pair = name.endswith('.npy') and 'image' in name
        require(is_pair, f'{where}: {_ALLOWED}')
        beside = os.path.join(folder, 'label'.join(name.rsplit('image', 1)))
        require(os.path.isfile(beside), f'{where}: found no {beside} with its labels')
        arrays = [np.load(each, mmap_mode='r', allow_pickle=False) for each in (file, beside)]
        return where, _read_at_random(arrays[0]), np.array(arrays[1])


def _open_npz(file: str, where: str) -> tuple[np.ndarray, np.ndarray]:
    with zipfile.ZipFile(file) as archive:
        members = {info.filename.removesuffix('.npy'): info for info in archive.infolist()}
        pair = next((pair for pair in _PAIRS if members.keys() >= set(pair)), None)
        pairs = ', or '.join(map(' and '.join, _PAIRS))
        found = ', '.join(members) or 'no arrays'
        require(pair is not None, f'{where}: expected arrays {pairs}; found {found}')
        images, labels = (members[name] for name in pair)
        if images.compress_type == zipfile.ZIP_STORED:
            mapped = _mapped(file, images.header_offset)
        else:
            size = f'{images.file_size / 2**30:.1f} GiB'
            require(
                images.file_size <= _MOST_COMPRESSED,
                f'{where}: {pair[0]}: is compressed and would take {size} of memory; unpack it, '
                f'python -m zipfile -e {file} DIR, and give --config.data.extra=DIR',
            )
            logging.info('%s: %s: is compressed: read whole, %s', where, pair[0], size)
            mapped = _unpacked(archive, images)
        return mapped, _unpacked(archive, labels)


def _unpacked(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> np.ndarray:
    return np.load(io.BytesIO(archive.read(member)), allow_pickle=False)


def _mapped(file: str, header: int) -> np.ndarray:
    """Returns a memory map of an array that lies in a zip file as it is, behind its header."""
    with pathlib.Path(file).open('rb') as opened:
        opened.seek(header + 26)
        lengths = struct.unpack('<HH', opened.read(4))  # of the name and of further fields
        opened.seek(header + 30 + sum(lengths))
        version = np.lib.format.read_magic(opened)
        require(version in ((1, 0), (2, 0)), f'data.extra: {file}: is of another .npy format')
        read = getattr(np.lib.format, f'read_array_header_{version[0]}_{version[1]}')
        shape, fortran, dtype = read(opened)
        require(not dtype.hasobject, f'data.extra: {file}: holds Python objects, never unpickled')
        order = 'F' if fortran else 'C'
        return _read_at_random(np.memmap(file, dtype, 'r', opened.tell(), shape, order))


def _read_at_random(array: np.memmap) -> np.ndarray:
    """Returns a memory map of which the system reads no more than what is asked for."""
    if hasattr(mmap, 'MADV_RANDOM'):
        array._mmap.madvise(mmap.MADV_RANDOM)
    return array
