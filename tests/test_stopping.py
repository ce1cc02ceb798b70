"""Signals: where they interrupt, where they wait, and how long."""

import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT

from ensadv.runtime import stopping

PROGRAM = """
import sys, time
from ensadv.runtime import stopping

stopping.GRACE_SECONDS = {grace}
stopping.install()
print('ready', flush=True)
try:
{body}
except stopping.Stopped as stopped:
    print(stopped, flush=True)
    sys.exit(stopped.exit_code)
print('not stopped', flush=True)
"""
STOPPED = ': stopped; the same command goes on from here\n'
WAIT = 'time.sleep(60)'
DEFER = """
with stopping.deferred():
    while not stopping.requested():
        time.sleep(0.01)
    print('saving', flush=True)
    time.sleep(0.5)  # or it might be gone, or just going, when a second signal comes
print('never', flush=True)
"""
# Long work that no Python handler interrupts.
UNINTERRUPTIBLE = """
import ctypes
with stopping.deferred():
    while True:
        ctypes.CDLL(None).usleep(10_000)
"""
INTERRUPTIBLE_WITHIN = """
with stopping.deferred():
    with stopping.deferred(False):
        time.sleep(60)
"""


def stop(body, *signals, grace=30.0, pause=0.0):
    """Returns (exit code, output, seconds) of a program that gets these signals."""
    indented = '\n'.join(f'    {line}' for line in body.strip().splitlines())
    process = subprocess.Popen(
        [sys.executable, '-c', PROGRAM.format(grace=grace, body=indented)],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert process.stdout.readline() == 'ready\n'
        for number, signum in enumerate(signals):
            time.sleep(pause if number else 0.1)
            process.send_signal(signum)
        output, errors = process.communicate(timeout=60)
    finally:
        process.kill()
        process.communicate()
    return process.returncode, output, errors


@pytest.mark.parametrize('signum, code', [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
@pytest.mark.parametrize('body', [WAIT, INTERRUPTIBLE_WITHIN])
def test_a_signal_interrupts(signum, code, body):
    assert stop(body, signum)[:2] == (code, f'{signum.name}{STOPPED}')


def test_a_signal_waits_where_it_must():
    assert stop(DEFER, signal.SIGTERM)[:2] == (143, f'saving\nSIGTERM{STOPPED}')


def test_what_does_not_end_in_time_is_cut_off():
    code, output, errors = stop(UNINTERRUPTIBLE, signal.SIGTERM, grace=0.5)
    assert (code, output) == (143, '')
    assert errors.splitlines()[-1].startswith('error: SIGTERM: ended at once')


def test_a_second_signal_ends_at_once():
    code, output, _ = stop(UNINTERRUPTIBLE, signal.SIGINT, signal.SIGINT, pause=1.5)
    assert (code, output) == (130, '')


def test_the_same_signal_twice_in_a_moment_is_one():
    """As `timeout` sends it, to the process and to its group."""
    code, output, _ = stop(DEFER, signal.SIGTERM, signal.SIGTERM)
    assert (code, output) == (143, f'saving\nSIGTERM{STOPPED}')


@pytest.fixture
def asked(monkeypatch):
    monkeypatch.setattr(stopping, '_requested', signal.SIGTERM)


@pytest.mark.usefixtures('asked')
def test_asked_for_earlier():
    reached = []

    def work():
        with stopping.deferred():
            reached.append('inside')
            with stopping.deferred(False):
                reached.append('never')

    with pytest.raises(stopping.Stopped):
        work()
    assert reached == ['inside']
    # An error goes before.
    with pytest.raises(ValueError, match='mine'):
        with stopping.deferred():
            raise ValueError('mine')
