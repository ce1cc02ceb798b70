"""What a system costs: weights, and operations per example, counted without training it."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from ensadv import build, losses, prng
from ensadv.attacks import registry
from ensadv.models import ensemble
from ensadv.training import diversity, from_config
from ensadv.training.objectives import Predict


class Operations(NamedTuple):
    """Floating-point operations per example of all members; a multiply-add counts as 2.

    XLA's count of its programs before it optimizes them, with plain convolutions, whatever
    algorithm convolves on this machine (`conv`).

    Attributes:
      forward: a prediction.
      attack_step: a gradient step of an attack.
      update: a forward and backward pass of training, for one of its losses.
      train_step: a whole training step, its attack and all passes of its objective; where weights
        are perturbed only from some step on, the average over training.
    """

    forward: float
    attack_step: float
    update: float
    train_step: float


class Passes(NamedTuple):
    """What a training step is made of.

    Attributes:
      predictions: for the attack's target.
      attack_steps: gradient steps of the attack.
      updates: forward and backward passes of the objective.
      perturbed_share: share of training's steps that have twice the updates, and what stands below,
        see `objectives.awp`.
      distillation_steps: of DVERGE, an average over training; of the operations of attack steps.
      gradient_updates: of GAL and TRS, passes whose input gradients are differentiated again.
      gradient_steps: of TRS, steps that climb the square of input gradients, for each image.
    """

    predictions: int
    attack_steps: int
    updates: int
    perturbed_share: float
    distillation_steps: float = 0.0
    gradient_updates: int = 0
    gradient_steps: float = 0.0


def passes(config: ConfigDict) -> Passes:
    """Returns what a training step is made of: its objective takes clean and adversarial images."""
    objective, train, share = from_config.objective(config), config.train, 0.0
    if objective.perturbation:
        share = max(0.0, 1 - objective.perturbation.start / train.steps)
    predictions, steps = 0, 0
    if objective.attacks:
        predictions = int(objective.attack_target is not None)
        steps = registry.training_settings(config.attack)['steps']
    made = Passes(predictions, steps, 1 + objective.attacks, share)
    if train.diversity == 'dverge':
        distils = train.dverge_steps * max(0.0, 1 - train.dverge_start / train.steps)
        updates = config.ensemble.size - 1 + objective.attacks
        return made._replace(updates=updates, distillation_steps=distils)
    if train.diversity == 'gal':
        return made._replace(gradient_updates=int(train.gal_weight > 0))
    if train.diversity == 'trs':
        smooths = train.trs_smoothness > 0
        return made._replace(
            gradient_updates=(train.trs_similarity > 0) + smooths,
            gradient_steps=smooths * diversity.ROUGHEST_STEPS / 2,  # of every second image
        )
    return made


def size(tree: Any) -> int:
    """Returns the number of elements in a tree's arrays, or in the shapes of such."""
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def one_device(config: ConfigDict, dataset: Mapping[str, Any]) -> nn.Module:
    """Returns a member's network as it is counted: on one device, with plain convolutions.

    Args:
      config: resolved, see `build.resolve`.
      dataset: as `build.model` takes it.
    """
    config = config.copy_and_resolve_references()
    # There is no other device to average batch statistics with.
    config.batch_norm.sync = False
    # The same number of operations on every machine, but for batch norm's sums, which on a CPU are
    # matrix multiplications: 0.3 % more for an update of a WRN-10-1, 0.03 % of a WRN-28-10.
    config.model.conv = 'grouped'
    return build.model(config, dataset, dtype=config.model.dtype)


def operations(config: ConfigDict, dataset: Mapping[str, Any]) -> Operations:
    """Counts a system's operations.

    Args:
      config: resolved, see `build.resolve`.
      dataset: 'num_classes', 'image_shape', 'mean' and 'std', as `data.Dataset.describe` gives
        them.
    """
    model, shape = one_device(config, dataset), tuple(dataset['image_shape'])
    counts = _of_one_member(model, config.ensemble.combine, shape)
    forward, attack_step, update = (count * config.ensemble.size for count in counts)
    made = passes(config)
    passed = made.updates * update + made.distillation_steps * attack_step
    if made.gradient_updates:
        counts = _of_one_gradient(model, shape)
        gradient_update, gradient_step = (count * config.ensemble.size for count in counts)
        passed += made.gradient_updates * gradient_update + made.gradient_steps * gradient_step
    train_step = (
        made.predictions * forward
        + made.attack_steps * attack_step
        + (1 + made.perturbed_share) * passed
    )
    return Operations(forward, attack_step, update, train_step)


@functools.cache
def _of_one_member(
    model: nn.Module, combine: str, image_shape: tuple[int, ...]
) -> tuple[float, float, float]:
    """Returns one member's operations of a prediction, of an attack's step, and of an update."""
    variables = jax.eval_shape(lambda: ensemble.init(model, prng.key(0), 1, image_shape))
    x = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    label = jax.ShapeDtypeStruct((1,), jnp.int32)

    def clean_loss(v, x, y):
        log_probs = ensemble.combine(ensemble.apply(model, v, x), combine)
        return jnp.sum(losses.cross_entropy(log_probs, y))

    def train_loss(params, stats, x, y):
        logits, stats = ensemble.apply_train(model, {'params': params, 'batch_stats': stats}, x)
        return jnp.sum(losses.cross_entropy(ensemble.combine(logits, combine), y)), stats

    forward = _count(functools.partial(ensemble.apply, model), variables, x)
    attack_step = _count(jax.grad(clean_loss, argnums=1), variables, x, label)
    update = _count(
        jax.grad(train_loss, has_aux=True), variables['params'], variables['batch_stats'], x, label
    )
    return forward, attack_step, update


@functools.cache
def _of_one_gradient(model: nn.Module, image_shape: tuple[int, ...]) -> tuple[float, float]:
    """Returns one member's operations of a squared input gradient, differentiated.

    With respect to the weights, and to the images.
    """
    variables = jax.eval_shape(lambda: ensemble.init(model, prng.key(0), 1, image_shape))
    x = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    label = jax.ShapeDtypeStruct((1,), jnp.int32)

    def square(params, stats, x, y):
        predict = Predict(model, 'probs', params, stats)
        return jnp.sum(jnp.square(diversity.input_gradients(predict, x, y)))

    arguments = variables['params'], variables['batch_stats'], x, label
    return tuple(_count(jax.grad(square, argnums=place), *arguments) for place in (0, 2))


def _count(f: Callable[..., Any], *args: Any) -> float:
    return jax.jit(f).lower(*args).cost_analysis()['flops']
