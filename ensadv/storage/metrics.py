"""Metrics of a run: to the log and, through CLU, to TensorBoard; its progress and its profile."""

import contextlib
import functools
import io
import time
from collections.abc import Iterator, Mapping, Sequence
from types import ModuleType
from typing import Any

import jax
from absl import logging
from etils import epath

from ensadv.errors import StorageError
from ensadv.runtime import distributed, progress
from ensadv.runtime.tf_import import import_tensorflow
from ensadv.storage import files

_PREFIX = 'events.out.tfevents.'  # of the names of TensorBoard's files


@functools.cache
def _import_clu() -> ModuleType | None:
    """Returns CLU's metric_writers; None where TensorFlow, which they need, cannot be had."""
    try:
        import_tensorflow()  # CLU imports it at once
        from clu import metric_writers
    except ImportError as error:
        logging.debug('TensorBoard files by tensorboard itself: %s', error)
        return None
    return metric_writers


@functools.cache
def _import_tensorboard() -> ModuleType | None:
    """Returns TensorBoard's own writer of event files; None, with one warning, without it."""
    try:
        from tensorboard.summary.writer import event_file_writer
    except ImportError as error:
        logging.warning('metrics go to the log only, not to TensorBoard: %s', error)
        return None
    return event_file_writer


def _event(step: int, **content: Any) -> Any:
    from tensorboard.compat.proto import event_pb2

    return event_pb2.Event(wall_time=time.time(), step=step, **content)


class _EventFile:
    """What CLU's MetricWriter does for TensorBoard, without TensorFlow: the same tags and forms."""

    def __init__(self, directory: epath.Path):
        self._file = _import_tensorboard().EventFileWriter(str(directory))

    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        from tensorboard.plugins.scalar.summary_v2 import scalar_pb

        for tag, value in scalars.items():
            self._file.add_event(_event(step, summary=scalar_pb(tag, value)))

    def write_hparams(self, hparams: Mapping[str, Any]) -> None:
        from tensorboard.plugins.hparams.summary_v2 import hparams_pb

        self._file.add_event(_event(0, summary=hparams_pb(hparams)))

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def _drop_overtaken(directory: epath.Path, first_step: int) -> None:
    """Tells TensorBoard to drop what it has read so far of `first_step` and later."""
    from tensorboard.compat.proto import event_pb2
    from tensorboard.summary.writer.record_writer import RecordWriter

    start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
    content = io.BytesIO()
    records = RecordWriter(content)
    records.write(_event(0, file_version='brain.Event:2').SerializeToString())
    # The first one that it reads in a directory drops nothing, and older files may have none.
    for _ in range(2):
        records.write(_event(first_step, session_log=start).SerializeToString())
    # It reads files in the order of their names, which begin with the second: after those of
    # earlier processes, and before the one that follows.
    this_second = lambda: f'{_PREFIX}{int(time.time()):010d}.'
    paths = directory.iterdir() if directory.exists() else ()
    if any(path.name.startswith(this_second()) for path in paths):
        time.sleep(1)
    files.write_bytes(directory / f'{this_second()}0', content.getvalue())


