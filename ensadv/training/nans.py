"""NaN and infinity in training: the error, and the step, pass, member and layer where they begin.

Nothing here takes time before the loss, its gradient or the state is not finite. Then `replay`
finds the step, and a `Finder` looks into that step's passes.
"""

import math
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import logging
from flax.core import tracers
from jax import Array
from ml_collections import ConfigDict

from ensadv import build
from ensadv.attacks import registry
from ensadv.data import datasets
from ensadv.errors import TrainingError
from ensadv.models import ensemble
from ensadv.runtime import distributed, progress
from ensadv.training import from_config
from ensadv.training.optim import TrainState
from ensadv.training.step import attack_images, perturbed, train_step

# (state, number of steps) -> (state, sums of metrics)
Advance = Callable[[TrainState, int], tuple[TrainState, Mapping[str, Array]]]
# (layer, what of it) -> float32 [members, 4], or [4] of the ensemble: how many values are NaN, how
# many are infinite, how many there are, and the largest finite magnitude. In the order of
# computation.
Counts = OrderedDict[tuple[str, str], Array]

ADVICE = (
    'A lower train.learning_rate helps most often (in a new workdir: the config of a run cannot '
    'change)'
)
_IMAGES = ('', 'the images')
_STATE = 'the weights and running averages'


class NotFiniteError(TrainingError):
    """The loss, its gradient, the weights or the running averages became NaN or infinite.

    Attributes:
      first, last: it was between these steps.
    """

    def __init__(self, first: int, last: int):
        super().__init__(
            'the loss, its gradient, the weights or the running averages are not finite between '
            f'steps {first} and {last}; the checkpoints before that are good. {ADVICE}'
        )
        self.first, self.last = first, last


def error_with_advice(error: NotFiniteError, start: int) -> TrainingError:
    """Returns the error together with how to find out more.

    Args:
      error: as it was raised.
      start: step of the newest checkpoint, or 0 if there is none.
    """
    return TrainingError(
        f'{error}. The same command with --config.debug.nans=True goes on from '
        f'{_start_name(start)} and finds the layer'
    )


def error_with_place(
    error: NotFiniteError,
    start: int,
    state: TrainState,
    advance: Advance,
    find: Callable[[TrainState], str | None],
) -> TrainingError:
    """Returns an error that says at which step, member and layer the arithmetic went wrong.

    Args:
      error: as it was raised.
      start, state: from which steps are made once more; the state's memory is reused.
      advance: see `replay`.
      find: see `Finder.find`.
    """
    logging.warning('%s. Once more from %s, step by step', error, _start_name(start))
    if (bad := replay(state, advance, start, error.last)) is None:
        return TrainingError(
            f'{error}. Made once more from {_start_name(start)}, all steps to {error.last} were '
            'finite'
        )
    step, before = bad
    when = f'the step from {step} to {step + 1}'
    if (place := find(before)) is None:
        return TrainingError(
            f'{when} is not finite, but computed once more, pass by pass, it is: rounding decides. '
            f'{ADVICE}'
        )
    if place.startswith(_STATE):
        return TrainingError(f'the state of step {step} itself is not finite: {place}')
    return TrainingError(
        f'{when} is the first that is not finite. {place}. {_weights(before.params)}. {ADVICE}'
    )


def _start_name(start: int) -> str:
    return f'the checkpoint of step {start}' if start else 'the beginning'


@jax.jit
def all_finite(tree: Any) -> Array:
    """Returns whether every value of every array is finite, bool []."""
    return jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree)]).all()


def replay(
    state: TrainState, advance: Advance, first: int, last: int
) -> tuple[int, TrainState] | None:
    """Makes steps one by one until the metrics, or the state before or after, are not finite.

    Args:
      state: that of step `first`; its memory is reused.
      advance: makes a number of steps.
      first: where to begin.
      last: where to give up.

    Returns:
      The step that begins there, and the state before it; None if all steps to `last` are finite.
    """
    finite = bool(all_finite(state))
    with progress.Bar(total=last - first, label='replay', unit='step') as bar:
        for step in range(first, last):
            before = jax.tree.map(jnp.copy, state)  # advancing reuses the state's memory
            state, sums = advance(state, 1)
            finite &= all(map(np.isfinite, jax.device_get(sums).values()))
            if not finite or not all_finite(state):
                return step, before
            bar.update()
    return None


