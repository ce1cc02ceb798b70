"""White-box attacks in the L-infinity ball: a start, a step and a projection, composed.

An attack sees a function from images to logits or log-probabilities and nothing of what is behind
it. Every example is attacked by itself: its result depends on its own key, image and label, not on
the batch.

`attack` and `worst_case` are whole attacks, and check what they are given as far as it is known
when they are called: inside `jit` that is types, shapes and plain numbers, but no array's values.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.core import Tracer

from ensadv import losses, prng
from ensadv.config import starts_differ

# What is attacked: images [B, H, W, C] in [0, 1] -> logits or log-probabilities [B, classes]; or
# whatever else the given functions of `loss` and `judge` take.
Predict = Callable[[Array], Any]
# What is climbed: a key of losses.LOSSES, or a function (outputs, labels) -> [B], which is given
# the outputs as they are.
Loss = str | Callable[[Any, Array], Array]
StepSize = float | optax.Schedule

NEVER = -1  # in place of a number of steps: the example stood to the end
LEAST_GRADIENT = 1e-30  # below it the squares underflow in `pgd`, and the attack hardly moves


def ifgsm(step_size: StepSize) -> optax.GradientTransformation:
    """The step of IFGSM (Kurakin et al., 2016): `step_size` pixels along the gradient's sign."""
    _check_pixels('step_size', step_size)
    return optax.chain(
        optax.scale_by_sign(), optax.scale_by_learning_rate(step_size, flip_sign=False)
    )


def pgd(step_size: StepSize) -> optax.GradientTransformation:
    """The step of the paper's PGD: Adam's update of the gradient with rate `step_size` (pixels).

    Adam's epsilon is far below its usual 1e-8, since a confident network's input gradients are
    not: with 1e-8 the attack would stall where it is needed most. Nor would the squares of such
    gradients be float32 numbers, so they are scaled first, which Adam's update does not show.
    """
    _check_pixels('step_size', step_size)
    return optax.chain(
        optax.scale(2.0**40),
        optax.scale_by_adam(eps=1e-16),
        optax.scale_by_learning_rate(step_size, flip_sign=False),
    )


STEPS = {'ifgsm': ifgsm, 'pgd': pgd}


def schedule(how: str, step_size: float, num_steps: int | Array) -> StepSize:
    """Returns the step size over an attack's steps 0 .. num_steps - 1.

    Args:
      how: 'constant', or 'linear' or 'cosine': from `step_size` down to 0 at `num_steps`.
      step_size: the first step's, in pixels.
      num_steps: of the whole attack; may be traced.

    Raises:
      ValueError: for any other `how`.
    """
    if how == 'constant':
        return step_size
    if how == 'linear':
        return lambda step: step_size * (1 - step / num_steps)
    if how == 'cosine':
        return lambda step: step_size * (1 + jnp.cos(math.pi * step / num_steps)) / 2
    raise ValueError(f"schedule: expected 'constant', 'linear' or 'cosine', found {how!r}")


def start(how: str, rng: Array, x: Array, *, epsilon: float, sigma: float | None) -> Array:
    """Returns where an attack starts, [B, H, W, C], before projection.

    Args:
      how: 'gaussian' (x + N(0, sigma^2), Algorithm 1 of the paper), 'uniform' (uniform in the
        ball) or 'none' (x itself).
      rng: keys [B], one per example.
      x: images [B, H, W, C] in [0, 1].
      epsilon: the ball's radius, in pixels.
      sigma: the Gaussian's standard deviation, in pixels; of no other start.

    Raises:
      ValueError: for any other `how`, and for 'gaussian' without `sigma`.
    """
    shape, rng = x.shape[1:], prng.of_examples(rng)
    if how == 'gaussian' and sigma is None:
        raise ValueError("sigma: needed for start_from='gaussian', in pixels, as epsilon / 2")
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


def _gradient(predict: Predict, x_adv: Array, y: Array, loss: Loss):
    """Returns the loss's gradient at each image [B, H, W, C], and the outputs there."""
    loss_fn = losses.LOSSES_OF_LOGITS[loss] if isinstance(loss, str) else loss

    def objective(x_adv):
        outputs = predict(x_adv)
        return jnp.sum(loss_fn(outputs, y)), outputs

    return jax.grad(objective, has_aux=True)(x_adv)


