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
    np.testing.assert_allclose(plane.axes, [[1, 0, 0, 0], [0, 0, 1, 0]], atol=1e-12)
    np.testing.assert_allclose(plane.points, [[0, 0], [0.2, 0], [0.3, 0.4]], atol=1e-12)
    # Two pixels move, each by at most 0.5: a square, from its lower left corner on.
    square = [[-0.5, -0.5], [0.5, -0.5], [0.5, 0.5], [-0.5, 0.5]]
    np.testing.assert_allclose(plane.corners, square, atol=1e-9)
    np.testing.assert_allclose(plane.extent, [-0.6, 0.6, -0.6, 0.6], atol=1e-9)
    assert plane.note == ''


def test_the_window_is_a_square_around_all_points():
    points = np.array([[0, 0], [3.0, 0], [1, -1]])
    corners = np.array([[-1.0, 0], [0, 1]])
    # x from -1 to 3, y from -1 to 1: side 4 and twice a tenth of it, around (1, 0).
    extent = planes.window(points, corners)
    np.testing.assert_allclose(extent, [1 - 2.4, 1 + 2.4, -2.4, 2.4])


def test_the_region_of_three_pixels_is_the_cubes_regular_hexagon():
    # The plane across the diagonal of a cube meets it in a hexagon: the middles of six edges, such
    # as (1, -1, 0), at the distance sqrt(2).
    axes = np.array([[1, -1, 0], [1, 1, -2]]) / np.sqrt([[2], [6]])
    corners = planes.region(axes, linf(0.1))
    angles = np.radians([-150, -90, -30, 30, 90, 150]) + math.radians(30)
    # The first corner's angle is the least above -180 degrees.
    expected = 0.1 * math.sqrt(2) * np.column_stack([np.cos(angles), np.sin(angles)])
    assert corners.shape == (6, 2)
    nearest = np.linalg.norm(corners[:, None] - expected[None], axis=2).min(axis=1)
    np.testing.assert_allclose(nearest, 0, atol=1e-9)
    turns = np.cross(
        np.append(corners, np.zeros((6, 1)), axis=1),
        np.append(np.roll(corners, -1, axis=0), np.zeros((6, 1)), axis=1),
    )
    assert (turns[:, 2] > 0).all()


def test_the_corners_of_a_large_region_lie_on_the_ball_and_are_all_there():
    random = np.random.default_rng(0)
    axes = np.linalg.qr(random.normal(size=(300, 2)))[0].T
    corners = planes.region(axes, linf(0.03))
    np.testing.assert_allclose(np.abs(corners @ axes).max(axis=1), 0.03, rtol=1e-6)
    # On the way from corner to corner, too, which it would not be were one of them missing.
    between = (corners + np.roll(corners, 1, axis=0)) / 2
    np.testing.assert_allclose(np.abs(between @ axes).max(axis=1), 0.03, rtol=1e-6)


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
        assert np.linalg.norm(plane.corners - corner, axis=1).min() < 1e-4
    x, y = plane.corners.T
    area = np.sum(x * np.roll(y, -1) - y * np.roll(x, -1)) / 2
    assert area == pytest.approx(2 * a[0] * b[1], rel=1e-4)
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
    assert 'random sign direction' in plane.note
    np.testing.assert_allclose(plane.axes @ plane.axes.T, np.eye(2), atol=1e-12)
    np.testing.assert_allclose(plane.axes[: len(known)], np.reshape(known, (-1, 4)), atol=1e-12)
    if not known:
        np.testing.assert_allclose(np.abs(plane.axes[0]), 0.5)  # signs, of length 1
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


def test_the_grid_has_y_upwards_and_the_middles_of_pixels():
    grid = planes.grid(np.array([-1.0, 1.0, 3.0, 7.0]), 2)
    np.testing.assert_allclose(grid, [[[-0.5, 4], [0.5, 4]], [[-0.5, 6], [0.5, 6]]])


def test_what_leaves_the_box_is_void():
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
        [0.25, 0.25, 1, 0.25],  # clipped
        [0.6, 0.7, 0.5, 0.5],
        [0.25, 0.25, 0.35, 0.45],
        [0.25, 0.25, 0.35, 0.45],
    ]
    np.testing.assert_allclose(found.reshape(4, 4), expected, rtol=1e-6)


def some_planes():
    return plane_files.Planes(
        names=('SingleAdv, seed 0', 'ε'),
        attacked=('SingleAdv, seed 0', 'ε'),
        places=np.array([4], np.int32),
        labels=np.array([7], np.int32),
        images=np.arange(12, dtype=np.uint8).reshape(1, 2, 2, 3),
        extent=np.array([[-1, 1, -1, 1]], np.float32),
        classes=np.arange(-1, 17, dtype=np.int16).reshape(1, 2, 3, 3),
        points=np.zeros((1, 3, 2), np.float32),
        point_classes=np.ones((1, 2, 3), np.int16),
        region=np.array([[[0, 1], [1, 0], [np.nan, np.nan]]], np.float32),
        notes=('',),
        record={'epsilon': 0.1, 'runs': [{'step': 3}], 'num_classes': 10},
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
        ({'labels': None}, 'expected an array labels, found names, attacked'),
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
    axes = np.linalg.qr(np.random.default_rng(0).normal(size=(12, 2)))[0].T
    corners = planes.region(axes, ThreatModel('l2', 0.3))
    np.testing.assert_allclose(np.linalg.norm(corners, axis=1), 0.3)
    turns = np.diff(np.unwrap(np.arctan2(corners[:, 1], corners[:, 0])))
    assert np.all((turns > 0) & (turns < 0.04))
