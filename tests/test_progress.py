"""What a user sees while it lasts: bars on a terminal, lines elsewhere, and rates that are true."""

import fcntl
import logging
import os
import struct
import sys
import termios

import numpy as np
import pytest
import tqdm.std
from conftest import Clock

from ensadv.evaluation import evaluator
from ensadv.models import ensemble
from ensadv.runtime import distributed, progress, terminal


@pytest.fixture
def clock(monkeypatch):
    made = Clock()
    monkeypatch.setattr(tqdm.std, 'time', made)
    monkeypatch.setattr(progress.time, 'monotonic', made)
    return made


def on_terminal(monkeypatch, there):
    monkeypatch.setattr(terminal, 'draws_bars', lambda: there)


def count(bar, clock, *, seconds, times, n=1):
    for _ in range(times):
        clock.now += seconds
        bar.update(n)


@pytest.mark.parametrize(
    'columns, kind, expected', [(80, 'xterm', True), (0, 'xterm', False), (80, 'dumb', False)]
)
def test_bars_need_a_terminal_of_known_width(monkeypatch, columns, kind, expected):
    ours, its = os.openpty()
    with os.fdopen(ours), os.fdopen(its, 'w') as stderr:
        fcntl.ioctl(its, termios.TIOCSWINSZ, struct.pack('4H', 24, columns, 0, 0))
        monkeypatch.setattr(sys, 'stderr', stderr)
        monkeypatch.setenv('TERM', kind)
        assert terminal.draws_bars() == expected


def test_a_file_is_no_terminal(monkeypatch, tmp_path):
    with open(tmp_path / 'log', 'w') as stderr:
        monkeypatch.setattr(sys, 'stderr', stderr)
        assert not terminal.draws_bars()


@pytest.mark.parametrize('initial', [0, 40])
def test_rate_and_time_left_leave_out_what_compiles(monkeypatch, capsys, clock, initial):
    """At the start, and after going on."""
    on_terminal(monkeypatch, True)
    with progress.Bar(total=100, initial=initial, label='run', unit='step') as bar:
        with bar.compiling():
            clock.now += 600
        bar.update(1)
        count(bar, clock, seconds=2, times=4)
        assert bar.n == initial + 5
        assert bar.format_dict['rate'] == pytest.approx(0.5)
        assert bar.format_dict['elapsed'] == pytest.approx(8)
        with bar.untimed():  # as an evaluation
            clock.now += 600
        count(bar, clock, seconds=2, times=1)
        assert bar.format_dict['rate'] == pytest.approx(0.5)
    shown = capsys.readouterr().err.split('\r')
    assert [progress.COMPILING in text for text in shown if text.strip()][:4] == [
        False, True, False, False,
    ]  # fmt: skip


def test_lines_where_there_is_no_terminal(monkeypatch, caplog, clock):
    on_terminal(monkeypatch, False)
    caplog.set_level(logging.INFO, logger='absl')
    with progress.Bar(total=100, label='run', unit='step') as bar:
        for _ in range(2):
            with bar.compiling():
                clock.now += 600
            bar.update(0)
        bar.update(10)
        count(bar, clock, seconds=10, times=3)
    assert caplog.messages == [
        f'run: {progress.COMPILING}',
        'run: 13% (13/100), 10.00s/step, 14:30 left',
    ]


@pytest.mark.parametrize('there', [True, False])
def test_what_cannot_be_counted_is_said(monkeypatch, caplog, capsys, there):
    on_terminal(monkeypatch, there)
    caplog.set_level(logging.INFO, logger='absl')
    with progress.waiting('reading data'):
        shown = capsys.readouterr().err
    assert ('reading data ...' in shown) == there
    assert caplog.messages == ([] if there else ['reading data'])


def test_an_evaluator_says_it_once_for_each_thing_that_it_compiles(monkeypatch, caplog):
    on_terminal(monkeypatch, False)
    caplog.set_level(logging.INFO, logger='absl')
    compiled = lambda *args: np.ones(len(args[-1][0]), np.float32)
    monkeypatch.setattr(distributed, 'map_examples', lambda f, num_shared: compiled)
    network = ensemble.Network(None, 'probs', None)
    judging = evaluator.Evaluator(network, batch_size=4)
    for n in (10, 10, 3):  # in batches of 4, of 4 and of 3
        images, labels = np.zeros((n, 2, 2, 1), np.uint8), np.zeros(n, np.int32)
        verdicts = judging.evaluate(None, {}, images, labels, f'{n} images')
        assert len(verdicts.margin) == n
    said = [message for message in caplog.messages if progress.COMPILING in message]
    assert said == [f'{n} images: {progress.COMPILING}' for n in (10, 3)]
