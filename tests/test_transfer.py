"""The transfer set's file: what is written comes back, and nothing else is accepted."""

import json
import pickle
from functools import partial

import numpy as np
import pytest

from ensadv.attacks.threat_model import ThreatModel
from ensadv.data import datasets
from ensadv.errors import UserError
from ensadv.evaluation import transfer_sets

EPSILON = 8 / 255
MEMBERS = {'images', 'labels', 'indices', 'fooled', 'record'}
SOURCES = [{'system': 'Baseline', 'seed': 1, 'config': {}}]

linf = partial(ThreatModel, 'linf')


def edited(**changes) -> np.ndarray:
    """A record with changes."""
    record = {'epsilon': EPSILON, 'digest': '', 'fingerprint': '', 'share_fooled': 1, 'sources': []}
    return np.array(json.dumps(record | changes))


@pytest.fixture(scope='module')
def dataset() -> datasets.Dataset:
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (12, 4, 5, 3), np.uint8), np.arange(12) % 3
    return datasets.Dataset('npz', images[:2], labels[:2], images, labels.astype(np.int32), 3)


@pytest.fixture
def path(tmp_path):
    return tmp_path / 'sets' / 'blackbox.npz'


def arrays(dataset: datasets.Dataset) -> dict[str, np.ndarray]:
    """Five test images, each moved by 8 levels wherever it can be."""
    indices = np.array([0, 2, 3, 7, 11], np.int32)
    clean = dataset.image_test[indices].astype(int)
    return {
        'images': np.where(clean < 128, clean + 8, clean - 8).astype(np.uint8),
        'labels': dataset.label_test[indices],
        'indices': indices,
        'fooled': np.array([True, True, False, True, True]),
    }


def made(
    dataset: datasets.Dataset, record: dict | None = None, **changes
) -> transfer_sets.TransferSet:
    facts = {'epsilon': EPSILON, 'fingerprint': dataset.fingerprint, 'sources': SOURCES}
    return transfer_sets.TransferSet(**(arrays(dataset) | changes), record=facts | (record or {}))


def refusal(path, dataset: datasets.Dataset, epsilon: float = EPSILON) -> str:
    with pytest.raises(UserError) as caught:
        transfer_sets.load(path, dataset, linf(epsilon))
    text = str(caught.value)
    assert text.startswith(f'eval.blackbox_path: {path}: ')
    assert '\n' not in text
    assert 'allowed' in text or 'not a transfer set' in text
    return text


def stored(path) -> dict[str, np.ndarray]:
    with np.load(path) as file:
        return dict(file)


def assert_has(text: str, *words: str) -> None:
    for word in words:
        assert word in text


# What is written comes back


def test_a_set_comes_back_as_it_was_written(dataset, path):
    given = made(dataset)
    record = transfer_sets.write(path, given)
    assert record['n'] == 5
    assert record['fooled'] == 4
    assert record['share_fooled'] == 0.8
    assert record['sources'] == SOURCES
    assert json.loads(json.dumps(record)) == record
    assert set(stored(path)) == MEMBERS
    for read in (
        transfer_sets.load(path, dataset, linf(EPSILON)),
        transfer_sets.load(str(path), dataset, linf(EPSILON)),
    ):
        assert read.record == record
        for name, array in arrays(dataset).items():
            found = getattr(read, name)
            assert found.dtype == array.dtype
            np.testing.assert_array_equal(found, array)
    assert given.record.keys() == {'epsilon', 'fingerprint', 'sources'}
    assert [file.name for file in path.parent.iterdir()] == ['blackbox.npz']
    # A file that went through another program and back is the same set.
    again = transfer_sets.write(path, transfer_sets.load(path, dataset, linf(EPSILON)))
    assert again == record


def test_the_digest_tells_any_difference(dataset, path):
    changed = {name: array.copy() for name, array in arrays(dataset).items()}
    changed['images'][0, 0, 0, 0] ^= 1
    changed['labels'][0] ^= 1
    changed['indices'][0] ^= 1
    changed['fooled'][0] ^= True
    changes = [{}, *({name: array} for name, array in changed.items())]
    changes.append({'images': changed['images'].reshape(5, 5, 4, 3)})
    digests = [transfer_sets.write(path, made(dataset, **each))['digest'] for each in changes]
    assert len(set(digests)) == 6
    assert {len(digest) for digest in digests} == {64}
    assert transfer_sets.write(path, made(dataset, record={'seed': 1}))['digest'] == digests[0]


