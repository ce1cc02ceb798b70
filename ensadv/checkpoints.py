"""Checkpoints and snapshots, through Orbax."""

import importlib
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from ensadv import parallel
from ensadv.errors import UserError

_TRIES = 20


class Checkpoints:
    """Trees of arrays kept in `directory`/<step>/, each whole or not there.

    A checkpoint written on some number of devices restores on any other.
    """

    def __init__(self, directory: epath.Path, keep: int | None = None):
        """Opens the directory, made at the first save.

        Args:
          directory: where.
          keep: how many of the newest stay; None: all.

        Raises:
          UserError: for gs:// without the package that Orbax needs there.
        """
        if str(directory).startswith('gs://'):
            _require_storage_client(directory)
        # Lightweight: it does not look into the steps when it is made; `steps` does, with care.
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep, create=False, lightweight_initialize=True
        )
        self._directory = directory
        self._options = options
        self._manager: ocp.CheckpointManager | None = None

    def _open(self, create: bool) -> ocp.CheckpointManager | None:
        if self._manager is None and (create or self._directory.exists()):
            self._directory.mkdir(parents=True, exist_ok=True)
            self._manager = ocp.CheckpointManager(self._directory, options=self._options)
        return self._manager

    def steps(self) -> list[int]:
        """Returns the steps there are, ascending, as they stand on disk now.

        As process 0 sees them: others may see a step later on storage that hosts share.
        """
        return parallel.agree(self._steps_by_view())

    def _steps_by_view(self) -> list[int]:
        """Returns the steps by this process's view."""
        manager = self._open(create=False)
        if manager is None:
            return []
        for left in reversed(range(_TRIES)):
            try:
                manager.reload()
                break
            except (FileNotFoundError, NotADirectoryError):
                # It listed a step that another process deleted before it looked into it.
                if not left:
                    raise
        return sorted(manager.all_steps())

    def save(self, step: int, tree: Any, *, wait: bool = False) -> None:
        """Writes a tree, in the background unless `wait`; its arrays may be donated right away."""
        manager = self._open(create=True)
        manager.save(step, args=ocp.args.StandardSave(tree), force=True)
        if wait:
            manager.wait_until_finished()

    def restore(self, step: int, like: Any) -> Any:
        """Reads the tree of `step` onto all devices.

        Args:
          step: one of `steps()`.
          like: a tree of arrays or jax.ShapeDtypeStruct with the expected shapes and dtypes.
        """
        sharding = parallel.replicated()
        abstract = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), like
        )
        return self._open(create=False).restore(step, args=ocp.args.StandardRestore(abstract))

    def delete(self, step: int) -> None:
        """Removes the tree of `step`."""
        self._open(create=False).delete(step)

    def close(self) -> None:
        """Waits until what is being written is whole."""
        if self._manager is not None:
            self._manager.wait_until_finished()
            self._manager.close()
            self._manager = None


def _require_storage_client(directory: epath.Path) -> None:
    # Orbax asks with it whether the bucket has folders.
    try:
        importlib.import_module('google.cloud.storage')
    except ImportError as error:
        raise UserError(
            f'{directory}: gs:// needs a package that is missing: pip install google-cloud-storage '
            f'({error})'
        ) from error


def open_checkpoints(workdir: epath.Path, keep: int) -> Checkpoints:
    """Opens what a run needs to go on: `optim.TrainState`s."""
    return Checkpoints(workdir / 'checkpoints', keep)


def open_snapshots(workdir: epath.Path) -> Checkpoints:
    """Opens what evaluation needs: {'params', 'batch_stats'}, every leaf [k, ...]."""
    return Checkpoints(workdir / 'snapshots')
