"""The transfer set: adversarial examples made once against other networks, and its file.

Black-box accuracy is measured on it, in studies that may lie years apart. So all that can be
verified of the file is verified before any of it is used.
"""

import dataclasses
import hashlib
import json
import math
from typing import Any

import numpy as np
from etils import epath

from ensadv.attacks.threat_model import ThreatModel
from ensadv.data import datasets
from ensadv.errors import UserError
from ensadv.storage import files, records

_DTYPES = {'images': np.uint8, 'labels': np.int32, 'indices': np.int32, 'fooled': np.bool_}

# What every record has, beside what is only told.
_RECORD = {
    'digest': str,
    'fingerprint': str,
    'epsilon': float,
    'share_fooled': float,
    'sources': [records.SOURCE],
}


@dataclasses.dataclass(frozen=True, eq=False)
class TransferSet:
    """Adversarial examples and what they were made of.

    Attributes:
      images: uint8 [n, H, W, C].
      labels: int32 [n], the true ones.
      indices: int32 [n], places in the test split, ascending.
      fooled: bool [n], where every source errs on the image as it is stored.
      record: plain JSON: 'epsilon', in pixels, 'fingerprint', of the data set, and whatever else
        tells how the set was made; from a file also what `write` adds.
    """

    images: np.ndarray
    labels: np.ndarray
    indices: np.ndarray
    fooled: np.ndarray
    record: dict[str, Any]


def quantize(x_adv: np.ndarray, images: np.ndarray, threat: ThreatModel) -> np.ndarray:
    """Returns adversarial examples as they can be stored: at whole levels, none beyond epsilon.

    Of linf each pixel goes to the nearest level within epsilon, and of l2 to the next one towards
    its image, so that no example gets further away.

    Args:
      x_adv: float [n, H, W, C], pixels in [0, 1].
      images: uint8 [n, H, W, C], what they were made from.
      threat: the threat model.

    Returns:
      uint8 [n, H, W, C].
    """
    center = images.astype(np.int16)
    if threat.norm == 'l2':
        moves = np.trunc(np.asarray(x_adv, np.float64) * 255 - center)
        return np.clip(center + moves, 0, 255).astype(np.uint8)
    nearest, levels = np.rint(np.asarray(x_adv) * 255).astype(np.int16), _levels(threat.epsilon)
    low, high = np.maximum(center - levels, 0), np.minimum(center + levels, 255)
    return np.clip(nearest, low, high).astype(np.uint8)


def write(path: epath.PathLike, transfer_set: TransferSet) -> dict[str, Any]:
    """Writes the file, complete or not at all.

    Returns:
      The record as it is written: with 'n', 'fooled' and 'share_fooled', the examples that fool
      every source, and 'digest', the SHA-256 of the four arrays.

    Raises:
      ValueError: if an array is not what `TransferSet` says.
    """
    if reason := _malformed(transfer_set):
        raise ValueError(f'transfer set: {reason}')
    text = json.dumps(transfer_set.record | _facts(transfer_set))
    arrays = {name: getattr(transfer_set, name) for name in _DTYPES}
    files.write_arrays(_expanded(path), arrays | {'record': np.array(text)})
    return json.loads(text)


def read_record(path: epath.PathLike, threat: ThreatModel | None = None) -> dict[str, Any]:
    """Returns the record that `write` wrote, without reading the images.

    Raises:
      UserError: if the file is missing, damaged, no transfer set or, where `threat` is given,
        made for another one.
    """
    record = _parsed_record(path, _read(path, ('record',))['record'])
    if threat is not None and (reason := _made_for_another_threat(record, threat)):
        raise _refusal(path, reason)
    return record


def load(path: epath.PathLike, dataset: datasets.Dataset, threat: ThreatModel) -> TransferSet:
    """Reads a transfer set for this data set and this threat model, and verifies everything.

    Raises:
      UserError: if the file is missing, damaged or edited, made for other images or another
        threat model, or not what it says it is.
    """
    members = _read(path, (*_DTYPES, 'record'))
    record = _parsed_record(path, members.pop('record'))
    transfer_set = TransferSet(**members, record=record)
    reason = (
        _malformed(transfer_set)
        or _edited(transfer_set)
        or _made_for_others(record, dataset, threat)
        or _not_of_the_test_split(transfer_set, dataset, threat)
    )
    if reason:
        raise _refusal(path, reason)
    return transfer_set


def _levels(epsilon: float) -> int:
    """Returns epsilon in whole levels of 0..255; 8/255 is 8, though its float may lie below."""
    return math.floor(epsilon * 255 + 1e-6)


def _facts(transfer_set: TransferSet) -> dict[str, Any]:
    """Returns what a record says of the arrays, recomputed."""
    digest = hashlib.sha256()
    for name in _DTYPES:
        array = getattr(transfer_set, name)
        digest.update(f'{name} {array.dtype.str} {array.shape}\n'.encode())
        digest.update(np.ascontiguousarray(array))
    n, fooled = len(transfer_set.fooled), int(np.sum(transfer_set.fooled))
    counts = {'n': n, 'fooled': fooled, 'share_fooled': fooled / n}
    return {'digest': digest.hexdigest(), **counts}


def _expanded(path: epath.PathLike) -> epath.Path:
    return epath.Path(path).expanduser()


