"""What every layer computes in one training step: counts of NaN and infinity, largest magnitudes.

The step is computed as `step.train_step` does, but part by part and member by member, with a look
at everything that goes into and comes out of every module, forward and backward.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from jax import Array

from ensadv import losses
from ensadv.models import ensemble
from ensadv.runtime import distributed
from ensadv.training.optim import TrainState


class Place(NamedTuple):
    """Where numbers were looked at.

    Attributes:
      stage: the part of the step, such as 'clean forward pass'.
      member: which, or None for what belongs to the ensemble.
      layer: the path of its module, as in 'group_1_block_1/conv_2'; '' is the whole network.
      what: such as 'its output' or 'the gradient of its kernel'.
    """

    stage: str
    member: int | None
    layer: str
    what: str


class Seen(NamedTuple):
    """What was seen at a place, on all devices; scalars, float32 while they are computed.

    Attributes:
      nan: how many values are NaN.
      infinite: how many are infinite.
      size: how many there are.
      largest: the largest finite magnitude, 0 where there is none.
    """

    nan: Any
    infinite: Any
    size: Any
    largest: Any

    @property
    def finite(self) -> bool:
        return not (self.nan or self.infinite)


Rows = OrderedDict[Place, Seen]  # in the order of computation


def first_not_finite(rows: Rows) -> Place | None:
    """Returns the first place, in the order of computation, with a value that is not finite."""
    return next((place for place, seen in rows.items() if not seen.finite), None)


def _look_at(x: Array) -> Seen:
    largest = jnp.max(jnp.where(jnp.isfinite(x), jnp.abs(x), 0))
    scalars = (jnp.sum(jnp.isnan(x)), jnp.sum(jnp.isinf(x)), x.size, largest)
    return Seen(*(jnp.asarray(scalar, jnp.float32) for scalar in scalars))


@jax.custom_vjp
def _watch(x: Array, slot: Seen) -> Array:
    """Returns x. The "gradient" of `slot` is what is seen of x's gradient."""
    del slot
    return x


_watch.defvjp(lambda x, slot: (x, None), lambda _, gradient: (gradient, _look_at(gradient)))


def _interceptor(see: Callable[[str, str, Array], Array]) -> Callable[..., Any]:
    """Returns what shows `see(layer, what, value)` the input and the output of every module."""

    def interceptor(next_fun, args, kwargs, context):
        if context.method_name != '__call__':
            return next_fun(*args, **kwargs)
        layer = '/'.join(context.module.path)
        x = see(layer, 'its input', args[0])
        return see(layer, 'its output', next_fun(x, *args[1:], **kwargs))

    return interceptor


def _own_leaves(tree: Mapping[str, Any], layer: str) -> dict[str, Any]:
    """Returns a module's own variables, without those of the modules in it, by name."""
    for name in filter(None, layer.split('/')):
        tree = tree.get(name, {})
    return {name: leaf for name, leaf in tree.items() if not isinstance(leaf, Mapping)}


class Passes(NamedTuple):
    """A forward and a backward pass.

    Attributes:
      forward, backward: the rows of what was seen.
      gradient: of the weights, [k, ...].
      batch_stats: after the pass, [k, ...].
    """

    forward: Any
    backward: Any
    gradient: Any
    batch_stats: Any


