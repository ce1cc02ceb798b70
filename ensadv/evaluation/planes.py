"""Decision planes, the paper's Figure 4: the plane through an image and two adversarial examples.

Pixels are in [0, 1]. A point of the plane is image + x e1 + y e2 with orthonormal e1 and e2, so x
and y are L2 pixel distances. Geometry alone: what a model says of the points is not known here.
"""

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from scipy.spatial import HalfspaceIntersection

from ensadv.attacks.threat_model import ThreatModel

BOX_TOLERANCE = 1e-6  # by which a pixel may leave [0, 1], for rounding
SPAN_TOLERANCE = 1e-3  # of epsilon: points nearer than this, in L2 distance, count as one
CIRCLE_CORNERS = 180
MARGIN = 0.1  # on each side of the window, as a share of what it holds


class Plane(NamedTuple):
    """One plane in the space of images with d pixel values, and the window drawn of it.

    Attributes:
      axes: float64 [2, d], e1 and e2, orthonormal.
      points: float64 [3, 2], of the image and both adversarial examples.
      corners: float64 [V, 2], of the permitted region, counter-clockwise.
      extent: float64 [4], left, right, bottom, top: a square.
      note: see `Planes.notes`.
    """

    axes: np.ndarray
    points: np.ndarray
    corners: np.ndarray
    extent: np.ndarray
    note: str


def through(
    image: np.ndarray, first: np.ndarray, second: np.ndarray, threat: ThreatModel, seed: int
) -> Plane:
    """Returns the plane through an image and its two adversarial examples.

    e1 points to the first one, and e2 (by Gram and Schmidt) to that side of it where the second
    one is. Where they span no plane, random sign directions take the missing places, so that the
    three points always lie in the plane.

    Args:
      image: float [H, W, C], at least two pixel values.
      first: float [H, W, C], the first model's adversarial example.
      second: float [H, W, C], the second model's.
      threat: the threat model, with epsilon > 0.
      seed: of the random directions.

    Raises:
      ValueError: if the image is too small to have a plane, or epsilon is not > 0.
    """
    image = np.asarray(image, np.float64).ravel()
    epsilon = threat.epsilon
    if len(image) < 2 or not epsilon > 0:
        raise ValueError(
            f'plane: expected two pixel values or more and epsilon > 0, found {len(image)} and '
            f'{epsilon}'
        )
    moves = [np.asarray(point, np.float64).ravel() - image for point in (first, second)]
    tolerance = SPAN_TOLERANCE * epsilon
    axes = []
    for direction in itertools.chain(moves, _random_signs(len(image), epsilon, seed)):
        for axis in axes:
            direction = direction - (direction @ axis) * axis
        length = np.linalg.norm(direction)
        if length > tolerance:
            axes.append(direction / length)
        if len(axes) == 2:
            break
    axes = np.stack(axes)
    points = np.stack([np.zeros(2), *(axes @ move for move in moves)])
    corners = region(axes, threat)
    return Plane(axes, points, corners, window(points, corners), _note(moves, tolerance))


def _random_signs(size: int, epsilon: float, seed: int) -> Iterator[np.ndarray]:
    # Of NumPy's generators this one is promised to stay the same in later versions.
    random = np.random.RandomState(seed)
    while True:
        yield epsilon * (2.0 * random.randint(0, 2, size) - 1)


def _note(moves: list[np.ndarray], tolerance: float) -> str:
    """Says why two moves span no plane; '' where they do."""
    first, second = moves
    moved = [np.linalg.norm(move) > tolerance for move in moves]
    stayed = 'attack found no point worse than the image itself'
    random = 'the vertical axis is a random sign direction'
    if not any(moved):
        return f'neither {stayed}: both axes are random sign directions'
    if not all(moved):
        return f'the {"second" if moved[0] else "first"} {stayed}: {random}'
    axis = first / np.linalg.norm(first)
    if np.linalg.norm(second - (second @ axis) * axis) > tolerance:
        return ''
    if np.linalg.norm(first - second) <= tolerance:
        return f'both attacks found the same point: {random}'
    return f'the image and both adversarial examples lie on one line: {random}'