def _count(x: Array) -> Array:
    largest = jnp.max(jnp.where(jnp.isfinite(x), jnp.abs(x), 0), initial=0)
    found = [jnp.sum(jnp.isnan(x)), jnp.sum(jnp.isinf(x)), x.size, largest]
    return jnp.array(found, jnp.float32)


def _count_in_all(outputs: Any) -> Array:
    """Counts in the floats that a layer gives, mostly one array."""
    arrays = map(jnp.asarray, jax.tree.leaves(outputs))
    found = [_count(x) for x in arrays if jnp.issubdtype(x.dtype, jnp.floating)]
    counts = jnp.stack(found) if found else jnp.zeros((1, 4))
    return jnp.append(jnp.sum(counts[:, :3], axis=0), jnp.max(counts[:, 3]))


def _over_devices(counts: Array) -> Array:
    """Returns what was counted on all devices in their shares of the batch."""
    numbers = distributed.mean_over_devices(counts[..., :3]) * distributed.num_devices()
    largest = distributed.max_over_devices(counts[..., 3:])
    return jnp.concatenate([numbers, largest], axis=-1)


def count_in_layers(
    model: nn.Module, variables: ensemble.Variables, images: Array, *, combine: str, train: bool
) -> Counts:
    """Counts in what every layer gives, in a forward pass of an ensemble.

    Args:
      model: the members' network, without remat, inside which nothing can be looked at.
      variables: with a leading [k] axis.
      images: [B, H, W, C].
      combine: see `ensemble.combine`.
      train: whether batch norm uses the batch's statistics, and the running averages are updated.
    """
    logits, of_members = [], []
    outside = tracers.current_trace()
    for i in range(len(jax.tree.leaves(variables)[0])):
        counts = Counts()

        def look(call, args, kwargs, context, counts=counts):
            output = call(*args, **kwargs)
            # What a network of the user's own computes in a transformation, as in nn.scan, cannot
            # be looked at from outside.
            if context.method_name == '__call__' and tracers.current_trace() == outside:
                layer, own = '/'.join(context.module.path), context.module.variables
                counts[layer, 'its output'] = _count_in_all(output)
                for name, leaf in own.get('batch_stats', {}).items() if train else ():
                    if not isinstance(leaf, Mapping):  # those are of the modules inside
                        counts[layer, f'its running {name}'] = _count(leaf)
            return output

        own = jax.tree.map(lambda leaf, i=i: leaf[i], variables)
        with nn.intercept_methods(look):
            logits.append(model.apply(own, images, train=train, mutable=['batch_stats'])[0])
        of_members.append(counts)
    counts = jax.tree.map(lambda *members: jnp.stack(members), *of_members)
    counts['', 'the log-probabilities'] = _count(ensemble.combine(jnp.stack(logits), combine))
    return counts


def _count_in_leaves(what: str, tree: Any) -> Counts:
    """Counts in every variable, [k, ...] each; '{}' in `what` stands for a variable's name."""
    counts = Counts()
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        *layer, name = (key.key for key in path)
        counts['/'.join(layer), what.format(name)] = jax.vmap(_count)(leaf)
    return counts


@jax.jit
def _count_in_state(state: TrainState) -> Counts:
    weights = _count_in_leaves('its {}', state.params)
    return weights | _count_in_leaves('its running {}', state.batch_stats)


