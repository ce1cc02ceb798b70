"""Published ways to have the members of an ensemble differ, for any objective of `objectives`.

`adp` is a penalty on predictions, which goes with a cross-entropy; `gal` and `trs` are terms of
their own, on input gradients; `dverge` is a term in place of the one on clean images.

Input gradients are each member's own: of its own cross-entropy, at each image, float32. The passes
that they and distilled images take use the batch's statistics in batch norm, and leave the running
averages as they are: these take in what members are trained to classify, once a pass. In the
authors' PyTorch code every one of these passes moves them.
"""

import itertools

import jax
import jax.numpy as jnp
from jax import Array

from ensadv import losses, prng
from ensadv.attacks.attack import LEAST_GRADIENT
from ensadv.attacks.threat_model import ThreatModel, each
from ensadv.cpu import order
from ensadv.models import features
from ensadv.training.objectives import Loss, Penalty, Predict, member_cross_entropies

DETERMINANT_OFFSET = 1e-6  # on the Gram matrix's diagonal, as in ADP's code
ROUGHEST_STEPS = 6  # of a third of the radius each, as in TRS's code
LAYER = 'random'  # in place of a layer's name: another one at each step


def adp(alpha: float, beta: float) -> Penalty | None:
    """Returns ADP's penalty: -alpha H - beta log det G (Pang et al., ICML 2019).

    H is the entropy of the mean of the members' probabilities, G as in `log_determinant`. The
    authors add it to the sum of the members' cross-entropies, and in adversarial training to that
    of the adversarial images too.

    Args:
      alpha, beta: of the authors 2 and 0.5; where both are 0 there is no penalty.
    """

    def penalty(prediction, labels):
        entropy = jnp.mean(entropy_of_mean(prediction.member_logits))
        log_det = jnp.mean(log_determinant(prediction.member_logits, labels))
        metrics = {'entropy': entropy, 'log_determinant': log_det}
        return -alpha * entropy - beta * log_det, metrics

    return penalty if alpha or beta else None


def entropy_of_mean(member_logits: Array) -> Array:
    """Returns the entropy of the members' mean probabilities, in nats, float [B].

    Args:
      member_logits: float [k, B, classes].

    >>> logits = jnp.array([[[50.0, 0.0]], [[0.0, 50.0]]])  # two members, sure of different classes
    >>> f'{entropy_of_mean(logits)[0]:.4f}'  # log 2
    '0.6931'
    """
    log_probs = jax.nn.log_softmax(member_logits)
    mean = jax.nn.logsumexp(log_probs, axis=0) - jnp.log(len(member_logits))
    return -jnp.sum(jnp.exp(mean) * mean, axis=-1)


def log_determinant(member_logits: Array, labels: Array) -> Array:
    """Returns log det (G + 1e-6 I), ADP's diversity of an image, float [B].

    G is the Gram matrix [k, k] of the members' probabilities of all classes but the label, scaled
    to length 1 for each member: the identity where these are orthogonal, all ones where they agree.

    Args:
      member_logits: float [k, B, classes], k < classes.
      labels: int [B].

    >>> logits = 50 * jnp.array([[[1.0, 1.0, 0.0]], [[1.0, 0.0, 1.0]]])  # of the label 0
    >>> f'{log_determinant(logits, jnp.array([0]))[0]:.4f}'
    '0.0000'
    """
    is_label = jnp.arange(member_logits.shape[-1]) == labels[:, None]
    # Normalised over the other classes, so that they do not underflow where a member is sure.
    others = jax.nn.softmax(jnp.where(is_label, -jnp.inf, member_logits))
    units = others / jnp.linalg.norm(others, axis=-1, keepdims=True)
    gram = jnp.einsum('ibc,jbc->bij', units, units, precision='highest')
    return jnp.linalg.slogdet(gram + DETERMINANT_OFFSET * jnp.eye(len(gram[0])))[1]


def gal(weight: float) -> Loss:
    """Returns GAL: weight times log sum over pairs of members of exp(cos(g_i, g_j)), clean images.

    g are input gradients (Kariyappa & Qureshi, 2019, arXiv 1901.09981: gradient alignment loss).
    It is differentiated twice. With ReLU members are piecewise linear in the images, and DVERGE's
    authors, who compare with it, take a leaky one; `model.activation` has SiLU.

    Args:
      weight: 0.5 in the code of DVERGE's and of TRS's authors.
    """

    def loss(predict, x, x_adv, y):
        del x_adv
        found = cosines(input_gradients(predict, x, y))
        alignment = jnp.mean(jax.nn.logsumexp(found, axis=0))
        return weight * alignment, {'alignment': alignment, 'gradient_cosine': jnp.mean(found)}

    return loss


