"""Readers, one for each kind of data set: they return whole arrays."""

import contextlib
import importlib.util
import io
import re
import sys
from collections.abc import Mapping
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
from absl import logging
from etils import epath

from ensadv.errors import DataError
from ensadv.runtime.tf_import import import_tensorflow
from ensadv.storage import files
from ensadv.values import nearest

# (image shape, classes) of the data sets from TFDS, so that `spec` needs no TensorFlow.
TFDS = {
    'cifar10': ((32, 32, 3), 10),
    'cifar100': ((32, 32, 3), 100),
    'svhn_cropped': ((32, 32, 3), 10),
    'mnist': ((28, 28, 1), 10),
}
TFDS_PREFIX = 'tfds:'  # of the name of any other
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


class TfdsFacts(NamedTuple):
    """What a TFDS data set's own description says of its examples.

    Attributes:
      image, label: the names of what images are classified, and of their classes.
      image_shape: (H, W, C).
      class_names: by label.
    """

    image: str
    label: str
    image_shape: tuple[int, int, int]
    class_names: tuple[str, ...]


def open_tfds(name: str, data_dir: str | None) -> tuple[Any, TfdsFacts, bool]:
    """Returns a TFDS builder, what its description says, and whether TensorFlow is installed.

    Args:
      name: as TFDS has it, or after `TFDS_PREFIX`.
      data_dir: see `datasets.load`.

    Raises:
      DataError: if there is no such data set, or it is not one of images of one size with classes.
    """
    tfds, has_tensorflow = _import_tfds(name)
    plain = name.removeprefix(TFDS_PREFIX)
    with errors_as(f'data.data_dir: cannot open {data_dir or "the default of TFDS"}'), _silent():
        try:
            builder = tfds.builder(plain, data_dir=data_dir)
        except tfds.core.DatasetNotFoundError as error:
            meant = nearest(re.split('[/:]', plain)[0], tfds.list_builders())
            raise DataError(f'data.name: {name}: TFDS knows no such data set{meant}') from error
        info = builder.info
    is_named = isinstance(info.features, tfds.features.FeaturesDict)
    features = dict(info.features.items()) if is_named else {}
    keys = info.supervised_keys or ()
    if len(keys) != 2 or not all(isinstance(key, str) and key in features for key in keys):
        keys = ('image', 'label')
    image, label = map(features.get, keys)
    is_classified = isinstance(image, tfds.features.Image) and isinstance(
        label, tfds.features.ClassLabel
    )
    where = f'data.name: {name}'
    require(
        is_classified,
        f'{where}: found {", ".join(features) or "no named features"}, allowed are data sets of '
        'TFDS with an image and its class',
    )
    require(
        None not in image.shape and image.np_dtype == np.uint8,
        f'{where}: found images {image.shape} of {np.dtype(image.np_dtype)}, allowed are images of '
        'one size (None is any), of uint8',
    )
    require((label.num_classes or 0) > 1, f'{where}: found {label.num_classes} classes')
    return builder, TfdsFacts(*keys, tuple(image.shape), tuple(label.names)), has_tensorflow


def tfds_splits(builder: Any, name: str) -> tuple[str, str]:
    """Returns the names of the splits of a prepared data set to train on, and to evaluate on.

    Where there is no test split it is the validation split, by which such sets are usually judged.
    """
    splits = builder.info.splits
    test = next((split for split in ('test', 'validation') if split in splits), None)
    require(
        'train' in splits and test is not None,
        f'data.name: {name}: found the splits {", ".join(splits)}, needed are train, and test or '
        'validation',
    )
    return 'train', test


_ELSEWHERE = 'point to a TFDS directory that has it with --config.data.data_dir=DIR'
_AGAIN = 'let TFDS download it with --config.data.download=True'


def not_prepared(name: str, builder: Any) -> str:
    """Returns what to tell where a data set's files are not there."""
    plain = name.removeprefix(TFDS_PREFIX)
    return f'data.data_dir: found no {plain} in {builder.data_path}; {_ELSEWHERE}, or {_AGAIN}'


def read_tfds(
    name: str, data_dir: str | None, download: bool
) -> tuple[list[np.ndarray], tuple[str, ...]]:
    """Returns the four arrays of a TFDS data set, in file order, and the classes' names."""
    builder, facts, has_tensorflow = open_tfds(name, data_dir)
    prepared, plain = bool(builder.info.splits), name.removeprefix(TFDS_PREFIX)
    require(prepared or download, not_prepared(name, builder))
    if not prepared:
        require(
            has_tensorflow,
            f'data.download: to prepare {name} TFDS needs TensorFlow: pip install tensorflow-cpu; '
            f'or {_ELSEWHERE}, {_AS_ARRAY_RECORD.format(plain)}',
        )
        with errors_as(f'data.download: TFDS could not prepare {name}; try again, or {_ELSEWHERE}'):
            builder.download_and_prepare()
    with errors_as(
        f'data.data_dir: cannot read {name} in {builder.data_path}',
        f'if it is damaged, remove it and {_AGAIN}',
    ):
        formats = {each.value for each in builder.info.available_file_formats()}
        if not has_tensorflow and not formats & _RANDOM_ACCESS:
            raise DataError(
                f'data.data_dir: {name} in {builder.data_path} is of {", ".join(sorted(formats))} '
                'files, which only TensorFlow reads: pip install tensorflow-cpu; or bring it '
                f'{_AS_ARRAY_RECORD.format(plain)}'
            )
        # TFDS reads ArrayRecord only one example at a time.
        is_array_record = builder.info.file_format.value == 'array_record'
        one_by_one = is_array_record or not has_tensorflow
        arrays = []
        for split in tfds_splits(builder, name):
            read = _read_one_by_one if one_by_one else _read_at_once
            images, labels = read(builder, split, facts)
            arrays += [images, labels.astype(np.int32)]
    for split, labels in zip(('training', 'test'), arrays[1::2], strict=True):
        require(
            len(labels) > 0 and labels.min() >= 0,
            f'data.name: {name}: found {split} examples without a label (-1), or none at all',
        )
    return arrays, facts.class_names


def _read_at_once(builder: Any, split: str, facts: TfdsFacts) -> tuple[np.ndarray, np.ndarray]:
    examples = builder.as_dataset(split=split, batch_size=-1, shuffle_files=False)
    return examples[facts.image].numpy(), examples[facts.label].numpy()


def _read_one_by_one(builder: Any, split: str, facts: TfdsFacts) -> tuple[np.ndarray, np.ndarray]:
    with _silent():
        examples = builder.as_data_source(split=split)
        images = np.empty((len(examples), *facts.image_shape), np.uint8)
        labels = np.empty(len(examples), np.int64)
        for place, example in enumerate(examples):
            images[place], labels[place] = example[facts.image], example[facts.label]
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
