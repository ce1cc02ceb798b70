"""Loading of the data sets, and the sampling and augmentation of batches."""

import collections
import json
import os
import pathlib
import pickle
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ensadv import config_checks, errors
from ensadv.data import batches, checks, datasets, readers

PREPARED = pathlib.Path(__file__).parents[2] / 'shared' / 'tfds'
needs_cifar10 = pytest.mark.skipif(not PREPARED.exists(), reason='no prepared CIFAR-10 here')
TFDS_NAMES = ('cifar10', 'cifar100', 'svhn_cropped', 'mnist')


def tiny_arrays() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        'image_train': rng.integers(0, 256, (9, 4, 5, 3), np.uint8),
        'label_train': np.array([0, 1, 2] * 3),
        'image_test': rng.integers(0, 256, (4, 4, 5, 3), np.uint8),
        'label_test': np.array([2, 1, 0, 1]),
    }


def tiny_dataset(**changes) -> datasets.Dataset:
    return datasets.Dataset('npz', **(tiny_arrays() | changes), num_classes=3)


def message(*args, **kwargs) -> str:
    with pytest.raises(errors.DataError) as caught:
        datasets.load(*args, **kwargs)
    text = str(caught.value)
    assert '\n' not in text
    return text


# The data sets


def test_names_are_those_that_the_config_allows():
    assert datasets.NAMES == config_checks.DATASETS
    assert 'imagenet' in message('imagenet')
    assert issubclass(errors.DataError, errors.UserError)


def test_digits_are_sklearns_and_always_split_alike():
    from sklearn.datasets import load_digits

    digits = datasets.load('digits')
    assert digits.image_train.shape == (1437, 8, 8, 1)
    assert digits.image_test.shape == (360, 8, 8, 1)
    assert digits.image_train.dtype == np.uint8
    assert digits.label_train.dtype == np.int32
    assert min(np.bincount(digits.label_test)) >= 34
    images = np.concatenate([digits.image_train, digits.image_test])[..., 0]
    labels = np.concatenate([digits.label_train, digits.label_test])
    source = load_digits()
    grey = np.array([round(level * 255 / 16) for level in range(17)], np.uint8)
    assert (grey[0], grey[8], grey[16]) == (0, 128, 255)
    assert counted(images, labels) == counted(grey[source.images.astype(int)], source.target)
    assert digits.fingerprint == FINGERPRINT_OF_DIGITS
    assert datasets.spec('digits') == ((8, 8, 1), 10)


# The split that results refer to: scikit-learn must not change it unnoticed.
FINGERPRINT_OF_DIGITS = 'fa690bd4ecb8b86a6a563a8b81a459bb55497cded122e4bce18b69bb15e2e9f9'


def counted(images: np.ndarray, labels: np.ndarray) -> collections.Counter:
    return collections.Counter(zip(map(bytes, images), labels.tolist(), strict=True))


def test_mean_and_std_are_those_of_the_training_images():
    rng = np.random.default_rng(1)
    images = rng.integers(0, 256, (5000, 4, 5, 3), np.uint8)  # more than one chunk
    images[..., 2] = 37  # a constant channel
    dataset = tiny_dataset(image_train=images)
    pixels = images.reshape(-1, 3) / 255
    np.testing.assert_allclose(dataset.mean, pixels.mean(axis=0), rtol=1e-10)
    np.testing.assert_allclose(dataset.std[:2], pixels.std(axis=0)[:2], rtol=1e-10)
    assert dataset.std[2] == 1.0
    assert tiny_dataset(image_train=np.zeros((2, 1, 1, 1), np.uint8)).mean == (0.0,)
    two = np.array([0, 255], np.uint8).reshape(2, 1, 1, 1)
    assert tiny_dataset(image_train=two).mean == (0.5,)
    assert tiny_dataset(image_train=two).std == (0.5,)


