"""Leases: one holder at a time, the dead ones' leases taken over, the live ones' never."""

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
import threading
import time

import pytest
from absl import logging
from conftest import ROOT, Clock
from etils import epath

from ensadv.storage import files
from ensadv.storage import leases as leases_lib

STALE = 300.0
# What has the name of a lease for 4000 that nobody made.
STRAY = '4000.0123456789abcdef'

needs_proc = pytest.mark.skipif(
    leases_lib._machine() is None, reason='processes are told apart through /proc'
)


@pytest.fixture
def folder(tmp_path) -> epath.Path:
    return epath.Path(tmp_path) / 'run' / 'claims'


@pytest.fixture
def new_leases(folder):
    """Makes Leases, each like a process of its own; beats come by hand, `leases.beat()`."""
    with contextlib.ExitStack() as stack:

        def new(**settings):
            settings = {'stale_seconds': STALE, 'beat_seconds': 1e6} | settings
            made = leases_lib.Leases(folder, **settings)
            stack.callback(made.close)
            return made

        yield new


def names(folder):
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def wait_until(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def python(code, *args):
    return subprocess.Popen(
        [sys.executable, '-c', code, *map(str, args)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )


TAKE_AND_WAIT = """
import sys, time
from etils import epath
from ensadv.storage import leases
mine = leases.Leases(epath.Path(sys.argv[1]))
print(mine.take('4000'), flush=True)
time.sleep(float(sys.argv[2]))
"""


def test_one_holder_at_a_time(new_leases, folder):
    one, other = new_leases(), new_leases()
    assert one.holder('4000') is None
    assert not folder.exists()
    assert one.take('4000')
    assert not other.take('4000')
    assert (one.still_held('4000'), other.still_held('4000')) == (True, False)
    one.release('4000')
    assert not one.still_held('4000')
    assert other.take('4000')
    assert not one.take('4000')


def test_taking_twice_is_holding_once(new_leases, folder):
    leases = new_leases()
    assert leases.take('4000')
    assert leases.take('4000')
    assert len(names(folder)) == 1
    leases.release('4000')
    leases.release('4000')
    leases.release('never taken')
    assert names(folder) == []


def test_taken_releases_even_after_an_error(new_leases, folder):
    one, other = new_leases(), new_leases()
    with one.taken('4000') as mine, other.taken('4000') as others:
        assert (mine, others) == (True, False)
    assert names(folder) == []
    with pytest.raises(ZeroDivisionError), one.taken('4000'):
        _ = 1 / 0
    assert other.take('4000')
    with other.taken('8000') as mine:
        assert mine
    assert other.still_held('4000')


def test_close_releases_everything(new_leases, folder):
    leases = new_leases()
    assert leases.take('4000')
    assert leases.take('8000')
    leases.close()
    assert names(folder) == []
    leases.close()


def test_names_that_begin_alike_differ(new_leases):
    one, other = new_leases(), new_leases()
    assert one.take('40')
    assert other.take('4')
    assert other.take('4.5')
    assert not other.take('40')
    assert not one.take('4.5')
    one.release('40')
    assert other.still_held('4')


def test_holder_is_for_messages(new_leases, folder):
    leases = new_leases()
    assert leases.take('4000')
    assert leases.holder('4000').endswith(f' pid {os.getpid()}')
    assert new_leases().holder('4000') == leases.holder('4000')
    assert leases.holder('400') is None
    leases.release('4000')
    (folder / STRAY).write_text('')
    assert leases.holder('4000') == 'an unknown process'


def test_a_lease_without_beats_is_taken_over_by_the_observers_clock(new_leases, folder):
    clock = Clock()
    holder, observer = new_leases(), new_leases(clock=clock)
    assert holder.take('4000')
    clock.now += 10 * STALE  # What counts begins as the observer first looks.
    for _ in range(50):
        assert not observer.take('4000')
        clock.now += STALE / 64
    clock.now = 1000 + 11 * STALE - 0.1
    assert not observer.take('4000')
    assert holder.still_held('4000')
    clock.now += 0.1
    assert observer.take('4000')
    assert not holder.still_held('4000')
    assert len(names(folder)) == 1


def test_a_beat_begins_the_time_anew(new_leases):
    clock = Clock()
    holder, observer = new_leases(), new_leases(clock=clock)
    assert holder.take('4000')
    for _ in range(12):
        assert not observer.take('4000')
        clock.now += STALE - 1
        holder.beat()
    assert not observer.take('4000')
    clock.now += STALE
    assert observer.take('4000')


def test_a_slow_reading_ages_no_lease(new_leases, monkeypatch):
    clock = Clock()
    holder, observer = new_leases(), new_leases(clock=clock)
    assert holder.take('4000')
    read_bytes = epath.Path.read_bytes

    def slow(path):
        content = read_bytes(path)
        clock.now += 2 * STALE
        return content

    monkeypatch.setattr(type(epath.Path('.')), 'read_bytes', slow, raising=False)
    assert not observer.take('4000')
    assert not observer.take('4000')


def test_a_lease_that_was_removed_is_not_made_anew(new_leases, folder):
    holder, observer = new_leases(), new_leases()
    assert holder.take('4000')
    assert holder.take('8000')
    (lost,) = folder.glob('4000.*')
    lost.unlink()
    assert observer.take('4000')
    holder.beat()
    assert not holder.still_held('4000')
    assert holder.still_held('8000')
    assert not lost.exists()
    assert not holder.take('4000')
    holder.release('4000')  # Leaves the observer's alone.
    assert observer.still_held('4000')


def test_a_holder_paused_within_a_beat_gives_way(new_leases, folder, monkeypatch):
    clock = Clock()
    holder, observer = new_leases(clock=clock), new_leases(clock=clock)
    assert holder.take('4000')
    assert not observer.take('4000')
    write_bytes = files.write_bytes

    def paused(path, content):
        monkeypatch.setattr(files, 'write_bytes', write_bytes)
        clock.now += STALE
        assert observer.take('4000')
        write_bytes(path, content)

    monkeypatch.setattr(files, 'write_bytes', paused)
    holder.beat()
    assert not holder.still_held('4000')
    assert observer.still_held('4000')
    assert len(names(folder)) == 1


def test_one_that_tries_costs_a_live_holder_nothing(new_leases, folder):
    holder = new_leases()
    assert holder.take('4000')
    (folder / STRAY).write_text('')  # It has not listed yet, and will withdraw.
    holder.beat()
    assert holder.still_held('4000')


def test_beats_that_come_late_keep_what_nobody_took(new_leases):
    clock = Clock()
    holder = new_leases(clock=clock)
    assert holder.take('4000')
    clock.now += 2 * STALE
    holder.beat()
    assert holder.still_held('4000')


def test_beats_go_on_after_errors_with_one_warning(new_leases, folder, monkeypatch, caplog):
    holder = new_leases()
    assert holder.take('4000')
    (path,) = folder.iterdir()
    contents = [path.read_text()]

    def full(path, content):
        raise OSError(28, 'No space left on device')

    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING, logger='absl'):
        patch.setattr(files, 'write_bytes', full)
        for _ in range(3):
            holder.beat()
    assert caplog.text.count('No space left on device') == 1
    assert holder.still_held('4000')
    for _ in range(2):
        holder.beat()
        contents.append(path.read_text())
    assert len(set(contents)) == 3


def test_errors_in_take_propagate_and_leave_no_lease(new_leases, folder, monkeypatch):
    leases = new_leases()
    live = leases._live

    def lost(name):
        if names(folder):
            raise OSError(5, 'Input/output error')
        return live(name)

    monkeypatch.setattr(leases, '_live', lost)
    with pytest.raises(OSError, match='Input/output'):
        leases.take('4000')
    assert names(folder) == []


def test_who_does_not_see_its_own_lease_holds_nothing(new_leases, folder, monkeypatch):
    leases = new_leases()
    monkeypatch.setattr(leases_lib.time, 'sleep', lambda seconds: None)
    monkeypatch.setattr(leases, '_files', dict)
    assert not leases.take('4000')
    assert names(folder) == []


def test_two_that_see_each_other_withdraw_and_one_tries_again(new_leases, folder, monkeypatch):
    leases, rival = new_leases(), folder / STRAY
    write_bytes, pauses = files.write_bytes, []

    def write_beside_a_rival(path, content):
        write_bytes(path, content)
        rival.write_text('')

    def rival_withdraws(seconds):
        assert names(folder) == [rival.name]  # Ours is withdrawn by now.
        pauses.append(seconds)
        rival.unlink()

    monkeypatch.setattr(files, 'write_bytes', write_beside_a_rival)
    monkeypatch.setattr(leases_lib.time, 'sleep', rival_withdraws)
    assert not leases.take('4000')
    assert len(pauses) == 2
    assert all(0 <= pause <= 0.2 for pause in pauses)
    rival.unlink()
    monkeypatch.setattr(files, 'write_bytes', write_bytes)
    assert leases.take('4000')


def test_a_lease_that_vanishes_while_one_looks_is_gone(new_leases, folder, monkeypatch):
    holder, observer = new_leases(), new_leases()
    assert holder.take('4000')
    files = observer._files

    def released_after_listing():
        listed = files()
        holder.release('4000')
        return listed

    monkeypatch.setattr(observer, '_files', released_after_listing)
    assert observer.take('4000')


@pytest.mark.parametrize('content', [b'', b'\xff{', b'[]', b'{"host": "h", "pid": -1}'])
def test_garbage_lives_until_it_is_stale(new_leases, folder, content):
    clock = Clock()
    observer = new_leases(clock=clock)
    folder.mkdir(parents=True)
    (folder / STRAY).write_bytes(content)
    assert not observer.take('4000')
    clock.now += STALE - 1
    assert not observer.take('4000')
    clock.now += 1
    assert observer.take('4000')


@pytest.mark.parametrize('pid', [0, -1, 2**40, 1.5, '7', None])
def test_a_pid_that_is_none_is_garbage(new_leases, folder, pid):
    fields = json.loads(leases_lib._content(0))
    assert leases_lib._parse(json.dumps(fields).encode()) is not None
    assert leases_lib._parse(json.dumps(fields | {'pid': pid}).encode()) is None


def test_other_files_are_no_leases(new_leases, folder):
    leases = new_leases()
    folder.mkdir(parents=True)
    others = [f'.{STRAY}.tmp', f'.{STRAY}', '4000', '4000.json', '4000.0123', f'{STRAY}.tmp']
    for name in others:
        (folder / name).write_text('{}')
    assert leases.take('4000')
    assert len(names(folder)) == len(others) + 1
    leases.release('4000')
    assert names(folder) == sorted(others)


def this_process(**changes):
    fields = json.loads(leases_lib._content(0))
    del fields['beat']
    return dataclasses.replace(leases_lib.Process(**fields), **changes)


@needs_proc
def test_a_reused_pid_does_not_look_alive(new_leases, folder):
    assert this_process().runs() is True
    assert this_process(start='1').runs() is False
    observer = new_leases()
    folder.mkdir(parents=True)
    fields = dataclasses.asdict(this_process(start='1'))
    (folder / STRAY).write_text(json.dumps(fields | {'beat': 3}))
    assert observer.take('4000')
    assert STRAY not in names(folder)


@needs_proc
@pytest.mark.parametrize(
    'changes', [{'machine': 'another'}, {'machine': None}, {'machine': None, 'pid': 2**31 - 1}]
)
def test_a_pid_of_another_machine_tells_nothing(changes):
    assert this_process(**{'start': '1'} | changes).runs() is None
    assert this_process(start=None).runs() is None


@needs_proc
def test_what_cannot_be_told_is_alive(monkeypatch):
    def hidden(*_):
        raise PermissionError

    monkeypatch.setattr(leases_lib, '_state_and_start', hidden)
    assert this_process(start='1').runs() is None
    monkeypatch.setattr(leases_lib.os, 'kill', hidden)
    assert this_process().runs() is None
    monkeypatch.setattr(leases_lib.os, 'readlink', hidden)
    assert leases_lib._machine() is None
    assert json.loads(leases_lib._content(0))['start'] is None


@needs_proc
@pytest.mark.parametrize('reaped', [True, False])
def test_a_killed_process_loses_its_lease_at_once(new_leases, folder, reaped):
    observer = new_leases()
    with python(TAKE_AND_WAIT, folder, 600) as process:
        assert process.stdout.readline() == 'True\n'
        assert not observer.take('4000')
        assert observer.holder('4000').endswith(f' pid {process.pid}')
        process.kill()
        # Until it is waited for, a killed process is a zombie.
        os.waitid(os.P_PID, process.pid, os.WEXITED | (0 if reaped else os.WNOWAIT))
        assert observer.take('4000')


def test_a_held_lease_keeps_no_process_running(new_leases, folder):
    with python(TAKE_AND_WAIT, folder, 0) as process:
        output, _ = process.communicate(timeout=60)
    assert (output, process.returncode) == ('True\n', 0)
    assert len(names(folder)) == 1


def test_the_thread_beats_while_something_is_held(new_leases, folder):
    def threads():
        return [thread for thread in threading.enumerate() if thread.name == 'leases']

    def beats(count):
        (path,) = folder.glob('[!.]*')  # a hidden one is being written
        contents = set()
        wait_until(lambda: contents.add(path.read_bytes()) or len(contents) > count)

    wait_until(lambda: not threads())  # Of the tests before.
    leases = new_leases(beat_seconds=0.002)
    for _ in range(2):
        assert leases.take('4000')
        assert leases.take('8000')
        assert len(threads()) == 1
        leases.release('4000')
        beats(3)
        leases.release('8000')
        wait_until(lambda: not threads())
        assert names(folder) == []


CONTEND = """
import pathlib, random, sys, time
from etils import epath
from ensadv.storage import leases
folder = pathlib.Path(sys.argv[1])
mine = leases.Leases(epath.Path(folder / 'claims'), beat_seconds=0.01)
print('ready', flush=True)
while not (folder / 'go').exists():
    time.sleep(0.001)
left = [str(name) for name in range(30)]
while left:
    for name in list(left):
        done = folder / f'done{name}'
        if done.exists():
            left.remove(name)
            continue
        with mine.taken(name) as taken:
            if taken and not done.exists():
                busy = folder / f'busy{name}'
                busy.touch(exist_ok=False)
                time.sleep(random.uniform(0, 0.01))
                busy.unlink()
                done.touch(exist_ok=False)
                print(name, flush=True)
"""


def test_contending_processes_do_everything_once(tmp_path):
    with contextlib.ExitStack() as stack:
        processes = [stack.enter_context(python(CONTEND, tmp_path)) for _ in range(4)]
        for process in processes:
            assert process.stdout.readline() == 'ready\n'
        (tmp_path / 'go').touch()
        outputs = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * 4
    done = [int(name) for output in outputs for name in output.split()]
    assert sorted(done) == list(range(30))
    assert names(epath.Path(tmp_path) / 'claims') == []


def elsewhere(folder, beat=0):
    """Writes the lease of a process on another machine."""
    process = leases_lib.Process('far', 1, 'another machine', '1')
    content = json.dumps(dataclasses.asdict(process) | {'beat': beat}).encode()
    files.write_bytes(folder / STRAY, content)


def test_a_silent_holder_elsewhere_is_waited_for_and_then_succeeded(
    new_leases, folder, monkeypatch, caplog
):
    clock = Clock()
    monkeypatch.setattr(
        leases_lib.time, 'sleep', lambda seconds: setattr(clock, 'now', clock.now + seconds)
    )
    elsewhere(folder)
    leases = new_leases(clock=clock)
    assert leases.take_over('4000') is None
    assert leases.still_held('4000')
    assert names(folder) != [STRAY]
    assert STALE <= clock.now - 1000 < STALE + 10
    assert caplog.text.count('held by far pid 1, which may be gone') == 1


def test_a_holder_elsewhere_that_beats_is_left_alone(new_leases, folder, monkeypatch):
    clock = Clock()

    def sleep(seconds):
        clock.now += seconds
        elsewhere(folder, beat=int(clock.now > 1030))

    monkeypatch.setattr(leases_lib.time, 'sleep', sleep)
    elsewhere(folder)
    assert new_leases(clock=clock).take_over('4000') == 'far pid 1'
    assert clock.now < 1030 + STALE / 10
    assert names(folder) == [STRAY]


@needs_proc
def test_a_holder_on_this_machine_need_not_be_waited_for(new_leases, monkeypatch):
    assert new_leases().take('4000')
    monkeypatch.setattr(leases_lib, '_LOOK_SECONDS', 1e6)
    assert new_leases().take_over('4000').endswith(f' pid {os.getpid()}')
