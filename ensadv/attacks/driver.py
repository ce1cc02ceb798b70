"""What runs any attack: the points that count, restarts, and the last iterate for training.

Every example is attacked by itself: its result depends on its own key, image and label, not on the
batch. `last_iterate` and `worst_case` are whole attacks, and check what they are given as far as it
is known when they are called: inside `jit` that is types, shapes and plain numbers, but no array's
values.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.core import Tracer

from ensadv import losses, prng
from ensadv.attacks.attack import Attack, Predict
from ensadv.attacks.threat_model import ThreatModel, each

NEVER = -1  # in place of a number of steps: the example stood to the end

Judge = Callable[[Any, Array], Array]  # (outputs, labels) -> margin [B]


def last_iterate(
    attack: Attack, predict: Predict, threat: ThreatModel, rng: Array, x: Array, y: Array
) -> Array:
    """Returns where one restart of an attack ends, [B, H, W, C]: Algorithm 1's inner loop.

    Args:
      attack: the attack.
      predict: what is attacked: images [B, H, W, C] -> logits or log-probabilities [B, classes],
        which come to the same; not probabilities. For an attack whose loss is a function, whatever
        that takes.
      threat: the threat model.
      rng: keys [B], one per example.
      x: clean images, float32 [B, H, W, C] in [0, 1].
      y: labels, int [B]; for an attack whose loss is a function, any target that it takes.

    Raises:
      ValueError: for arguments that cannot be meant, as far as they are known.
    """
    x, y = jnp.asarray(x), jnp.asarray(y)
    _check(attack, predict, rng, x, y)
    body = lambda _, state: attack.step(predict, threat, state, x, y)[0]
    state = attack.init(predict, threat, prng.of_examples(rng), x, y)
    return jax.lax.fori_loop(0, attack.steps, body, state).x


class Progress(NamedTuple):
    """An attack between two of its steps, and what came of it so far; every leaf is [B, ...].

    Attributes:
      state: the attack's.
      steps: int32 [B], steps taken so far, over all restarts.
      margin: float32 [B], the lowest margin so far, the clean image's among them.
      last_margin: float32 [B], the current point's; valid after `advance`.
      fooled_at: int32 [B], `steps` when the margin first was <= 0; NEVER where it has not been.
      informed: bool [B], whether any step so far was, see `attack.Query`.
      x_worst: [B, H, W, C], where the margin was lowest.
    """

    state: Any
    steps: Array
    margin: Array
    last_margin: Array
    fooled_at: Array
    informed: Array
    x_worst: Array


def _record(progress: Progress, x: Array, margin: Array) -> Progress:
    """Takes a point and its margin into account."""
    margin = margin.astype(jnp.float32)
    lower = margin < progress.margin
    newly = (margin <= 0) & (progress.fooled_at == NEVER)
    return progress._replace(
        margin=jnp.where(lower, margin, progress.margin),
        last_margin=margin,
        fooled_at=jnp.where(newly, progress.steps, progress.fooled_at),
        x_worst=jnp.where(each(lower, x), x, progress.x_worst),
    )


def begin(
    attack: Attack,
    predict: Predict,
    threat: ThreatModel,
    rng: Array,
    x: Array,
    y: Array,
    *,
    judge: Judge = losses.margin,
    number: int | Array = 0,
) -> Progress:
    """Returns an attack at its first start, with the clean image taken into account.

    But where that is the first point that is judged (the setting `start` is 'none'), that is left
    to `advance`.

    Args:
      attack, predict, threat, rng, x, y, judge: as in `worst_case`.
      number: of the start, as in `restart`.
    """
    no_margin = jnp.full(len(x), jnp.inf, jnp.float32)
    progress = Progress(
        state=None,
        steps=jnp.zeros(len(x), jnp.int32),
        margin=no_margin,
        last_margin=no_margin,
        fooled_at=jnp.full(len(x), NEVER, jnp.int32),
        informed=jnp.zeros(len(x), bool),
        x_worst=x,
    )
    if getattr(attack, 'start', None) != 'none' or not _is_bounded(attack):
        progress = _record(progress, x, judge(predict(x), y))
    return restart(attack, predict, threat, progress, rng, x, y, number)


def restart(
    attack: Attack,
    predict: Predict,
    threat: ThreatModel,
    progress: Progress,
    rng: Array,
    x: Array,
    y: Array,
    number: int | Array,
) -> Progress:
    """Returns the attack at the start with this number, counted from 0, for keys rng [B]."""
    keys = jax.vmap(lambda key: jax.random.fold_in(key, number))(prng.of_examples(rng))
    return progress._replace(state=attack.init(predict, threat, keys, x, y))


def advance(
    attack: Attack,
    predict: Predict,
    threat: ThreatModel,
    progress: Progress,
    x: Array,
    y: Array,
    *,
    num_steps: int | Array,
    judge: Judge = losses.margin,
) -> Progress:
    """Takes so many steps more; every point counts, the first and the last too.

    A gradient that is not finite counts as 0, so that the points stay images.
    """

    def record(progress, point, outputs):
        margin = judge(outputs, y)
        if not _is_bounded(attack):
            margin = jnp.where(threat.distance(point, x) <= threat.epsilon, margin, jnp.inf)
        return _record(progress, point, margin)

    def body(_, progress):
        guarded = lambda x: predict(_with_finite_gradient(x))
        state, query = attack.step(guarded, threat, progress.state, x, y)
        point = progress.state.x if query.x is None else query.x
        progress = record(progress, point, query.outputs)
        return progress._replace(
            state=state,
            steps=progress.steps + 1,
            informed=progress.informed | query.informed,
        )

    progress = jax.lax.fori_loop(0, num_steps, body, progress)
    return record(progress, progress.state.x, predict(progress.state.x))


def _is_bounded(attack: Attack) -> bool:
    return getattr(attack, 'bounded', True)


@jax.custom_vjp
def _with_finite_gradient(x: Array) -> Array:
    """Returns x [B, ...], but examples whose gradient is not finite get one of zeros."""
    return x


def _finite_or_zero(_: None, gradient: Array) -> tuple[Array]:
    axes = tuple(range(1, gradient.ndim))
    return (jnp.where(jnp.all(jnp.isfinite(gradient), axis=axes, keepdims=True), gradient, 0),)


_with_finite_gradient.defvjp(lambda x: (x, None), _finite_or_zero)


class Outcome(NamedTuple):
    """What an attack with restarts did to each example.

    Attributes:
      margin: float32 [B], the lowest margin over all steps and restarts, the clean image among
        them (`losses.margin`; the example stands where it is > 0).
      last_margin: float32 [B], the lowest margin among the restarts' last points.
      informed: bool [B], whether any step was, see `attack.Query`. Where an example stands without,
        it was not attacked.
      x_adv: [B, H, W, C], where the margin was lowest.
    """

    margin: Array
    last_margin: Array
    informed: Array
    x_adv: Array


def worst_case(
    attack: Attack,
    predict: Predict,
    threat: ThreatModel,
    rng: Array,
    x: Array,
    y: Array,
    *,
    judge: Judge = losses.margin,
) -> Outcome:
    """Attacks for evaluation: keeps for each example the worst point seen, in one pass.

    So more steps or restarts never make a network look more robust. The clean image is one of the
    points, since it lies in the ball too.

    Args:
      judge: (outputs, labels) -> margin [B].
      attack, predict, threat, rng, x, y: as in `last_iterate`.

    Raises:
      ValueError: as `last_iterate` does.
    """
    x, y = jnp.asarray(x), jnp.asarray(y)
    _check(attack, predict, rng, x, y)

    def one_restart(number, carry):
        progress, last_margin = carry
        progress = restart(attack, predict, threat, progress, rng, x, y, number)
        progress = advance(
            attack, predict, threat, progress, x, y, num_steps=attack.steps, judge=judge
        )
        return progress, jnp.minimum(last_margin, progress.last_margin)

    progress = begin(attack, predict, threat, rng, x, y, judge=judge)
    carry = progress, jnp.full_like(progress.margin, jnp.inf)
    restarts = getattr(attack, 'restarts', 1)
    progress, last_margin = jax.lax.fori_loop(0, restarts, one_restart, carry)
    return Outcome(progress.margin, last_margin, progress.informed, progress.x_worst)


def _range(values: Array) -> tuple[float, float] | None:
    """Returns the least and the largest value of an array; None where they are not known yet."""
    if isinstance(values, Tracer) or not values.size:
        return None
    with jax.ensure_compile_time_eval():  # though others be traced
        return jnp.min(values).item(), jnp.max(values).item()


def _check(attack: Attack, predict: Predict, rng: Array, x: Array, y: Array) -> None:
    """Raises ValueError for arguments that cannot be meant, as far as they are known."""
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(
            f'x: expected floats in [0, 1], found {x.dtype}; of pixels 0..255 take x / 255'
        )
    typed = jnp.issubdtype(rng.dtype, jax.dtypes.prng_key)
    if (rng.shape if typed else rng.shape[:-1]) != x.shape[:1]:
        raise ValueError(
            f'rng: expected a key for each of {len(x)} examples, as jax.random.split(key, '
            f'{len(x)}) gives, found shape {rng.shape}'
        )
    # A NaN is in no range.
    if (found := _range(x)) and not (found[0] >= 0 and found[1] <= 1):
        raise ValueError(
            f'x: expected pixels in [0, 1], found {found[0]:g} to {found[1]:g}; of pixels 0..255 '
            'take x / 255, and standardise them in predict'
        )
    if not callable(loss := getattr(attack, 'loss', None)):
        _check_labels(predict, x, y, loss)


def _check_labels(predict: Predict, x: Array, y: Array, loss: str | None) -> None:
    """Raises ValueError unless there is a label for each row that `predict` gives."""
    if not jnp.issubdtype(y.dtype, jnp.integer) or y.shape != x.shape[:1]:
        raise ValueError(
            f'y: expected integer labels of shape {x.shape[:1]}, found {y.dtype} {y.shape}'
        )
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