def _range(values: Array) -> tuple[float, float] | None:
    """Returns the least and the largest value of an array; None where they are not known yet."""
    if isinstance(values, Tracer) or not values.size:
        return None
    with jax.ensure_compile_time_eval():  # though others be traced
        return jnp.min(values).item(), jnp.max(values).item()


def _check_pixels(name: str, value: Any) -> None:
    """Requires a number of pixels of [0, 1]; what is traced, or a schedule, is not known yet."""
    if value is None or callable(value) or isinstance(value, Tracer):
        return
    if not 0 <= float(value) <= 1:
        raise ValueError(
            f'{name}: expected a number in [0, 1], as pixels are (8/255), found {value}'
        )


def _check(
    predict: Predict,
    rng: Array,
    x: Array,
    y: Array,
    *,
    epsilon: float,
    start_from: str,
    sigma: float | None,
    restarts: int | Array = 1,
    loss: Loss,
) -> None:
    """Raises ValueError for arguments that cannot be meant, as far as they are known."""
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(
            f'x: expected floats in [0, 1], found {x.dtype}; of pixels 0..255 take x / 255'
        )
    if not jnp.issubdtype(y.dtype, jnp.integer) or y.shape != x.shape[:1]:
        raise ValueError(
            f'y: expected integer labels of shape {x.shape[:1]}, found {y.dtype} {y.shape}'
        )
    typed = jnp.issubdtype(rng.dtype, jax.dtypes.prng_key)
    if (rng.shape if typed else rng.shape[:-1]) != x.shape[:1]:
        raise ValueError(
            f'rng: expected a key for each of {len(x)} examples, as jax.random.split(key, '
            f'{len(x)}) gives, found shape {rng.shape}'
        )
    _check_pixels('epsilon', epsilon)
    _check_pixels('sigma', sigma)
    if isinstance(restarts, (int, np.integer)):
        if restarts < 1:
            raise ValueError(f'restarts: expected at least 1, found {restarts}')
        if restarts > 1 and not starts_differ(start_from, sigma):
            raise ValueError(
                f'restarts: {restarts} equal ones with start_from={start_from!r}, sigma={sigma}; '
                "expected 1, or start_from='uniform', or 'gaussian' with sigma > 0"
            )
    # A NaN is in no range.
    if (found := _range(x)) and not (found[0] >= 0 and found[1] <= 1):
        raise ValueError(
            f'x: expected pixels in [0, 1], found {found[0]:g} to {found[1]:g}; of pixels 0..255 '
            'take x / 255, and standardise them in predict'
        )
    if isinstance(loss, str):
        _check_outputs(predict, x, y, loss)


def _check_outputs(predict: Predict, x: Array, y: Array, loss: str) -> None:
    """Raises ValueError unless `predict` gives what the named losses take, with these labels."""
    if loss not in losses.LOSSES:
        raise ValueError(f'loss: expected one of {", ".join(losses.LOSSES)}, found {loss!r}')
    if isinstance(x, Tracer):
        return
    outputs = jax.eval_shape(predict, x)
    if getattr(outputs, 'shape', ())[:-1] != x.shape[:1]:
        raise ValueError(
            f'predict: expected logits or log-probabilities [{len(x)}, classes] for loss={loss!r}, '
            f'found {outputs}'
        )
    classes = outputs.shape[-1]
    if (found := _range(y)) and (found[0] < 0 or found[1] >= classes):
        raise ValueError(f'y: expected labels in 0..{classes - 1}, found {found[0]} to {found[1]}')


