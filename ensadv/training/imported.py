"""Training that begins at weights that were imported, and not at random ones."""

import jax
import jax.numpy as jnp
from etils import epath
from ml_collections import ConfigDict

from ensadv.errors import UserError
from ensadv.storage import checkpoints, workdir
from ensadv.training.optim import TrainState


def step_of(path: epath.Path) -> int:
    """Returns the step that imported weights stand for in a workdir; 0 where none were."""
    record = workdir.read_record(path) or {}
    return record.get('imported', {'step': 0})['step']


def free_fields(config: ConfigDict, path: epath.Path) -> tuple[str, ...]:
    """Returns which fields of a workdir's config may still change: none of them was used.

    Args:
      config: with all fields.
      path: of a run without a checkpoint; if nothing was imported there, no more fields are free.
    """
    if not step_of(path):
        return ()
    # The snapshot has averages, or none.
    training = (f'train.{field}' for field in config.train if field != 'ema_decay')
    return 'attack', 'data', 'model.dtype', *training


def state_at(
    config: ConfigDict, snapshots: checkpoints.Checkpoints, step: int, like: TrainState
) -> TrainState:
    """Returns the state after `step` steps that left a snapshot's weights, and no momentum.

    Args:
      config: the run's.
      snapshots: the run's.
      step: of the snapshot.
      like: what `train.init_state` gives.

    Raises:
      UserError: if the snapshot is not there.
    """
    if step not in snapshots.steps():
        raise UserError(
            f'the snapshot of step {step}, which has the imported weights, is not there any more: '
            'import them again, into another workdir'
        )
    joint = config.ensemble.training == 'joint'
    flat = lambda tree: tree if joint else jax.tree.map(lambda leaf: leaf[:, 0], tree)
    raised = lambda tree: tree if joint else jax.tree.map(lambda leaf: leaf[:, None], tree)
    shapes = jax.eval_shape(lambda: flat({'params': like.params, 'batch_stats': like.batch_stats}))
    shapes = {**shapes, 'averaged': shapes} if config.train.ema_decay else shapes
    found = raised(snapshots.restore(step, shapes))
    # The optimizer counts steps, for its schedule.
    is_count = lambda leaf: jnp.issubdtype(leaf.dtype, jnp.integer)
    counted = lambda leaf: jnp.full_like(leaf, step) if is_count(leaf) else leaf
    return like.replace(
        step=jnp.full_like(like.step, step),
        params=found['params'],
        batch_stats=found['batch_stats'],
        opt_state=jax.tree.map(counted, like.opt_state),
        averaged=found.get('averaged'),
    )
