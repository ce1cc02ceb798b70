"""Extra training images: which files are read, how, and what is told of those that cannot be."""

import os
import pickle
import zipfile

import numpy as np
import pytest
from conftest import tiny_config

from ensadv import build, errors
from ensadv.data import checks, datasets, extra

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (20, 4, 5, 3), np.uint8)
LABELS = np.arange(20) % 3
SHAPE = (4, 5, 3)


def load(*paths, classes=3):
    return extra.load(tuple(map(str, paths)), SHAPE, classes)


def write_shards(folder):
    """Writes the images as three files of each kind."""
    folder.mkdir()
    np.savez(folder / 'part0.npz', images=IMAGES[:7], labels=LABELS[:7])
    np.savez_compressed(folder / 'part1.npz', image=IMAGES[7:9], label=LABELS[7:9].astype(np.uint8))
    np.save(folder / 'some_image_2.npy', IMAGES[9:])
    np.save(folder / 'some_label_2.npy', LABELS[9:])
    (folder / 'README.txt').write_text('not read')


def test_files_in_any_form_hold_the_same_images(tmp_path):
    np.savez(tmp_path / 'whole.npz', image=IMAGES, label=LABELS)
    write_shards(tmp_path / 'shards')
    found = [
        load(tmp_path / 'whole.npz'),
        load(tmp_path / 'shards'),
        load(tmp_path / 'shards/part?.npz', tmp_path / 'shards/some_image_2.npy'),
    ]
    chosen = np.array([19, 0, 6, 7, 8, 9, 0])
    for each in found:
        np.testing.assert_array_equal(each.labels, LABELS)
        np.testing.assert_array_equal(each.images(chosen), IMAGES[chosen])
        np.testing.assert_array_equal(each.all_images(), IMAGES)
        assert (each.labels.dtype, each.nbytes) == (np.int32, IMAGES.nbytes)
    assert len({each.fingerprint for each in found}) == 1
    assert [type(part) for part in found[1].parts] == [np.memmap, np.ndarray, np.memmap]
    # What is mapped is read from the file when it is used, and nothing else of it.
    assert found[0].parts[0].filename == str(tmp_path / 'whole.npz')


def test_a_folder_into_which_a_compressed_file_is_unpacked_is_mapped(tmp_path):
    np.savez_compressed(tmp_path / 'small.npz', image=IMAGES, label=LABELS)
    with zipfile.ZipFile(tmp_path / 'small.npz') as archive:
        archive.extractall(tmp_path / 'unpacked')  # as python -m zipfile -e does
    assert isinstance(load(tmp_path / 'unpacked').parts[0], np.memmap)
    assert load(tmp_path / 'unpacked').fingerprint == load(tmp_path / 'small.npz').fingerprint


def test_the_fingerprint_tells_what_it_looks_at(tmp_path):
    images, labels = IMAGES.copy(), LABELS.copy()
    images[13, 0, 0, 0] ^= 1
    labels[5] = 0
    found = set()
    for number, (x, y) in enumerate([(IMAGES, LABELS), (images, LABELS), (IMAGES, labels)]):
        np.savez(tmp_path / f'{number}.npz', image=x, label=y)
        found.add(load(tmp_path / f'{number}.npz').fingerprint)
    assert len(found) == 3


def damaged(path):
    np.savez(path, image=IMAGES, label=LABELS)
    path.write_bytes(path.read_bytes()[:700])


