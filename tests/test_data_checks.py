"""What is told of a data set at the start, and what in it can hardly be meant."""

import types

import numpy as np
import pytest
from conftest import tiny_config

from ensadv import build
from ensadv.data import checks, datasets


def good() -> dict[str, np.ndarray]:
    """Arrays of 10 classes in which nothing is odd, as the files of users' mistakes are made of."""
    rng = np.random.default_rng(0)
    image = lambda n: rng.integers(0, 256, (n, 8, 8, 1), np.uint8)
    return {
        'image_train': image(64),
        'label_train': np.arange(64) % 10,
        'image_test': image(20),
        'label_test': np.arange(20) % 10,
    }


def dataset_of(**changes: np.ndarray) -> datasets.Dataset:
    arrays = good() | changes
    return datasets.Dataset('npz', **arrays, num_classes=int(arrays['label_train'].max()) + 1)


def with_label(place: int, label: int) -> np.ndarray:
    labels = good()['label_train']
    labels[place] = label
    return labels


def in_color(channels: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    return {
        f'image_{split}': rng.integers(0, 256, (n, 8, 9, channels), np.uint8)
        for split, n in (('train', 64), ('test', 20))
    }


def opaque(channels: int) -> dict[str, np.ndarray]:
    images = in_color(channels)
    for array in images.values():
        array[..., -1] = 255
    return images


def doubtful_cases() -> list:
    arrays = good()
    images = {name: arrays[name] for name in ('image_train', 'image_test')}
    labels = {name: arrays[name] for name in ('label_train', 'label_test')}
    first, gap = images['image_train'], labels['label_train'].copy()
    gap[gap == 5] = 4
    black_half = first.copy()
    black_half[::2] = 0
    cases = {
        'from_1': (
            {name: array + 1 for name, array in labels.items()},
            ['11 classes', 'no training image has label 0', 'subtract 1'],
        ),
        'from_3': (
            {name: array + 3 for name, array in labels.items()},
            ['13 classes', 'one of the labels 0..2', 'subtract 3'],
        ),
        'ignored': (
            {'label_train': with_label(3, 255)},
            ['256 classes', 'labels 10..254', 'like 255, of 1 training image,', 'leave out'],
        ),
        'stray': (
            {'label_train': with_label(3, 10)},
            ['11 classes', 'no test image has label 10', 'a slip'],
        ),
        'gap': ({'label_train': gap}, ['no training image has label 5', 'without gaps']),
        'untested': (
            {'label_test': labels['label_test'] % 2 * 9},
            ['no test image has one of the labels 1..8', 'test images are usually of all classes'],
        ),
        'numbers': (
            {'label_train': np.arange(64) * 5},
            ['64 different labels of 64 training images'],
        ),
        'binary': (
            {name: array // 128 for name, array in images.items()},
            ['image_train and image_test', '0 and 1 only', 'times 255 first'],
        ),
        'levels': (
            {name: array // 16 for name, array in images.items()},
            ['pixels are 0..15', 'times 17 first'],
        ),
        'binary_test': (
            {'image_test': images['image_test'] // 128},
            ['image_test: pixels are 0 and 1 only'],
        ),
        'gray': (
            {name: array // 8 + 100 for name, array in images.items()},
            ['pixels are 100..131', 'another range'],
        ),
        'black': (
            {name: array * 0 for name, array in images.items()},
            ['image_train and image_test: all pixels are 0'],
        ),
        'unread': ({'image_train': black_half}, ['32 of 64 of image_train', 'one value']),
        'channels_first': (
            {name: np.moveaxis(array, -1, 1) for name, array in in_color(3).items()},
            ['images of 3 x 8 pixels with 9 channels', 'np.moveaxis(images, 1, -1)'],
        ),
        'gray_channels_first': (
            {name: np.moveaxis(array, -1, 1) for name, array in images.items()},
            ['images of 1 x 8 pixels with 8 channels', 'np.moveaxis'],
        ),
        'flattened': (
            {name: array.reshape(-1, 64, 1, 1) for name, array in images.items()},
            ['images of 64 x 1 pixels with 1 channel:', 'flattened'],
        ),
        'opacity': (opaque(4), ['(8, 9, 4)', 'opacity']),
        'gray_opacity': (opaque(2), ['(8, 9, 2)', 'opacity']),
        'tested_on_training': (
            {'image_test': first[:20], 'label_test': labels['label_train'][:20]},
            ['20 of 20 test images are training images too'],
        ),
        'one_in_training': (
            {'image_test': np.concatenate([first[7:8], images['image_test'][1:]])},
            ['1 of 20 test images'],
        ),
    }
    return [pytest.param(*case, id=name) for name, case in cases.items()]


@pytest.mark.parametrize('changes,words', doubtful_cases())
def test_what_can_hardly_be_meant_is_told_once(changes, words):
    (doubt,) = checks.doubts(dataset_of(**changes))
    assert '\n' not in doubt
    for word in words:
        assert word in doubt


@pytest.mark.parametrize(
    'changes',
    [
        {},
        in_color(3),
        in_color(4),
        # Black and white, as letters are; and images that are bright everywhere.
        {name: good()[name] // 128 * 255 for name in ('image_train', 'image_test')},
        {name: good()[name] // 2 + 128 for name in ('image_train', 'image_test')},
    ],
    ids=['gray', 'color', 'four_channels', 'black_and_white', 'bright'],
)
def test_what_may_be_meant_is_not_doubted(changes):
    assert checks.doubts(dataset_of(**changes)) == []


def test_digits_are_not_doubted():
    digits = datasets.load('digits')
    assert checks.doubts(digits) == []
    assert checks.doubts(datasets.hold_out(digits, 200)) == []


def test_few_shared_images_are_counted_but_not_doubted():
    rng = np.random.default_rng(2)
    image_test = rng.integers(0, 256, (300, 8, 8, 1), np.uint8)
    image_test[:3] = good()['image_train'][[5, 5, 9]]
    changes = {'image_test': image_test, 'label_test': np.arange(300) % 10}
    few = dataset_of(**changes)
    assert checks.summary(few).endswith('; 3 test images are training images too')
    assert checks.doubts(few) == []
    image_test[3] = good()['image_train'][0]
    assert '4 of 300 test images' in checks.doubts(dataset_of(**changes))[0]


def test_held_out_images_are_checked_too():
    arrays = good()
    twice = {name: np.repeat(arrays[name], 2, axis=0) for name in ('image_train', 'label_train')}
    held = datasets.hold_out(dataset_of(**twice), 40)
    found = checks.doubts(held)
    assert len(found) == 1
    assert 'of 40 validation images are training images too' in found[0]
    # Six or seven images of each class: of some none is left.
    few = datasets.hold_out(dataset_of(), 60)
    assert 'fewer data.validation_examples' in checks.doubts(few)[0]


def test_the_summary_says_what_was_read():
    changes = in_color(3)
    changes['image_train'][changes['image_train'] < 7] = 7
    changes['label_train'] = np.sort(with_label(0, 9))
    assert checks.summary(datasets.hold_out(dataset_of(**changes), 0)) == (
        '64 training, 0 validation, 20 test images of 8 x 9 pixels and 3 channels, 10 classes; '
        'training: pixels 7..255 of 0..255, 6..7 images per class'
    )


@pytest.fixture
def told(monkeypatch) -> list[str]:
    lines = []
    # The module alone, since what reads the data logs as well.
    warn = lambda text, *args: lines.append(f'warning: {text % args}')
    monkeypatch.setattr(checks, 'logging', types.SimpleNamespace(warning=warn))
    monkeypatch.setattr(checks.distributed, 'tell', lambda line: lines.append(f'info: {line}'))
    return lines


@pytest.fixture
def labels_from_1(tmp_path) -> str:
    arrays = good()
    for split in ('train', 'test'):
        arrays[f'label_{split}'] += 1
    np.savez(tmp_path / 'my.npz', **arrays)
    return str(tmp_path / 'my.npz')


def test_a_run_tells_of_its_data_once(told, labels_from_1):
    config = tiny_config(
        data__name='npz', data__path=labels_from_1, data__validation_examples=5,
        eval__num_examples=None,
    )  # fmt: skip
    for _ in range(2):
        build.dataset(config)
    assert len(told) == 2
    assert told[0].startswith(f'info: {labels_from_1}: 59 training, 5 validation, 20 test images')
    assert told[1].startswith(f'warning: {labels_from_1}: 11 classes')


def test_sizes_that_are_read_from_data_come_with_the_warning(told, labels_from_1):
    assert datasets.spec('npz', path=labels_from_1) == ((8, 8, 1), 11)
    assert [line.partition(':')[0] for line in told] == ['info', 'warning']
