"""Readers, one for each kind of data set: they return whole arrays."""

import contextlib
import importlib.util
import io
import sys
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import numpy as np
from absl import logging
from etils import epath

from ensadv.errors import DataError
from ensadv.runtime.tf_import import import_tensorflow
from ensadv.storage import files

# (image shape, classes) of the data sets from TFDS, so that `spec` needs no TensorFlow.
TFDS = {
    'cifar10': ((32, 32, 3), 10),
    'cifar100': ((32, 32, 3), 100),
    'svhn_cropped': ((32, 32, 3), 10),
    'mnist': ((28, 28, 1), 10),
}
ARRAYS = ('image_train', 'label_train', 'image_test', 'label_test')
MAX_CLASSES = 2**16  # a larger label is a stray number, not a class

# TensorFlow's errors that are not the file's fault.
_TENSORFLOW_OTHER_FAULTS = (
    'AbortedError', 'CancelledError', 'DeadlineExceededError', 'PermissionDeniedError',
    'ResourceExhaustedError', 'UnauthenticatedError', 'UnavailableError',
)  # fmt: skip
_TFDS_FILES = ('array_record', 'tfrecord')  # parts of their names
_RANDOM_ACCESS = {'array_record', 'parquet'}  # formats that TFDS reads without TensorFlow
_AS_ARRAY_RECORD = (
    'as ArrayRecord, made where TensorFlow is: '
    "tensorflow_datasets.builder('{}', file_format='array_record').download_and_prepare()"
)


@contextlib.contextmanager
def errors_as(message: str, if_damaged: str = ''):
    """Raises DataError, one line of `message` and the cause, for any error inside.

    `if_damaged` is added where the cause may be a damaged file, not memory, storage or permissions.
    """
    try:
        yield
    except DataError:
        raise
    except Exception as error:
        kind = type(error).__name__
        told = getattr(error, 'strerror', None) or error  # without the file's name
        cause = ' '.join(f'{kind}: {told}'.split())[:300].removesuffix(':')
        innocent = isinstance(error, (MemoryError, OSError)) or kind in _TENSORFLOW_OTHER_FAULTS
        advice = f'; {if_damaged}' if if_damaged and not innocent else ''
        raise DataError(f'{message}{advice} ({cause})') from error


def require(condition: bool, message: str) -> None:
    if not condition:
        raise DataError(message)


@contextlib.contextmanager
def _silent():
    """Keeps TFDS from logging advice and tracebacks, since errors become one line."""
    logger = logging.get_absl_logger()
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


def _import_tfds(name: str) -> tuple[ModuleType, bool]:
    """Returns TFDS, and whether TensorFlow is installed, which only some formats need."""
    with errors_as(
        f'data.name={name} needs TensorFlow Datasets: pip install tensorflow-cpu '
        'tensorflow-datasets importlib_resources; data.name=digits and data.name=npz need neither'
    ):
        has_tensorflow = True
        try:
            import_tensorflow()
        except ImportError:
            # TFDS would take a broken TensorFlow for a whole one.
            if 'tensorflow' in sys.modules or importlib.util.find_spec('tensorflow'):
                raise
            has_tensorflow = False
        with _silent():
            import tensorflow_datasets as tfds
        return tfds, has_tensorflow


def read_tfds(name: str, data_dir: str | None, download: bool) -> tuple[list[np.ndarray], int]:
    """Returns the four arrays of a TFDS data set, in file order, and the number of classes."""
    tfds, has_tensorflow = _import_tfds(name)
    with errors_as(f'data.data_dir: cannot open {data_dir or "the default of TFDS"}'):
        builder = tfds.builder(name, data_dir=data_dir)
        prepared = {'train', 'test'} <= set(builder.info.splits)
    elsewhere = 'point to a TFDS directory that has it with --config.data.data_dir=DIR'
    again = 'let TFDS download it with --config.data.download=True'
    missing = f'data.data_dir: found no {name} in {builder.data_path}'
    require(prepared or download, f'{missing}; {elsewhere}, or {again}')
    if not prepared:
        require(
            has_tensorflow,
            f'data.download: to prepare {name} TFDS needs TensorFlow: pip install tensorflow-cpu; '
            f'or {elsewhere}, {_AS_ARRAY_RECORD.format(name)}',
        )
        with errors_as(f'data.download: TFDS could not prepare {name}; try again, or {elsewhere}'):
            builder.download_and_prepare()
    with errors_as(
        f'data.data_dir: cannot read {name} in {builder.data_path}',
        f'if it is damaged, remove it and {again}',
    ):
        formats = {each.value for each in builder.info.available_file_formats()}
        if not has_tensorflow and not formats & _RANDOM_ACCESS:
            raise DataError(
                f'data.data_dir: {name} in {builder.data_path} is of {", ".join(sorted(formats))} '
                'files, which only TensorFlow reads: pip install tensorflow-cpu; or bring it '
                f'{_AS_ARRAY_RECORD.format(name)}'
            )
        # TFDS reads ArrayRecord only one example at a time.
        is_array_record = builder.info.file_format.value == 'array_record'
        one_by_one = is_array_record or not has_tensorflow
        arrays = []
        for split in ('train', 'test'):
            read = _read_one_by_one if one_by_one else _read_at_once
            images, labels = read(builder, split)
            arrays += [images, labels.astype(np.int32)]
    return arrays, builder.info.features['label'].num_classes


