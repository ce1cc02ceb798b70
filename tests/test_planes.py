"""The geometry of decision planes, and their files."""

import math
from functools import partial

import numpy as np
import pytest
from etils import epath

from ensadv.attacks.threat_model import ThreatModel
from ensadv.errors import UserError
from ensadv.evaluation import planes
from ensadv.storage import files, plane_files

linf = partial(ThreatModel, 'linf')
GREY = np.full((2, 2, 1), 0.5)
# A right angle and 3-4-5: |a - x| = 0.2; b - x = 0.3 along it and 0.4 across.
FIRST = GREY + np.array([0.2, 0, 0, 0]).reshape(2, 2, 1)
SECOND = GREY + np.array([0.3, 0, 0.4, 0]).reshape(2, 2, 1)


def moved(*move):
    return GREY + np.array(move, float).reshape(2, 2, 1)


def test_a_plane_by_hand():
    plane = planes.through(GREY, FIRST, SECOND, linf(0.5), seed=0)
    # Four pixels that each move by 0.5 move by 1 together: that is the unit.
    np.testing.assert_allclose(plane.axes, [[1, 0, 0, 0], [0, 0, 1, 0]], atol=1e-12)
    np.testing.assert_allclose(plane.points, [[0, 0], [0.2, 0], [0.3, 0.4]], atol=1e-12)
    # Two pixels move, each by at most 0.5: a square, from its lower left corner on.
    assert same_polygon(plane.corners, [[-0.5, -0.5], [0.5, -0.5], [0.5, 0.5], [-0.5, 0.5]])
    assert plane.note == ''
    # With a third of that epsilon the plane is the same, and all is three times as far.
    near = planes.through(GREY, FIRST, SECOND, linf(0.5 / 3), seed=0)
    np.testing.assert_allclose(near.axes, plane.axes / 3, atol=1e-12)
    np.testing.assert_allclose(near.points, 3 * plane.points, atol=1e-12)
    assert same_polygon(near.corners, plane.corners)
    # In L2 the unit is epsilon.
    round_ = planes.through(GREY, FIRST, SECOND, ThreatModel('l2', 0.25), seed=0)
    np.testing.assert_allclose(round_.points, 4 * plane.points, atol=1e-12)


def same_polygon(corners, expected) -> bool:
    """Whether both have the same corners in the same order, whichever is the first."""
    turned = (np.roll(corners, i, axis=0) for i in range(len(corners)))
    return any(each.shape == np.shape(expected) and np.allclose(each, expected, atol=1e-5)
               for each in turned)  # fmt: skip


def test_the_region_of_three_pixels_is_the_cubes_regular_hexagon():
    # The plane across the diagonal of a cube meets it in a hexagon: the middles of six edges, such
    # as (1, -1, 0), at the distance sqrt(2), where sqrt(3) is the unit.
    axes = 0.1 * math.sqrt(3) * np.array([[1, -1, 0], [1, 1, -2]]) / np.sqrt([[2], [6]])
    corners = planes.region(np.full(3, 0.5), axes, linf(0.1))
    angles = np.radians([0, 60, 120, 180, 240, 300])
    expected = math.sqrt(2 / 3) * np.column_stack([np.cos(angles), np.sin(angles)])
    assert same_polygon(corners, expected)


@pytest.mark.parametrize(
    'norm, image, area',
    [
        # The ball is the square of side 1 around the image, or the circle of radius 1.
        ('linf', [0.5, 0.5], 1),
        ('linf', [0.0, 0.5], 0.5),
        ('linf', [0.0, 1.0], 0.25),
        ('linf', [0.25, 0.5], 0.75),
        ('l2', [0.0, 1.0], math.pi / 4),
    ],
)
def test_the_box_cuts_the_region(norm, image, area):
    # Of both norms the unit is 1; epsilon is 1 in L2, where [0, 1] holds a quarter of the circle.
    threat = ThreatModel(norm, 0.5 if norm == 'linf' else 1.0)
    axes = np.eye(2)
    corners = planes.region(np.array(image), axes, threat)
    x, y = corners.T
    assert np.sum(x * np.roll(y, -1) - y * np.roll(x, -1)) / 2 == pytest.approx(area, rel=1e-3)
    reached = image + corners @ axes
    assert -1e-5 < reached.min() <= reached.max() < 1 + 1e-5


def test_the_corners_of_a_large_region_lie_on_the_ball_and_are_all_there():
    random = np.random.default_rng(0)
    axes = 0.03 * math.sqrt(300) * np.linalg.qr(random.normal(size=(300, 2)))[0].T
    corners = planes.region(np.full(300, 0.5), axes, linf(0.03))
    assert np.linalg.norm(corners, axis=1).max() < 1
    np.testing.assert_allclose(np.abs(corners @ axes).max(axis=1), 0.03, rtol=1e-4)
    # On the way from corner to corner, too, which it would not be were one of them missing.
    between = (corners + np.roll(corners, 1, axis=0)) / 2
    np.testing.assert_allclose(np.abs(between @ axes).max(axis=1), 0.03, rtol=1e-4)


