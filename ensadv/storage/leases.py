"""Leases: processes that share a file system divide named pieces of work among them."""

import contextlib
import dataclasses
import json
import os
import pathlib
import random
import re
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator

from absl import logging
from etils import epath

from ensadv.storage import files

# <name>.<id>. While it is being written it is .<name>.<id>.tmp, and no lease yet.
_FILE_NAME = re.compile(r'(.+)\.[0-9a-f]{16}')
_TRIES = 3
_PAUSE_SECONDS = 0.2
_LOOK_SECONDS = 2.0  # between two looks at a lease that may be dead
_WARN_SECONDS = 3600  # between two warnings that a lease cannot be renewed


@dataclasses.dataclass(frozen=True)
class Process:
    """Who made a lease.

    `machine` and `start` tell processes apart that have the same pid; None where the system does
    not say.
    """

    host: str
    pid: int
    machine: str | None
    start: str | None

    def __str__(self) -> str:
        return f'{self.host} pid {self.pid}'

    def runs(self) -> bool | None:
        """Returns whether the process still runs; None if that is not known for sure.

        Only its own machine can tell.
        """
        if self.start is None or self.machine is None or self.machine != _machine():
            return None
        with contextlib.suppress(PermissionError):  # it is another user's
            try:
                os.kill(self.pid, 0)
            except ProcessLookupError:
                return False
        try:
            state, start = _state_and_start(self.pid)
        except OSError:
            return None  # it is there, but /proc hides it
        # A zombie runs no more, and waits only for its parent to notice.
        return state not in 'ZX' and start == self.start


@dataclasses.dataclass
class _Lease:
    path: epath.Path
    written: float  # by the clock, as the last writing that succeeded began
    beat: int = 0


class Leases:
    """Names that at most one process holds at a time, each as a file `directory`/<name>.<id>.

    To take a name, a process writes a lease with an id never used before, and *then* lists the
    directory; it holds the name only if its own is the one live lease there. Two can never both
    hold it: each would have listed before the other had written, but each lists after it wrote
    itself, so that A listed before B wrote, B wrote before B listed, B listed before A wrote and A
    wrote before A listed, in a circle. All this needs of the storage is that a listing shows what
    was written before and not removed since. Two that see each other both withdraw, and try again
    after a random pause.

    A lease is dead, and removed by whoever finds it, when

    - its process is gone, which processes on the same machine can tell; or
    - its content stayed the same for `stale_seconds` since the observer first saw it, by the
      observer's own clock. A thread of the holder's writes a new content every `beat_seconds`.

    So a killed process loses its leases, and a live one only if it is paused, or cut off from the
    storage, for `stale_seconds`. It can then find another at its work: ask `still_held` before
    what must not be done twice.

    The methods are for one thread at a time.
    """

    def __init__(
        self,
        directory: epath.Path,
        *,
        stale_seconds: float = 300.0,
        beat_seconds: float = 30.0,
        clock: Callable[[], float] = time.monotonic,
    ):
        """Touches nothing yet: the directory is made with the first lease.

        Args:
          directory: where; all that divide the work name the same.
          stale_seconds: how long a lease lives without a new content: many `beat_seconds`.
          beat_seconds: how often a lease that is held gets a new content.
          clock: seconds, of this process alone.
        """
        self._directory = directory
        self._stale_seconds = stale_seconds
        self._beat_seconds = beat_seconds
        self._clock = clock
        # What others' leases contained, and since when at the latest.
        self._seen: dict[epath.Path, tuple[bytes, float]] = {}
        # The thread writes while it holds the lock: what was released is not written again.
        self._lock = threading.Lock()
        self._held: dict[str, _Lease] = {}
        self._released = threading.Event()  # set when nothing is held any more

    def take(self, name: str) -> bool:
        """Returns True if this process holds `name` now, False if another does or may.

        Args:
          name: that of a file, as '4000', which is not hidden.
        """
        if self.still_held(name):
            return True
        for attempt in range(_TRIES):
            if attempt:
                # Not `random` itself: processes with the same seed would collide for ever.
                time.sleep(random.SystemRandom().uniform(0, _PAUSE_SECONDS))
            if self._live(name):
                return False
            path = self._directory / f'{name}.{secrets.token_hex(8)}'
            lease = _Lease(path, written=self._clock())
            alone = False
            try:
                files.write_bytes(path, _content(lease.beat))
                alone = list(self._live(name)) == [path]
            finally:
                if not alone:
                    path.unlink(missing_ok=True)
            if alone:
                self._hold(name, lease)
                return True
        return False

    def take_over(self, name: str) -> str | None:
        """Takes `name`, if its holder has died or, seen from here, shows no life any more.

        That takes up to `stale_seconds` if its holder is on another machine, less if it lives.

        Returns:
          None; or who holds it and lives, for messages.
        """
        first: dict[epath.Path, bytes] = {}
        while not self.take(name):
            for path, process in self._live(name).items():
                content = self._seen[path][0]
                if content != first.get(path, content) or (process and process.runs()):
                    return _name(process)
                if path not in first:
                    first[path] = content
                    logging.warning(
                        '%s: held by %s, which may be gone: waiting up to %g s to see if it lives',
                        self._directory / name,
                        _name(process),
                        self._stale_seconds,
                    )
            time.sleep(_LOOK_SECONDS)
        return None

    @contextlib.contextmanager
    def taken(self, name: str) -> Iterator[bool]:
        """Takes `name`, gives whether this process holds it, and releases it at the end."""
        mine = self.take(name)
        try:
            yield mine
        finally:
            if mine:
                self.release(name)

    def release(self, name: str) -> None:
        """Gives `name` back, if this process holds it."""
        with self._lock:
            if name in self._held:
                self._forget(name).unlink(missing_ok=True)

    def still_held(self, name: str) -> bool:
        """Returns whether this process holds `name`, as the storage says now."""
        with self._lock:
            return self._exists(name)

    def holder(self, name: str) -> str | None:
        """Returns who holds `name`, for messages: 'host pid 123', or None."""
        return next(map(_name, self._live(name).values()), None)

    def close(self) -> None:
        """Gives everything back."""
        with contextlib.ExitStack() as stack:  # all, even where one fails
            for name in list(self._held):
                stack.callback(self.release, name)

    def beat(self) -> None:
        """Renews what this process holds; a thread does it every `beat_seconds`."""
        for name in list(self._held):
            with self._lock:
                try:
                    self._renew(name)
                except Exception as error:  # whatever the storage raises may pass
                    logging.log_every_n_seconds(
                        logging.WARNING,
                        '%s: cannot renew this lease (%s); trying on, others may take the work '
                        'over after %g s',
                        _WARN_SECONDS,
                        self._held[name].path,
                        error,
                        self._stale_seconds,
                    )

    def _beat_until(self, released: threading.Event) -> None:
        while not released.wait(self._beat_seconds):
            self.beat()

    def _hold(self, name: str, lease: _Lease) -> None:
        with self._lock:
            if not self._held:
                self._released = threading.Event()
                beats = {'target': self._beat_until, 'args': (self._released,)}
                threading.Thread(**beats, name='leases', daemon=True).start()
            self._held[name] = lease

    def _forget(self, name: str) -> epath.Path:
        """Returns the path of a lease that is held no more; the caller has the lock."""
        path = self._held.pop(name).path
        if not self._held:
            self._released.set()
        return path

    def _renew(self, name: str) -> None:
        """Writes a new content, if the lease is still there; the caller has the lock."""
        if not self._exists(name):
            return
        lease, start = self._held[name], self._clock()
        files.write_bytes(lease.path, _content(lease.beat + 1))
        # Paused between the two lines above, this may have made a file anew that an observer had
        # removed. The work is the observer's then.
        late = self._clock() - lease.written >= self._stale_seconds
        if late and list(self._files().values()).count(name) > 1:
            lease.path.unlink(missing_ok=True)
        lease.written = start
        lease.beat += 1

    def _exists(self, name: str) -> bool:
        """Returns whether this process holds a lease whose file is there; else it is lost."""
        if name not in self._held:
            return False
        try:
            # Not exists(), which takes an error of the storage's for an absence.
            self._held[name].path.read_bytes()
        except FileNotFoundError:
            logging.warning(
                '%s: lost this lease: it was not renewed for long, and was removed',
                self._forget(name),
            )
            return False
        return True

    def _files(self) -> dict[epath.Path, str]:
        """Returns the leases there are and the names they are for, dead ones too."""
        # is_dir() takes an error of the storage's for an absence. Nobody takes anything by it:
        # `take` must see its own lease.
        paths = self._directory.iterdir() if self._directory.is_dir() else ()
        matches = {path: _FILE_NAME.fullmatch(path.name) for path in paths}
        return {path: match[1] for path, match in matches.items() if match}

    def _live(self, name: str) -> dict[epath.Path, Process | None]:
        """Returns the live leases for a name and who made them, and removes the dead ones."""
        names = self._files()
        self._seen = {path: seen for path, seen in self._seen.items() if path in names}
        live = {}
        for path in (path for path, its_name in names.items() if its_name == name):
            # The time before reading here, and after it in _seen: no age comes out too high.
            now = self._clock()
            try:
                content = path.read_bytes()
            except FileNotFoundError:
                continue  # released since it was listed
            if path not in self._seen or self._seen[path][0] != content:
                self._seen[path] = content, self._clock()
            process = _parse(content)
            stale = now - self._seen[path][1] >= self._stale_seconds
            if stale or (process and process.runs() is False):
                path.unlink(missing_ok=True)
            else:
                live[path] = process
        return live


