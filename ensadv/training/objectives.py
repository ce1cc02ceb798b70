"""What training descends. An objective is a weighted sum of terms."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from ensadv import losses
from ensadv.models import ensemble

Metrics = dict[str, Array]  # scalars, averages over the batch


class Prediction(NamedTuple):
    """What an ensemble predicts for a batch.

    Attributes:
      member_logits: float32 [k, B, classes].
      log_probs: the ensemble's, float32 [B, classes].
    """

    member_logits: Array
    log_probs: Array


@dataclasses.dataclass
class Predict:
    """The ensemble in training: images [B, H, W, C] -> `Prediction`.

    Batch norm takes the statistics of the images, and `batch_stats` takes them in, call after call.

    Attributes:
      model: the members' network.
      combine: how members' outputs become one, see `ensemble.combine`.
      params: the members' weights, [k, ...].
      batch_stats: the running averages so far, [k, ...].
    """

    model: nn.Module
    combine: str
    params: Any
    batch_stats: Any

    def __call__(self, images: Array) -> Prediction:
        variables = {'params': self.params, 'batch_stats': self.batch_stats}
        logits, self.batch_stats = ensemble.apply_train(self.model, variables, images)
        return Prediction(logits, ensemble.combine(logits, self.combine))


# (predict, x, x_adv, y) -> (loss [], metrics) of images x and x_adv [B, H, W, C] and labels y [B].
# The loss is an average over the batch, differentiated with respect to `predict.params`.
Loss = Callable[[Predict, Array, Array | None, Array], tuple[Array, Metrics]]


class Term(NamedTuple):
    """A part of an objective with a gradient of its own; `loss` counts `weight` times."""

    weight: float
    loss: Loss


class Objective(NamedTuple):
    """What training descends: `scale` times the sum of the weighted terms.

    Attributes:
      terms: they are differentiated one after the other, so that memory holds the activations of
        one at a time: what can be a term of its own should be one. A loss of both passes, such as
        a divergence between them, is one term.
      scale: of the sum.
      attacks: whether there are adversarial images; if not, x_adv is None.
      attack_target: (log_prob_fn, x, y) -> an array [B, ...], which the attack's loss is given in
        place of the labels, where `log_prob_fn` is what is attacked; None: the labels.
    """

    terms: tuple[Term, ...]
    scale: float = 1.0
    attacks: bool = True
    attack_target: Callable[[Callable[[Array], Array], Array, Array], Array] | None = None


def paper(adversarial_weight: float) -> Objective:
    """Returns the objective of Algorithm 1: (L(x) + rho L(x_adv)) / (1 + rho).

    L is the ensemble's cross-entropy. The clean and the adversarial images are two forward passes
    with a batch norm each; running averages take both, the clean ones first.

    Args:
      adversarial_weight: rho. At 0 it is clean training, without an attack.
    """

    def clean(predict, x, x_adv, y):
        del x_adv
        return _cross_entropy('clean', predict(x).log_probs, y)

    def adversarial(predict, x, x_adv, y):
        del x
        return _cross_entropy('adversarial', predict(x_adv).log_probs, y)

    if not adversarial_weight:
        return Objective((Term(1, clean),), attacks=False)
    terms = Term(1, clean), Term(adversarial_weight, adversarial)
    return Objective(terms, scale=1 / (1 + adversarial_weight))


def _cross_entropy(name: str, log_probs: Array, y: Array) -> tuple[Array, Metrics]:
    """Returns the loss, and the metrics <name>_loss and <name>_accuracy."""
    loss = jnp.mean(losses.cross_entropy(log_probs, y))
    accuracy = jnp.mean(losses.margin(log_probs, y) > 0)
    return loss, {f'{name}_loss': loss, f'{name}_accuracy': accuracy}


OBJECTIVES = {'paper': paper}