BAD = {
    'dtype': ({'image': IMAGES / 255, 'label': LABELS}, 'images: found float64 in 0..1, allowed'),
    'size': ({'image': IMAGES[:, :3], 'label': LABELS}, 'found images (3, 5, 3), data.name has'),
    'flat': ({'image': IMAGES.reshape(20, -1), 'label': LABELS}, 'images: found shape (20, 60)'),
    'scalar': ({'image': np.uint8(3), 'label': LABELS}, 'images: found shape ()'),
    'classes': ({'image': IMAGES, 'label': LABELS + 1}, 'labels: found 3, data.name allows 0..2'),
    'negative': ({'image': IMAGES, 'label': LABELS - 1}, 'labels: found label -1'),
    'short': ({'image': IMAGES, 'label': LABELS[:3]}, 'labels: found shape (3,), allowed is (20,)'),
    'soft': ({'image': IMAGES, 'label': np.eye(20)}, 'labels: found float64, allowed are integers'),
    'names': ({'x': IMAGES, 'y': LABELS}, 'expected arrays image and label, or images and labels'),
    'objects': ({'image': IMAGES.astype(object), 'label': LABELS}, 'Python objects'),
    'pickled labels': ({'image': IMAGES, 'label': LABELS.astype(object)}, 'cannot be read'),
}


@pytest.mark.parametrize('arrays, told', BAD.values(), ids=BAD)
def test_files_that_cannot_be_meant_are_told_in_a_line(tmp_path, arrays, told):
    path = tmp_path / 'bad.npz'
    np.savez(path, **arrays)
    assert_told(path, told)


def assert_told(path, told):
    with pytest.raises(errors.DataError) as caught:
        load(path)
    text = str(caught.value)
    assert text.startswith('data.extra: ')
    assert str(path) in text
    assert told in text
    assert '\n' not in text


def test_what_is_no_file_of_images_is_told_in_a_line(tmp_path, monkeypatch):
    assert_told(tmp_path / 'none.npz', 'found no file of images')
    assert_told(tmp_path / 'no*.npz', 'found no file of images')
    assert_told(tmp_path, 'found no file of images')
    assert_told('gs://bucket/x.npz', 'expected a local file')
    os.mkfifo(tmp_path / 'pipe.npz')
    assert_told(tmp_path / 'pipe.npz', 'is no file')  # to read it would never end
    (tmp_path / 'pipe.npz').unlink()
    for content in (b'', b'garbage', pickle.dumps({'image': 1})):
        (tmp_path / 'x.npz').write_bytes(content)
        assert_told(tmp_path / 'x.npz', 'cannot be read; damaged, or not what its name says')
    (tmp_path / 'x.pickle').write_bytes(b'')
    assert_told(tmp_path / 'x.pickle', 'allowed are .npz files')
    damaged(tmp_path / 'x.npz')
    assert_told(tmp_path / 'x.npz', 'cannot be read')
    np.save(tmp_path / 'image.npy', IMAGES)
    assert_told(tmp_path / 'image.npy', f'found no {tmp_path}/label.npy with its labels')
    np.savez_compressed(tmp_path / 'x.npz', image=IMAGES, label=LABELS)
    monkeypatch.setattr(extra, '_MOST_COMPRESSED', 100)
    assert_told(tmp_path / 'x.npz', f'unpack it, python -m zipfile -e {tmp_path}/x.npz DIR')


def test_test_images_among_them_are_told(tmp_path, caplog):
    np.savez(tmp_path / 'whole.npz', image=IMAGES, label=LABELS)
    found = load(tmp_path / 'whole.npz')
    for test, told in (
        (IMAGES[3:5], 'of 20 images that were looked at 2 are test'),
        (255 - IMAGES, ''),
    ):
        caplog.clear()
        labels = LABELS[: len(test)]
        checks.tell_extra(datasets.Dataset('npz', IMAGES, LABELS, test, labels, 3), found)
        assert told in caplog.text
        assert bool(told) == ('test images' in caplog.text)


def test_a_config_names_them(tmp_path):
    config = tiny_config()
    assert build.extra(config, SHAPE, 3) is None
    np.savez(tmp_path / 'whole.npz', image=IMAGES, label=LABELS)
    config.data.extra = (f'{tmp_path}/whole.npz',)
    assert build.extra(config, SHAPE, 3).describe()['num'] == 20
