"""Metrics, progress and profiles, through CLU and tqdm."""

import functools
import sys
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import tqdm
from absl import logging
from etils import epath

from ensadv import parallel
from ensadv.tf_import import import_tensorflow

LOG_SECONDS = 30  # between two lines of progress where there is no terminal


class _LogStream:
    """Takes a progress bar's text to the log, line by line."""

    def write(self, text: str) -> None:
        # Where bars are nested tqdm moves the cursor with this code.
        if line := text.replace('\x1b[A', '').strip():
            logging.info('%s', line)

    def flush(self) -> None:
        pass


def progress(*, total: int, initial: int = 0, label: str, unit: str) -> tqdm.tqdm:
    """Returns a tqdm with rate and time left: a bar on a terminal, lines in the log elsewhere.

    Only process 0 shows it.
    """
    settings = {'total': total, 'initial': initial, 'desc': label, 'unit': unit}
    if not parallel.is_main():
        return tqdm.tqdm(**settings, disable=True)
    if sys.stderr.isatty():
        return tqdm.tqdm(**settings, dynamic_ncols=True, leave=False)
    line = '{desc}: {percentage:.0f}% ({n_fmt}/{total_fmt}), {rate_fmt}, {remaining} left{postfix}'
    return tqdm.tqdm(
        **settings, file=_LogStream(), mininterval=LOG_SECONDS, delay=LOG_SECONDS,
        bar_format=line, leave=False,
    )  # fmt: skip


class _LogWriter:
    """The part of CLU's MetricWriter that training uses, for where CLU cannot be imported."""

    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        logging.info('[%d] %s', step, ', '.join(f'{k}={v:.6g}' for k, v in scalars.items()))

    def write_hparams(self, hparams: Mapping[str, Any]) -> None:
        logging.info('[Hyperparameters] %s', dict(hparams))

    def flush(self) -> None:
        pass

    def close(self) -> None:
        pass


@functools.cache
def _import_clu() -> tuple[ModuleType, ModuleType] | None:
    """Returns CLU's metric_writers and periodic_actions; None, with one warning, without them."""
    try:
        import_tensorflow()  # CLU imports it at once
        from clu import metric_writers, periodic_actions
    except ImportError as error:
        logging.warning('metrics go to the log only, not to TensorBoard: %s', error)
        return None
    return metric_writers, periodic_actions


def open_writer(directory: epath.Path) -> Any:
    """Returns CLU's writer to the log and to TensorBoard; to the log alone without TensorFlow.

    Only process 0 writes TensorBoard's files.
    """
    clu = _import_clu() if parallel.is_main() else None
    return clu[0].create_default_writer(directory) if clu else _LogWriter()


class TrainingLog:
    """Writes one training run's scalars, and shows its progress."""

    def __init__(
        self, workdir: epath.Path, *, label: str, steps: int, first_step: int,
        profile_step: int, profile_steps: int,
    ):  # fmt: skip
        """Opens TensorBoard's file in `workdir`.

        Args:
          workdir: the run's.
          label: the run's name in its progress.
          steps: at which the run ends.
          first_step: from which it goes on.
          profile_step: from which a profile is taken; 0: none.
          profile_steps: for how many steps.
        """
        self._writer = open_writer(workdir)
        self._actions = []
        if parallel.is_main() and (clu := _import_clu()):
            _, periodic_actions = clu
            self._actions.append(
                periodic_actions.ReportProgress(
                    num_train_steps=steps, every_secs=LOG_SECONDS, writer=self._writer
                )
            )
            if profile_step:
                self._actions.append(
                    periodic_actions.Profile(
                        logdir=workdir,
                        first_profile=profile_step,
                        every_secs=None,
                        num_profile_steps=profile_steps,
                        profile_duration_ms=None,
                    )
                )
        self._bar = progress(total=steps, initial=first_step, label=label, unit='step')

    def hyperparameters(self, values: Mapping[str, Any]) -> None:
        """Writes the run's settings, flat."""
        self._writer.write_hparams(dict(values))

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Writes scalars, and shows the accuracies in the progress."""
        self._writer.write_scalars(step, dict(values))
        shown = {k: values[k] for k in ('clean_accuracy', 'adversarial_accuracy') if k in values}
        self._bar.set_postfix({k: f'{v:.2f}' for k, v in shown.items()}, refresh=False)

    def step(self, step: int) -> None:
        """Is told after each call that step `step` is reached."""
        self._bar.update(step - self._bar.n)
        for action in self._actions:
            action(step)

    def close(self) -> None:
        """Waits until everything is written."""
        self._bar.close()
        self._writer.flush()
        self._writer.close()
