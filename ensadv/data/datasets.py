"""Data sets: whole splits as uint8 arrays, in host memory.

They are read and held out on the host, once. batches.py samples and augments on the device.
"""

import dataclasses
import functools
import hashlib
import re

import numpy as np
from etils import epath

from ensadv.data import checks, readers
from ensadv.errors import DataError
from ensadv.runtime import progress
from ensadv.storage import files

# Numbers of training and test examples.
_TFDS_SIZES = {
    'cifar10': (50_000, 10_000),
    'cifar100': (50_000, 10_000),
    'svhn_cropped': (73_257, 26_032),
    'mnist': (60_000, 10_000),
}
NAMES = (*readers.TFDS, 'digits', 'npz')

# Names of classes, for figures. Other data sets have numbers.
_CLASS_NAMES = {
    'cifar10': (
        'airplane', 'automobile', 'bird', 'cat', 'deer', 'dog', 'frog', 'horse', 'ship', 'truck',
    ),
}  # fmt: skip

# Digits and letters.
_NOT_TO_MIRROR = (
    'mnist', 'svhn_cropped', 'digits', 'binarized_mnist', 'cmaterdb', 'emnist', 'kmnist',
    'mnist_corrupted', 'omniglot',
)  # fmt: skip

_HOLD_OUT_SEED = 0  # not the run's: all seeds of a study hold out the same examples


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
    """All splits of a data set, in host memory.

    Images are uint8 [n, H, W, C], labels int32 [n] in 0..num_classes - 1. Treat the arrays as
    read-only, since `mean`, `std` and `fingerprint` are computed once. The validation split is
    empty unless `hold_out` made the data set; `held_out_from` is then the fingerprint of the whole.
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
    classes: tuple[str, ...] | None = None  # their names, where the data set's own reader has them

    def __post_init__(self):
        for field in ('image', 'label'):
            if getattr(self, f'{field}_validation') is None:
                empty = getattr(self, f'{field}_train')[:0]
                object.__setattr__(self, f'{field}_validation', empty)

    def split(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Returns images and labels of the 'train', 'validation' or 'test' split."""
        return getattr(self, f'image_{name}'), getattr(self, f'label_{name}')

    @property
    def class_names(self) -> tuple[str, ...]:
        """The classes' names, by label."""
        if self.classes is not None:
            return self.classes
        return _CLASS_NAMES.get(self.name, tuple(map(str, range(self.num_classes))))

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(H, W, C) of one image."""
        return self.image_train.shape[1:]

    @property
    def mean(self) -> tuple[float, ...]:
        """Mean of the training images for each channel, pixels in [0, 1]; 0 without any."""
        return self._moments[0]

    @property
    def std(self) -> tuple[float, ...]:
        """Standard deviation like `mean`; 1 for a constant channel or none, so it can divide."""
        return self._moments[1]

    @functools.cached_property
    def _moments(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        # Histograms are exact, and need no float copy of the images, eight times their size.
        counts = np.zeros((self.image_shape[-1], 256), np.int64)
        for start in range(0, len(self.image_train), 4096):
            pixels = self.image_train[start : start + 4096].reshape(-1, len(counts))
            counts += [np.bincount(channel, minlength=256) for channel in pixels.T]
        levels = np.arange(256) / 255
        share = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
        mean = share @ levels
        std = np.sqrt((share * (levels - mean[:, None]) ** 2).sum(axis=1))
        std[np.count_nonzero(counts, axis=1) <= 1] = 1.0
        return tuple(mean.tolist()), tuple(std.tolist())

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256, as hex digits, of the four arrays: bytes, shapes and dtypes.

        It does not depend on what is held out.
        """
        if self.held_out_from is not None:
            return self.held_out_from
        digest = hashlib.sha256()
        for field in readers.ARRAYS:
            array = getattr(self, field)
            digest.update(f'{field} {array.dtype.str} {array.shape}\n'.encode())
            digest.update(np.ascontiguousarray(array))
        return digest.hexdigest()

    def describe(self) -> dict:
        """Returns the facts that a run records about its data, as JSON keeps them."""
        fields = ('name', 'fingerprint', 'num_classes', 'class_names', 'image_shape', 'mean', 'std')
        splits = ('train', 'validation', 'test')
        sizes = {f'num_{split}': len(self.split(split)[1]) for split in splits}
        values = {field: getattr(self, field) for field in fields}
        return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()} | sizes


