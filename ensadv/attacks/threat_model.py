"""What an adversary may do to an image: move it by at most epsilon, in a norm, within the box."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from ensadv import prng
from ensadv.attacks import registry


@dataclasses.dataclass(frozen=True)
class ThreatModel:
    """The ball of radius epsilon around each image, cut off at the box [0, 1].

    >>> threat = ThreatModel('linf', 8 / 255)
    >>> print(threat)
    L-infinity, epsilon 0.03137 (8/255)

    Attributes:
      norm: 'linf' or 'l2', of all pixel values of an image.
      epsilon: the radius, >= 0, for pixels in [0, 1]; at most 1 for linf.

    Raises:
      ValueError: for another norm or radius.
    """

    norm: str
    epsilon: float

    def __post_init__(self):
        if self.norm not in registry.NORMS:
            raise ValueError(
                f'norm: expected one of {", ".join(registry.NORMS)}, found {self.norm!r}'
            )
        self.check_length('epsilon', self.epsilon)

    def __str__(self) -> str:
        return registry.threat_model_words(self.norm, self.epsilon)

    @classmethod
    def of(cls, found: Mapping[str, Any]) -> 'ThreatModel':
        """Returns the threat model of a config or of settings in JSON.

        Args:
          found: has 'epsilon', and 'norm' unless that is linf.
        """
        return cls(found.get('norm', 'linf'), found['epsilon'])

    def to_json(self) -> dict[str, Any]:
        """Returns what `of` takes. Results for linf omit the norm, as those of old versions do."""
        return {'epsilon': self.epsilon} | ({} if self.norm == 'linf' else {'norm': self.norm})

    def check_length(self, name: str, value: float) -> None:
        """Raises ValueError unless a value, where it is known, is a length that can be meant."""
        if isinstance(value, jax.core.Tracer) or value is None:
            return
        if not 0 <= float(value) <= registry.longest(self.norm):
            where = '[0, 1], as pixels are (8/255)' if self.norm == 'linf' else '[0, infinity)'
            raise ValueError(f'{name}: expected a number in {where}, found {value}')

    def project(self, x_adv: Array, x: Array) -> Array:
        """Moves points into the ball and the box: for linf to the nearest point of both.

        For l2 a point is moved into the ball and then into the box, which leaves it in the ball.

        Args:
          x_adv: points [B, H, W, C].
          x: the images around which the balls are, [B, H, W, C] in [0, 1].
        """
        if self.norm == 'linf':
            low, high = jnp.maximum(x - self.epsilon, 0), jnp.minimum(x + self.epsilon, 1)
            return jnp.clip(x_adv, low, high)
        move = x_adv - x
        # A point in the ball keeps its bits. The factor keeps rounding from leaving others outside.
        too_long = self.distance(x_adv, x) > self.epsilon
        shorter = move * each(self.epsilon * (1 - 1e-6) / _length(move), x)
        return jnp.clip(jnp.where(each(too_long, x), x + shorter, x_adv), 0, 1)

    def gaussian_start(self, rng: Array, x: Array, sigma: float) -> Array:
        """Returns x + noise, projected (Algorithm 1 of the paper).

        Args:
          rng: keys [B], one per example.
          x: images [B, H, W, C] in [0, 1].
          sigma: for linf the standard deviation of each pixel; for l2 the length of the whole
            move (its root mean square), so sigma / sqrt(H W C) for each pixel.
        """
        shape = x.shape[1:]
        if self.norm == 'l2':
            sigma = sigma / math.sqrt(math.prod(shape))
        normal = jax.vmap(lambda key: jax.random.normal(key, shape, x.dtype))
        return self.project(x + sigma * normal(prng.of_examples(rng)), x)

    def uniform_start(self, rng: Array, x: Array) -> Array:
        """Returns points that are uniform in the ball around x, projected.

        Args:
          rng: keys [B], one per example.
          x: images [B, H, W, C] in [0, 1].
        """
        return self.project(x + self.epsilon * self.uniform_moves(rng, x), x)

    def uniform_moves(self, rng: Array, x: Array) -> Array:
        """Returns moves [B, H, W, C] that are uniform in the ball of radius 1.

        Args:
          rng: keys [B], one per example.
          x: images [B, H, W, C].
        """
        shape, keys = x.shape[1:], prng.of_examples(rng)
        if self.norm == 'linf':
            draw = lambda key: jax.random.uniform(key, shape, x.dtype, minval=-1, maxval=1)
            return jax.vmap(draw)(keys)

        def draw(key):
            of_direction, of_radius = jax.random.split(key)
            direction = jax.random.normal(of_direction, shape, x.dtype)
            radius = jax.random.uniform(of_radius, (), x.dtype) ** (1 / direction.size)
            return radius * direction / jnp.linalg.norm(direction)

        return jax.vmap(draw)(keys)

    def boundary_start(self, rng: Array, x: Array) -> Array:
        """Returns points at distance epsilon from x in random directions, cut off at the box.

        For linf some pixel moves by epsilon, and the others by uniform shares of it.

        Args:
          rng: keys [B], one per example.
          x: images [B, H, W, C] in [0, 1].
        """
        shape = x.shape[1:]

        def draw(key):
            if self.norm == 'l2':
                move = jax.random.normal(key, shape, x.dtype)
                return move / jnp.linalg.norm(move)
            move = jax.random.uniform(key, shape, x.dtype, minval=-1, maxval=1)
            return move / jnp.max(jnp.abs(move))

        moves = jax.vmap(draw)(prng.of_examples(rng))
        return self.project(x + self.epsilon * moves, x)

    def steepest(self, gradient: Array) -> Array:
        """Returns the moves of length 1 along which a loss grows fastest; 0 for a gradient of 0.

        For linf these are the gradient's signs, for l2 the gradient divided by its length.

        Args:
          gradient: [B, H, W, C].
        """
        return jnp.sign(gradient) if self.norm == 'linf' else self.unit(gradient)

    def unit(self, moves: Array) -> Array:
        """Returns moves [B, H, W, C] scaled to length 1; for linf as they are.

        For linf the moves are Adam's, which are about that long.
        """
        if self.norm == 'linf':
            return moves
        # The squares of a confident network's gradients underflow in float32.
        largest = jnp.max(jnp.abs(moves), axis=tuple(range(1, moves.ndim)))
        scaled = moves / each(jnp.where(largest > 0, largest, 1), moves)
        return scaled / each(_length(scaled), moves)

    def dual_length(self, gradient: Array) -> Array:
        """Returns by how much a linear function grows along a move of length 1, at most, float [B].

        Args:
          gradient: the function's, [B, H, W, C].
        """
        flat = gradient.reshape(len(gradient), -1)
        return jnp.linalg.norm(flat, ord=1 if self.norm == 'linf' else 2, axis=1)

    def distance(self, x_adv: Array, x: Array) -> Array:
        """Returns how far points [B, H, W, C] are from x, float [B]."""
        axes = tuple(range(1, x.ndim))
        if self.norm == 'linf':
            return jnp.max(jnp.abs(x_adv - x), axis=axes)
        return jnp.sqrt(jnp.sum(jnp.square(x_adv - x), axis=axes))


def _length(moves: Array) -> Array:
    """Returns the moves' L2 lengths [B]; 1 for a move of 0, by which it can be divided."""
    squares = jnp.sum(jnp.square(moves), axis=tuple(range(1, moves.ndim)))
    return jnp.sqrt(jnp.where(squares > 0, squares, 1))


def each(values: Array, like: Array) -> Array:
    """Returns values [B] with the axes that they need to go with `like`, [B, ...]."""
    return values.reshape(-1, *[1] * (like.ndim - 1))