def test_the_record_is_read_without_the_images(dataset, path):
    record = transfer_sets.write(path, made(dataset))
    assert transfer_sets.read_record(path) == record
    np.savez(path, record=stored(path)['record'])
    assert transfer_sets.read_record(path) == record


@pytest.mark.parametrize('epsilon', [EPSILON, np.nextafter(EPSILON, 0), np.nextafter(EPSILON, 1)])
def test_rounding_of_epsilon_makes_no_difference(dataset, path, epsilon):
    transfer_sets.write(path, made(dataset))
    assert transfer_sets.load(path, dataset, linf(float(epsilon))).record['epsilon'] == EPSILON


def test_what_is_held_out_makes_no_difference(dataset, path):
    transfer_sets.write(path, made(dataset))
    transfer_sets.load(path, datasets.hold_out(dataset, 1), linf(EPSILON))


@pytest.mark.parametrize(
    'changes,words',
    [
        ({'images': np.zeros((5, 4, 5, 3), np.float32)}, 'images: found float32'),
        ({'labels': np.zeros(5, np.int64)}, 'labels: found int64 (5,), allowed is int32 (5,)'),
        ({'fooled': np.zeros(4, bool)}, 'fooled: found bool (4,), allowed is bool (5,)'),
    ],
)
def test_what_could_not_be_read_is_not_written(dataset, path, changes, words):
    with pytest.raises(ValueError, match='transfer set') as caught:
        transfer_sets.write(path, made(dataset, **changes))
    assert words in str(caught.value)
    assert not path.exists()


# What is refused


def test_files_that_cannot_be_read_are_refused(dataset, path, tmp_path):
    assert 'no such file' in refusal(path, dataset)
    assert 'is no file' in refusal(tmp_path, dataset)
    assert 'is no file' in refusal('/dev/zero', dataset)  # to read it would never end
    path.parent.mkdir()
    for content in (b'', b'garbage', b'PK\x03\x04garbage', pickle.dumps({'a': 1})):
        path.write_bytes(content)
        assert_has(refusal(path, dataset), 'cannot be read', 'undamaged .npz')
    with path.open('wb') as file:
        np.save(file, np.zeros(3))
    assert 'cannot be read' in refusal(path, dataset)
    transfer_sets.write(path, made(dataset))
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    assert 'cannot be read' in refusal(path, dataset)
    with pytest.raises(UserError, match='cannot be read'):
        transfer_sets.read_record(path)


@pytest.mark.parametrize('name', sorted(MEMBERS))
def test_python_objects_are_never_unpickled(dataset, path, name):
    class Exploding:
        def __reduce__(self):
            return pytest.fail, ('unpickled',)

    transfer_sets.write(path, made(dataset))
    members = stored(path) | {name: np.array([Exploding()] * 5, dtype=object)}
    np.savez(path, **members)
    assert_has(refusal(path, dataset), 'cannot be read', 'plain arrays', 'allow_pickle=False')


@pytest.mark.parametrize('name', sorted(MEMBERS))
def test_missing_members_are_named(dataset, path, name):
    transfer_sets.write(path, made(dataset))
    members = stored(path)
    del members[name]
    np.savez(path, **members)
    assert_has(refusal(path, dataset), f'no {name}; found ', *members)


@pytest.mark.parametrize(
    'record,words',
    [
        (np.zeros(3), ['float64 (3,)', 'JSON object']),
        (np.array(['a', 'b']), ['(2,)', 'JSON object']),
        (np.array('{not JSON'), ['JSON object']),
        (np.array('[1]'), ['JSON object']),
        (np.array('[' * 100_000), ['JSON object']),
        (np.array('{"epsilon": 1}'), ['no digest']),
        (np.array('{"epsilon": "1", "digest": "", "fingerprint": ""}'), ['a number', '"1"']),
        (edited(epsilon=10**400), ['epsilon: expected a number']),
        (edited(sources=['wrn']), ['sources[0]: expected an object, found "wrn"']),
        (edited(sources=[{'system': 'VGG', 'seed': 1}]), ['no sources[0].config']),
    ],
)
def test_bad_records_are_refused(dataset, path, record, words):
    transfer_sets.write(path, made(dataset))
    np.savez(path, **(stored(path) | {'record': record}))
    assert_has(refusal(path, dataset), 'record', *words)
    with pytest.raises(UserError, match=r'eval\.blackbox_path: .*record'):
        transfer_sets.read_record(path)


