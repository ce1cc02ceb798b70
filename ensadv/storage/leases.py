"""Claims: processes that share a file system divide named pieces of work among them."""

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

# <name>.<id>. While it is being written it is .<name>.<id>.tmp, and no claim yet.
_FILE_NAME = re.compile(r'(.+)\.[0-9a-f]{16}')
_TRIES = 3
_PAUSE_SECONDS = 0.2
_LOOK_SECONDS = 2.0  # between two looks at a claim that may be dead


@dataclasses.dataclass(frozen=True)
class Process:
    """Who made a claim.

    `machine` and `start` tell processes apart that have the same pid; None where the system does
    not say.
    """

    host: str
    pid: int
    machine: str | None
    start: str | None

    def runs(self) -> bool | None:
        """Returns whether the process still runs; None if that is not known for sure.

        Only its own machine can tell.
        """
        if self.start is None or self.machine is None or self.machine != _machine():
            return None
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return False
        except PermissionError:
            pass  # Another user's.
        try:
            state, start = _state_and_start(self.pid)
        except OSError:
            return None  # It is there, but /proc hides it.
        # A zombie runs no more, and waits only for its parent to notice.
        return state not in 'ZX' and start == self.start


@dataclasses.dataclass
class _Claim:
    path: epath.Path
    written: float  # By the clock, as the last writing that succeeded began.
    beat: int = 0
    warned: bool = False


