"""What training descends. An objective is a weighted sum of terms."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
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
    """The ensemble in training: images -> `Prediction`.

    The images are [B, H, W, C], or each member's own, [k, B, H, W, C]. Batch norm takes their
    statistics, and `batch_stats` takes them in, call after call.

    Attributes:
      model: the members' network.
      combine: how members' outputs become one, see `ensemble.combine`.
      params: the members' weights, [k, ...].
      batch_stats: the running averages so far, [k, ...].
      step: int32 [], the step's number, from 0.
      rng: keys [B], one per example.
    """

    model: nn.Module
    combine: str
    params: Any
    batch_stats: Any
    step: Array | None = None
    rng: Array | None = None

    def __call__(self, images: Array) -> Prediction:
        variables = {'params': self.params, 'batch_stats': self.batch_stats}
        logits, self.batch_stats = ensemble.apply_train(self.model, variables, images)
        return Prediction(logits, ensemble.combine(logits, self.combine))


# (predict, x, x_adv, y) -> (loss [], metrics) of images x and x_adv [B, H, W, C] and targets y:
# labels int32 [B], or distributions float32 [B, classes]. The loss is an average over the batch,
# differentiated with respect to `predict.params`.
Loss = Callable[[Predict, Array, Array | None, Array], tuple[Array, Metrics]]
# (prediction, labels int32 [B]) -> (what is added to a cross-entropy [], metrics).
Penalty = Callable[[Prediction, Array], tuple[Array, Metrics]]


class Term(NamedTuple):
    """A part of an objective with a gradient of its own; `loss` counts `weight` times."""

    weight: float
    loss: Loss


class WeightPerturbation(NamedTuple):
    """How far and from when on weights are perturbed, see `awp`.

    Attributes:
      gamma: norm of a layer's perturbation / norm of its weights.
      start: number of the first step with it, from 0.
    """

    gamma: float
    start: int = 0


class Objective(NamedTuple):
    """What training descends: `scale` times the sum of the weighted terms.

    Attributes:
      terms: they are differentiated one after the other, so that memory holds the activations of
        one at a time: what can be a term of its own should be one. A loss of both passes, such as
        a divergence between them, is one term.
      scale: of the sum.
      attacks: whether there are adversarial images; if not, x_adv is None.
      attack_target: (log_prob_fn, x, y) -> an array [B, ...], which the attack's loss is given in
        place of `y`, where `log_prob_fn` is what is attacked; None: `y`.
      perturbation: of the weights, see `awp`; None: they stay as they are.
    """

    terms: tuple[Term, ...]
    scale: float = 1.0
    attacks: bool = True
    attack_target: Callable[[Callable[[Array], Array], Array, Array], Array] | None = None
    perturbation: WeightPerturbation | None = None


def paper(
    adversarial_weight: float,
    label_smoothing: float = 0.0,
    members: bool = False,
    penalty: Penalty | None = None,
) -> Objective:
    """Returns the objective of Algorithm 1: (L(x) + rho L(x_adv)) / (1 + rho).

    L is the ensemble's cross-entropy. The clean and the adversarial images are two forward passes
    with a batch norm each; running averages take both, the clean ones first. That is so in all
    objectives here.

    Args:
      adversarial_weight: rho. At 0 it is clean training, without an attack.
      label_smoothing: share of the targets' mass that is spread over all classes evenly.
      members: whether L is the sum of the members' own cross-entropies instead.
      penalty: added to each L, as that of `diversity.adp`.
    """
    loss = functools.partial(
        _cross_entropy, label_smoothing=label_smoothing, members=members, penalty=penalty
    )

    def clean(predict, x, x_adv, y):
        del x_adv
        return loss('clean', predict(x), y)

    def adversarial(predict, x, x_adv, y):
        del x
        return loss('adversarial', predict(x_adv), y)

    if not adversarial_weight:
        return Objective((Term(1, clean),), attacks=False)
    terms = Term(1, clean), Term(adversarial_weight, adversarial)
    return Objective(terms, scale=1 / (1 + adversarial_weight))


def trades(
    beta: float,
    label_smoothing: float = 0.0,
    members: bool = False,
    penalty: Penalty | None = None,
) -> Objective:
    """Returns TRADES: L(x) + beta KL(p(x) || p(x_adv)) (Zhang et al., ICML 2019).

    The attack climbs that KL too, from the ensemble's prediction at x, which it takes as given. The
    objective's gradient goes through both predictions, as in the authors' code.

    Args:
      beta: 1 / lambda of the paper. At 0 it is clean training, without an attack.
      label_smoothing, members, penalty: of L, as in `paper`.
    """
    cross_entropy = functools.partial(
        _cross_entropy, label_smoothing=label_smoothing, members=members
    )

    def loss(predict, x, x_adv, y):
        clean, adversarial = predict(x), predict(x_adv)
        natural, metrics = cross_entropy('clean', clean, y, penalty=penalty)
        metrics |= cross_entropy('adversarial', adversarial, y)[1]
        divergence = jnp.mean(losses.kl_divergence(clean.log_probs, adversarial.log_probs))
        metrics['divergence'] = divergence
        return natural + beta * divergence, metrics

    def clean_prediction(log_prob_fn, x, y):
        # The cross-entropy to a distribution is KL but for its entropy, which x_adv does not alter.
        del y
        return jnp.exp(log_prob_fn(x))

    if not beta:
        return paper(0.0, label_smoothing, members, penalty)
    return Objective((Term(1, loss),), attack_target=clean_prediction)


def mart(beta: float) -> Objective:
    """Returns MART: BCE(x_adv) + beta (1 - p(y | x)) KL(p(x) || p(x_adv)) (Wang et al., ICLR 2020).

    BCE is `losses.boosted_cross_entropy`. The KL counts the more, the less sure the ensemble is of
    the clean image's label. Targets have to be labels.

    Args:
      beta: lambda of the paper.
    """

    def loss(predict, x, x_adv, y):
        both = predict(x), predict(x_adv)
        clean, adversarial = (prediction.log_probs for prediction in both)
        boosted = jnp.mean(losses.boosted_cross_entropy(adversarial, y))
        doubt = -jnp.expm1(-losses.cross_entropy(clean, y))
        divergence = jnp.mean(doubt * losses.kl_divergence(clean, adversarial))
        metrics = _cross_entropy('clean', both[0], y)[1]
        metrics |= _cross_entropy('adversarial', both[1], y)[1]
        metrics |= {'boosted_loss': boosted, 'divergence': divergence}
        return boosted + beta * divergence, metrics

    return Objective((Term(1, loss),))


def awp(objective: Objective, gamma: float, start: int = 0) -> Objective:
    """Returns an objective at adversarially perturbed weights (AWP, Wu et al., NeurIPS 2020).

    After the attack, each layer of each member moves along the objective's gradient g, by gamma
    times the norm of its weights w: v = gamma |w| g / |g|, in one step as the authors have it. The
    gradient at w + v, of the same images, is what w descends. Kernels alone are perturbed: so it is
    in the authors' code, which passes over biases and batch norm's parameters.

    Metrics, and batch norm's running averages, are of the passes at w, for w is what is evaluated.
    The authors' running averages are of the passes at w + v.

    Args:
      objective: any.
      gamma: at 0 nothing is perturbed.
      start: number of the first step with it, from 0; before it no time is spent.
    """
    return objective._replace(perturbation=WeightPerturbation(gamma, start) if gamma else None)


def _cross_entropy(
    name: str,
    prediction: Prediction,
    y: Array,
    label_smoothing: float = 0.0,
    members: bool = False,
    penalty: Penalty | None = None,
) -> tuple[Array, Metrics]:
    """Returns the loss, with its penalty, and the metrics <name>_loss and <name>_accuracy."""
    labels = losses.labels_of(y)
    if label_smoothing:
        classes = prediction.log_probs.shape[-1]
        y = y if y.ndim == 2 else jax.nn.one_hot(y, classes)
        y = optax.smooth_labels(y, label_smoothing)
    if members:
        loss = member_cross_entropies(prediction, y)
    else:
        loss = jnp.mean(losses.cross_entropy(prediction.log_probs, y))
    accuracy = jnp.mean(losses.margin(prediction.log_probs, labels) > 0)
    metrics = {f'{name}_loss': loss, f'{name}_accuracy': accuracy}
    if penalty:
        added, found = penalty(prediction, labels)
        loss += added
        metrics |= {f'{name}_{what}': value for what, value in found.items()}
    return loss, metrics


def member_cross_entropies(prediction: Prediction, y: Array) -> Array:
    """Returns the sum over members of their own cross-entropies, [] (averages over the batch)."""
    log_probs = jax.nn.log_softmax(prediction.member_logits)
    return jnp.sum(jnp.mean(jax.vmap(losses.cross_entropy, (0, None))(log_probs, y), axis=1))


# From the config's group `train`, by `train.objective`. `options` are members and penalty, as
# `paper` has them.
OBJECTIVES: dict[str, Callable[..., Objective]] = {
    'paper': lambda train, **options: paper(
        train.adversarial_weight, train.label_smoothing, **options
    ),
    'trades': lambda train, **options: trades(train.beta, train.label_smoothing, **options),
    'mart': lambda train, **options: mart(train.beta),
}
