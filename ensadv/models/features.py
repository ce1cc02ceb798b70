"""What a network computes on its way from images to logits, layer by layer."""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from ensadv import prng
from ensadv.models.own_networks import OwnNetwork


def of_layers(model: nn.Module, variables: Any, x: Array) -> dict[str, Array]:
    """Returns the output of every layer, float32 [B, ...], by name, in the order of the names.

    A layer is a module that the network itself calls: of a Wide ResNet its first convolution, each
    residual block (before the activation), the last batch norm, and the linear layer, whose output
    are the logits. Of one that is called several times the last output counts. Batch norm takes the
    images' statistics; the running averages stay as they are.

    Args:
      model: a member's network.
      variables: a member's, without a leading axis.
      x: images [B, H, W, C].
    """
    depth = 2 if isinstance(model, OwnNetwork) else 1

    def is_layer(module: nn.Module, method: str) -> bool:
        return method == '__call__' and len(module.path) == depth

    collections = ['batch_stats', 'intermediates']
    _, updated = model.apply(
        variables, x, train=True, mutable=collections, capture_intermediates=is_layer
    )
    found = updated['intermediates']
    if depth == 2:
        found = found['network']
    outputs = {name: layer['__call__'][-1] for name, layer in sorted(found.items())}
    return {name: out.astype(jnp.float32) for name, out in outputs.items() if _is_features(out)}


def _is_features(output: Any) -> bool:
    return hasattr(output, 'dtype') and jnp.issubdtype(output.dtype, jnp.floating)


def names(model: nn.Module, image_shape: Sequence[int]) -> list[str]:
    """Returns the names of a network's layers, as `of_layers` has them; computes nothing.

    Args:
      model: a member's network.
      image_shape: (H, W, C).
    """
    x = jax.ShapeDtypeStruct((2, *image_shape), jnp.float32)

    def found(x):
        return of_layers(model, model.init(prng.key(0), x, train=False), x)

    # With the axis that there is in training, of one device.
    axis = getattr(model, 'norm_axis', None)
    x = jax.ShapeDtypeStruct((1, *x.shape), x.dtype)
    return list(jax.eval_shape(jax.vmap(found, axis_name=axis), x))
