"""The files of decision planes, planes/<name>.npz of a run: plain arrays, read without JAX."""

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from ensadv.errors import UserError
from ensadv.storage import files, records

# Each array's kind (as NumPy's dtype.kind has it) and its axes; one name has one length.
_ARRAYS = {
    'names': ('U', ('rows',)),
    'member': ('i', ('rows',)),
    'clean': ('b', ('rows',)),
    'attacked': ('U', (2,)),
    'places': ('i', ('m',)),
    'saturated': ('i', ('m',)),
    'labels': ('i', ('m',)),
    'images': ('u', ('m', 'H', 'W', 'C')),
    'window': ('f', ()),
    'classes': ('i', ('m', 'rows', 'R', 'R')),
    'margins': ('f', ('m', 'rows', 'R', 'R')),
    'inside': ('b', ('m', 'R', 'R')),
    'points': ('f', ('m', 3, 2)),
    'point_classes': ('i', ('m', 'rows', 3)),
    'region': ('f', ('m', 'V', 2)),
    'notes': ('U', ('m',)),
}
_RECORD = {'class_names?': (None, [str]), 'attack': str, 'places': [range(2**31)]}
_OF_CLASSES = ('labels', 'classes', 'point_classes')
_TEXTS = ('names', 'attacked', 'notes')


class Planes(NamedTuple):
    """Decision planes of m images: the columns of a figure, whose rows are models.

    Coordinates are in units of epsilon: for linf the change's root mean square over the pixel
    values, for l2 its length. Nothing that an attack may do is farther than 1 from the image.

    Attributes:
      names: the rows: models whose decision regions are known, as 'SingleAdv, seed 0'.
      member: int32 [rows], which of its run's members a model is, from 1; 0: the ensemble.
      clean: bool [rows], whether a model was trained on clean images alone.
      attacked: whose adversarial examples span the plane (first, second).
      places: int32 [m], the images' places in the test split.
      saturated: int32 [m], the number of their saturated pixel values, see `planes.saturated`.
      labels: int32 [m].
      images: uint8 [m, H, W, C].
      window: float32, the side of the square around the image that is drawn.
      classes: int16 [m, rows, R, R], predicted class at the middle of each pixel of the window;
        [..., j, i]: j counts upwards (y), i to the right (x).
      margins: float32 [m, rows, R, R], by how much the label's log-probability exceeds every other
        class's there.
      inside: bool [m, R, R], whether all pixels of the image there are in [0, 1].
      points: float32 [m, 3, 2]: (x, y) of the image, the first and the second adversarial example.
      point_classes: int16 [m, rows, 3], predictions there.
      region: float32 [m, V, 2]: corners, in order, of the plane's intersection with what an attack
        may do, the ball and the box [0, 1]; padded with NaN.
      notes: one per image; '' unless its plane is degenerate.
      record: JSON-able: how they were made, see decision_planes.py.
    """

    names: tuple[str, ...]
    member: np.ndarray
    clean: np.ndarray
    attacked: tuple[str, str]
    places: np.ndarray
    saturated: np.ndarray
    labels: np.ndarray
    images: np.ndarray
    window: np.ndarray
    classes: np.ndarray
    margins: np.ndarray
    inside: np.ndarray
    points: np.ndarray
    point_classes: np.ndarray
    region: np.ndarray
    notes: tuple[str, ...]
    record: Mapping[str, Any]

    @property
    def shown(self) -> list[int]:
        """The rows of Figure 4: both ensembles, or of one run its members and itself."""
        wholes = np.flatnonzero(self.member == 0)
        return list(wholes if len(wholes) > 1 else range(len(self.names)))

    @property
    def is_response(self) -> bool:
        """Whether they show what adversarial training changes: the second of two is not clean."""
        return self.clean[self.member == 0].tolist() == [True, False]


def write(path: epath.Path, planes: Planes) -> None:
    """Writes decision planes, complete or not at all."""
    arrays = {name: np.asarray(getattr(planes, name)) for name in _ARRAYS}
    files.write_arrays(path, arrays | {'record': np.array(json.dumps(planes.record))})


def read(path: epath.Path) -> Planes:
    """Reads what `write` wrote; nothing is unpickled.

    Raises:
      UserError: if the file is missing, damaged or holds something else.
    """
    if not path.exists():
        raise UserError(f'{path}: found no such file, expected one of --mode=planes')
    try:
        arrays = files.read_arrays(path)
        record = json.loads(arrays.pop('record').item())
    except Exception as error:  # whatever storage, zipfile, NumPy and JSON raise
        cause = f'{type(error).__name__}: {error}'
        raise UserError(f'{path}: expected a file of --mode=planes ({cause})') from error
    if reason := _malformed(arrays, record):
        raise UserError(f'{path}: {reason}')
    texts = {name: tuple(map(str, arrays[name])) for name in _TEXTS}
    kept = {name: arrays[name] for name in _ARRAYS}
    return Planes(**(kept | texts), record=record)


def _malformed(arrays: dict[str, np.ndarray], record: object) -> str | None:
    """Returns what is wrong, or None."""
    if 'extent' in arrays:
        return 'is of an older version, which --mode=planes replaces'
    if reason := records.mismatch(record, _RECORD):
        return f'record: {reason}'
    lengths: dict[str | int, int] = {}
    for name, (kind, axes) in _ARRAYS.items():
        if name not in arrays:
            return f'expected an array {name}, found {", ".join(arrays)}'
        array = arrays[name]
        fits = array.dtype.kind == kind and array.ndim == len(axes)
        for axis, length in zip(axes, array.shape, strict=False):
            fits &= length == (axis if isinstance(axis, int) else lengths.setdefault(axis, length))
        if not fits:
            shape = ', '.join(f'{axis}' for axis in axes)
            return f'{name}: expected [{shape}], found {array.dtype} {array.shape}'
    if not all(lengths[axis] for axis in ('m', 'rows', 'R', 'H', 'W', 'C')):
        return f'expected at least one of each, found {lengths}'
    for name in ('window', 'points'):
        if not np.isfinite(arrays[name]).all():
            return f'{name}: expected finite numbers'
    if not arrays['window'] > 0:
        return f'window: expected a number > 0, found {arrays["window"]}'
    classes = {int(c) for name in _OF_CLASSES for c in np.unique(arrays[name])}
    names = record.get('class_names')
    if min(classes, default=0) < 0 or (names and max(classes, default=0) >= len(names)):
        return f'expected classes by their numbers, found {sorted(classes)}'
    return None