def attack(
    predict: Predict,
    rng: Array,
    x: Array,
    y: Array,
    *,
    step: optax.GradientTransformation,
    num_steps: int | Array,
    epsilon: float,
    start_from: str = 'gaussian',
    sigma: float | None = None,
    loss: Loss = 'cross_entropy',
) -> Array:
    """Returns the attack's last iterate x_adv, [B, H, W, C]: the inner loop of Algorithm 1.

    Args:
      predict: what is attacked: images [B, H, W, C] -> logits or log-probabilities [B, classes],
        which come to the same; not probabilities. With a function as `loss`, whatever that takes.
      rng: keys [B], one per example.
      x: clean images, float32 [B, H, W, C] in [0, 1].
      y: labels, int [B].
      step: turns the gradient of the loss into what is *added* to the image: `ifgsm(...)`,
        `pgd(...)`, or any optax transformation that scales its updates positively.
      num_steps: gradient steps; may be traced, so that one compilation serves all numbers.
      epsilon: radius of the L-infinity ball, in pixels.
      start_from, sigma: see `start`; 'gaussian' needs a sigma.
      loss: a key of `losses.LOSSES`, climbed; or a function (outputs, labels) -> [B], which is
        given the outputs as they are.

    Raises:
      ValueError: for arguments that cannot be meant, as far as they are known, see above.
    """
    x, y = jnp.asarray(x), jnp.asarray(y)
    _check(predict, rng, x, y, epsilon=epsilon, start_from=start_from, sigma=sigma, loss=loss)
    x_start = project(start(start_from, rng, x, epsilon=epsilon, sigma=sigma), x, epsilon)

    def body(_, carry):
        x_adv, step_state = carry
        gradient, _ = _gradient(predict, x_adv, y, loss)
        update, step_state = step.update(gradient, step_state)
        return project(x_adv + update, x, epsilon), step_state

    return jax.lax.fori_loop(0, num_steps, body, (x_start, step.init(x_start)))[0]


class Progress(NamedTuple):
    """An evaluation's attack between two of its steps; every leaf is [B, ...].

    Attributes:
      x_adv: [B, H, W, C], the current iterate.
      step_state: each example's own state of the optax transformation.
      steps: int32 [B], gradient steps taken so far, over all restarts.
      margin: float32 [B], the lowest margin so far, the clean image's among them.
      last_margin: float32 [B], the current iterate's; valid after `advance`.
      fooled_at: int32 [B], `steps` when the margin first was <= 0; NEVER where it has not been.
      has_gradient: bool [B], whether any step so far had a gradient that is finite and not zero
        (at least LEAST_GRADIENT in some pixel).
      x_worst: [B, H, W, C], where the margin was lowest; None where only verdicts are wanted.
    """

    x_adv: Array
    step_state: Any
    steps: Array
    margin: Array
    last_margin: Array
    fooled_at: Array
    has_gradient: Array
    x_worst: Array | None


def _record(progress: Progress, x: Array, margin: Array) -> Progress:
    """Takes a point and its margin into account."""
    margin = margin.astype(jnp.float32)
    lower = margin < progress.margin
    x_worst = progress.x_worst
    if x_worst is not None:
        x_worst = jnp.where(lower.reshape(-1, *[1] * (x.ndim - 1)), x, x_worst)
    newly = (margin <= 0) & (progress.fooled_at == NEVER)
    return progress._replace(
        margin=jnp.where(lower, margin, progress.margin),
        last_margin=margin,
        fooled_at=jnp.where(newly, progress.steps, progress.fooled_at),
        x_worst=x_worst,
    )


def begin(
    predict: Predict,
    x: Array,
    y: Array,
    *,
    step: optax.GradientTransformation,
    start_from: str,
    judge: Callable[[Any, Array], Array] = losses.margin,
    keep_worst: bool = False,
) -> Progress:
    """Returns the attack before its first start, with the clean image taken into account.

    But where that is the first iterate (`start_from` is 'none'), that is left to `advance`.
    """
    no_margin = jnp.full(len(x), jnp.inf, jnp.float32)
    progress = Progress(
        x_adv=x,
        step_state=jax.vmap(step.init)(x),
        steps=jnp.zeros(len(x), jnp.int32),
        margin=no_margin,
        last_margin=no_margin,
        fooled_at=jnp.full(len(x), NEVER, jnp.int32),
        has_gradient=jnp.zeros(len(x), bool),
        x_worst=x if keep_worst else None,
    )
    return progress if start_from == 'none' else _record(progress, x, judge(predict(x), y))


def restart(
    progress: Progress,
    rng: Array,
    x: Array,
    number: int | Array,
    *,
    step: optax.GradientTransformation,
    epsilon: float,
    start_from: str,
    sigma: float | None,
) -> Progress:
    """Returns the attack at the start with this number, counted from 0, for keys rng [B]."""
    keys = jax.vmap(lambda key: jax.random.fold_in(key, number))(prng.of_examples(rng))
    x_start = project(start(start_from, keys, x, epsilon=epsilon, sigma=sigma), x, epsilon)
    return progress._replace(x_adv=x_start, step_state=jax.vmap(step.init)(x_start))