def trs(similarity: float, smoothness: float, radius: float) -> Loss:
    """Returns TRS: similarity mean |cos(g_i, g_j)| + smoothness mean |g|^2.

    g are input gradients (Yang et al., NeurIPS 2021): in the cosine at clean images, averaged over
    pairs of members; in the squares, averaged over members, at every second image itself and at
    the `roughest` point near each other one. So it is in the authors' code.

    Args:
      similarity: lambda_a of the authors, 40 for CIFAR-10.
      smoothness: 2 / 128^2 times their lambda_b, 2.5 for CIFAR-10: their penalty is twice the
        square of the gradient of a mean over 128 images.
      radius: of the ball in which points are looked for, in pixels of [0, 1]; of the authors it
        grows from 0.01 to 0.03 in training.
    """

    def loss(predict, x, x_adv, y):
        del x_adv
        total, metrics = 0.0, {}
        if similarity:
            found = jnp.mean(jnp.abs(cosines(input_gradients(predict, x, y))))
            metrics['gradient_cosine'] = found
            total += similarity * found
        if smoothness:
            near = roughest(predict, x[1::2], y[1::2], radius)
            points, labels = jnp.concatenate([x[::2], near]), jnp.concatenate([y[::2], y[1::2]])
            squares = _squares(input_gradients(predict, points, labels))
            metrics['gradient_square'] = found = jnp.mean(squares)
            total += smoothness * found
        return total, metrics

    return loss


def input_gradients(predict: Predict, images: Array, y: Array) -> Array:
    """Returns the gradients of each member's own cross-entropy at images, float32 [k, B, H, W, C].

    They can be differentiated with respect to `predict.params` and to the images.

    Args:
      predict: the ensemble.
      images: [B, H, W, C].
      y: targets, labels int32 [B] or distributions float32 [B, classes].
    """

    def of_member(variables, x):
        def loss(x):
            logits, _ = predict.model.apply(variables, x, train=True, mutable=['batch_stats'])
            return jnp.sum(losses.cross_entropy(jax.nn.log_softmax(logits), y))

        return jax.grad(loss)(x)

    return order.each_member(of_member, _variables(predict), images)


def cosines(gradients: Array) -> Array:
    """Returns the cosine of each pair of members' gradients, [pairs, B]; of a gradient of zero 0.

    Args:
      gradients: [k, B, ...].

    >>> gradients = jnp.array([[[3.0, 0.0]], [[0.0, 2.0]], [[-1e-25, 0.0]]])
    >>> [f'{cosine[0]:.1f}' for cosine in cosines(gradients)]
    ['0.0', '-1.0', '0.0']
    """
    flat = gradients.reshape(*gradients.shape[:2], -1)
    # A sure member's gradients are so small that their squares are no float32 numbers.
    largest = jax.lax.stop_gradient(jnp.max(jnp.abs(flat), axis=-1, keepdims=True))
    scaled = flat / jnp.where(largest > LEAST_GRADIENT, largest, 1)
    squares = jnp.sum(jnp.square(scaled), axis=-1, keepdims=True)
    units = scaled / jnp.sqrt(jnp.where(squares > 0, squares, 1))
    pairs = itertools.combinations(range(len(units)), 2)
    return jnp.stack([jnp.sum(units[i] * units[j], axis=-1) for i, j in pairs])


def roughest(predict: Predict, x: Array, y: Array, radius: float) -> Array:
    """Returns points near images at which members' squared input gradients are large.

    They climb the sum over members, from a uniform start in the ball, by signed steps.

    Args:
      predict: the ensemble, whose `rng` has a key for each second example.
      x: images [B, H, W, C], the second, fourth, ... of the batch.
      y: their targets.
      radius: of the linf ball.
    """
    fixed, threat = _fixed(predict), ThreatModel('linf', radius)
    climb = jax.grad(lambda points: jnp.sum(_squares(input_gradients(fixed, points, y))))

    def step(_, points):
        return threat.project(points + radius / 3 * jnp.sign(climb(points)), x)

    # The attack in training has drawn its noise from the keys themselves.
    keys = jax.vmap(lambda key: jax.random.fold_in(key, 1))(predict.rng[1::2])
    return jax.lax.fori_loop(0, ROUGHEST_STEPS, step, threat.uniform_start(keys, x))