class Claims:
    """Names that at most one process holds at a time, each as a file `directory`/<name>.<id>.

    To take a name, a process writes a claim with an id never used before, and *then* lists the
    directory; it holds the name only if its own is the one live claim there. Two can never both
    hold it: each would have listed before the other had written, but each lists after it wrote
    itself, so that A listed before B wrote, B wrote before B listed, B listed before A wrote and A
    wrote before A listed, in a circle. All this needs of the storage is that a listing shows what
    was written before and not removed since. Two that see each other both withdraw, and try again
    after a random pause.

    A claim is dead, and removed by whoever finds it, when

    - its process is gone, which processes on the same machine can tell; or
    - its content stayed the same for `stale_seconds` since the observer first saw it, by the
      observer's own clock. A thread of the holder's writes a new content every `beat_seconds`.

    So a killed process loses its claims, and a live one only if it is paused, or cut off from the
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
        """Touches nothing yet: the directory is made with the first claim.

        Args:
          directory: where; all that divide the work name the same.
          stale_seconds: how long a claim lives without a new content: many `beat_seconds`.
          beat_seconds: how often a claim that is held gets a new content.
          clock: seconds, of this process alone.
        """
        self._directory = directory
        self._stale_seconds = stale_seconds
        self._beat_seconds = beat_seconds
        self._clock = clock
        # What others' claims contained, and since when at the latest.
        self._seen: dict[epath.Path, tuple[bytes, float]] = {}
        # The thread writes while it holds the lock: what was released is not written again.
        self._lock = threading.Lock()
        self._held: dict[str, _Claim] = {}
        self._stop: threading.Event | None = None

    def take(self, name: str) -> bool:
        """Returns True if this process holds `name` now, False if another does or may.

        Args:
          name: a file's name, as '4000'.
        """
        if not name or name.startswith('.') or '/' in name:
            raise ValueError(
                f'name: expected the name of a file that is not hidden, found {name!r}'
            )
        if self.still_held(name):
            return True
        for attempt in range(_TRIES):
            if attempt:
                # Not `random` itself: processes with the same seed would collide for ever.
                time.sleep(random.SystemRandom().uniform(0, _PAUSE_SECONDS))
            if self._live(name):
                return False
            path = self._directory / f'{name}.{secrets.token_hex(8)}'
            claim = _Claim(path, written=self._clock())
            alone = False
            try:
                files.write_bytes(path, _content(claim.beat))
                alone = list(self._live(name)) == [path]
            finally:
                if not alone:
                    path.unlink(missing_ok=True)
            if alone:
                self._hold(name, claim)
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
                renewed = content != first.get(path, content)
                if renewed or (process is not None and process.runs()):
                    return _who(process)
                if path not in first:
                    first[path] = content
                    logging.warning(
                        '%s: held by %s, which may be gone: waiting up to %g s to see if it lives',
                        self._directory / name,
                        _who(process),
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
                self._drop(name).path.unlink(missing_ok=True)

    def still_held(self, name: str) -> bool:
        """Returns whether this process holds `name`, as the storage says now."""
        with self._lock:
            return name in self._held and self._is_there(name)

    def holder(self, name: str) -> str | None:
        """Returns who holds `name`, for messages: 'host pid 123', or None."""
        for process in self._live(name).values():
            return _who(process)
        return None

    def close(self) -> None:
        """Gives everything back."""
        with contextlib.ExitStack() as stack:  # All, even where one fails.
            for name in list(self._held):
                stack.callback(self.release, name)

    def beat(self) -> None:
        """Renews what this process holds; a thread does it every `beat_seconds`."""
        for name in list(self._held):
            with self._lock:
                if name not in self._held:
                    continue
                claim = self._held[name]
                try:
                    self._renew(name, claim)
                except Exception as error:  # Whatever the storage raises may pass.
                    if not claim.warned:
                        claim.warned = True
                        logging.warning(
                            '%s: cannot renew this claim (%s); trying on, others may take the '
                            'work over after %g s',
                            claim.path,
                            error,
                            self._stale_seconds,
                        )

    def _hold(self, name: str, claim: _Claim) -> None:
        with self._lock:
            self._held[name] = claim
            if self._stop is None:
                self._stop = threading.Event()
                threading.Thread(
                    target=self._beat_until, args=(self._stop,), name='claims', daemon=True
                ).start()

    def _drop(self, name: str) -> _Claim:
        """Forgets a claim; the last one ends the thread. The caller has the lock."""
        claim = self._held.pop(name)
        if not self._held:
            self._stop.set()
            self._stop = None
        return claim

    def _beat_until(self, stop: threading.Event) -> None:
        while not stop.wait(self._beat_seconds):
            self.beat()

    def _renew(self, name: str, claim: _Claim) -> None:
        if not self._is_there(name):
            return
        start = self._clock()
        files.write_bytes(claim.path, _content(claim.beat + 1))
        # Paused between the two lines above, this may have made a file anew that an observer had
        # removed. The work is the observer's then.
        late = self._clock() - claim.written >= self._stale_seconds
        if late and list(self._files().values()).count(name) > 1:
            claim.path.unlink(missing_ok=True)
            self._lose(name)
            return
        claim.written = start
        claim.beat += 1

    def _is_there(self, name: str) -> bool:
        """Returns whether the file of a claim that is held is there; if not, the claim is lost."""
        try:
            # Not exists(), which takes an error of the storage's for an absence.
            self._held[name].path.read_bytes()
        except FileNotFoundError:
            self._lose(name)
            return False
        return True

    def _lose(self, name: str) -> None:
        claim = self._drop(name)
        logging.warning(
            '%s: lost this claim: it was not renewed for long, and was removed', claim.path
        )

    def _files(self) -> dict[epath.Path, str]:
        """Returns the claims there are and the names they are to, dead ones too."""
        # is_dir() takes an error of the storage's for an absence. Nobody takes anything by it:
        # `take` must see its own claim.
        paths = self._directory.iterdir() if self._directory.is_dir() else ()
        matches = {path: _FILE_NAME.fullmatch(path.name) for path in paths}
        return {path: match[1] for path, match in matches.items() if match}

    def _live(self, name: str) -> dict[epath.Path, Process | None]:
        """Returns the live claims to a name and who made them, and removes the dead ones."""
        files = self._files()
        self._seen = {path: seen for path, seen in self._seen.items() if path in files}
        live = {}
        for path in (path for path, its_name in files.items() if its_name == name):
            # The time before reading here, and after it in _seen: no age comes out too high.
            now = self._clock()
            try:
                content = path.read_bytes()
            except FileNotFoundError:
                continue  # Released since it was listed.
            if path not in self._seen or self._seen[path][0] != content:
                self._seen[path] = content, self._clock()
            process = _parse(content)
            stale = now - self._seen[path][1] >= self._stale_seconds
            if stale or (process is not None and process.runs() is False):
                path.unlink(missing_ok=True)
            else:
                live[path] = process
        return live


def _who(process: Process | None) -> str:
    return f'{process.host} pid {process.pid}' if process else 'an unknown process'


def _content(beat: int) -> bytes:
    """Returns what a claim of this process's contains, another thing at each beat."""
    try:
        start = _state_and_start(os.getpid())[1]
    except OSError:
        start = None
    process = Process(socket.gethostname(), os.getpid(), _machine(), start)
    return json.dumps(dataclasses.asdict(process) | {'beat': beat}).encode()


def _parse(content: bytes) -> Process | None:
    """Returns who wrote a claim, None if it does not say."""
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