def look(
    model: nn.Module,
    variables: ensemble.Variables,
    x: Array,
    loss_fn: Callable[[Array], Array],
    *,
    combine: str,
    train: bool,
    weight: float | Array = 1.0,
) -> Passes:
    """Computes an ensemble's loss and its gradient, and looks at every layer of every member.

    Args:
      model: the members' network, without remat.
      variables: with a leading [k] axis.
      x: images [B, H, W, C].
      loss_fn: from log-probabilities [B, classes] to the loss.
      combine: see `ensemble.combine`.
      train: whether batch norm uses the batch's statistics.
      weight: what the loss is multiplied by before the backward pass.

    Returns:
      The passes, whose rows are of the stages 'forward pass' and 'backward pass'.
    """
    k = len(jax.tree.leaves(variables)[0])

    def computed(params, slots):
        seen = Rows()

        def see(member, layer, what, value):
            place = Place('forward pass', member, layer, what)
            seen[place] = _look_at(value)
            return _watch(value, slots[place]) if slots else value

        images = see(None, '', 'the images', x)
        outputs = []
        for i in range(k):
            own = jax.tree.map(lambda leaf, i=i: leaf[i], {**variables, 'params': params})
            with nn.intercept_methods(_interceptor(partial(see, i))):
                outputs.append(model.apply(own, images, train=train, mutable=['batch_stats']))
        logits, updated = zip(*outputs, strict=True)
        log_probs = ensemble.combine(jnp.stack(logits), combine)
        log_probs = see(None, '', 'the log-probabilities', log_probs)
        loss = see(None, '', 'the loss', loss_fn(log_probs))
        return weight * loss, (seen, [variables.get('batch_stats', {}) for variables in updated])

    params = variables['params']
    slots = jax.eval_shape(lambda: computed(params, None)[1][0])
    slots = jax.tree.map(lambda slot: jnp.zeros(slot.shape, slot.dtype), slots)
    differentiate = jax.grad(computed, argnums=(0, 1), has_aux=True)
    (gradient, watched), (seen, batch_stats) = differentiate(params, slots)

    forward = Rows()
    for place, of_place in seen.items():
        forward[place] = of_place
        if train and place.what == 'its output':
            for name, leaf in _own_leaves(batch_stats[place.member], place.layer).items():
                forward[place._replace(what=f'its running {name}')] = _look_at(leaf)
    backward = Rows()
    # From the loss back: the ensemble's part, one member after the other, the images.
    *places, images = reversed(seen)
    for place in (*sorted(places, key=lambda place: place.member or 0), images):
        there = place._replace(stage='backward pass')
        backward[there._replace(what=f'the gradient of {place.what}')] = watched[place]
        if place.what == 'its output':
            for name, leaf in _own_leaves(gradient, place.layer).items():
                what = f'the gradient of its {name}'
                backward[there._replace(what=what)] = _look_at(leaf[place.member])
    batch_stats = jax.tree.map(lambda *leaves: jnp.stack(leaves), *batch_stats)
    return Passes(forward, backward, gradient, batch_stats)


def _of_leaves(stage: str, **trees: Any) -> Rows:
    """Returns a row for each weight and member of like trees, [k, ...], called 'its new', ..."""
    rows = Rows()
    kinds = [jax.tree_util.tree_leaves_with_path(tree) for tree in trees.values()]
    for leaves in zip(*kinds, strict=True):
        for i in range(len(leaves[0][1])):
            for kind, (path, leaf) in zip(trees, leaves, strict=True):
                *layer, name = (key.key for key in path)
                what = f'the {kind} of its {name}' if kind == 'gradient' else f'its {kind} {name}'
                rows[Place(stage, i, '/'.join(layer), what)] = _look_at(leaf[i])
    return rows


class _Table(struct.PyTreeNode):
    """Rows as a compiled function returns them: thousands of them are few arrays."""

    places: tuple[Place, ...] = struct.field(pytree_node=False)
    seen: Seen  # every leaf [places]

    @classmethod
    def of(cls, rows: Rows) -> '_Table':
        return cls(tuple(rows), Seen(*map(jnp.stack, zip(*rows.values(), strict=True))))

    def over_devices(self) -> '_Table':
        """Puts together what each device saw in its share of the batch."""
        *counts, largest = self.seen
        counts = [n * distributed.num_devices() for n in distributed.mean_over_devices(counts)]
        return self.replace(seen=Seen(*counts, distributed.max_over_devices(largest)))

    def rows(self, stage: str = '{}') -> Rows:
        """Returns the rows, on the host; '{}' in `stage` stands for the name that a stage has."""
        nan, infinite, size, largest = map(np.asarray, jax.device_get(self.seen))
        count = lambda n: round(float(n))
        return Rows(
            (
                place._replace(stage=stage.format(place.stage)),
                Seen(count(nan[n]), count(infinite[n]), count(size[n]), float(largest[n])),
            )
            for n, place in enumerate(self.places)
        )