@contextlib.contextmanager
def _storage_errors(directory: epath.Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # whatever TensorFlow, CLU, TensorBoard and the profiler raise
        raise files.storage_error(directory, files.reason(error)) from error


class Writer:
    """Writes scalars to the log, and to files that TensorBoard reads.

    Only process 0 writes files.
    """

    def __init__(self, directory: epath.Path | None, *, first_step: int):
        """Opens a file.

        Args:
          directory: where; None: nowhere, and scalars only go to the log.
          first_step: the first that is written; what is there of it and of later ones, from a
            process that was killed, TensorBoard does not show any more.

        Raises:
          StorageError: here and in all methods, if the file cannot be written.
        """
        self._directory = directory
        self._file: Any = None
        if directory is None or not distributed.is_main():
            return
        # First, since TensorBoard as well imports TensorFlow, and less quietly.
        clu = _import_clu()
        if not _import_tensorboard():
            return
        with self._writing():
            _drop_overtaken(directory, first_step)
            if clu:
                # Beside training, as each writing may be a request.
                self._file = clu.AsyncWriter(clu.SummaryWriter(str(directory)))
            else:
                self._file = _EventFile(directory)

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            with _storage_errors(self._directory):
                yield
        except StorageError:
            self._file = None  # it would fail again as it is closed
            raise

    def scalars(self, step: int, values: Mapping[str, float], *, log: bool = True) -> None:
        """Writes scalars, and unless told not to logs them."""
        if log:
            shown = ', '.join(f'{tag}={value:.6g}' for tag, value in sorted(values.items()))
            logging.info('[%d] %s', step, shown)
        if self._file:
            with self._writing():
                self._file.write_scalars(step, dict(values))

    def hyperparameters(self, values: Mapping[str, Any]) -> None:
        """Writes a run's settings, flat: {'train.steps': 500, ...}. Each of a list has its own."""
        if not self._file:
            return
        flat: dict[str, Any] = {}
        for name, value in values.items():
            several = isinstance(value, Sequence) and not isinstance(value, str)
            items = {f'{name}.{i}': v for i, v in enumerate(value)} if several else {name: value}
            flat |= {name: '' if value is None else value for name, value in items.items()}
        with self._writing():
            self._file.write_hparams(flat)

    def flush(self) -> None:
        """Waits until everything is on disk."""
        if self._file:
            with self._writing():
                self._file.flush()

    def close(self) -> None:
        """Waits until everything is on disk."""
        if self._file:
            with self._writing():
                self._file.close()
        self._file = None


class _Profile:
    """JAX's profile of some steps, for TensorBoard."""

    def __init__(self, directory: epath.Path, first_step: int, num_steps: int):
        self._directory = directory
        self._first_step: int | None = first_step
        self._num_steps = num_steps
        self._until: int | None = None

    def step(self, step: int) -> None:
        """Is told that step `step` is reached."""
        if self._until is not None and step >= self._until:
            self.close()
        elif self._first_step is not None and step >= self._first_step:
            self._first_step = None
            self._until = step + self._num_steps
            with _storage_errors(self._directory):
                jax.profiler.start_trace(str(self._directory))

    def close(self) -> None:
        """Writes what there is."""
        if self._until is not None:
            self._until = None
            with _storage_errors(self._directory):
                jax.profiler.stop_trace()


class TrainingLog(Writer):
    """Writes one training run's scalars, and shows its progress."""

    def __init__(
        self, workdir: epath.Path, *, label: str, steps: int, first_step: int,
        profile_step: int, profile_steps: int,
    ):  # fmt: skip
        """Opens TensorBoard's file in `workdir`, and the progress, `bar`.

        Args:
          workdir: the run's.
          label: the run's name in its progress.
          steps: at which the run ends.
          first_step: from which it goes on.
          profile_step: from which a profile is taken; 0: none.
          profile_steps: for how many steps.
        """
        # What was written at the step that it goes on from is not written again.
        super().__init__(workdir, first_step=first_step + 1)
        self._profile = None
        if profile_step and distributed.is_main():
            self._profile = _Profile(workdir, profile_step, profile_steps)
        self.bar = progress.Bar(total=steps, initial=first_step, label=label, unit='step')

    def scalars(self, step: int, values: Mapping[str, float], *, log: bool = True) -> None:
        """Writes scalars, and shows the accuracies in the progress."""
        super().scalars(step, values, log=log)
        shown = {k: values[k] for k in ('clean_accuracy', 'adversarial_accuracy') if k in values}
        self.bar.set_postfix({k: f'{v:.2f}' for k, v in shown.items()}, refresh=False)

    def step(self, step: int) -> None:
        """Is told after each call that step `step` is reached."""
        self.bar.update(step - self.bar.n)
        if self._profile:
            self._profile.step(step)

    def close(self) -> None:
        """Waits until everything is on disk."""
        self.bar.close()
        if self._profile:
            self._profile.close()
        super().close()
