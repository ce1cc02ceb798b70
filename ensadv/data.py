"""Images: whole splits as uint8 arrays, and their sampling and augmentation on the device.

`load`, `spec` and `hold_out` run on the host, once. `batch_indices`, `augment` and `to_pixels` are
pure `jnp` and belong inside the compiled training step.
"""

import contextlib
import dataclasses
import functools
import hashlib
import importlib.util
import io
import math
import sys
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from etils import epath

from ensadv import data_checks, progress, workdir
from ensadv.errors import UserError
from ensadv.tf_import import import_tensorflow

# (image shape, classes) of what comes through TFDS: known here so that `spec` needs no TensorFlow.
_TFDS = {
    'cifar10': ((32, 32, 3), 10),
    'cifar100': ((32, 32, 3), 100),
    'svhn_cropped': ((32, 32, 3), 10),
    'mnist': ((28, 28, 1), 10),
}
# And training and test examples, for `sizes`.
_TFDS_SIZES = {
    'cifar10': (50_000, 10_000),
    'cifar100': (50_000, 10_000),
    'svhn_cropped': (73_257, 26_032),
    'mnist': (60_000, 10_000),
}
NAMES = (*_TFDS, 'digits', 'npz')

# What figures call the classes; those of other data sets go by their numbers.
_CLASS_NAMES = {
    'cifar10': (
        'airplane', 'automobile', 'bird', 'cat', 'deer', 'dog', 'frog', 'horse', 'ship', 'truck',
    ),
}  # fmt: skip

_ARRAYS = ('image_train', 'label_train', 'image_test', 'label_test')
_MAX_CLASSES = 2**16  # beyond it a label is a stray number, not a class
_HOLD_OUT_SEED = 0  # not the run's: all seeds of a study hold the same examples out


