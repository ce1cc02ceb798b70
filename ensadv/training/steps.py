"""One training step: a pure function of arrays."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax import Array

from ensadv import losses
from ensadv.models import ensemble
from ensadv.training.optim import TrainState

Batch = tuple[Array, Array]  # images float32 [B, H, W, C] in [0, 1], labels int32 [B]
Metrics = dict[str, Array]  # scalars, averages over the batch


def init_state(
    model: nn.Module,
    rng: Array,
    k: int,
    image_shape: tuple[int, ...],
    optimizer: optax.GradientTransformation,
) -> TrainState:
    """Returns the state before the first step of an ensemble with k members."""
    variables = ensemble.init(model, rng, k, image_shape)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=variables['params'],
        batch_stats=variables['batch_stats'],
        opt_state=optimizer.init(variables['params']),
    )


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
    adversarial_weight: float,
    mean_over_devices: Callable[[Any], Any] = lambda tree: tree,
) -> tuple[TrainState, Metrics]:
    """Makes one step of Algorithm 1: attacks the ensemble, then updates every member.

    The loss is (L + rho * L_adv) / (1 + rho), each the ensemble's cross-entropy averaged over the
    batch. The clean and the adversarial images are two forward passes with a batch norm each; the
    running averages take both, the clean ones first.

    Args:
      state: the state before the step.
      batch: this device's share of the global batch.
      rng: keys [B], one per example, for the attack's start.
      model: the members' network.
      optimizer: turns gradients into updates.
      combine: how members' outputs become one, see `ensemble.combine`.
      attack: `attack(log_prob_fn, rng, x, y) -> x_adv`.
      attack_batch_norm: statistics while attacking: 'running' averages or the 'batch' itself's.
      adversarial_weight: rho. At 0 there is no attack and no adversarial pass.
      mean_over_devices: averages a tree over the devices that share the global batch.

    Returns:
      The next state, and metrics: loss, clean_loss, clean_accuracy, gradient_norm, parameter_norm
      (of the next state) and, unless rho is 0, adversarial_loss and adversarial_accuracy.
      Accuracies are those of the forward passes that the update uses, so with the batch's
      statistics in batch norm.
    """
    x, y = batch

    def log_probs_train(params, batch_stats, images):
        variables = {'params': params, 'batch_stats': batch_stats}
        logits, batch_stats = ensemble.apply_train(model, variables, images)
        return ensemble.combine(logits, combine), batch_stats

    def attacked(images):
        if attack_batch_norm == 'batch':
            return log_probs_train(state.params, state.batch_stats, images)[0]
        variables = {'params': state.params, 'batch_stats': state.batch_stats}
        return ensemble.combine(ensemble.apply(model, variables, images), combine)

    x_adv = attack(attacked, rng, x, y) if adversarial_weight else None

    def objective(params, batch_stats, images, weight):
        log_probs, batch_stats = log_probs_train(params, batch_stats, images)
        loss = jnp.mean(losses.cross_entropy(log_probs, y))
        return weight * loss, (batch_stats, loss, _accuracy(log_probs, y))

    of_objective = jax.grad(objective, has_aux=True)
    clean_weight = 1 / (1 + adversarial_weight)
    gradient, (batch_stats, loss, accuracy) = of_objective(
        state.params, state.batch_stats, x, clean_weight
    )
    metrics = {'clean_loss': loss, 'clean_accuracy': accuracy}
    if x_adv is not None:
        # One pass's activations at a time: 0.7 to 0.8 of the memory on a CPU.
        x_adv = ensemble.when_there(x_adv, gradient)
        of_adversarial, (batch_stats, adversarial_loss, accuracy) = of_objective(
            state.params, batch_stats, x_adv, adversarial_weight * clean_weight
        )
        gradient = optax.tree.add(gradient, of_adversarial)
        metrics['adversarial_loss'] = adversarial_loss
        metrics['adversarial_accuracy'] = accuracy
        loss = clean_weight * (loss + adversarial_weight * adversarial_loss)
    metrics['loss'] = loss
    gradient, batch_stats, metrics = mean_over_devices((gradient, batch_stats, metrics))
    metrics['gradient_norm'] = optax.tree.norm(gradient)
    updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    metrics['parameter_norm'] = optax.tree.norm(params)
    state = TrainState(
        step=state.step + 1,
        params=params,
        batch_stats=batch_stats,
        opt_state=opt_state,
    )
    return state, metrics


def _accuracy(log_probs: Array, labels: Array) -> Array:
    return jnp.mean(losses.margin(log_probs, labels) > 0)