def advance(
    predict: Predict,
    progress: Progress,
    x: Array,
    y: Array,
    *,
    step: optax.GradientTransformation,
    num_steps: int | Array,
    epsilon: float,
    loss: Loss,
    judge: Callable[[Any, Array], Array] = losses.margin,
) -> Progress:
    """Takes so many steps more; every iterate counts, the first and the last too.

    A gradient that is not finite moves its example nowhere: the iterate stays an image.
    """

    def body(_, progress):
        gradient, outputs = _gradient(predict, progress.x_adv, y, loss)
        progress = _record(progress, progress.x_adv, judge(outputs, y))
        axes = tuple(range(1, gradient.ndim))
        finite = jnp.all(jnp.isfinite(gradient), axis=axes, keepdims=True)
        gradient = jnp.where(finite, gradient, 0)
        update, step_state = jax.vmap(lambda g, state: step.update(g, state))(
            gradient, progress.step_state
        )
        return progress._replace(
            x_adv=project(progress.x_adv + update, x, epsilon),
            step_state=step_state,
            steps=progress.steps + 1,
            has_gradient=progress.has_gradient
            | jnp.any(jnp.abs(gradient) >= LEAST_GRADIENT, axis=axes),
        )

    progress = jax.lax.fori_loop(0, num_steps, body, progress)
    return _record(progress, progress.x_adv, judge(predict(progress.x_adv), y))


class Outcome(NamedTuple):
    """What an attack with restarts did to each example.

    Attributes:
      margin: float32 [B], the lowest margin over all steps and restarts, the clean image among
        them (`losses.margin`; the example stands where it is > 0).
      last_margin: float32 [B], the lowest margin among the restarts' last iterates.
      has_gradient: bool [B], whether any step had a gradient that is finite and not zero. Where an
        example stands without, it was not attacked.
      x_adv: [B, H, W, C], where the margin was lowest; None unless asked for.
    """

    margin: Array
    last_margin: Array
    has_gradient: Array
    x_adv: Array | None


def worst_case(
    predict: Predict,
    rng: Array,
    x: Array,
    y: Array,
    *,
    step: optax.GradientTransformation,
    num_steps: int | Array,
    epsilon: float,
    start_from: str = 'gaussian',
    sigma: float | None = None,
    restarts: int | Array = 1,
    loss: Loss = 'cross_entropy',
    judge: Callable[[Any, Array], Array] = losses.margin,
    keep_worst: bool = True,
) -> Outcome:
    """Attacks for evaluation: keeps for each example the worst point seen, in one pass.

    More steps or restarts can so never make a network look more robust. The clean image is one of
    the points: it lies in the ball too.

    Args:
      predict: as in `attack`; with functions as `loss` and `judge`, whatever those take.
      restarts: independent starts, each with the full number of steps; 1 where all would be equal.
      judge: (outputs, labels) -> margin [B].
      keep_worst: whether to return the worst points, too.
      rng, x, y, step, num_steps, epsilon, start_from, sigma, loss: as in `attack`.

    Raises:
      ValueError: as `attack` does, and for restarts that would all be equal.
    """
    x, y = jnp.asarray(x), jnp.asarray(y)
    _check(
        predict, rng, x, y, epsilon=epsilon, start_from=start_from, sigma=sigma,
        restarts=restarts, loss=loss,
    )  # fmt: skip

    def one_restart(i, carry):
        progress, last_margin = carry
        progress = restart(
            progress, rng, x, i, step=step, epsilon=epsilon, start_from=start_from, sigma=sigma
        )
        progress = advance(
            predict, progress, x, y, step=step, num_steps=num_steps, epsilon=epsilon, loss=loss,
            judge=judge,
        )  # fmt: skip
        return progress, jnp.minimum(last_margin, progress.last_margin)

    progress = begin(
        predict, x, y, step=step, start_from=start_from, judge=judge, keep_worst=keep_worst
    )
    no_margin = jnp.full_like(progress.margin, jnp.inf)
    progress, last_margin = jax.lax.fori_loop(0, restarts, one_restart, (progress, no_margin))
    return Outcome(progress.margin, last_margin, progress.has_gradient, progress.x_worst)