def _squares(gradients: Array) -> Array:
    """Returns the squared L2 norms [k, B] of gradients [k, B, ...]."""
    return jnp.sum(jnp.square(gradients), axis=tuple(range(2, gradients.ndim)))


def dverge(epsilon: float, steps: int, layer: str = LAYER, start: int = 0, seed: int = 0) -> Loss:
    """Returns DVERGE's loss: sum over j != i of the cross-entropy of member i on images distilled
    from member j, summed over i (Yang et al., NeurIPS 2020).

    A distilled image looks like an image of the batch, whose label it keeps, and to member j like
    another one: see `distilled`. No member trains on images that were distilled from itself, nor on
    clean ones. Each of the k - 1 passes is of one member's images for every other member, with a
    batch norm of its own.

    Args:
      epsilon, steps, layer, seed: as in `distilled`.
      start: number of the first step with distilled images, from 0; before it images stay as they
        are, and each member trains on clean ones, k - 1 times. The authors begin with trained
        members.
    """

    def loss(predict, x, x_adv, y):
        del x_adv
        k = len(jax.tree.leaves(predict.params)[0])
        distil = lambda: distilled(predict, x, epsilon, steps, layer, seed)
        as_they_are = lambda: jnp.broadcast_to(x, (k, *x.shape))
        images = jax.lax.cond(predict.step >= start, distil, as_they_are) if start else distil()
        total, right = jnp.zeros(()), []
        for shift in range(1, k):
            prediction = predict(jnp.roll(images, -shift, axis=0))
            total += member_cross_entropies(prediction, y)
            margins = jax.vmap(losses.margin, (0, None))
            right.append(margins(prediction.member_logits, losses.labels_of(y)) > 0)
        return total, {'distilled_loss': total, 'distilled_accuracy': jnp.mean(jnp.stack(right))}

    return loss


def distilled(
    predict: Predict, x: Array, epsilon: float, steps: int, layer: str = LAYER, seed: int = 0
) -> Array:
    """Returns images that keep their looks and have another image's features, [k, B, H, W, C].

    In the ball around each image they approach, for each member in turn, the features of the
    image's neighbour in the batch, the second for the first and the first for the second: by signed
    steps along the summed gradients of the squared distance, each of L1 norm 1, as in the authors'
    code.

    Args:
      predict: the ensemble.
      x: images [B, H, W, C], B even, in an order that is random.
      epsilon: the linf ball's radius; of the authors 0.07 for CIFAR-10.
      steps: of epsilon / steps each; of the authors 10.
      layer: whose output the features are, see `features.of_layers`; 'random': one of all, drawn
        for each step. The authors draw one for each epoch.
      seed: of that draw.
    """
    fixed, threat = _fixed(predict), ThreatModel('linf', epsilon)
    key = None if layer != LAYER else jax.random.fold_in(prng.key(seed), predict.step)

    def outputs(variables, images):
        found = features.of_layers(predict.model, variables, images)
        return found if layer == LAYER else {layer: found[layer]}

    def of_member(variables, x):
        swapped = x.reshape(-1, 2, *x.shape[1:])[:, ::-1].reshape(x.shape)
        wanted = outputs(variables, swapped)
        chosen = 0 if key is None else jax.random.randint(key, (), 0, len(wanted))

        def distance(points):
            found = outputs(variables, points)
            of_each = [jnp.sum(jnp.square(found[name] - wanted[name])) for name in wanted]
            return jnp.sum(jnp.where(jnp.arange(len(of_each)) == chosen, jnp.stack(of_each), 0))

        def step(_, carry):
            points, momentum = carry
            gradient = jax.grad(distance)(points)
            length = jnp.sum(jnp.abs(gradient), axis=tuple(range(1, x.ndim)))
            momentum += gradient / each(jnp.maximum(length, LEAST_GRADIENT), x)
            points = threat.project(points - epsilon / steps * jnp.sign(momentum), x)
            return points, momentum

        return jax.lax.fori_loop(0, steps, step, (x, jnp.zeros_like(x)))[0]

    return order.each_member(of_member, _variables(fixed), x)


def _variables(predict: Predict) -> dict:
    return {'params': predict.params, 'batch_stats': predict.batch_stats}


def _fixed(predict: Predict) -> Predict:
    """Returns the ensemble as it is, for images that the gradient does not go through."""
    params = jax.lax.stop_gradient(predict.params)
    return Predict(predict.model, predict.combine, params, predict.batch_stats)