def test_the_region_of_directions_that_are_signs():
    """Attacks by signs move all pixels alike, so that hundreds of bounds are the same four."""
    random = np.random.default_rng(0)
    image = np.full((20, 20, 1), 0.5)
    first, second = (image + 0.1 * random.choice([-1, 1], (20, 20, 1)) for _ in range(2))
    plane = planes.through(image, first.astype(np.float32), second.astype(np.float32), linf(0.1), 0)
    # Where they agree |x' + y'| <= 1 in their shares x', y', and elsewhere |x' - y'| <= 1: a
    # parallelogram, with both examples, a and b, and their mirror images as its corners.
    _, a, b = plane.points
    for corner in (a, b, -a, -b):
        assert np.linalg.norm(plane.corners - corner, axis=1).min() < 1e-3
    x, y = plane.corners.T
    area = np.sum(x * np.roll(y, -1) - y * np.roll(x, -1)) / 2
    assert area == pytest.approx(2 * a[0] * b[1], rel=1e-3)
    assert len(plane.corners) < 9  # and no heap of corners within a float's rounding


@pytest.mark.parametrize(
    'first, second, known, told',
    [
        (GREY, GREY, [], 'neither attack found'),
        (FIRST, GREY, [[1, 0, 0, 0]], 'the second attack found no point worse'),
        (GREY, FIRST, [[1, 0, 0, 0]], 'the first attack found no point worse'),
        (FIRST, FIRST, [[1, 0, 0, 0]], 'both attacks found the same point'),
        (FIRST, moved(-0.1, 0, 0, 0), [[1, 0, 0, 0]], 'lie on one line'),
        (FIRST, moved(0.1, 1e-6, 0, 0), [[1, 0, 0, 0]], 'lie on one line'),
    ],
)
def test_what_spans_no_plane_gets_a_random_direction_and_says_so(first, second, known, told):
    plane = planes.through(GREY, first, second, linf(0.2), seed=3)
    assert told in plane.note
    assert 'random permitted direction' in plane.note
    axes = plane.axes / 0.4  # the unit
    np.testing.assert_allclose(axes @ axes.T, np.eye(2), atol=1e-12)
    np.testing.assert_allclose(axes[: len(known)], np.reshape(known, (-1, 4)), atol=1e-12)
    if not known:
        np.testing.assert_allclose(np.abs(axes[0]), 0.5)  # signs, of length 1
    # The points lie in the plane, and are where they should be.
    for point, exact in zip(plane.points, (GREY, first, second), strict=True):
        np.testing.assert_allclose(GREY.ravel() + point @ plane.axes, exact.ravel(), atol=2e-6)
    again = planes.through(GREY, first, second, linf(0.2), seed=3)
    np.testing.assert_array_equal(again.axes, plane.axes)
    others = [planes.through(GREY, first, second, linf(0.2), seed=seed).axes for seed in range(8)]
    assert any(not np.allclose(other, plane.axes) for other in others)


@pytest.mark.parametrize('image, epsilon', [(np.zeros((1, 1, 1)), 0.1), (GREY, 0.0)])
def test_what_can_have_no_plane_is_refused(image, epsilon):
    with pytest.raises(ValueError, match='expected two pixel values'):
        planes.through(image, image, image, linf(epsilon), seed=0)


def test_random_directions_are_into_the_box():
    """Half of all directions would leave it at once, and no region would be left."""
    image = np.array([0, 1, 0, 1, 0.5, 0.0]).reshape(2, 3, 1)
    plane = planes.through(image, image, image, linf(0.1), seed=0)
    assert len(plane.corners) >= 3
    middle = image.ravel() + 0.9 * plane.corners.mean(axis=0) @ plane.axes
    assert middle.min() >= 0
    assert middle.max() <= 1
    assert 'both axes are random permitted directions' in plane.note


def test_pixels_that_an_attack_would_move_out_of_the_box_are_saturated():
    images = np.full((5, 2, 2, 1), 100, np.uint8)
    # Of epsilon 8/255: 7 and 248 are too near to 0 and 1, and 8 and 247 are not.
    images[0, 0, 0] = 7
    images[1, 0, :] = 8
    images[2] = 248
    images[3, 1, 1] = 247
    assert planes.saturated(images, linf(8 / 255)).tolist() == [1, 0, 4, 0, 0]
    # An L2 move of 16/255 that is the same for all four pixels takes each by 8/255.
    assert planes.saturated(images, ThreatModel('l2', 16 / 255)).tolist() == [1, 0, 4, 0, 0]


def test_the_grid_has_y_upwards_and_the_middles_of_pixels():
    grid = planes.grid(4.0, 2)
    np.testing.assert_allclose(grid, [[[-1, -1], [1, -1]], [[-1, 1], [1, 1]]])


def test_what_leaves_the_box_is_no_image():
    # The first pixel is x, the second 0.9 + y: the box is [0, 1] x [-0.9, 0.1].
    image = np.array([0.0, 0.9]).reshape(2, 1, 1)
    coordinates = np.array(
        [[[0.0, 0.1], [1.0, 0.1], [1.001, 0.1]], [[-5e-7, 0], [-2e-6, 0], [0.5, 0.11]]]
    )
    inside = planes.inside(image, np.eye(2), coordinates)
    np.testing.assert_array_equal(inside, [[True, True, False], [True, False, False]])