def _giving_gradient(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """Returns the optimizer, but with the gradient for its next state."""

    def update(gradient, opt_state, params):
        return optimizer.update(gradient, opt_state, params)[0], gradient

    return optax.GradientTransformation(optimizer.init, update)


class Finder:
    """Finds the first place in a step that is not finite.

    Every device takes the share of the batch that it takes in training, and in separate training
    the members are looked at one after the other.
    """

    def __init__(
        self,
        config: ConfigDict,
        dataset: datasets.Dataset,
        draw: Callable[..., Any],
        take: Callable[[int, int], tuple[Any, Any]],
        keys: Any,
    ):
        """Compiles nothing yet.

        Args:
          config: the run's.
          dataset: the run's.
          draw: `draw(step, number, examples, chosen, keys) -> (batch, rng)`: `feeds.draw`, called
            inside `distributed.run_on_devices`.
          take: `take(step, num_steps) -> (examples, chosen)`, a feed's.
          keys: what `draw` takes.
        """
        model = build.model(config, dataset.describe(), dtype=config.model.dtype)
        self._config, self._draw, self._take, self._keys = config, draw, take, keys
        self._settings = from_config.step_settings(config, model)
        objective = self._settings['objective']
        steps = registry.training_settings(config.attack)['steps']
        self._attack_steps = steps if objective.attacks else 0
        self._attack_has_target = objective.attacks and objective.attack_target is not None
        self._perturbed_from = objective.perturbation.start if objective.perturbation else math.inf

        def on_devices(function, **settings):
            compiled = distributed.run_on_devices(partial(function, **settings), 4, divided=True)
            return lambda args, num_steps: jax.device_get(
                compiled(*args[:3], np.int32(num_steps), args[3])
            )

        of_batch = config.attack.batch_norm == 'batch'
        self._clean = on_devices(self._count_forward, train=True, attacked=False)
        self._target = on_devices(self._count_forward, train=of_batch, attacked=False)
        self._attack = on_devices(self._count_forward, train=of_batch, attacked=True)
        self._adversarial = on_devices(self._count_forward, train=True, attacked=True)
        self._gradient = on_devices(self._count_in_update, perturbs=False)
        self._update = on_devices(self._count_in_update, perturbs=True)
        self._perturbed = [
            on_devices(self._count_forward, train=True, attacked=attacked, perturbs=True)
            for attacked in (False, True)
        ]

    def find(self, state: TrainState) -> str | None:
        """Names the first place in the step from a state that is not finite; None if all is.

        As 'attack step 1 of 7, forward pass, member 0, conv_0, its output: 2 NaN and ...'.
        """
        examples, chosen = self._take(state.updates, 1)
        if self._config.ensemble.training == 'joint':
            members = [(0, state, self._keys, chosen)]
        else:
            of_member = lambda i: jax.tree.map(lambda leaf: leaf[i], (state, self._keys))
            # Behind the axis of the devices.
            chosen_by = lambda i: jax.tree.map(lambda leaf: leaf[:, i], chosen)
            members = [(i, *of_member(i), chosen_by(i)) for i in range(self._config.ensemble.size)]
        places = (
            _first_bad(name, counts, i)
            for i, state, keys, chosen in members
            for name, counts in self._parts((state, examples, keys, chosen))
        )
        return next(filter(None, places), None)

    def _parts(self, args: tuple[Any, ...]) -> Iterator[tuple[str, Counts]]:
        """Yields the parts of a step, and what is counted in them.

        `args` are its state, the examples, the keys, and those chosen, as `feeds.draw` has them.
        """
        yield _STATE, jax.device_get(_count_in_state(args[0]))
        counts = self._clean(args, 0)
        yield 'clean forward pass', counts
        layers = [layer for layer, _ in counts]
        in_order = lambda counts: Counts(
            sorted(counts.items(), key=lambda item: -layers.index(item[0][0]))
        )
        if self._attack_has_target:
            yield "forward pass of the attack's target", self._target(args, 0)
        passes = [
            (f'attack step {done + 1} of {self._attack_steps}, forward pass', self._attack, done)
            for done in range(self._attack_steps)
        ]
        if self._attack_steps:
            passes.append(('adversarial forward pass', self._adversarial, self._attack_steps))
        for name, forward, done in passes:
            counts = forward(args, done)
            if _is_bad(counts[_IMAGES]):
                # They come of a gradient at the images before, whose forward pass was finite.
                gradient, _ = self._gradient(args, done - 1)
                name = f'attack step {done} of {self._attack_steps}, backward pass'
                yield name, in_order(gradient) | counts
            yield name, counts
        where = ''
        if int(args[0].step) >= self._perturbed_from:
            yield 'backward pass', in_order(self._gradient(args, self._attack_steps)[0])
            where = ' at perturbed weights'
            for name, forward in zip(('clean', 'adversarial'), self._perturbed, strict=True):
                if name == 'clean' or self._attack_steps:
                    yield f'{name} forward pass{where}', forward(args, self._attack_steps)
        gradient, counts = self._update(args, self._attack_steps)
        yield f'backward pass{where}', in_order(gradient)
        yield 'update', counts

    def _count_forward(
        self, state, examples, keys, num_steps, chosen, train, attacked, perturbs=False
    ) -> Counts:
        """Counts in a forward pass on the images, or on what the attack makes of them so far."""
        batch, rng = self._draw(state.step, 0, examples, chosen, keys)
        images, settings = batch[0], self._settings_for(num_steps)
        if attacked:
            given = ('model', 'combine', 'attack', 'attack_batch_norm', 'objective')
            images = attack_images(state, batch, rng, **{name: settings[name] for name in given})
        if perturbs:
            gradient = self._step(state, batch, rng, num_steps, perturbs=False)[0].opt_state
            gamma = settings['objective'].perturbation.gamma
            state = state.replace(params=perturbed(state.params, gradient, gamma))
        counts = Counts({_IMAGES: _count(images)})
        counts |= count_in_layers(
            settings['model'],
            {'params': state.params, 'batch_stats': state.batch_stats},
            images,
            combine=settings['combine'],
            train=train,
        )
        return jax.tree.map(_over_devices, counts)

    def _count_in_update(
        self, state, examples, keys, num_steps, chosen, perturbs
    ) -> tuple[Counts, Counts]:
        """Counts in the gradient, and in what the step gives, with so many steps of the attack."""
        batch, rng = self._draw(state.step, 0, examples, chosen, keys)
        after, metrics = self._step(state, batch, rng, num_steps, perturbs=perturbs)
        counts = _count_in_leaves('its new {}', after.params)
        counts |= {('', f'the {name}'): _count(value) for name, value in metrics.items()}
        return _count_in_leaves('the gradient of its {}', after.opt_state), counts

    def _settings_for(self, num_steps) -> dict[str, Any]:
        """Returns the step's settings, with so many steps of the attack."""
        return self._settings | {'attack': partial(self._settings['attack'], num_steps=num_steps)}

    def _step(self, state, batch, rng, num_steps, *, perturbs) -> tuple[TrainState, Any]:
        """Makes the step; its state's `opt_state` is the gradient."""
        settings = self._settings_for(num_steps)
        settings['optimizer'] = _giving_gradient(settings['optimizer'])
        if not perturbs:
            settings['objective'] = settings['objective']._replace(perturbation=None)
        average = distributed.mean_over_devices
        return train_step(state, batch, rng, **settings, mean_over_devices=average)


def _is_bad(counts: np.ndarray) -> bool:
    nan, infinite, *_ = counts
    return bool(nan or infinite)


def _first_bad(part: str, counts: Counts, first_member: int) -> str | None:
    """Names the first place in a part of the step that is not finite, if there is one."""
    for (layer, what), found in counts.items():
        rows = np.atleast_2d(found)
        bad = [i for i, row in enumerate(rows) if _is_bad(row)]
        if not bad:
            continue
        if found.ndim == 2:
            members = ' and '.join(str(first_member + i) for i in bad)
            who = f'member{"s" if len(bad) > 1 else ""} {members}'
            what = f'{who}, {layer or "the whole network"}, {what}'
        if part != _STATE:
            _log_largest(part, counts, bad[0])
        nan, infinite, size, _ = (f'{number:,.0f}' for number in rows[bad[0]])
        return f'{part}, {what}: {nan} NaN and {infinite} infinite of {size} values'
    return None


def _log_largest(part: str, counts: Counts, member: int) -> None:
    """Logs the largest values in a part of the step, place by place, of one member."""
    lines = [f'largest finite values in this step, {part}:']
    lines.append(f'{"largest":>8}  {"NaN":>9}  {"infinite":>9}  where')
    for (layer, what), found in counts.items():
        nan, infinite, _, largest = found[member] if found.ndim == 2 else found
        where = f'{layer}: {what}' if layer else what
        lines.append(f'{largest:>8.2g}  {nan:>9,.0f}  {infinite:>9,.0f}  {where}')
    logging.warning('%s', '\n'.join(lines))


def _weights(params: Any) -> str:
    """Returns how large the weights are, of all members."""
    leaves = jax.tree_util.tree_leaves_with_path(jax.device_get(params))
    norm = math.hypot(*(np.linalg.norm(leaf.astype(np.float64)) for _, leaf in leaves))
    path, leaf = max(leaves, key=lambda item: np.max(np.abs(item[1])))
    name = '/'.join(key.key for key in path)
    return f'The weights before: norm {norm:.2g}, largest {np.max(np.abs(leaf)):.2g} in {name}'
