"""Decision planes, of the paper's Figures 3 and 4: through an image and two adversarial examples.

Pixels are in [0, 1]. A point of the plane is image + x e1 + y e2, where e1 and e2 are orthogonal
and of the length `unit`, so x and y are in units of epsilon. Nothing that an attack may do is
farther than 1 from the image. Geometry alone: what a model says of the points is not known here.
"""

import itertools
import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from ensadv.attacks.threat_model import ThreatModel

BOX_TOLERANCE = 1e-6  # by which a pixel may leave [0, 1], for rounding
SPAN_TOLERANCE = 1e-3  # of epsilon: points nearer than this, in L2 distance, count as one
REGION_TOLERANCE = 1e-5  # of epsilon, by which the region's corners may lie outside
CIRCLE_CORNERS = 180


class Plane(NamedTuple):
    """One plane in the space of images with d pixel values.

    Attributes:
      axes: float64 [2, d], e1 and e2, orthogonal, both of the length `unit`.
      points: float64 [3, 2], of the image and both adversarial examples.
      corners: float64 [V, 2], of the permitted region, counter-clockwise.
      note: see `Planes.notes`.
    """

    axes: np.ndarray
    points: np.ndarray
    corners: np.ndarray
    note: str


def unit(threat: ThreatModel, size: int) -> float:
    """Returns the longest move that is permitted, in L2: for linf of all pixel values by epsilon.

    Args:
      threat: the threat model.
      size: d, the number of pixel values.
    """
    return threat.epsilon * (math.sqrt(size) if threat.norm == 'linf' else 1.0)


def through(
    image: np.ndarray, first: np.ndarray, second: np.ndarray, threat: ThreatModel, seed: int
) -> Plane:
    """Returns the plane through an image and its two adversarial examples.

    e1 points to the first one, and e2 (by Gram and Schmidt) to that side of it where the second
    one is. Where they span no plane, random permitted images take the missing places, so that the
    three points always lie in the plane.

    Args:
      image: float [H, W, C] in [0, 1], at least two pixel values.
      first: float [H, W, C], the first model's adversarial example.
      second: float [H, W, C], the second model's.
      threat: the threat model, with epsilon > 0.
      seed: of the random images.

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
    for direction in itertools.chain(moves, _random_moves(image, epsilon, seed)):
        for axis in axes:
            direction = direction - (direction @ axis) * axis
        length = np.linalg.norm(direction)
        if length > tolerance:
            axes.append(direction / length)
        if len(axes) == 2:
            break
    axes, scale = np.stack(axes), unit(threat, len(image))
    points = np.stack([np.zeros(2), *(axes @ move for move in moves)]) / scale
    axes *= scale
    return Plane(axes, points, region(image, axes, threat), _note(moves, tolerance))


def _random_moves(image: np.ndarray, epsilon: float, seed: int) -> Iterator[np.ndarray]:
    """Yields moves of all pixel values up or down by epsilon, as far as they stay in [0, 1]."""
    # Of NumPy's generators this one is promised to stay the same in later versions.
    random = np.random.RandomState(seed)
    while True:
        signs = 2.0 * random.randint(0, 2, len(image)) - 1
        yield np.clip(image + epsilon * signs, 0, 1) - image


def _note(moves: list[np.ndarray], tolerance: float) -> str:
    """Says why two moves span no plane; '' where they do."""
    first, second = moves
    moved = [np.linalg.norm(move) > tolerance for move in moves]
    stayed = 'attack found no point worse than the image itself'
    random = 'the vertical axis is a random permitted direction'
    if not any(moved):
        return f'neither {stayed}: both axes are random permitted directions'
    if not all(moved):
        return f'the {"second" if moved[0] else "first"} {stayed}: {random}'
    axis = first / np.linalg.norm(first)
    if np.linalg.norm(second - (second @ axis) * axis) > tolerance:
        return ''
    if np.linalg.norm(first - second) <= tolerance:
        return f'both attacks found the same point: {random}'
    return f'the image and both adversarial examples lie on one line: {random}'


def region(image: np.ndarray, axes: np.ndarray, threat: ThreatModel) -> np.ndarray:
    """Returns where a plane meets what an attack may do: the ball around its image, and [0, 1].

    Args:
      image: float [d], in [0, 1].
      axes: float64 [2, d], as `Plane.axes`.
      threat: the threat model.

    Returns:
      float64 [V, 2], the corners of the convex polygon, counter-clockwise; in place of a circle its
      corners.
    """
    image = np.asarray(image, np.float64).ravel()
    if threat.norm == 'l2':
        angles = np.linspace(0, 2 * np.pi, CIRCLE_CORNERS, endpoint=False)
        corners, reach = np.stack([np.cos(angles), np.sin(angles)], axis=1), np.inf
    else:
        corners, reach = np.array([[-1.0, -1], [1, -1], [1, 1], [-1, 1]]), threat.epsilon
    normals = np.concatenate([axes.T, -axes.T])
    bounds = np.concatenate([np.minimum(1 - image, reach), np.minimum(image, reach)])
    # Many pixels share a bound, up to rounding, where directions consist of signs.
    tolerance = REGION_TOLERANCE * threat.epsilon
    while len(corners):
        over = corners @ normals.T - bounds
        worst = np.argmax(over.max(axis=0))
        if over[:, worst].max() <= tolerance:
            break
        corners = _cut(corners, over[:, worst])
    return corners


def _cut(corners: np.ndarray, over: np.ndarray) -> np.ndarray:
    """Returns the part of a convex polygon [V, 2] where a linear function, `over` [V], is <= 0."""
    following, after = np.roll(corners, -1, axis=0), np.roll(over, -1)
    crosses = (over < 0) != (after < 0)
    share = over / np.where(crosses, over - after, 1)
    crossings = corners + share[:, None] * (following - corners)
    pairs = np.stack([corners, crossings], axis=1)
    return pairs[np.stack([over < 0, crosses], axis=1)]


def saturated(images: np.ndarray, threat: ThreatModel) -> np.ndarray:
    """Returns how many pixel values of each image are saturated, int32 [n].

    One is where the longest move, if it is the same for all pixel values, takes it out of [0, 1]:
    nearer than epsilon to 0 or 1 for linf.

    Args:
      images: uint8 [n, H, W, C].
      threat: the threat model.
    """
    size = images[0].size
    reach = 255 * unit(threat, size) / math.sqrt(size) - 1e-3  # for rounding
    # Image by image: all at once would take gigabytes.
    numbers = [np.count_nonzero((image < reach) | (image > 255 - reach)) for image in images]
    return np.array(numbers, np.int32)


def grid(window: float, resolution: int) -> np.ndarray:
    """Returns the middles of the pixels of a square around the image, float64 [R, R, 2].

    At [j, i] is (x, y): x grows with i and y with j.

    Args:
      window: the square's side.
      resolution: R.
    """
    middles = window * ((np.arange(resolution) + 0.5) / resolution - 0.5)
    return np.stack(np.meshgrid(middles, middles), axis=-1)


def inside(image: np.ndarray, axes: np.ndarray, coordinates: np.ndarray) -> np.ndarray:
    """Returns which points are images: every pixel in [0, 1], up to BOX_TOLERANCE.

    Args:
      image: float [H, W, C].
      axes: float64 [2, d], as `Plane.axes`.
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
        """Returns the points at places int [B], float32 [B, H, W, C], also outside of [0, 1]."""
        which = self._which[places]
        images = self._images[which]
        moves = np.einsum('bk,bkd->bd', self._coordinates[places], self._axes[which])
        return (images + moves.reshape(images.shape)).astype(np.float32)