@functools.lru_cache(maxsize=1)  # training and evaluation of a run share one copy
@progress.waiting('reading data')
def load(
    name: str, *, data_dir: str | None = None, path: str | None = None, download: bool = False
) -> Dataset:
    """Reads a data set whole.

    Args:
        name: one of `NAMES`, or 'tfds:' and the name of any data set of TFDS.
        data_dir: TFDS directory, may be on gs://; None is TFDS's own, ~/tensorflow_datasets.
        path: for 'npz', the file with uint8 images `image_train`, `image_test` [n, H, W, C] and
            integer labels `label_train`, `label_test` [n] from 0; may be on gs://.
        download: whether TFDS may download and prepare what is missing from `data_dir`.

    Raises:
        DataError: the data are missing, cannot be read, or are not what they should be.
    """
    if name in readers.TFDS or name.startswith(readers.TFDS_PREFIX):
        arrays, classes = readers.read_tfds(name, data_dir, download)
        named = None if name in readers.TFDS else classes
        return Dataset(name, *arrays, len(classes), classes=named)
    if name == 'digits':
        return Dataset(name, *readers.read_digits(), 10)
    if name == 'npz':
        arrays = readers.read_npz(path)
        return Dataset(name, *arrays, int(arrays[1].max()) + 1)
    raise DataError(f'data.name: found {name!r}, allowed are {", ".join(NAMES)}')


@functools.lru_cache(maxsize=1)  # as for `load`
def hold_out(dataset: Dataset, n: int) -> Dataset:
    """Moves n training examples into the validation split, on which a snapshot can be chosen.

    The choice depends on n and the number of examples alone, and a larger n adds to that of a
    smaller one. It is spread over the split, since files may be sorted by class. All examples keep
    their order; `mean` and `std` become those of the remaining training examples.

    Args:
        dataset: from `load`, with nothing held out yet.
        n: examples, from 0 up; 0 returns `dataset` itself.

    Raises:
        DataError: no training example would remain.
    """
    total = len(dataset.label_train)
    check_held_out(dataset.name, total, n)
    if n == 0:
        return dataset
    held_out = np.zeros(total, bool)
    # NumPy promises that this generator stays the same in later versions.
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
    """Raises DataError unless holding out n of `total` training examples leaves some."""
    found = f'data.validation_examples: found {n}'
    allowed = f'{name} has {total} training examples, allowed are 0..{total - 1}'
    readers.require(0 <= n < total, f'{found}; {allowed}')


def spec(
    name: str, *, data_dir: str | None = None, path: str | None = None
) -> tuple[tuple[int, int, int], int]:
    """Returns (H, W, C) of one image and the number of classes, without TensorFlow.

    Takes the arguments of `load` and raises the same errors. If it has to read the data, it logs
    what they are (`checks.tell`); of TFDS it reads no more than a description.
    """
    if name in readers.TFDS:
        return readers.TFDS[name]
    if name.startswith(readers.TFDS_PREFIX):
        _, facts, _ = readers.open_tfds(name, data_dir)
        return facts.image_shape, len(facts.class_names)
    dataset = load(name, path=path)
    checks.tell(dataset, path or name)
    return dataset.image_shape, dataset.num_classes


def sizes(name: str, *, data_dir: str | None = None, path: str | None = None) -> tuple[int, int]:
    """Returns the numbers of training and test examples, with nothing held out; as `spec`."""
    if name in readers.TFDS:
        return _TFDS_SIZES[name]
    if name.startswith(readers.TFDS_PREFIX):
        builder, _, _ = readers.open_tfds(name, data_dir)
        splits = builder.info.splits
        readers.require(bool(splits), readers.not_prepared(name, builder))
        train, test = (splits[split].num_examples for split in readers.tfds_splits(builder, name))
        return train, test
    dataset = load(name, path=path)
    return len(dataset.label_train), len(dataset.label_test)


def read_places(path: str) -> np.ndarray:
    """Reads places in a split from a text file with one whole number a line, in any order.

    Returns:
        int32 [n], ascending, each once, from 0; at least one.

    Raises:
        DataError: naming the file and, where one is wrong, the line.
    """
    with readers.errors_as(f'eval.indices: cannot read {path}'):
        file = epath.Path(path).expanduser()
        files.check_is_file(file)
        content = file.read_bytes()
    where = f'eval.indices: {path}'
    allowed = 'allowed is a text of places in the test split, one whole number a line'
    lines = content.decode('utf-8-sig', errors='replace').splitlines()
    first: dict[int, int] = {}  # line by place
    for number, line in enumerate(map(str.strip, lines), start=1):
        if not line:
            continue
        is_place = line.isascii() and line.isdecimal() and len(line) <= 10
        readers.require(
            is_place and int(line) < 2**31,
            f'{where}: line {number}: found {line[:50]!r}, {allowed}',
        )
        place = int(line)
        readers.require(
            place not in first,
            f'{where}: found {place} in line {first.get(place)} and in line {number}, allowed is '
            'each place once',
        )
        first[place] = number
    readers.require(bool(first), f'{where}: found no number, {allowed}')
    return np.array(sorted(first), np.int32)


def flips_by_default(name: str) -> bool:
    """Returns whether a mirrored image means the same: not so for digits and letters."""
    name = re.split('[/:]', name.removeprefix(readers.TFDS_PREFIX))[0]
    return name not in _NOT_TO_MIRROR