def open_leases(workdir: epath.Path) -> Leases:
    """Returns the leases on the work in a run's workdir."""
    return Leases(workdir / 'claims')


def _name(process: Process | None) -> str:
    return str(process or 'an unknown process')


def _content(beat: int) -> bytes:
    """Returns what a lease of this process's contains, another thing at each beat."""
    try:
        start = _state_and_start(os.getpid())[1]
    except OSError:
        start = None
    process = Process(socket.gethostname(), os.getpid(), _machine(), start)
    return json.dumps(dataclasses.asdict(process) | {'beat': beat}).encode()


def _parse(content: bytes) -> Process | None:
    """Returns who wrote a lease, None if it does not say."""
    try:
        fields = json.loads(content)
        process = Process(**{f.name: fields[f.name] for f in dataclasses.fields(Process)})
    except (ValueError, TypeError, KeyError):
        return None
    return process if type(process.pid) is int and 0 < process.pid < 2**31 else None


def _machine() -> str | None:
    """Names what this process's pid means something in; None if that is not known for sure.

    A host's name alone is not enough: several containers, or clones of a machine, share it.
    """
    try:
        boot = pathlib.Path('/proc/sys/kernel/random/boot_id').read_text().strip()
        return f'{socket.gethostname()} {boot} {os.readlink("/proc/self/ns/pid")}'
    except OSError:
        return None


def _state_and_start(pid: int) -> tuple[str, str]:
    """Returns fields 3 and 22 of /proc/<pid>/stat: 'R' and such, and when the process started."""
    stat = pathlib.Path(f'/proc/{pid}/stat').read_text(errors='replace')
    # Field 2, the command in parentheses, may hold anything.
    fields = stat.rpartition(')')[2].split()
    return fields[0], fields[19]