def _refusal(path: epath.PathLike, reason: str) -> UserError:
    return UserError(f'eval.blackbox_path: {path}: {" ".join(reason.split())}')


def _read(path: epath.PathLike, names: tuple[str, ...]) -> dict[str, np.ndarray]:
    """Returns these members of the file, and reads no others; nothing is unpickled."""
    try:
        files.check_is_file(_expanded(path))
        with _expanded(path).open('rb') as file:
            stored = np.load(file, allow_pickle=False)
            there = stored.files
            members = {name: np.asarray(stored[name]) for name in names if name in there}
    except FileNotFoundError as error:
        allowed = 'allowed is the file of a transfer set'
        raise _refusal(path, f'found no such file, {allowed}') from error
    except Exception as error:  # whatever storage, zipfile and NumPy raise
        cause = f'{type(error).__name__}: {error}'[:300]
        allowed = 'allowed is an undamaged .npz file of plain arrays'
        raise _refusal(path, f'cannot be read, {allowed} ({cause})') from error
    if missing := ', '.join(name for name in names if name not in members):
        raise _refusal(path, f'not a transfer set: no {missing}; found {", ".join(there)}')
    return members


def _parsed_record(path: epath.PathLike, member: np.ndarray) -> dict[str, Any]:
    try:
        record = json.loads(member.item()) if member.dtype.kind == 'U' else None
    except (ValueError, RecursionError):  # not one string, or not JSON
        record = None
    if not isinstance(record, dict):
        allowed = 'allowed is a JSON object'
        raise _refusal(path, f'record: found {member.dtype} {member.shape}, {allowed}')
    if reason := records.mismatch(record, _RECORD):
        raise _refusal(path, f'not a transfer set: record: {reason}')
    return record


# Each of these returns what is wrong, or None.


def _malformed(transfer_set: TransferSet) -> str | None:
    shape = transfer_set.images.shape
    for name, dtype in _DTYPES.items():
        array = getattr(transfer_set, name)
        fits = len(shape) == 4 and array.size if name == 'images' else array.shape == shape[:1]
        if array.dtype != dtype or not fits:
            expected = '[n, H, W, C], not empty' if name == 'images' else f'({shape[0]},)'
            allowed = f'allowed is {np.dtype(dtype)} {expected}'
            return f'{name}: found {array.dtype} {array.shape}, {allowed}'
    return None


def _edited(transfer_set: TransferSet) -> str | None:
    for name, value in _facts(transfer_set).items():
        stated = transfer_set.record.get(name)
        if stated != value:
            found = f'found arrays with {name} {value}'
            return f'damaged or edited: {found}, allowed is the {stated} of its record'
    return None


def _made_for_others(
    record: dict[str, Any], dataset: datasets.Dataset, threat: ThreatModel
) -> str | None:
    if record['fingerprint'] != dataset.fingerprint:
        found = f'found the fingerprint {record["fingerprint"]:.16}...'
        allowed = f'allowed is {dataset.fingerprint:.16}..., that of {dataset.name}'
        return f'made for other images: {found}, {allowed}'
    return _made_for_another_threat(record, threat)


def _made_for_another_threat(record: dict[str, Any], threat: ThreatModel) -> str | None:
    epsilon, norm = threat.epsilon, record.get('norm', 'linf')
    if norm != threat.norm:
        return f"made for another norm: found {norm}, allowed is this config's {threat.norm}"
    if not math.isclose(record['epsilon'], epsilon, rel_tol=1e-6):
        found, allowed = (f'{e:.6g} ({255 * e:.6g}/255)' for e in (record['epsilon'], epsilon))
        return f"made for another epsilon: found {found}, allowed is this config's {allowed}"
    return None


def _not_of_the_test_split(
    transfer_set: TransferSet, dataset: datasets.Dataset, threat: ThreatModel
) -> str | None:
    indices, last = transfer_set.indices, len(dataset.label_test) - 1
    if indices.min() < 0 or indices.max() > last:
        return f'indices: found {indices.min()}..{indices.max()}, allowed are 0..{last}'
    if np.any(np.diff(indices) <= 0):
        place = int(np.argmax(np.diff(indices) <= 0))
        found = f'found {indices[place]} before {indices[place + 1]}'
        return f'indices: {found}, allowed are ascending places, each once'
    if wrong := int(np.sum(transfer_set.labels != dataset.label_test[indices])):
        return f'labels: found {wrong} that differ, allowed are those of the test split'
    images, clean = transfer_set.images, dataset.image_test[indices]
    if images.shape != clean.shape:
        return f'images: found {images.shape}, allowed is {clean.shape} as in the test split'
    # Differences of uint8 wrap; that of the larger and the smaller does not.
    difference = np.maximum(images, clean) - np.minimum(images, clean)
    allowed, furthest = _levels(threat.epsilon), difference.max(axis=(1, 2, 3))
    if threat.norm == 'l2':
        allowed = 255 * threat.epsilon * (1 + 1e-5)
        furthest = np.sqrt(np.sum(difference.astype(np.float64) ** 2, axis=(1, 2, 3)))
    if far := int(np.sum(furthest > allowed)):
        found = f'found {far} up to {furthest.max():.6g} levels from their test images'
        return f'images: {found}, allowed are {allowed:.6g} levels (epsilon {threat.epsilon:.6g})'
    return None