@pytest.mark.parametrize(
    'name,array,words',
    [
        ('images', np.zeros((5, 4, 5, 3), np.float32), ['float32', 'uint8 [n, H, W, C]']),
        ('images', np.zeros((5, 4, 5), np.uint8), ['uint8 (5, 4, 5)', '[n, H, W, C]']),
        ('images', np.zeros((0, 4, 5, 3), np.uint8), ['(0, 4, 5, 3)', 'not empty']),
        ('images', np.array(3, np.uint8), ['uint8 ()']),
        ('labels', np.zeros(5, np.int64), ['int64', 'int32 (5,)']),
        ('indices', np.arange(4, dtype=np.int32), ['(4,)', '(5,)']),
        ('indices', np.arange(5.0), ['float64']),
        ('fooled', np.ones(5, np.int32), ['int32', 'bool']),
    ],
)
def test_wrong_dtypes_and_shapes_are_refused(dataset, path, name, array, words):
    transfer_sets.write(path, made(dataset))
    np.savez(path, **(stored(path) | {name: array}))
    assert_has(refusal(path, dataset), f'{name}: found', *words)


@pytest.mark.parametrize('name', ['images', 'labels', 'indices', 'fooled'])
def test_edited_arrays_are_refused(dataset, path, name):
    transfer_sets.write(path, made(dataset))
    members = stored(path)
    edited = members[name].copy()
    edited.flat[0] = not edited.flat[0]
    np.savez(path, **(members | {name: edited}))
    assert_has(refusal(path, dataset), 'damaged or edited', 'digest')


@pytest.mark.parametrize('field,value', [('fooled', 5), ('n', 6), ('share_fooled', 1.0)])
def test_edited_records_are_refused(dataset, path, field, value):
    record = transfer_sets.write(path, made(dataset)) | {field: value}
    np.savez(path, **(stored(path) | {'record': np.array(json.dumps(record))}))
    assert_has(refusal(path, dataset), f'{field} ', f'the {value} of its record')


def test_sets_made_for_other_images_are_refused(dataset, path):
    transfer_sets.write(path, made(dataset, record={'fingerprint': 'f' * 64}))
    text = refusal(path, dataset)
    assert_has(text, 'made for other images', 'f' * 16, dataset.fingerprint[:16])


def test_sets_made_for_another_epsilon_are_refused(dataset, path):
    transfer_sets.write(path, made(dataset))
    text = refusal(path, dataset, epsilon=0.15)
    assert_has(text, 'another epsilon', '0.0313725 (8/255)', '0.15 (38.25/255)')
    assert 'another epsilon' in refusal(path, dataset, epsilon=EPSILON * (1 + 2e-6))


@pytest.mark.parametrize(
    'indices,words',
    [
        ([0, 2, 3, 7, 12], ['0..12', '0..11']),
        ([-1, 2, 3, 7, 11], ['-1..11', '0..11']),
        ([0, 3, 2, 7, 11], ['3 before 2', 'ascending']),
        ([0, 2, 2, 7, 11], ['2 before 2', 'each once']),
    ],
)
def test_places_outside_or_out_of_order_are_refused(dataset, path, indices, words):
    transfer_sets.write(path, made(dataset, indices=np.array(indices, np.int32)))
    assert_has(refusal(path, dataset), 'indices: found', *words)


def test_other_labels_are_refused(dataset, path):
    labels = arrays(dataset)['labels'].copy()
    labels[1:3] += 1
    transfer_sets.write(path, made(dataset, labels=labels))
    assert_has(refusal(path, dataset), 'labels: found 2', 'those of the test split')


def test_images_of_another_shape_are_refused(dataset, path):
    transfer_sets.write(path, made(dataset, images=arrays(dataset)['images'][:, :3]))
    assert_has(refusal(path, dataset), 'images: found (5, 3, 5, 3)', '(5, 4, 5, 3)')