def region(axes: np.ndarray, threat: ThreatModel) -> np.ndarray:
    """Returns where a plane meets the ball around its origin: of l2 a circle, up to its corners.

    Args:
      axes: float [2, d], orthonormal.
      threat: the threat model.

    Returns:
      float64 [V, 2], the polygon's corners, counter-clockwise.
    """
    if threat.norm == 'l2':
        angles = np.linspace(0, 2 * np.pi, CIRCLE_CORNERS, endpoint=False)
        return threat.epsilon * np.stack([np.cos(angles), np.sin(angles)], axis=1)
    # |x e1_i + y e2_i| <= 1 for every pixel value i; the polygon grows with epsilon.
    normals = axes.T[np.linalg.norm(axes, axis=0) > 1e-12]
    # Many pixels share a bound, up to rounding, where directions consist of signs.
    normals = np.unique(np.round(np.concatenate([normals, -normals]), 12), axis=0)
    bounds = np.column_stack([normals, -np.ones(len(normals))])
    corners = HalfspaceIntersection(bounds, np.zeros(2)).intersections
    corners = corners[np.argsort(np.arctan2(corners[:, 1], corners[:, 0]))]
    # Where three bounds meet, up to rounding, the corner is there twice.
    gaps = np.linalg.norm(corners - np.roll(corners, 1, axis=0), axis=1)
    return threat.epsilon * corners[gaps > 1e-5 * np.abs(corners).max()]


def window(points: np.ndarray, corners: np.ndarray) -> np.ndarray:
    """Returns the square (left, right, bottom, top) that holds points [n, 2], corners [V, 2]."""
    held = np.concatenate([points, corners])
    low, high = held.min(axis=0), held.max(axis=0)
    middle, half = (low + high) / 2, (0.5 + MARGIN) * np.max(high - low)
    return np.array([middle[0] - half, middle[0] + half, middle[1] - half, middle[1] + half])


def grid(extent: np.ndarray, resolution: int) -> np.ndarray:
    """Returns the middles of a window's pixels, float64 [R, R, 2]: (x, y) at [j, i].

    x grows with i and y with j.
    """
    left, right, bottom, top = np.asarray(extent, np.float64)
    middles = (np.arange(resolution) + 0.5) / resolution
    x, y = left + (right - left) * middles, bottom + (top - bottom) * middles
    return np.stack(np.meshgrid(x, y), axis=-1)


def inside(image: np.ndarray, axes: np.ndarray, coordinates: np.ndarray) -> np.ndarray:
    """Returns which points are images: every pixel in [0, 1], up to BOX_TOLERANCE.

    Args:
      image: float [H, W, C].
      axes: float64 [2, d].
      coordinates: float64 [R, R, 2], as `grid` gives them.

    Returns:
      bool [R, R].
    """
    image = np.asarray(image, np.float64).ravel()
    # Row by row: all images at once would take gigabytes.
    rows = (image + row @ axes for row in coordinates)
    low, high = -BOX_TOLERANCE, 1 + BOX_TOLERANCE
    return np.stack([(row.min(axis=1) >= low) & (row.max(axis=1) <= high) for row in rows])


class Samples:
    """Points of several planes as images, float32 [n, H, W, C], made as they are asked for."""

    def __init__(
        self, images: np.ndarray, axes: np.ndarray, which: np.ndarray, coordinates: np.ndarray
    ):
        """Makes no image yet.

        Args:
          images: float [m, H, W, C], the planes' origins.
          axes: float64 [m, 2, d].
          which: int [n], each point's plane.
          coordinates: float64 [n, 2], each point's (x, y).
        """
        self._images, self._axes = images, axes
        self._which, self._coordinates = which, coordinates

    def __len__(self) -> int:
        return len(self._which)

    def __getitem__(self, places: np.ndarray) -> np.ndarray:
        """Returns the points at places int [B], clipped to [0, 1]: float32 [B, H, W, C]."""
        which = self._which[places]
        images = self._images[which]
        moves = np.einsum('bk,bkd->bd', self._coordinates[places], self._axes[which])
        return np.clip(images + moves.reshape(images.shape), 0, 1).astype(np.float32)
