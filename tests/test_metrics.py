"""TensorBoard's files: the same by both writers, each step once, one line where they cannot be."""

import os
import subprocess
import sys

import pytest
from conftest import ROOT, tensorboard_values

from ensadv.errors import StorageError
from ensadv.storage import metrics

SETTINGS = {'train.steps': 4, 'train.learning_rate_steps': (2, 3), 'data.path': None, 'name': 'a'}


@pytest.fixture(params=['clu', 'tensorboard'])
def library(request, monkeypatch):
    """Each of the two that write TensorBoard's files."""
    if request.param == 'tensorboard':
        monkeypatch.setattr(metrics, '_import_clu', lambda: None)
    return request.param


def write(directory, first_step, values):
    writer = metrics.Writer(directory, first_step=first_step)
    for step, value in values.items():
        writer.scalars(step, {'loss': value})
    writer.close()


@pytest.mark.parametrize('marked', [True, False])
def test_what_a_killed_process_wrote_too_much_is_not_shown(workdir, library, monkeypatch, marked):
    """Also of runs that a version began which marked nothing."""
    with monkeypatch.context() as patch:
        if not marked:
            patch.setattr(metrics, '_drop_overtaken', lambda *args: None)
        write(workdir, 1, {2: 2.0, 4: 4.0, 6: 6.0, 8: 8.0})
    write(workdir, 5, {6: 0.5})  # it goes on from the checkpoint of step 4
    assert tensorboard_values(workdir)['loss'] == [(2, 2.0), (4, 4.0), (6, 0.5)]


def test_hyperparameters_are_the_same_by_both_and_not_in_the_log(workdir, library, caplog):
    from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams import metadata

    writer = metrics.Writer(workdir, first_step=1)
    writer.hyperparameters(SETTINGS)
    writer.close()
    events = EventAccumulator(str(workdir))
    events.Reload()
    content = events.PluginTagToContent('hparams')[metadata.SESSION_START_INFO_TAG]
    found = metadata.parse_session_start_info_plugin_data(content).hparams
    assert {name: value.WhichOneof('kind') for name, value in found.items()} == {
        'train.steps': 'number_value',
        'train.learning_rate_steps.0': 'number_value',
        'train.learning_rate_steps.1': 'number_value',
        'data.path': 'string_value',
        'name': 'string_value',
    }
    assert found['train.learning_rate_steps.1'].number_value == 3
    assert 'learning_rate_steps' not in caplog.text


# What main.py shows when a file cannot grow; argv: a directory, and whether there is TensorFlow.
FULL = """
import resource, signal, sys
if sys.argv.pop() == 'tensorboard':
    sys.modules['tensorflow'] = None
from absl import logging
from etils import epath
from ensadv import command_line, errors
from ensadv.storage import metrics
logging.use_absl_handler()  # as absl's app does
command_line.FLAGS(['main.py'])
command_line.set_up_logging()
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
writer = metrics.Writer(epath.Path(sys.argv[1]), first_step=1)
resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
try:
    for step in range(500):
        writer.scalars(step, {f'loss_{i}': 1.0 for i in range(9)})
    writer.close()
except errors.StorageError as error:
    writer.close()
    sys.exit(f'error: {error}')
"""


def test_a_file_that_cannot_be_written_is_one_error(workdir, library):
    """Though other libraries write in threads, which tell of their errors at length."""
    result = subprocess.run(
        [sys.executable, '-c', FULL, str(workdir), library],
        env={name: value for name, value in os.environ.items() if name != 'TF_CPP_MIN_LOG_LEVEL'},
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 1
    *logged, error = result.stderr.strip().splitlines()
    assert error.startswith(f'error: {workdir}: cannot be written: ')
    assert all('] [' in line for line in logged), result.stderr


def test_a_full_disk_is_called_so(workdir, monkeypatch):
    def full(*args):
        try:
            raise ValueError("in 'a'\n[OS error 28: ENOSPC No space left on device]")
        except ValueError as error:
            raise RuntimeError('in another thread') from error

    monkeypatch.setattr(metrics, '_import_clu', lambda: None)
    monkeypatch.setattr(metrics._EventFile, 'write_scalars', full)
    writer = metrics.Writer(workdir, first_step=1)
    with pytest.raises(StorageError, match='cannot be written: No space left on device'):
        writer.scalars(1, {'loss': 1.0})