def test_samples_are_the_images_at_these_points():
    images = np.stack([GREY, GREY / 2])
    axes = np.stack([np.eye(4)[:2], np.eye(4)[2:]])
    samples = planes.Samples(
        images, axes, np.array([0, 1, 1]), np.array([[0.1, 0.2], [0.1, 0.2], [2, 0]])
    )
    assert len(samples) == 3
    found = samples[np.array([2, 0, 1, 1])]
    assert (found.dtype, found.shape) == (np.float32, (4, 2, 2, 1))
    expected = [
        [0.25, 0.25, 2.25, 0.25],  # outside of the box, too
        [0.6, 0.7, 0.5, 0.5],
        [0.25, 0.25, 0.35, 0.45],
        [0.25, 0.25, 0.35, 0.45],
    ]
    np.testing.assert_allclose(found.reshape(4, 4), expected, rtol=1e-6)


def some_planes():
    return plane_files.Planes(
        names=('SingleAdv, seed 0', 'ε'),
        member=np.zeros(2, np.int32),
        clean=np.array([True, False]),
        attacked=('SingleAdv, seed 0', 'ε'),
        places=np.array([4], np.int32),
        saturated=np.array([2], np.int32),
        labels=np.array([7], np.int32),
        images=np.arange(12, dtype=np.uint8).reshape(1, 2, 2, 3),
        window=np.array(3, np.float32),
        classes=np.arange(18, dtype=np.int16).reshape(1, 2, 3, 3),
        margins=np.linspace(-1, 1, 18, dtype=np.float32).reshape(1, 2, 3, 3),
        inside=np.eye(3, dtype=bool)[None],
        points=np.zeros((1, 3, 2), np.float32),
        point_classes=np.ones((1, 2, 3), np.int16),
        region=np.array([[[0, 1], [1, 0], [np.nan, np.nan]]], np.float32),
        notes=('',),
        record={'epsilon': 0.1, 'runs': [{'step': 3}], 'attack': 'pgd20', 'places': []},
    )


def test_a_file_gives_back_what_was_written(tmp_path):
    path = epath.Path(tmp_path) / 'planes' / 'members.npz'
    plane_files.write(path, some_planes())
    read = plane_files.read(path)
    for name, expected in some_planes()._asdict().items():
        found = getattr(read, name)
        if isinstance(expected, np.ndarray):
            assert found.dtype == expected.dtype
            np.testing.assert_array_equal(found, expected)
        else:
            assert found == expected


@pytest.mark.parametrize(
    'change, told',
    [
        ({'record': np.array('[1]')}, 'record: expected an object'),
        ({'record': np.array('{')}, 'expected a file of --mode=planes'),
        ({'record': None}, 'expected a file of --mode=planes'),
        ({'labels': None}, 'expected an array labels, found names, member'),
        ({'window': np.float32(0)}, 'window: expected a number > 0'),
        ({'record': np.array('{"attack": 3}')}, 'record: attack: expected a text'),
        ({'extent': np.zeros((1, 4), np.float32)}, 'is of an older version, which --mode=planes'),
        ({'labels': np.zeros(2, np.int32)}, 'labels: expected [m], found int32 (2,)'),
        ({'classes': np.zeros((1, 2, 3, 4), np.int16)}, 'classes: expected [m, rows, R, R]'),
        ({'images': np.zeros((1, 2, 2, 3))}, 'images: expected [m, H, W, C], found float64'),
    ],
)
def test_other_files_are_refused_with_one_line(tmp_path, change, told):
    path = epath.Path(tmp_path) / 'x.npz'
    plane_files.write(path, some_planes())
    arrays = files.read_arrays(path) | change
    files.write_arrays(path, {k: array for k, array in arrays.items() if array is not None})
    with pytest.raises(UserError) as caught:
        plane_files.read(path)
    assert told in str(caught.value)
    assert '\n' not in str(caught.value)


def test_missing_and_damaged_files_are_refused(tmp_path):
    path = epath.Path(tmp_path) / 'x.npz'
    with pytest.raises(UserError, match='found no such file'):
        plane_files.read(path)
    path.write_bytes(b'PK\x03\x04 no archive')
    with pytest.raises(UserError, match='expected a file of --mode=planes'):
        plane_files.read(path)


def test_the_l2_ball_meets_a_plane_in_a_circle():
    axes = 0.3 * np.linalg.qr(np.random.default_rng(0).normal(size=(12, 2)))[0].T
    corners = planes.region(np.full(12, 0.5), axes, ThreatModel('l2', 0.3))
    np.testing.assert_allclose(np.linalg.norm(corners, axis=1), 1)
    turns = np.diff(np.unwrap(np.arctan2(corners[:, 1], corners[:, 0])))
    assert np.all((turns > 0) & (turns < 0.04))
