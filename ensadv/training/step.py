"""One training step: a pure function of arrays."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax import Array

from ensadv.cpu import order
from ensadv.models import ensemble
from ensadv.training import optim
from ensadv.training.objectives import Metrics, Objective, Predict
from ensadv.training.optim import TrainState

# Images float32 [B, H, W, C] in [0, 1]; labels int32 [B], or distributions float32 [B, classes].
Batch = tuple[Array, Array]


def initial_state(
    model: nn.Module,
    rng: Array,
    k: int,
    image_shape: tuple[int, ...],
    optimizer: optax.GradientTransformation,
    averages: bool = False,
) -> TrainState:
    """Returns the state before the first step of an ensemble with k members.

    Args:
      model: the members' network.
      rng: key of the first weights.
      k: members.
      image_shape: (H, W, C).
      optimizer: turns gradients into updates.
      averages: whether averages over the steps are kept.
    """
    variables = ensemble.init(model, rng, k, image_shape)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=variables['params'],
        batch_stats=variables['batch_stats'],
        opt_state=optimizer.init(variables['params']),
        averaged=jax.tree.map(jnp.zeros_like, variables) if averages else None,
    )


def attacked(
    model: nn.Module, combine: str, state: TrainState, batch_norm: str
) -> Callable[[Array], Array]:
    """Returns what training attacks: images -> the ensemble's log-probabilities.

    Args:
      model, combine, batch_norm: as in `train_step`.
      state: whose weights and running averages are used.
    """

    def log_probs(images):
        if batch_norm == 'batch':
            return Predict(model, combine, state.params, state.batch_stats)(images).log_probs
        variables = {'params': state.params, 'batch_stats': state.batch_stats}
        return ensemble.combine(ensemble.apply(model, variables, images), combine)

    return log_probs


def attack_images(
    state: TrainState,
    batch: Batch,
    rng: Array,
    *,
    model: nn.Module,
    combine: str,
    attack: Callable[..., Array],
    attack_batch_norm: str,
    objective: Objective,
) -> Array | None:
    """Returns the adversarial images, if the objective has such; arguments as in `train_step`."""
    if not objective.attacks:
        return None
    x, y = batch
    log_probs = attacked(model, combine, state, attack_batch_norm)
    target = objective.attack_target(log_probs, x, y) if objective.attack_target else y
    return attack(log_probs, rng, x, target)


def descend(
    objective: Objective,
    model: nn.Module,
    combine: str,
    state: TrainState,
    x: Array,
    x_adv: Array | None,
    y: Array,
    rng: Array,
) -> tuple[Any, Any, Metrics]:
    """Returns the objective's gradient, the running averages after it, and its metrics.

    The terms are differentiated one after the other, and on a CPU one waits for the one before:
    memory holds the activations of one at a time.
    """

    def weighted(params, batch_stats, term, x, x_adv):
        predict = Predict(model, combine, params, batch_stats, state.step, rng)
        loss, metrics = term.loss(predict, x, x_adv, y)
        return term.weight * objective.scale * loss, (loss, predict.batch_stats, metrics)

    gradient, total, batch_stats, metrics = None, 0, state.batch_stats, {}
    for term in objective.terms:
        if gradient is not None:
            x, x_adv = order.wait_for(gradient, (x, x_adv))
        added, (loss, batch_stats, found) = jax.grad(weighted, has_aux=True)(
            state.params, batch_stats, term, x, x_adv
        )
        gradient = added if gradient is None else optax.tree.add(gradient, added)
        total += term.weight * loss
        metrics |= found
    return gradient, batch_stats, metrics | {'loss': objective.scale * total}


def perturbed(params: Any, gradient: Any, gamma: float) -> Any:
    """Returns weights [k, ...] that are moved along their gradient, see `objectives.awp`."""

    def norm(leaf):
        of_member = tuple(range(1, leaf.ndim))
        return jnp.sqrt(jnp.sum(jnp.square(leaf), axis=of_member, keepdims=True))

    def moved(is_kernel, w, g):
        # Of a gradient of zero no direction is known.
        return w + gamma * norm(w) / (norm(g) + 1e-20) * g if is_kernel else w

    return jax.tree.map(moved, optim.are_kernels(params), params, gradient)


def train_step(
    state: TrainState,
    batch: Batch,
    rng: Array,
    *,
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    combine: str,
    attack: Callable[..., Array],
    attack_batch_norm: str = 'running',
    objective: Objective,
    ema_decay: float = 0,
    mean_over_devices: Callable[[Any], Any] = lambda tree: tree,
) -> tuple[TrainState, Metrics]:
    """Makes one step: attacks the ensemble, then descends the objective with every member.

    Args:
      state: the state before the step.
      batch: this device's share of the global batch.
      rng: keys [B], one per example, for the attack's start and what the objective draws.
      model: the members' network.
      optimizer: turns gradients into updates.
      combine: how members' outputs become one, see `ensemble.combine`.
      attack: `attack(log_prob_fn, rng, x, target) -> x_adv`.
      attack_batch_norm: statistics while attacking: 'running' averages or the 'batch' itself's.
      objective: what is descended, and whether there is an attack, and on what.
      ema_decay: of the averages over the steps, where the state has them.
      mean_over_devices: averages a tree over the devices that share the global batch.

    Returns:
      The next state, and the metrics: the objective's own, its value as loss, gradient_norm, and
      parameter_norm of the next state; with perturbed weights (see `objectives.awp`) also its value
      there as perturbed_loss. What the objective measures is of forward passes with the batch's
      statistics in batch norm, before the update.
    """
    x, y = batch
    x_adv = attack_images(
        state, batch, rng, model=model, combine=combine, attack=attack,
        attack_batch_norm=attack_batch_norm, objective=objective,
    )  # fmt: skip

    def passes(params, x, x_adv):
        at = state.replace(params=params)
        return mean_over_devices(descend(objective, model, combine, at, x, x_adv, y, rng))

    gradient, batch_stats, metrics = passes(state.params, x, x_adv)
    if objective.perturbation:
        gamma, start = objective.perturbation

        def at_perturbed_weights(gradient):
            params = perturbed(state.params, gradient, gamma)
            found, _, at = passes(params, *order.wait_for(gradient, (x, x_adv)))
            return found, at['loss']

        as_they_are = lambda gradient: (gradient, metrics['loss'])
        gradient, metrics['perturbed_loss'] = (
            jax.lax.cond(state.step >= start, at_perturbed_weights, as_they_are, gradient)
            if start
            else at_perturbed_weights(gradient)
        )
    metrics['gradient_norm'] = optax.tree.norm(gradient)
    updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    metrics['parameter_norm'] = optax.tree.norm(params)
    step, averaged = state.step + 1, state.averaged
    if averaged is not None:
        new = {'params': params, 'batch_stats': batch_stats}
        averaged = optim.moving_average(averaged, new, step, ema_decay)
    return TrainState(step, params, batch_stats, opt_state, averaged), metrics
