"""Checkpoints and snapshots, through Orbax."""

import contextlib
import importlib
import zlib
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from etils import epath

from ensadv.errors import TrainingError, UserError
from ensadv.runtime import distributed
from ensadv.storage import files

_TRIES = 20
_STEP_NAMES = ocp.path.step.standard_name_format()
_CHECKSUMS = 'crc32'  # of every array: Orbax has none, and a flipped bit would be a wrong number


class DamagedError(TrainingError):
    """A checkpoint or snapshot that cannot be read, or is not what was written."""


class Checkpoints:
    """Trees of arrays kept in `directory`/<step>/, each whole or not there.

    A checkpoint written on some number of devices restores on any other.
    """

    def __init__(self, directory: epath.Path, keep: int | None = None, *, tidy: bool = False):
        """Opens the directory, made at the first save.

        Args:
          directory: where.
          keep: how many of the newest stay; None: all.
          tidy: whether to delete what a killed process left half written. Only for whom no other
            process writes beside.

        Raises:
          UserError: for gs:// without the package that Orbax needs there.
        """
        if str(directory).startswith('gs://'):
            _require_storage_client(directory)
        # Lightweight: it does not look into the steps when it is made; `steps` does, with care.
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep,
            create=False,
            lightweight_initialize=True,
            cleanup_tmp_directories=tidy,
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
        """Returns the steps there are, damaged ones too, ascending, as they stand on disk now.

        As process 0 sees them: others may see a step later on storage that hosts share.
        """
        return distributed.agree(self._steps_by_view())

    def _steps_by_view(self) -> list[int]:
        """Returns the steps by this process's view."""
        # Not by the manager, which reads files of each step, and fails where one is damaged.
        listed = lambda: sorted(found.step for found in _STEP_NAMES.find_all(self._directory))
        for _ in range(_TRIES):
            # It may list a step that another process deletes before it looks into it.
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                return listed()
        return listed()

    def save(self, step: int, tree: Any, *, wait: bool = False) -> None:
        """Writes a tree, in the background unless `wait`; its arrays may be donated right away.

        Among several processes always as with `wait`: Orbax's threads of two savings at a time
        would meet at the same barrier, which JAX refuses.

        Raises:
          StorageError: if this cannot be written, or what was written in the background could not.
        """
        # Copies, since a CPU's arrays are shared with NumPy.
        arrays = jax.tree.map(np.array, jax.device_get(tree))
        try:
            manager = self._open(create=True)
            manager.save(
                step,
                args=ocp.args.StandardSave(arrays),
                custom_metadata={_CHECKSUMS: _checksums(arrays)},
                force=True,
            )
            if wait or distributed.num_processes() > 1:
                manager.wait_until_finished()
        except Exception as error:  # whatever Orbax, TensorStore and the storage raise
            raise files.storage_error(self._directory, files.reason(error)) from error

    def restore(self, step: int, like: Any) -> Any:
        """Reads the tree of `step` onto all devices.

        Args:
          step: one of `steps()`.
          like: a tree of arrays or jax.ShapeDtypeStruct with the expected shapes and dtypes.

        Raises:
          DamagedError: if it cannot be read, or is not to the bit what was written.
        """
        sharding = distributed.replicated()
        abstract = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), like
        )
        problem = ''
        try:
            tree, written = self._read(step, abstract)
        except Exception as error:  # a file that lacks, is empty, or is not what it was
            problem = files.reason(error)
        else:
            found = _checksums(jax.device_get(tree))
            if wrong := sorted(name for name in found if written.get(name) != found[name]):
                problem = (
                    f'{len(wrong)} of {len(found)} arrays are not what was written, the first is '
                    f'{wrong[0]}'
                )
        if distributed.any_process(bool(problem)):
            # The manager takes what it found in this step for the form of all.
            self.close()
            path = self._directory / str(step)
            raise DamagedError(f'{path}: {problem or "another process cannot read it"}')
        return tree

    def _read(self, step: int, abstract: Any) -> tuple[Any, dict[str, int]]:
        """Returns the tree of a step, and the checksums that it was written with."""
        manager = self._open(create=False)
        tree = manager.restore(step, args=ocp.args.StandardRestore(abstract))
        return tree, manager.metadata(step).custom_metadata[_CHECKSUMS]

    def restore_newest(self, like: Any) -> tuple[int, Any] | None:
        """Reads the newest tree that is whole.

        Damaged ones that are newer are renamed to <step>.damaged.

        Args:
          like: as in `restore`.

        Returns:
          Its step and the tree; None where there is none.

        Raises:
          DamagedError: if there are some, and none is whole.
        """
        damaged: dict[int, DamagedError] = {}
        for step in reversed(self.steps()):
            try:
                tree = self.restore(step, like)
            except DamagedError as error:
                damaged[step] = error
                continue
            for newer, error in damaged.items():
                logging.warning(
                    '%s: damaged; taking %s instead',
                    error,
                    self._directory / str(step),
                )
                self._put_aside(newer)
            return step, tree
        if damaged:
            raise DamagedError(
                f'no step in {self._directory} can be read: {"; ".join(map(str, damaged.values()))}'
            )
        return None

    def _put_aside(self, step: int) -> None:
        """Renames a damaged step, so that it is neither found again nor in the way."""
        if distributed.is_main():
            aside = self._directory / f'{step}.damaged'
            if aside.exists():
                aside.rmtree()
            (self._directory / str(step)).rename(aside)
        distributed.barrier('put aside')
        # It remembers which steps there are.
        self.close()

    def delete(self, step: int) -> None:
        """Removes the tree of `step`."""
        # The manager knows the steps that there were when it was made.
        self.close()
        self._open(create=False).delete(step)

    def close(self) -> None:
        """Waits until what is being written is whole.

        Raises:
          StorageError: if it could not be written.
        """
        if self._manager is None:
            return
        manager, self._manager = self._manager, None
        try:
            manager.wait_until_finished()
            manager.close()
        except Exception as error:
            raise files.storage_error(self._directory, files.reason(error)) from error


def _checksums(tree: Any) -> dict[str, int]:
    """Returns each array's CRC-32, by its path in the tree."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {
        jax.tree_util.keystr(path): zlib.crc32(np.ascontiguousarray(leaf)) for path, leaf in leaves
    }


def _require_storage_client(directory: epath.Path) -> None:
    # Orbax asks with it whether the bucket has folders.
    try:
        importlib.import_module('google.cloud.storage')
    except ImportError as error:
        raise UserError(
            f'{directory}: gs:// needs a package that is missing: pip install google-cloud-storage '
            f'({error})'
        ) from error


def open_checkpoints(path: epath.Path, keep: int, *, tidy: bool = False) -> Checkpoints:
    """Opens what a run needs to go on: `optim.TrainState`s."""
    return Checkpoints(path / 'checkpoints', keep, tidy=tidy)


def open_snapshots(path: epath.Path, *, tidy: bool = False) -> Checkpoints:
    """Opens what evaluation needs: {'params', 'batch_stats'}, every leaf [k, ...].

    Where training keeps averages over the steps, 'averaged' has the same of them.
    """
    return Checkpoints(path / 'snapshots', tidy=tidy)
