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
from ensadv.training import from_config


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
      perturbed_share: share of training's steps that have the updates twice, see `objectives.awp`.
    """

    predictions: int
    attack_steps: int
    updates: int
    perturbed_share: float


def passes(config: ConfigDict) -> Passes:
    """Returns what a training step is made of: its objective takes clean and adversarial images."""
    objective, share = from_config.objective(config), 0.0
    if objective.perturbation:
        share = max(0.0, 1 - objective.perturbation.start / config.train.steps)
    if not objective.attacks:
        return Passes(0, 0, 1, share)
    steps = registry.training_settings(config.attack)['steps']
    return Passes(int(objective.attack_target is not None), steps, 2, share)


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
    counts = _of_one_member(
        one_device(config, dataset), config.ensemble.combine, tuple(dataset['image_shape'])
    )
    forward, attack_step, update = (count * config.ensemble.size for count in counts)
    made = passes(config)
    train_step = (
        made.predictions * forward
        + made.attack_steps * attack_step
        + (1 + made.perturbed_share) * made.updates * update
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

    def count(f: Callable[..., Any], *args: Any) -> float:
        return jax.jit(f).lower(*args).cost_analysis()['flops']

    def clean_loss(v, x, y):
        log_probs = ensemble.combine(ensemble.apply(model, v, x), combine)
        return jnp.sum(losses.cross_entropy(log_probs, y))

    def train_loss(params, stats, x, y):
        logits, stats = ensemble.apply_train(model, {'params': params, 'batch_stats': stats}, x)
        return jnp.sum(losses.cross_entropy(ensemble.combine(logits, combine), y)), stats

    forward = count(functools.partial(ensemble.apply, model), variables, x)
    attack_step = count(jax.grad(clean_loss, argnums=1), variables, x, label)
    update = count(
        jax.grad(train_loss, has_aux=True), variables['params'], variables['batch_stats'], x, label
    )
    return forward, attack_step, update
