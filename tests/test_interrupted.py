"""Real runs that are killed, asked to end or without space, and go on with the same command."""

import contextlib
import os
import signal
import subprocess

import pytest
from conftest import (
    ROOT,
    TINY,
    main_command,
    overrides,
    run_environment,
    run_main,
    snapshot_bytes,
    tensorboard_values,
    tiny_config,
)

from ensadv.storage import checkpoints

pytestmark = pytest.mark.usefixtures('small_network')

LONG_RUN = TINY | {
    'train.steps': 600, 'train.checkpoint_every': 50, 'train.snapshot_every': 1000,
    'train.log_every': 50, 'train.steps_per_call': 50, 'eval.inline': False,
}  # fmt: skip
COMMAND = ['--config=configs/singleadv.py', *overrides(LONG_RUN)]


@pytest.fixture(scope='module')
def undisturbed(tmp_path_factory) -> list[bytes]:
    """The last weights of a long run that nothing interrupts."""
    path = tmp_path_factory.mktemp('long') / 'whole'
    whole = run_main(*COMMAND, f'--workdir={path}', small=True)
    assert whole.returncode == 0, whole.stderr
    return snapshot_bytes(tiny_config('singleadv'), path, 600)


@contextlib.contextmanager
def long_run(path, *more):
    """Starts the long run, and gives its process, which does not outlive the test."""
    process = subprocess.Popen(
        main_command(*COMMAND, f'--workdir={path}', *more, small=True),
        cwd=ROOT, env=run_environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        text=True,
    )  # fmt: skip
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def goes_on(path, reached):
    """Runs the same command again, and returns the last weights."""
    again = run_main(*COMMAND, f'--workdir={path}', small=True)
    assert again.returncode == 0, again.stderr
    assert f'going on from the checkpoint of step {reached}' in again.stderr
    return snapshot_bytes(tiny_config('singleadv'), path, 600)


def test_killed_and_started_again_gives_the_same_bits(workdir, undisturbed):
    """SIGKILL in the middle of real work, and the same command once more."""
    with long_run(workdir) as process:
        for line in process.stderr:
            if (workdir / 'checkpoints' / '100').exists() or '] [300] ' in line:
                break
        os.kill(process.pid, signal.SIGKILL)
    assert not (workdir / 'snapshots' / '600').exists(), 'it was killed too late to test anything'
    reached = max(checkpoints.open_checkpoints(workdir, 3).steps())
    assert 100 <= reached < 600
    assert goes_on(workdir, reached) == undisturbed
    # TensorBoard's files are whole before the checkpoint, and show nothing twice after it.
    shown = [step for step, _ in tensorboard_values(workdir)['loss']]
    assert shown == list(range(50, 601, 50))


def test_a_signal_saves_a_checkpoint_and_the_run_goes_on_to_the_same_bits(workdir, undisturbed):
    with long_run(workdir, '--config.train.checkpoint_every=1000') as process:
        for line in process.stderr:
            if '] [50] ' in line:
                break
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=120)
    assert process.returncode == 143
    assert errors.splitlines()[-1].startswith('error: SIGTERM: stopped')
    (reached,) = checkpoints.open_checkpoints(workdir, 3).steps()
    assert 50 < reached < 600, 'it was stopped too late to test anything'
    assert not list((workdir / 'claims').iterdir())
    assert goes_on(workdir, reached) == undisturbed


def test_a_full_disk_is_one_line_and_the_run_goes_on_when_there_is_space(workdir):
    fields = TINY | {'eval.inline': False}
    command = ['--config=configs/singleadv.py', *overrides(fields), f'--workdir={workdir}']
    limited = subprocess.run(
        ['bash', '-c', 'ulimit -f 60; exec "$@"', 'bash', *main_command(*command)],
        cwd=ROOT, env=run_environment(), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert limited.returncode == 1, limited.stderr
    assert 'Traceback' not in limited.stderr
    errors = [line for line in limited.stderr.splitlines() if line.startswith('error: ')]
    assert len(errors) == 1, limited.stderr
    assert 'cannot be written' in errors[0]
    again = run_main(*command)
    assert again.returncode == 0, again.stderr
    assert (workdir / 'snapshots' / '4').exists()