class DataError(UserError):
    """A data set that is missing, unreadable or not what it should be; the message is one line."""


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
    """All splits of a data set, in host memory.

    Images are uint8 [n, H, W, C], labels int32 [n] in 0..num_classes - 1. Treat the arrays as
    read-only: `mean`, `std` and `fingerprint` are computed once and kept. The validation split is
    empty unless `hold_out` made the data set; then `held_out_from` is the fingerprint of the whole.
    """

    name: str
    image_train: np.ndarray
    label_train: np.ndarray
    image_test: np.ndarray
    label_test: np.ndarray
    num_classes: int
    image_validation: np.ndarray | None = None
    label_validation: np.ndarray | None = None
    held_out_from: str | None = None

    def __post_init__(self):
        for field in ('image', 'label'):
            if getattr(self, f'{field}_validation') is None:
                empty = getattr(self, f'{field}_train')[:0]
                object.__setattr__(self, f'{field}_validation', empty)

    def split(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Images and labels of the 'train', 'validation' or 'test' split."""
        return getattr(self, f'image_{name}'), getattr(self, f'label_{name}')

    @property
    def class_names(self) -> tuple[str, ...]:
        """What to call the classes, by label."""
        return _CLASS_NAMES.get(self.name, tuple(map(str, range(self.num_classes))))

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(H, W, C) of one image."""
        return self.image_train.shape[1:]

    @property
    def mean(self) -> tuple[float, ...]:
        """Mean of the training images for each channel, pixels in [0, 1]."""
        return self._moments[0]

    @property
    def std(self) -> tuple[float, ...]:
        """Standard deviation like `mean`; 1 for a constant channel, so that it can divide."""
        return self._moments[1]

    @functools.cached_property
    def _moments(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        # From histograms: exact counts, and no float copy of the images, eight times their size.
        counts = np.zeros((self.image_shape[-1], 256), np.int64)
        for start in range(0, len(self.image_train), 4096):
            pixels = self.image_train[start : start + 4096].reshape(-1, len(counts))
            counts += [np.bincount(channel, minlength=256) for channel in pixels.T]
        levels = np.arange(256) / 255
        share = counts / counts.sum(axis=1, keepdims=True)
        mean = share @ levels
        std = np.sqrt((share * (levels - mean[:, None]) ** 2).sum(axis=1))
        std[np.count_nonzero(counts, axis=1) == 1] = 1.0
        return tuple(mean.tolist()), tuple(std.tolist())

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256, as hex digits, of the four arrays: bytes, shapes and dtypes.

        It identifies the data, whatever part of them is held out.
        """
        if self.held_out_from is not None:
            return self.held_out_from
        digest = hashlib.sha256()
        for field in _ARRAYS:
            array = getattr(self, field)
            digest.update(f'{field} {array.dtype.str} {array.shape}\n'.encode())
            digest.update(np.ascontiguousarray(array))
        return digest.hexdigest()

    def describe(self) -> dict:
        """What a run writes down about its data; JSON keeps it unchanged."""
        fields = ('name', 'fingerprint', 'num_classes', 'class_names', 'image_shape', 'mean', 'std')
        splits = ('train', 'validation', 'test')
        sizes = {f'num_{split}': len(self.split(split)[1]) for split in splits}
        values = {field: getattr(self, field) for field in fields}
        return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()} | sizes


@functools.lru_cache(maxsize=1)  # a run's training and evaluation use the same one
@progress.waiting('reading data')
def load(
    name: str, *, data_dir: str | None = None, path: str | None = None, download: bool = False
) -> Dataset:
    """Reads a data set whole.

    Args:
        name: one of `NAMES`.
        data_dir: TFDS directory, may be gs://; None is TFDS's own, ~/tensorflow_datasets.
        path: for 'npz', the file that holds uint8 images `image_train`, `image_test` [n, H, W, C]
            and integer labels `label_train`, `label_test` [n], numbered from 0; may be gs://.
        download: whether TFDS may download and prepare what is missing from `data_dir`.

    Raises:
        DataError: the data is missing, cannot be read, or is not what it should be.
    """
    if name in _TFDS:
        arrays, num_classes = _read_tfds(name, data_dir, download)
        return Dataset(name, *arrays, num_classes)
    if name == 'digits':
        return Dataset(name, *_read_digits(), 10)
    if name == 'npz':
        arrays = _read_npz(path)
        return Dataset(name, *arrays, int(arrays[1].max()) + 1)
    raise DataError(f'data.name: found {name!r}, allowed are {", ".join(NAMES)}')


@functools.lru_cache(maxsize=1)  # as `load`: training and evaluation share one copy
def hold_out(dataset: Dataset, n: int) -> Dataset:
    """Moves n training examples into the validation split, from which a snapshot can be chosen.

    Which ones depends on n and the number of examples alone, and a larger n adds to those of a
    smaller one. They are spread over the split, since files may be sorted by class. All examples
    keep their order; `mean` and `std` become those of what is left to train on.

    Args:
        dataset: as `load` gives it, with nothing held out yet.
        n: examples, from 0 up; 0 returns `dataset` itself.

    Raises:
        DataError: nothing would be left to train on.
    """
    total = len(dataset.label_train)
    check_held_out(dataset.name, total, n)
    if n == 0:
        return dataset
    held_out = np.zeros(total, bool)
    # Of NumPy's generators this one is promised to stay the same in later versions.
    held_out[np.random.RandomState(_HOLD_OUT_SEED).permutation(total)[:n]] = True
    return dataclasses.replace(
        dataset,
        image_train=dataset.image_train[~held_out],
        label_train=dataset.label_train[~held_out],
        image_validation=dataset.image_train[held_out],
        label_validation=dataset.label_train[held_out],
        held_out_from=dataset.fingerprint,
    )


def check_held_out(name: str, total: int, n: int) -> None:
    """Raises DataError unless n of so many training examples leave some to train on."""
    found = f'data.validation_examples: found {n}'
    allowed = f'{name} has {total} training examples, allowed are 0..{total - 1}'
    _require(0 <= n < total, f'{found}; {allowed}')


def spec(
    name: str, *, data_dir: str | None = None, path: str | None = None
) -> tuple[tuple[int, int, int], int]:
    """(H, W, C) of one image and the number of classes, without TensorFlow.

    What has to be read for it is told of, see `data_checks.tell`. Takes the arguments of `load` and
    raises the same errors; `data_dir` makes no difference.
    """
    del data_dir
    if name in _TFDS:
        return _TFDS[name]
    dataset = load(name, path=path)
    data_checks.tell(dataset, path or name)
    return dataset.image_shape, dataset.num_classes


def sizes(name: str, *, path: str | None = None) -> tuple[int, int]:
    """Numbers of training and test examples, with nothing held out; as `spec`."""
    if name in _TFDS:
        return _TFDS_SIZES[name]
    dataset = load(name, path=path)
    return len(dataset.label_train), len(dataset.label_test)


def read_places(path: str) -> np.ndarray:
    """Reads places in a split from a text file with one whole number a line, in any order.

    Returns:
        int32 [n], ascending, each once, from 0; at least one.

    Raises:
        DataError: naming the file and, where one is wrong, the line.
    """
    with _explained(f'eval.indices: cannot read {path}'):
        file = epath.Path(path).expanduser()
        workdir.check_is_file(file)
        content = file.read_bytes()
    where = f'eval.indices: {path}'
    allowed = 'allowed is a text of places in the test split, one whole number a line'
    lines = content.decode('utf-8-sig', errors='replace').splitlines()
    first: dict[int, int] = {}  # line by place
    for number, line in enumerate(map(str.strip, lines), start=1):
        if not line:
            continue
        is_place = line.isascii() and line.isdecimal() and len(line) <= 10
        _require(
            is_place and int(line) < 2**31,
            f'{where}: line {number}: found {line[:50]!r}, {allowed}',
        )
        place = int(line)
        _require(
            place not in first,
            f'{where}: found {place} in line {first.get(place)} and in line {number}, allowed is '
            'each place once',
        )
        first[place] = number
    _require(bool(first), f'{where}: found no number, {allowed}')
    return np.array(sorted(first), np.int32)


def flips_by_default(name: str) -> bool:
    """Whether a mirrored image still means the same: not so for the three sets of digits."""
    return name not in ('mnist', 'svhn_cropped', 'digits')


# TensorFlow's errors that are no fault of a file.
_TENSORFLOW_ELSEWHERE = (
    'AbortedError', 'CancelledError', 'DeadlineExceededError', 'PermissionDeniedError',
    'ResourceExhaustedError', 'UnauthenticatedError', 'UnavailableError',
)  # fmt: skip
_OF_TFDS = ('array_record', 'tfrecord')  # in names of files
_RANDOM_ACCESS = {'array_record', 'parquet'}  # formats that TFDS reads without TensorFlow
_AS_ARRAY_RECORD = (
    'as ArrayRecord, made where TensorFlow is: '
    "tensorflow_datasets.builder('{}', file_format='array_record').download_and_prepare()"
)


@contextlib.contextmanager
def _explained(message: str, if_damaged: str = ''):
    """Makes one line, `message` and the cause, of whatever other libraries and storage raise.

    `if_damaged` is added where the cause may be the file, and not memory, storage or permissions.
    """
    try:
        yield
    except DataError:
        raise
    except Exception as error:
        kind = type(error).__name__
        told = getattr(error, 'strerror', None) or error  # which does not name the file again
        cause = ' '.join(f'{kind}: {told}'.split())[:300].removesuffix(':')
        innocent = isinstance(error, (MemoryError, OSError)) or kind in _TENSORFLOW_ELSEWHERE
        advice = f'; {if_damaged}' if if_damaged and not innocent else ''
        raise DataError(f'{message}{advice} ({cause})') from error


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise DataError(message)


@contextlib.contextmanager
def _silent():
    """Keeps TFDS from logging advice and tracebacks: what goes wrong is told in one line."""
    logger = logging.get_absl_logger()
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


def _import_tfds(name: str) -> tuple[ModuleType, bool]:
    """Returns TFDS, and whether TensorFlow is there, which only some formats need."""
    with _explained(
        f'data.name={name} needs TensorFlow Datasets: pip install tensorflow-cpu '
        'tensorflow-datasets importlib_resources; data.name=digits and data.name=npz need neither'
    ):
        has_tensorflow = True
        try:
            import_tensorflow()
        except ImportError:
            # Where it is there but broken TFDS would take it for whole.
            if 'tensorflow' in sys.modules or importlib.util.find_spec('tensorflow'):
                raise
            has_tensorflow = False
        with _silent():
            import tensorflow_datasets as tfds
        return tfds, has_tensorflow


def _read_tfds(name: str, data_dir: str | None, download: bool) -> tuple[list[np.ndarray], int]:
    """The four arrays of a TFDS data set, in the order of its files, and the number of classes."""
    tfds, has_tensorflow = _import_tfds(name)
    with _explained(f'data.data_dir: cannot open {data_dir or "the default of TFDS"}'):
        builder = tfds.builder(name, data_dir=data_dir)
        prepared = {'train', 'test'} <= set(builder.info.splits)
    elsewhere = 'point to a TFDS directory that has it with --config.data.data_dir=DIR'
    again = 'let TFDS download it with --config.data.download=True'
    missing = f'data.data_dir: found no {name} in {builder.data_path}'
    _require(prepared or download, f'{missing}; {elsewhere}, or {again}')
    if not prepared:
        _require(
            has_tensorflow,
            f'data.download: to prepare {name} TFDS needs TensorFlow: pip install tensorflow-cpu; '
            f'or {elsewhere}, {_AS_ARRAY_RECORD.format(name)}',
        )
        with _explained(f'data.download: TFDS could not prepare {name}; try again, or {elsewhere}'):
            builder.download_and_prepare()
    with _explained(
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
        # TFDS reads ArrayRecord, which Grain takes, in no other way.
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


def _read_digits() -> list[np.ndarray]:
    """scikit-learn's 1,797 real 8x8 digits; the same 360 of them always are the test split."""
    with _explained('data.name=digits needs scikit-learn: pip install scikit-learn'):
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    digits = load_digits()
    images = np.round(digits.images[..., None] * 255 / 16).astype(np.uint8)
    labels = digits.target.astype(np.int32)
    split = train_test_split(images, labels, test_size=360, stratify=labels, random_state=0)
    return [split[0], split[2], split[1], split[3]]


def _read_npz(path: str | None) -> list[np.ndarray]:
    """The four arrays of a user's file, checked."""
    _require(bool(path), 'data.path: needed for data.name=npz, as in --config.data.path=my.npz')
    file = epath.Path(path).expanduser()
    of_tfds = next((kind for kind in _OF_TFDS if kind in file.name), None)
    _require(
        of_tfds is None,
        f'{path}: found a file of TFDS or Grain ({of_tfds}), allowed is an .npz file; a directory '
        f'that TFDS prepared is read by data.data_dir and data.name={", ".join(_TFDS)}',
    )
    with _explained(f'data.path: cannot read {path}'):
        workdir.check_is_file(file)
        # Whole, since a zip file is read in many small pieces, each a request where it is remote.
        content = io.BytesIO(file.read_bytes())
    with _explained(f'{path}: cannot be read', 'not an .npz file, or damaged'):
        file = np.load(content, allow_pickle=False)
    _require(isinstance(file, Mapping), f'{path}: found one array, allowed is an .npz file')
    missing = ', '.join(field for field in _ARRAYS if field not in file)
    _require(not missing, f'{path}: no {missing}; found {", ".join(file) or "no arrays"}')
    arrays = []
    for field in _ARRAYS:
        with _explained(
            f'{path}: {field}: cannot be read',
            'damaged, or Python objects, which are never unpickled',
        ):
            arrays.append(np.asarray(file[field]))
    image_train, label_train, image_test, label_test = arrays
    _check_images(image_train, f'{path}: image_train')
    _check_images(image_test, f'{path}: image_test')
    _check_labels(label_train, image_train, f'{path}: label_train')
    _check_labels(label_test, image_test, f'{path}: label_test')
    found, shape = image_test.shape[1:], image_train.shape[1:]
    _require(found == shape, f'{path}: image_test: found images {found}, image_train has {shape}')
    found, largest = label_test.max(), label_train.max()
    _require(largest > 0, f'{path}: label_train: found only label 0, allowed are 2 classes or more')
    allowed = f'label_train allows 0..{largest}'
    _require(found <= largest, f'{path}: label_test: found label {found}, {allowed}')
    return [image_train, label_train.astype(np.int32), image_test, label_test.astype(np.int32)]


def _check_images(images: np.ndarray, where: str) -> None:
    if images.dtype != np.uint8:
        found, advice = _as_uint8(images)
        raise DataError(f'{where}: found {found}, allowed is uint8, 0..255{advice}')
    allowed = 'allowed is [n, height, width, channels], not empty'
    _require(images.ndim == 4 and images.size, f'{where}: found shape {images.shape}, {allowed}')


def _as_uint8(images: np.ndarray) -> tuple[str, str]:
    """Returns what pixels of another type are, and how they become uint8, as far as is known."""
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


def _check_labels(labels: np.ndarray, images: np.ndarray, where: str) -> None:
    integer = labels.dtype.kind in 'iu'  # to issubdtype time spans would be integers, too
    _require(integer, f'{where}: found {labels.dtype}, allowed are integers')
    allowed = f'allowed is ({len(images)},), one label for each image of {images.shape}'
    _require(labels.shape == (len(images),), f'{where}: found shape {labels.shape}, {allowed}')
    for label in (labels.min(), labels.max()):
        allowed = f'allowed are 0..{_MAX_CLASSES - 1}'
        _require(0 <= label < _MAX_CLASSES, f'{where}: found label {label}, {allowed}')


def batch_indices(
    key: jax.Array, step: jax.Array, positions: jax.Array, *, batch_size: int, num_examples: int
) -> jax.Array:
    """Which examples make up a batch, or one device's part of it.

    Training reads a stream of epochs, each a fresh permutation of all examples; step t reads on
    from place t * batch_size. So a batch may straddle two epochs, every example comes exactly once
    in each, and the batch depends on `key` and `step` alone.

    Args:
        key: the run's `prng.key` for sampling, the same at every step.
        step: int32 scalar, any from 0 up.
        positions: int32 [m], places 0..batch_size - 1 in the global batch.
        batch_size: of the global batch, at most `num_examples`.
        num_examples: in the training split.

    Returns:
        int32 [m], in 0..num_examples - 1.

    Raises:
        DataError: the batch is larger than the split, or the two need more than 32-bit arithmetic.
    """
    # A stream repeats its phase every num_examples / gcd steps. Counting such cycles apart keeps
    # every product below the bound checked here, whatever the step; step * batch_size would wrap.
    gcd = math.gcd(batch_size, num_examples)
    cycle_steps, cycle_epochs = num_examples // gcd, batch_size // gcd
    possible = batch_size <= num_examples and cycle_steps * batch_size + num_examples < 2**31
    found = f'train.batch_size: found {batch_size} for {num_examples} examples'
    _require(possible, f'{found}, allowed is at most their number, and a common multiple < 2^31')
    cycle, step_in_cycle = jnp.divmod(jnp.asarray(step, jnp.int32), cycle_steps)
    epoch_in_cycle, start = jnp.divmod(step_in_cycle * batch_size, num_examples)
    epoch = cycle * cycle_epochs + epoch_in_cycle

    def permutation(epoch):
        return jax.random.permutation(jax.random.fold_in(key, epoch), num_examples)

    this = permutation(epoch)
    # A permutation is a sort of all examples: draw the second one only when it is read.
    straddles = start + batch_size > num_examples
    following = jax.lax.cond(straddles, lambda: permutation(epoch + 1), lambda: this)
    place = start + jnp.asarray(positions, jnp.int32)
    wrapped = place % num_examples
    return jnp.where(place < num_examples, this[wrapped], following[wrapped]).astype(jnp.int32)


def augment(keys: jax.Array, images: jax.Array, *, pad: int, flip: bool) -> jax.Array:
    """Random crops of images padded with reflections, and random horizontal flips.

    As Wide ResNets are trained, with 4 pixels (Zagoruyko & Komodakis 2016, section 3). The
    reflection does not repeat the border pixel.

    Args:
        keys: `prng.key`s [B], one for each image, so that an image's augmentation does not
            depend on which others share its device.
        images: uint8 [B, H, W, C].
        pad: pixels on each side; 0 does not crop.
        flip: whether half of the images, by chance, are mirrored left to right.

    Returns:
        uint8 [B, H, W, C].
    """

    def one(key, image):
        crop_key, flip_key = jax.random.split(key)
        if pad:
            padded = jnp.pad(image, ((pad, pad), (pad, pad), (0, 0)), mode='reflect')
            top, left = jax.random.randint(crop_key, (2,), 0, 2 * pad + 1)
            image = jax.lax.dynamic_slice(padded, (top, left, 0), image.shape)
        if flip:
            image = jnp.where(jax.random.bernoulli(flip_key), image[:, ::-1], image)
        return image

    return jax.vmap(one)(keys, images)


def to_pixels(images: jax.Array) -> jax.Array:
    """uint8 images of any shape to float32 pixels in [0, 1]."""
    return images.astype(jnp.float32) / 255