def test_fingerprint_tells_any_difference():
    original = tiny_arrays()
    changed_pixel = original['image_test'].copy()
    changed_pixel[0, 0, 0, 0] ^= 1
    fingerprints = {
        tiny_dataset().fingerprint,
        tiny_dataset(image_test=changed_pixel).fingerprint,
        tiny_dataset(label_train=original['label_train'][::-1]).fingerprint,
        tiny_dataset(label_train=original['label_train'].astype(np.int16)).fingerprint,
        tiny_dataset(image_train=original['image_train'].reshape(9, 5, 4, 3)).fingerprint,
    }
    assert len(fingerprints) == 5
    assert tiny_dataset().fingerprint in fingerprints
    fortran = np.asfortranarray(original['image_train'])
    assert tiny_dataset(image_train=fortran).fingerprint == tiny_dataset().fingerprint


def test_describe_survives_json():
    description = tiny_dataset().describe()
    assert json.loads(json.dumps(description)) == description
    expected = {'name', 'fingerprint', 'image_shape', 'num_classes', 'class_names', 'mean', 'std'}
    assert set(description) == expected | {'num_train', 'num_validation', 'num_test'}
    assert description['image_shape'] == [4, 5, 3]
    sizes = [description[f'num_{split}'] for split in ('train', 'validation', 'test')]
    assert sizes == [9, 0, 4]


def test_flips_only_where_a_mirrored_image_means_the_same():
    assert [name for name in datasets.NAMES if datasets.flips_by_default(name)] == [
        'cifar10',
        'cifar100',
        'npz',
    ]


# The validation split