def _read_at_once(builder: Any, split: str) -> tuple[np.ndarray, np.ndarray]:
    examples = builder.as_dataset(split=split, batch_size=-1, shuffle_files=False)
    return examples['image'].numpy(), examples['label'].numpy()


def _read_one_by_one(builder: Any, split: str) -> tuple[np.ndarray, np.ndarray]:
    with _silent():
        examples = builder.as_data_source(split=split)
        images = np.empty((len(examples), *builder.info.features['image'].shape), np.uint8)
        labels = np.empty(len(examples), np.int64)
        for place, example in enumerate(examples):
            images[place], labels[place] = example['image'], example['label']
    return images, labels


def read_digits() -> list[np.ndarray]:
    """Returns scikit-learn's 1,797 real 8x8 digits; the test split is always the same 360."""
    with errors_as('data.name=digits needs scikit-learn: pip install scikit-learn'):
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    digits = load_digits()
    images = np.round(digits.images[..., None] * 255 / 16).astype(np.uint8)
    labels = digits.target.astype(np.int32)
    split = train_test_split(images, labels, test_size=360, stratify=labels, random_state=0)
    return [split[0], split[2], split[1], split[3]]


def read_npz(path: str | None) -> list[np.ndarray]:
    """Returns the four arrays of a user's file, checked."""
    require(bool(path), 'data.path: needed for data.name=npz, as in --config.data.path=my.npz')
    file = epath.Path(path).expanduser()
    of_tfds = next((kind for kind in _TFDS_FILES if kind in file.name), None)
    require(
        of_tfds is None,
        f'{path}: found a file of TFDS or Grain ({of_tfds}), allowed is an .npz file; a directory '
        f'that TFDS prepared is read by data.data_dir and data.name={", ".join(TFDS)}',
    )
    with errors_as(f'data.path: cannot read {path}'):
        files.check_is_file(file)
        # Read it whole: a zip file is read in many small pieces, each a request if it is remote.
        content = io.BytesIO(file.read_bytes())
    with errors_as(f'{path}: cannot be read', 'not an .npz file, or damaged'):
        file = np.load(content, allow_pickle=False)
    require(isinstance(file, Mapping), f'{path}: found one array, allowed is an .npz file')
    missing = ', '.join(field for field in ARRAYS if field not in file)
    require(not missing, f'{path}: no {missing}; found {", ".join(file) or "no arrays"}')
    arrays = []
    for field in ARRAYS:
        with errors_as(
            f'{path}: {field}: cannot be read',
            'damaged, or Python objects, which are never unpickled',
        ):
            arrays.append(np.asarray(file[field]))
    image_train, label_train, image_test, label_test = arrays
    check_images(image_train, f'{path}: image_train')
    check_images(image_test, f'{path}: image_test')
    check_labels(label_train, image_train, f'{path}: label_train')
    check_labels(label_test, image_test, f'{path}: label_test')
    found, shape = image_test.shape[1:], image_train.shape[1:]
    require(found == shape, f'{path}: image_test: found images {found}, image_train has {shape}')
    found, largest = label_test.max(), label_train.max()
    require(largest > 0, f'{path}: label_train: found only label 0, allowed are 2 classes or more')
    allowed = f'label_train allows 0..{largest}'
    require(found <= largest, f'{path}: label_test: found label {found}, {allowed}')
    return [image_train, label_train.astype(np.int32), image_test, label_test.astype(np.int32)]


def check_images(images: np.ndarray, where: str) -> None:
    if images.dtype != np.uint8:
        found, advice = _as_uint8(images)
        raise DataError(f'{where}: found {found}, allowed is uint8, 0..255{advice}')
    allowed = 'allowed is [n, height, width, channels], not empty'
    require(images.ndim == 4 and images.size, f'{where}: found shape {images.shape}, {allowed}')


def _as_uint8(images: np.ndarray) -> tuple[str, str]:
    """Returns a description of pixels of another type, and advice on making them uint8, or ''."""
    kind = str(images.dtype)
    if images.dtype.kind not in 'iuf' or not images.size:
        return kind, ''
    low, high = images.min(), images.max()
    if not np.isfinite([low, high]).all():
        return f'{kind} with {"NaN" if np.isnan(low) else "infinity"}', ''
    kind = f'{kind} in {low:.4g}..{high:.4g}'
    if low < 0 or high > 255:
        return kind, ': pixels as they were before they were standardised'
    scaled = '255 * x' if high <= 1 else 'x'
    return kind, f': np.round({scaled}).astype(np.uint8)'


def check_labels(labels: np.ndarray, images: np.ndarray, where: str) -> None:
    integer = labels.dtype.kind in 'iu'  # np.issubdtype counts time spans as integers, too
    require(integer, f'{where}: found {labels.dtype}, allowed are integers')
    allowed = f'allowed is ({len(images)},), one label for each image of {images.shape}'
    require(labels.shape == (len(images),), f'{where}: found shape {labels.shape}, {allowed}')
    for label in (labels.min(), labels.max()):
        allowed = f'allowed are 0..{MAX_CLASSES - 1}'
        require(0 <= label < MAX_CLASSES, f'{where}: found label {label}, {allowed}')
