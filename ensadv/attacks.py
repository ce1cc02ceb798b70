"""White-box attacks in the L-infinity ball: a start, a step and a projection, composed.

An attack sees a function from images to log-probabilities and nothing of what is behind it. Every
example is attacked by itself: its result depends on its own key, image and label, not on the batch.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from ensadv import losses

LogProbFn = Callable[[Array], Array]  # images [B, H, W, C] in [0, 1] -> log-probs [B, classes]


def ifgsm(step_size: float) -> optax.GradientTransformation:
    """The step of IFGSM (Kurakin et al., 2016): `step_size` pixels along the gradient's sign."""
    return optax.chain(optax.scale_by_sign(), optax.scale(step_size))


def pgd(step_size: float) -> optax.GradientTransformation:
    """The step of the paper's PGD: Adam's update of the gradient with rate `step_size` (pixels).

    Adam's epsilon is far below its usual 1e-8, since a confident network's input gradients are
    not: with 1e-8 the attack would stall where it is needed most.
    """
    return optax.chain(optax.scale_by_adam(eps=1e-16), optax.scale(step_size))


STEPS = {'ifgsm': ifgsm, 'pgd': pgd}


def start(how: str, rng: Array, x: Array, *, epsilon: float, sigma: float) -> Array:
    """Returns where an attack starts, [B, H, W, C], before projection.

    Args:
      how: 'gaussian' (x + N(0, sigma^2), Algorithm 1 of the paper), 'uniform' (uniform in the
        ball) or 'none' (x itself).
      rng: keys [B], one per example.
      x: images [B, H, W, C] in [0, 1].
      epsilon: the ball's radius, in pixels.
      sigma: the Gaussian's standard deviation, in pixels.

    Raises:
      ValueError: for any other `how`.
    """
    shape = x.shape[1:]
    if how == 'gaussian':
        return x + sigma * jax.vmap(lambda key: jax.random.normal(key, shape, x.dtype))(rng)
    if how == 'uniform':
        return x + epsilon * jax.vmap(
            lambda key: jax.random.uniform(key, shape, x.dtype, minval=-1, maxval=1)
        )(rng)
    if how == 'none':
        return x
    raise ValueError(f"start: expected 'gaussian', 'uniform' or 'none', found {how!r}")


def project(x_adv: Array, x: Array, epsilon: float) -> Array:
    """Returns the nearest point of the ball of radius epsilon around x within the box [0, 1]."""
    return jnp.clip(x_adv, jnp.maximum(x - epsilon, 0), jnp.minimum(x + epsilon, 1))


class Outcome(NamedTuple):
    """What an attack with restarts did to each example.

    Attributes:
      x_adv: [B, H, W, C], the iterate with the lowest margin over all steps and restarts,
        the clean image among them.
      margin: [B], the margin there (`losses.margin`; the example stands where it is > 0).
      last_margin: [B], the lowest margin among the restarts' last iterates.
    """

    x_adv: Array
    margin: Array
    last_margin: Array


def _climb(log_prob_fn, x_start, x, y, *, step, num_steps, epsilon, loss, visit, visited):
    """Takes the attack's steps; `visited = visit(visited, x_j, log_probs_j)` sees each iterate
    whose gradient is taken, so all but the last."""

    def objective(x_adv):
        log_probs = log_prob_fn(x_adv)
        return jnp.sum(losses.LOSSES[loss](log_probs, y)), log_probs

    def body(_, carry):
        x_adv, step_state, visited = carry
        gradient, log_probs = jax.grad(objective, has_aux=True)(x_adv)
        visited = visit(visited, x_adv, log_probs)
        update, step_state = step.update(gradient, step_state)
        return project(x_adv + update, x, epsilon), step_state, visited

    x_start = project(x_start, x, epsilon)
    x_adv, _, visited = jax.lax.fori_loop(
        0, num_steps, body, (x_start, step.init(x_start), visited)
    )
    return x_adv, visited


def attack(
    log_prob_fn: LogProbFn,
    rng: Array,
    x: Array,
    y: Array,
    *,
    step: optax.GradientTransformation,
    num_steps: int | Array,
    epsilon: float,
    start_from: str = 'gaussian',
    sigma: float = 0.0,
    loss: str = 'cross_entropy',
) -> Array:
    """Returns the attack's last iterate x_adv, [B, H, W, C]: the inner loop of Algorithm 1.

    Args:
      log_prob_fn: what is attacked: images [B, H, W, C] -> log-probabilities [B, classes].
      rng: keys [B], one per example.
      x: clean images, float32 [B, H, W, C] in [0, 1].
      y: labels, int [B].
      step: turns the gradient of the loss into what is *added* to the image: `ifgsm(...)`,
        `pgd(...)`, or any optax transformation that scales its updates positively.
      num_steps: gradient steps; may be traced, so that one compilation serves all numbers.
      epsilon: radius of the L-infinity ball, in pixels.
      start_from, sigma: see `start`.
      loss: a key of `losses.LOSSES`, climbed.
    """
    x_start = start(start_from, rng, x, epsilon=epsilon, sigma=sigma)
    x_adv, _ = _climb(
        log_prob_fn, x_start, x, y, step=step, num_steps=num_steps, epsilon=epsilon, loss=loss,
        visit=lambda visited, *_: visited, visited=(),
    )  # fmt: skip
    return x_adv


def worst_case(
    log_prob_fn: LogProbFn,
    rng: Array,
    x: Array,
    y: Array,
    *,
    step: optax.GradientTransformation,
    num_steps: int | Array,
    epsilon: float,
    start_from: str = 'gaussian',
    sigma: float = 0.0,
    restarts: int = 1,
    loss: str = 'cross_entropy',
) -> Outcome:
    """Attacks for evaluation: keeps for each example the worst point seen, in one pass.

    More steps or restarts can so never make a network look more robust. The clean image is one of
    the points: it lies in the ball too.

    Args:
      restarts: independent starts, each with the full number of steps.
      log_prob_fn, rng, x, y, step, num_steps, epsilon, start_from, sigma, loss: as in `attack`.
    """

    def keep_worst(worst, x_adv, log_probs):
        worst_x, worst_margin = worst
        margin = losses.margin(log_probs, y)
        lower = margin < worst_margin
        return (
            jnp.where(lower[:, None, None, None], x_adv, worst_x),
            jnp.where(lower, margin, worst_margin),
        )

    def restart(i, carry):
        worst, last_margin = carry
        keys = jax.vmap(lambda key: jax.random.fold_in(key, i))(rng)
        x_start = start(start_from, keys, x, epsilon=epsilon, sigma=sigma)
        x_adv, worst = _climb(
            log_prob_fn, x_start, x, y, step=step, num_steps=num_steps, epsilon=epsilon, loss=loss,
            visit=keep_worst, visited=worst,
        )  # fmt: skip
        log_probs = log_prob_fn(x_adv)
        last_margin = jnp.minimum(last_margin, losses.margin(log_probs, y))
        return keep_worst(worst, x_adv, log_probs), last_margin

    clean_margin = losses.margin(log_prob_fn(x), y)
    no_margin = jnp.full_like(clean_margin, jnp.inf)
    (x_adv, margin), last_margin = jax.lax.fori_loop(
        0, restarts, restart, ((x, clean_margin), no_margin)
    )
    return Outcome(x_adv, margin, last_margin)