def make_examine(
    draw: Callable[..., Any],
    *,
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    combine: str,
    attack: Callable[..., Array],
    attack_steps: int,
    attack_loss: str,
    attack_batch_norm: str,
    adversarial_weight: float,
) -> Callable[..., Rows]:
    """Returns `examine(state, arrays, keys) -> rows`, which computes one step part by part.

    Every device takes the share of the batch that it takes in training, and batch norm the
    statistics that it takes there. The rows end with the first part that is not finite; where
    there is none they are of the whole step.

    Args:
      draw: `draw(step, arrays, keys) -> (batch, rng)`, as `step.train_step` takes them; called
        inside `distributed.run_on_devices`.
      model: the members' network, without remat.
      attack: as for `step.train_step`; takes `num_steps` by name.
      attack_steps: how many it takes in training.
      attack_loss: what it climbs, a key of `losses.LOSSES`.
      optimizer, combine, attack_batch_norm: as for `step.train_step`.
      adversarial_weight: rho, see `objectives.paper`.
    """

    def attacked(state, batch, rng, num_steps):
        def log_prob_fn(images):
            variables = {'params': state.params, 'batch_stats': state.batch_stats}
            if attack_batch_norm == 'batch':
                logits, _ = ensemble.apply_train(model, variables, images)
            else:
                logits = ensemble.apply(model, variables, images)
            return ensemble.combine(logits, combine)

        return attack(log_prob_fn, rng, *batch, num_steps=num_steps)

    def attack_step(state, arrays, keys, done):
        batch, rng = draw(state.step, arrays, keys)
        passes = look(
            model,
            {'params': state.params, 'batch_stats': state.batch_stats},
            attacked(state, batch, rng, done),
            lambda log_probs: jnp.sum(losses.LOSSES[attack_loss](log_probs, batch[1])),
            combine=combine,
            train=attack_batch_norm == 'batch',
        )
        # An attack wants no gradient of the weights.
        wanted = {f'the gradient of its {what}' for what in ('input', 'output')}
        backward = Rows(
            (place, seen)
            for place, seen in passes.backward.items()
            if place.member is None or place.what in wanted
        )
        return _Table.of(passes.forward | backward).over_devices()

    def training_pass(state, batch_stats, arrays, keys, adversarial):
        batch, rng = draw(state.step, arrays, keys)
        x, weight = batch[0], 1.0
        if adversarial_weight:
            adversary = lambda: attacked(state, batch, rng, attack_steps)
            x = jax.lax.cond(adversarial, adversary, lambda: x)
            weight = jnp.where(adversarial, adversarial_weight, 1) / (1 + adversarial_weight)
        passes = look(
            model,
            {'params': state.params, 'batch_stats': batch_stats},
            x,
            lambda log_probs: jnp.mean(losses.cross_entropy(log_probs, batch[1])),
            combine=combine,
            train=True,
            weight=weight,
        )
        tables = [_Table.of(rows).over_devices() for rows in (passes.forward, passes.backward)]
        return Passes(
            *tables, *distributed.mean_over_devices((passes.gradient, passes.batch_stats))
        )

    attack_step = distributed.run_on_devices(attack_step, 4)
    training_pass = distributed.run_on_devices(training_pass, 5)

    @jax.jit
    def of_state(state):
        weights = _of_leaves('state', current=state.params)
        return _Table.of(weights | _of_leaves('state', running=state.batch_stats))

    @jax.jit
    def of_update(state, gradients, batch_stats):
        gradient = jax.tree.map(lambda *leaves: sum(leaves), *gradients)
        updates, _ = optimizer.update(gradient, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        rows = _of_leaves('gradient', gradient=gradient)
        norm = _look_at(optax.tree.norm(gradient))
        rows[Place('gradient', None, '', 'the norm of the gradient')] = norm
        rows |= _of_leaves('update', gradient=gradient, new=params)
        rows |= _of_leaves('update', running=batch_stats)
        norm = _look_at(optax.tree.norm(params))
        rows[Place('update', None, '', 'the norm of the new weights')] = norm
        return _Table.of(rows)

    def parts(state: TrainState, arrays: Any, keys: Any) -> Iterator[Rows]:
        yield of_state(state).rows()
        for done in range(attack_steps if adversarial_weight else 0):
            table = attack_step(state, arrays, keys, np.int32(done))
            yield table.rows(f'attack step {done + 1} of {attack_steps}, {{}}')
        passes, batch_stats = {}, state.batch_stats
        for name in ('clean', 'adversarial') if adversarial_weight else ('clean',):
            adversarial = np.bool_(name == 'adversarial')
            passes[name] = training_pass(state, batch_stats, arrays, keys, adversarial)
            batch_stats = passes[name].batch_stats
        for name, both in passes.items():
            yield both.forward.rows(f'{name} {{}}')
        for name, both in passes.items():
            yield both.backward.rows(f'{{}} of the {name} loss')
        yield of_update(state, [both.gradient for both in passes.values()], batch_stats).rows()

    def examine(state: TrainState, arrays: Any, keys: Any) -> Rows:
        rows = Rows()
        for part in parts(state, arrays, keys):
            rows |= part
            if first_not_finite(rows):
                break
        return rows

    return examine