@pytest.mark.parametrize('level', [0, 255])
def test_images_beyond_epsilon_are_refused(dataset, path, level):
    images, places = arrays(dataset)['images'].copy(), arrays(dataset)['indices']
    clean = int(dataset.image_test[places[1], 2, 3, 1])
    images[1, 2, 3, 1] = level
    assert abs(level - clean) > 8
    transfer_sets.write(path, made(dataset, images=images))
    text = refusal(path, dataset)
    assert_has(text, f'images: found 1 up to {abs(level - clean)} levels', 'allowed are 8 levels')


@pytest.mark.parametrize('difference,accepted', [(38, True), (39, False)])
def test_the_ball_ends_at_the_last_whole_level(dataset, path, difference, accepted):
    clean = dataset.image_test[arrays(dataset)['indices']].astype(int)
    images = np.where(clean < 128, clean + difference, clean - difference).astype(np.uint8)
    transfer_sets.write(path, made(dataset, images=images, record={'epsilon': 0.15}))
    if accepted:
        transfer_sets.load(path, dataset, linf(0.15))
    else:
        assert_has(refusal(path, dataset, 0.15), 'found 5 up to 39', 'allowed are 38 levels')


# Quantisation


@pytest.mark.parametrize(
    'epsilon,image,level,expected',
    [
        (8 / 255, 100, 108, 108),
        (8 / 255, 100, 92, 92),
        (8 / 255, 100, 103.4, 103),
        (8 / 255, 100, 103.6, 104),
        (8 / 255, 100, 108.6, 108),  # the nearest level would be outside
        (8 / 255, 100, 91.4, 92),
        (8 / 255, 3, 0, 0),
        (8 / 255, 3, -1, 0),
        (8 / 255, 250, 255, 255),
        (8 / 255, 250, 256, 255),
        (0.15, 100, 138.25, 138),
        (0.15, 100, 61.75, 62),
        (0.15, 100, 138.9, 138),
        (0.152, 100, 138.76, 138),  # 38.76 levels: the nearest, 39, is outside
        (0.152, 100, 61.24, 62),
        (1.0, 0, 255, 255),
    ],
)
def test_images_are_stored_at_the_nearest_level_within_the_ball(epsilon, image, level, expected):
    x_adv = np.full((1, 2, 2, 1), level, np.float32) / np.float32(255)
    images = np.full((1, 2, 2, 1), image, np.uint8)
    stored_images = transfer_sets.quantize(x_adv, images, linf(epsilon))
    assert stored_images.dtype == np.uint8
    assert stored_images.shape == images.shape
    assert set(stored_images.ravel().tolist()) == {expected}


@pytest.mark.parametrize('epsilon', [level / 255 for level in range(1, 17)])
def test_what_an_attack_reaches_in_float32_keeps_its_level(epsilon):
    images = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1)
    x = images.astype(np.float32) / 255
    x_adv = np.clip(x + np.float32(epsilon), 0, 1)
    expected = np.minimum(images.astype(int) + round(255 * epsilon), 255)
    np.testing.assert_array_equal(transfer_sets.quantize(x_adv, images, linf(epsilon)), expected)
    np.testing.assert_array_equal(transfer_sets.quantize(x, images, linf(epsilon)), images)


def test_l2_examples_are_stored_within_the_ball_and_verified(dataset, path):
    threat = ThreatModel('l2', 0.5)
    indices = arrays(dataset)['indices']
    images = dataset.image_test[indices]
    move = np.random.default_rng(0).normal(size=images.shape)
    move *= 0.5 / np.linalg.norm(move.reshape(len(move), -1), axis=1).reshape(-1, 1, 1, 1)
    x_adv = np.clip(images / 255 + move, 0, 1)
    stored_images = transfer_sets.quantize(x_adv, images, threat)
    far = np.linalg.norm((stored_images / 255 - images / 255).reshape(len(images), -1), axis=1)
    assert np.all(far <= 0.5 + 1e-9)
    assert np.max(np.abs(stored_images - 255 * x_adv)) < 1
    transfer_sets.write(path, made(dataset, images=stored_images, record=threat.to_json()))
    transfer_sets.load(path, dataset, threat)
    with pytest.raises(UserError, match='another norm: found l2'):
        transfer_sets.load(path, dataset, linf(0.5))
    transfer_sets.write(path, made(dataset, images=255 - images, record=threat.to_json()))
    with pytest.raises(UserError, match='levels from their test images'):
        transfer_sets.load(path, dataset, threat)