def numbered_dataset(total: int = 100, classes: int = 5) -> datasets.Dataset:
    """A data set sorted by class, whose training images hold their own place."""
    places = np.arange(total)
    images = np.stack([places // 256, places % 256], axis=-1).astype(np.uint8)
    labels = (places * classes // total).astype(np.int32)
    test = tiny_arrays()['label_test'].astype(np.int32)
    images = images.reshape(total, 1, 1, 2)
    return datasets.Dataset('npz', images, labels, images[:4], test, classes)


def places(images: np.ndarray) -> list[int]:
    return (images.reshape(-1, 2).astype(int) @ [256, 1]).tolist()


def test_held_out_examples_are_not_trained_on():
    whole = numbered_dataset()
    held = datasets.hold_out(whole, 20)
    train, validation = places(held.image_train), places(held.image_validation)
    assert (len(train), len(validation)) == (80, 20)
    assert sorted(train + validation) == list(range(100))
    assert (train, validation) == (sorted(train), sorted(validation))  # the order is kept
    np.testing.assert_array_equal(held.label_train, whole.label_train[train])
    np.testing.assert_array_equal(held.label_validation, whole.label_train[validation])
    assert set(held.label_validation) == set(range(5))  # sorted by class, yet all are there
    pixels = held.image_train.reshape(-1, 2) / 255
    np.testing.assert_allclose(held.mean, pixels.mean(axis=0), rtol=1e-10)
    assert held.std[1] == pytest.approx(pixels.std(axis=0)[1], rel=1e-10)
    assert held.mean != whole.mean
    for split in ('train', 'validation', 'test'):
        images, labels = held.split(split)
        assert images is getattr(held, f'image_{split}')
        assert labels is getattr(held, f'label_{split}')
        assert (images.dtype, labels.dtype) == (np.uint8, np.int32)
        assert held.describe()[f'num_{split}'] == len(images) == len(labels)
    assert held.split('test')[0] is whole.image_test


def test_the_same_examples_are_always_held_out():
    chosen = places(datasets.hold_out(numbered_dataset(), 10).image_validation)
    # What runs that resume elsewhere refer to: NumPy must not change it unnoticed.
    assert chosen == [2, 16, 26, 54, 55, 73, 75, 86, 93, 95]
    more = places(datasets.hold_out(numbered_dataset(), 30).image_validation)
    assert set(chosen) < set(more)
    largest = places(datasets.hold_out(numbered_dataset(50000, 10), 5).image_validation)
    assert largest == [11841, 19602, 25747, 42642, 45519]


def test_the_fingerprint_is_that_of_the_whole():
    whole = numbered_dataset()
    assert datasets.hold_out(whole, 20).fingerprint == numbered_dataset().fingerprint
    held = datasets.hold_out(whole, 99)
    assert held.describe()['fingerprint'] == whole.describe()['fingerprint']
    assert (held.describe()['num_train'], held.describe()['num_validation']) == (1, 99)


def test_nothing_held_out_is_the_data_set_itself():
    whole = numbered_dataset()
    assert datasets.hold_out(whole, 0) is whole
    images, labels = whole.split('validation')
    assert (images.shape, images.dtype) == ((0, 1, 1, 2), np.uint8)
    assert (labels.shape, labels.dtype) == ((0,), np.int32)


@pytest.mark.parametrize('n', [-1, 100, 101])
def test_something_is_left_to_train_on(n):
    with pytest.raises(errors.DataError) as caught:
        datasets.hold_out(numbered_dataset(), n)
    expected = f'data.validation_examples: found {n}; npz has 100 training examples, '
    assert str(caught.value) == f'{expected}allowed are 0..99'


# A user's own arrays


def test_npz_gives_back_what_was_saved(tmp_path):
    arrays = tiny_arrays()
    np.savez_compressed(tmp_path / 'my.npz', **arrays, extra=np.zeros(2))
    dataset = datasets.load('npz', path=str(tmp_path / 'my.npz'))
    for field, array in arrays.items():
        np.testing.assert_array_equal(getattr(dataset, field), array)
    assert dataset.label_train.dtype == dataset.label_test.dtype == np.int32
    assert dataset.num_classes == 3
    assert datasets.spec('npz', path=str(tmp_path / 'my.npz')) == ((4, 5, 3), 3)


def bad_npz_cases() -> list:
    good = tiny_arrays()
    scaled = good['image_train'].astype(np.float32) / 255
    nan = scaled.copy()
    nan[0, 0, 0, 0] = np.nan
    none = np.zeros((0, 4, 5, 3), np.uint8)
    no_labels = np.zeros(0, np.int64)
    zeros = good['label_train'] * 0
    pickled = np.array([{'a': 1}] * 9, dtype=object)
    cases = {
        'float': (
            {'image_train': scaled},
            ['image_train', 'float32 in 0..1,', 'uint8', '0..255: np.round(255 * x).astype'],
        ),
        'levels': (
            {'image_train': 255 * scaled},
            ['float32 in 0..255,', 'uint8, 0..255: np.round(x).astype'],
        ),
        'standardised': (
            {'image_train': 4 * scaled - 2},
            ['float32 in -2..2,', 'before they were standardised'],
        ),
        'bool': ({'image_train': scaled > 0.5}, ['found bool, allowed is uint8']),
        'nan': ({'image_train': nan}, ['image_train', 'float32 with NaN', 'uint8']),
        'int64': ({'image_test': good['image_test'].astype(int)}, ['image_test', 'int64', 'uint8']),
        'flat': ({'image_train': good['image_train'][..., 0]}, ['image_train', '(9, 4, 5)']),
        'no_images': ({'image_test': none, 'label_test': no_labels}, ['image_test', 'not empty']),
        'no_training': ({'image_train': none, 'label_train': no_labels}, ['image_train', 'empty']),
        'sizes': ({'image_test': good['image_test'][:, :3]}, ['image_test', '(3, 5, 3)']),
        'float_labels': ({'label_train': good['label_train'] * 1.0}, ['label_train', 'float64']),
        'bool_labels': ({'label_test': good['label_test'] > 1}, ['label_test', 'bool']),
        'one_hot': ({'label_train': np.eye(9, dtype=int)}, ['label_train', '(9, 9)', '(9,)']),
        'short': ({'label_test': good['label_test'][:3]}, ['label_test', '(3,)', '(4,)']),
        'last_axis': (
            {'image_train': np.moveaxis(good['image_train'], 0, -1)},
            ['label_train', '(9,)', 'one label for each image of (4, 5, 3, 9)'],
        ),
        'negative': ({'label_train': good['label_train'] - 1}, ['label_train', '-1', '0..']),
        'huge': ({'label_train': good['label_train'] + 10**9}, ['label_train', '10000000', '0..']),
        'unseen': ({'label_test': good['label_test'] + 1}, ['label_test', 'label 3', '0..2']),
        'one_class': (
            {'label_train': zeros, 'label_test': zeros[:4]},
            ['label_train', '2'],
        ),
        'pickled': ({'label_train': pickled}, ['label_train', 'Python objects']),
    }
    return [pytest.param(*case, id=name) for name, case in cases.items()]


@pytest.mark.parametrize('changes,words', bad_npz_cases())
def test_bad_npz_arrays_are_named(tmp_path, changes, words):
    path = str(tmp_path / 'my.npz')
    np.savez(path, **(tiny_arrays() | changes))
    text = message('npz', path=path)
    for word in [path, *words]:
        assert word in text


def test_bad_npz_files_are_named(tmp_path):
    path = tmp_path / 'my.npz'
    assert 'data.path' in message('npz')
    assert f'{path}' in message('npz', path=str(path))  # missing
    assert 'data.path' in message('npz', path=str(tmp_path))  # a directory
    os.mkfifo(tmp_path / 'pipe')
    # To read either would never end.
    for endless in (f'{tmp_path}/pipe', '/dev/zero'):
        assert f'cannot read {endless} (OSError: is no file)' in message('npz', path=endless)
    for content in (b'', b'garbage', b'PK\x03\x04garbage', pickle.dumps({'a': 1})):
        path.write_bytes(content)
        assert 'not an .npz file' in message('npz', path=str(path))
    with path.open('wb') as file:
        np.save(file, tiny_arrays()['image_train'])
    assert 'one array' in message('npz', path=str(path))
    arrays = tiny_arrays()
    del arrays['image_test'], arrays['label_train']
    np.savez(path, **arrays)
    text = message('npz', path=str(path))
    assert 'no label_train, image_test; found image_train, label_test' in text
    np.savez(path, **tiny_arrays())
    content = bytearray(path.read_bytes())
    content[300] ^= 255  # a pixel of image_train
    path.write_bytes(content)
    for kind in ('array_record', 'tfrecord'):
        text = message('npz', path=f'{tmp_path}/cifar10-test.{kind}-00000-of-00001')
        assert f'({kind}), allowed is an .npz file' in text
        assert 'data.data_dir' in text
    assert 'image_train: cannot be read; damaged' in message('npz', path=str(path))


# TFDS


@needs_cifar10
def test_cifar10_is_read_from_a_prepared_directory():
    pytest.importorskip('tensorflow_datasets')
    cifar10 = datasets.load('cifar10', data_dir=str(PREPARED))
    assert cifar10.image_train.shape == (50000, 32, 32, 3)
    assert cifar10.image_test.shape == (10000, 32, 32, 3)
    assert cifar10.image_train.dtype == cifar10.image_test.dtype == np.uint8
    assert np.bincount(cifar10.label_train).tolist() == [5000] * 10
    assert np.bincount(cifar10.label_test).tolist() == [1000] * 10
    assert cifar10.label_train.dtype == cifar10.label_test.dtype == np.int32
    np.testing.assert_allclose(cifar10.mean, (0.4914, 0.4822, 0.4465), atol=0.01)
    np.testing.assert_allclose(cifar10.std, (0.2470, 0.2435, 0.2616), atol=0.01)
    assert datasets.spec('cifar10') == (cifar10.image_shape, cifar10.num_classes)
    assert checks.doubts(cifar10) == []


def test_specs_are_those_of_tfds(tmp_path):
    tfds = pytest.importorskip('tensorflow_datasets')
    for name in TFDS_NAMES:
        features = tfds.builder(name, data_dir=str(tmp_path)).info.features
        assert datasets.spec(name) == (features['image'].shape, features['label'].num_classes)


@pytest.mark.parametrize('name', TFDS_NAMES)
def test_missing_tfds_data_is_not_downloaded_unless_told(tmp_path, name):
    pytest.importorskip('tensorflow_datasets')
    text = message(name, data_dir=str(tmp_path / 'none'))
    for word in (name, str(tmp_path), '--config.data.data_dir=', '--config.data.download=True'):
        assert word in text
    assert not list(tmp_path.iterdir())


def test_a_failed_download_is_one_line(tmp_path, monkeypatch):
    tfds = pytest.importorskip('tensorflow_datasets')

    def fail(self):
        raise ConnectionError('no route\nto host')

    monkeypatch.setattr(tfds.core.DatasetBuilder, 'download_and_prepare', fail)
    text = message('mnist', data_dir=str(tmp_path), download=True)
    assert 'data.download' in text
    assert 'ConnectionError: no route to host' in text


@needs_cifar10
def test_a_damaged_tfds_file_is_one_line(tmp_path):
    pytest.importorskip('tensorflow_datasets')
    version = PREPARED / 'cifar10' / '3.0.2'
    for source in version.iterdir():
        target = tmp_path / 'cifar10' / '3.0.2' / source.name
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.suffix in ('.json', '.txt'):
            shutil.copyfile(source, target)
        else:
            target.write_bytes(b'\0' * 100)
    text = message('cifar10', data_dir=str(tmp_path))
    assert f'cannot read cifar10 in {tmp_path}' in text
    assert 'DataLoss' in text


@pytest.fixture(scope='module')
def prepared(tmp_path_factory):
    """Directories that TFDS prepared in each format, of the same few examples shaped as MNIST's."""
    tfds = pytest.importorskip('tensorflow_datasets')

    def examples(n: int, seed: int):
        rng = np.random.default_rng(seed)
        for place in range(n):
            yield place, {'image': rng.integers(0, 256, (28, 28, 1), np.uint8), 'label': place % 10}

    root = tmp_path_factory.mktemp('prepared')
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            tfds.image_classification.MNIST, '_split_generators',
            lambda self, manager: {'train': examples(30, 0), 'test': examples(20, 1)},
        )  # fmt: skip
        for kind in ('tfrecord', 'array_record', 'parquet'):
            builder = tfds.builder('mnist', data_dir=str(root / kind), file_format=kind)
            builder.download_and_prepare()
    return root


def test_every_format_of_tfds_gives_the_same_data(prepared):
    formats = ('tfrecord', 'array_record', 'parquet')
    found = [datasets.load('mnist', data_dir=str(prepared / kind)) for kind in formats]
    expected = np.random.default_rng(0).integers(0, 256, (28, 28, 1), np.uint8)
    assert any(np.array_equal(expected, image) for image in found[1].image_train)
    assert found[1].image_train.shape == (30, 28, 28, 1)
    assert found[1].label_train.dtype == np.int32
    # So a run goes on, whichever its data come in.
    assert len({dataset.fingerprint for dataset in found}) == 1
    assert counted(found[1].image_test, found[1].label_test) == counted(
        found[0].image_test, found[0].label_test
    )


# Reads argv[2] where TensorFlow is not installed; None in sys.modules would look as if it was.
WITHOUT_TENSORFLOW = """
import importlib.machinery as machinery, sys
find = machinery.PathFinder.find_spec.__func__
def find_others(cls, name, path=None, target=None):
    return None if name.split('.')[0] == 'tensorflow' else find(cls, name, path, target)
machinery.PathFinder.find_spec = classmethod(find_others)
from ensadv.data import datasets
from ensadv.errors import DataError
for kind in ('array_record', 'parquet', 'tfrecord', 'none'):
    try:
        print(datasets.load('mnist', data_dir=f'{sys.argv[1]}/{kind}', download=True).fingerprint)
    except DataError as error:
        print(error)
assert 'tensorflow' not in sys.modules
"""


def test_where_tensorflow_is_not_installed_what_grain_reads_is_read(prepared):
    result = subprocess.run(
        [sys.executable, '-c', WITHOUT_TENSORFLOW, str(prepared)],
        cwd=pathlib.Path(__file__).parents[1], capture_output=True, text=True, check=True,
    )  # fmt: skip
    first, second, third, fourth = result.stdout.splitlines()
    here = datasets.load('mnist', data_dir=str(prepared / 'tfrecord')).fingerprint
    assert first == second == here
    assert f'{prepared}/tfrecord/mnist/' in third
    assert 'of tfrecord files, which only TensorFlow reads' in third
    assert "file_format='array_record'" in third
    assert 'damaged' not in third
    assert 'data.download: to prepare mnist TFDS needs TensorFlow' in fourth
    assert 'Traceback' not in result.stderr
    assert 'OpenCV' not in result.stderr


def make_builder(name, features, keys=('picture', 'kind'), splits=('train', 'validation')):
    """Makes TFDS know a data set of 6 x 7 pixels; returns its class."""
    import tensorflow_datasets as tfds

    def examples():
        for place in range(8):
            yield place, {'picture': np.full((6, 7, 3), place, np.uint8), 'kind': place % 3}

    return type(
        name,
        (tfds.core.GeneratorBasedBuilder,),
        {
            '__module__': __name__,
            'VERSION': tfds.core.Version('1.0.0'),
            '_info': lambda self: tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict(features), supervised_keys=keys
            ),
            '_split_generators': lambda self, manager: {split: examples() for split in splits},
            '_generate_examples': None,
        },
    )


def test_any_image_set_of_tfds_is_read_by_its_description(prepared, tmp_path):
    tfds = pytest.importorskip('tensorflow_datasets')
    place = str(prepared / 'array_record')
    named, plain = (datasets.load(name, data_dir=place) for name in ('tfds:mnist', 'mnist'))
    assert named.fingerprint == plain.fingerprint
    assert (named.name, named.class_names) == ('tfds:mnist', tuple('0123456789'))
    assert datasets.spec('tfds:mnist', data_dir=place) == ((28, 28, 1), 10)
    assert datasets.sizes('tfds:mnist', data_dir=place) == (30, 20)

    features = {
        'picture': tfds.features.Image(shape=(6, 7, 3)),
        'kind': tfds.features.ClassLabel(names=['a', 'b', 'c']),
    }
    made = make_builder('SomeOwnSet', features)
    made(data_dir=str(tmp_path), file_format='array_record').download_and_prepare()
    own = datasets.load('tfds:some_own_set', data_dir=str(tmp_path))
    assert sorted(own.image_train[:, 0, 0, 0]) == list(range(8))
    np.testing.assert_array_equal(own.label_train, own.image_train[:, 0, 0, 0] % 3)
    assert (own.image_shape, own.class_names) == ((6, 7, 3), ('a', 'b', 'c'))
    assert len(own.label_test) == 8  # its validation split
    assert own.describe()['class_names'] == ['a', 'b', 'c']

    any_size = {**features, 'picture': tfds.features.Image(shape=(None, None, 3))}
    make_builder('AnySize', any_size)
    make_builder('NoClass', {'picture': features['picture']}, keys=None)
    make_builder('NoTest', features, splits=('train',))(
        data_dir=str(tmp_path), file_format='array_record'
    ).download_and_prepare()
    for name, told in (
        ('any_size', 'found images (None, None, 3) of uint8, allowed are images of one size'),
        ('no_class', 'found picture, allowed are data sets of TFDS with an image and its class'),
        ('no_test', 'found the splits train, needed are train, and test or validation'),
        ('some_own_sat', "TFDS knows no such data set (did you mean 'some_own_set'?)"),
    ):
        assert told in message(f'tfds:{name}', data_dir=str(tmp_path))
    assert 'found no some_own_set in' in message('tfds:some_own_set', data_dir=str(tmp_path / 'x'))


@pytest.mark.parametrize('kind', ['tfrecord', 'array_record'])
def test_only_what_may_be_damaged_is_to_be_removed(prepared, tmp_path, monkeypatch, kind):
    shutil.copytree(prepared / kind, tmp_path / 'copy')
    (file,) = (tmp_path / 'copy').rglob('*-test.*')
    file.write_bytes(b'\0' * 100)
    text = message('mnist', data_dir=str(tmp_path / 'copy'))
    assert 'cannot read mnist' in text
    assert 'if it is damaged, remove it' in text
    for error in (MemoryError(), PermissionError('not yours'), TimeoutError('no answer')):

        def fail(*args, error=error):
            raise error

        monkeypatch.setattr(readers, '_read_at_once', fail)
        monkeypatch.setattr(readers, '_read_one_by_one', fail)
        text = message('mnist', data_dir=str(tmp_path / 'copy'))
        assert f'cannot read mnist in {tmp_path}/copy' in text
        assert type(error).__name__ in text
        assert 'remove' not in text.replace(str(tmp_path), '')


@pytest.mark.parametrize('module', ['tensorflow', 'tensorflow_datasets'])
def test_without_tensorflow_only_tfds_data_is_lost(monkeypatch, module):
    monkeypatch.setitem(sys.modules, module, None)
    text = message('cifar10')
    for word in (module, 'pip install', 'importlib_resources', 'digits', 'npz'):
        assert word in text
    assert datasets.load('digits').num_classes == 10
    assert datasets.spec('cifar10') == ((32, 32, 3), 10)


# Sampling


def sampler(batch_size: int, num_examples: int):
    """`batch_indices` of (key, step, positions), compiled."""
    sizes = {'batch_size': batch_size, 'num_examples': num_examples}
    return jax.jit(lambda *args: batches.batch_indices(*args, **sizes))


def stream(key: jax.Array, num_examples: int, epochs: range) -> np.ndarray:
    keys = [jax.random.fold_in(key, epoch) for epoch in epochs]
    return np.concatenate([jax.random.permutation(k, num_examples) for k in keys])


@pytest.mark.parametrize(
    'num_examples,batch_size', [(10, 4), (7, 3), (12, 4), (5, 5), (11, 1), (9, 8)]
)
def test_batches_are_a_stream_of_whole_epochs(num_examples, batch_size):
    steps = 4 * num_examples // batch_size
    key = jax.random.key(3)
    sample = sampler(batch_size, num_examples)
    read = np.concatenate([sample(key, step, jnp.arange(batch_size)) for step in range(steps)])
    assert read.dtype == np.int32
    np.testing.assert_array_equal(read, stream(key, num_examples, range(4))[: steps * batch_size])
    for epoch in range(steps * batch_size // num_examples):
        part = read[epoch * num_examples : (epoch + 1) * num_examples]
        assert sorted(part) == list(range(num_examples))


@pytest.mark.parametrize('devices', [2, 8])
def test_a_device_gets_its_slice_of_the_same_batch(devices):
    key = jax.random.key(0)
    sample = sampler(8, 13)
    mapped = jax.jit(jax.vmap(sample, (None, None, 0)))
    for step in range(5):
        whole = sample(key, step, jnp.arange(8))
        parts = jnp.arange(8).reshape(devices, -1)
        each = np.concatenate([sample(key, step, part) for part in parts])
        np.testing.assert_array_equal(each, whole)
        np.testing.assert_array_equal(mapped(key, step, parts).ravel(), whole)


def test_seeds_and_epochs_differ():
    sample = sampler(50, 50)
    keys = [jax.random.key(seed) for seed in (0, 1)]
    orders = [sample(key, step, jnp.arange(50)).tolist() for key in keys for step in range(3)]
    assert len(set(map(tuple, orders))) == 6


@pytest.mark.parametrize('num_examples,batch_size', [(50000, 128), (50000, 4096), (73257, 512)])
def test_long_runs_do_not_overflow(num_examples, batch_size):
    key = jax.random.key(0)
    sample = sampler(batch_size, num_examples)
    for step in (500_000, 2**24, 2**31 - 1):
        found = sample(key, step, jnp.arange(batch_size))
        epoch, start = divmod(step * batch_size, num_examples)  # Python's integers never wrap
        expected = stream(key, num_examples, range(epoch, epoch + 2))[start : start + batch_size]
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize('num_examples,batch_size', [(7, 8), (2**24 + 1, 4096)])
def test_sizes_that_cannot_be_sampled_are_refused(num_examples, batch_size):
    with pytest.raises(errors.DataError, match=rf'batch_size.*{batch_size}.*{num_examples}'):
        sampler(batch_size, num_examples)(jax.random.key(0), 0, jnp.arange(2))


# Augmentation


def allowed_crops(image: np.ndarray, pad: int, flip: bool) -> dict[bytes, tuple]:
    height, width, _ = image.shape
    padded = np.pad(image, ((pad, pad), (pad, pad), (0, 0)), mode='reflect')
    crops = {}
    for top in range(2 * pad + 1):
        for left in range(2 * pad + 1):
            crop = padded[top : top + height, left : left + width]
            crops[crop.tobytes()] = (top, left, False)
            if flip:
                crops[crop[:, ::-1].tobytes()] = (top, left, True)
    return crops


@pytest.mark.parametrize('flip', [False, True])
@pytest.mark.parametrize('pad', [0, 2])
def test_augmented_images_are_all_the_allowed_crops(pad, flip):
    image = np.random.default_rng(0).integers(0, 256, (6, 7, 3), np.uint8)
    crops = allowed_crops(image, pad, flip)
    choices = (2 * pad + 1) ** 2 * (1 + flip)
    assert len(crops) == choices
    count = 64 * choices
    images = np.broadcast_to(image, (count, 6, 7, 3))
    augmented = batches.augment(
        jax.random.split(jax.random.key(0), count), images, pad=pad, flip=flip
    )
    assert augmented.dtype == jnp.uint8
    seen = collections.Counter(crops[bytes(one)] for one in np.asarray(augmented))
    assert len(seen) == choices  # KeyError above if any crop is not an allowed one
    if choices > 1:  # chi-square of a uniform choice, at most 8 standard deviations off
        chi_square = sum((n - 64) ** 2 / 64 for n in seen.values())
        assert abs(chi_square - (choices - 1)) < 8 * np.sqrt(2 * (choices - 1))


def test_augmentation_belongs_to_the_image_not_to_its_batch():
    images = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 1), np.uint8)
    keys = jax.random.split(jax.random.key(1), 6)
    augment = jax.jit(lambda keys, images: batches.augment(keys, images, pad=4, flip=True))
    whole = augment(keys, images)
    np.testing.assert_array_equal(augment(keys[:2], images[:2]), whole[:2])
    np.testing.assert_array_equal(augment(keys[5:], images[5:]), whole[5:])
    assert (whole != augment(jax.random.split(jax.random.key(2), 6), images)).any()


def test_nothing_to_augment_returns_the_images():
    images = tiny_arrays()['image_train']
    keys = jax.random.split(jax.random.key(0), len(images))
    np.testing.assert_array_equal(batches.augment(keys, images, pad=0, flip=False), images)


def test_pixels_are_in_the_unit_interval():
    levels = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1)
    pixels = jax.jit(batches.to_pixels)(levels)
    assert pixels.dtype == jnp.float32
    np.testing.assert_allclose(pixels, levels / 255, rtol=1e-6)
    assert pixels.min() == 0
    assert pixels.max() == 1
