"""Processes that run one command together: what they agree on, and that they end together.

They speak through the key-value store of JAX's coordination service, which process 0 serves.
"""

import contextlib
import dataclasses
import json
import os
import socket
import sys
import threading
import time
from typing import Any, NoReturn

GO_ON = 'What is written is kept: the same command, on all hosts, goes on from there'
_ROOT = 'ensadv'
_DAY_MS = 24 * 3600 * 1000
_CLEAN_EVERY = 1000  # agreements


@dataclasses.dataclass
class _Sign:
    """The newest sign of life of a process, and in how many looks it has stayed the same.

    Looks, and not seconds: a machine that was paused finds all others' signs old at once.
    """

    text: str
    looks: int = 0


class Peers:
    """This process's place among those that run the same command in lockstep.

    `agree`, `where` and `barrier` are for the main thread: all processes call the same ones in the
    same order. A thread gives signs of life, looks for those of the others, and ends this process
    when one of them has died or has told that it failed.
    """

    def __init__(
        self,
        client: Any,
        index: int,
        count: int,
        *,
        sign_seconds: float = 2.0,
        patience: int = 20,
    ):
        """Starts the thread.

        Args:
          client: JAX's DistributedRuntimeClient.
          index: this process's, from 0.
          count: how many there are.
          sign_seconds: between two signs of life, and between two looks at the others'.
          patience: looks at the same sign after which a process counts as dead.
        """
        self.index = index
        self.count = count
        self._client = client
        self._sign_seconds = sign_seconds
        self._patience = patience
        self._agreements = self._questions = self._barriers = 0
        self._signs = [_Sign('') for _ in range(count)]
        self._unanswered = 0  # looks in a row that the store did not answer
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name='peers', daemon=True)
        self._thread.start()

    def agree(self, value: Any) -> Any:
        """Returns process 0's value on all processes, as JSON has it."""
        self._agreements += 1
        key = f'{_ROOT}/agreed/{self._agreements}'
        text = json.dumps(value)
        if self.index == 0:
            self._client.key_value_set(key, text)
        else:
            text = self._client.blocking_key_value_get(key, _DAY_MS)
        if self._agreements % _CLEAN_EVERY == 0:
            self.barrier('agreed')
            if self.index == 0:
                self._client.key_value_delete(f'{_ROOT}/agreed/')
        return json.loads(text)

    def where(self, flag: bool) -> list[int]:
        """Returns on which processes `flag` is true, the same list on all of them."""
        self._questions += 1
        folder = f'{_ROOT}/where/{self._questions}/'
        if flag:
            self._client.key_value_set(f'{folder}{self.index}', 'true')
        self.barrier('where')
        found = sorted(int(key.rpartition('/')[2]) for key, _ in self._list(folder))
        if self.index == 0:
            # By now all have read the answer before this one.
            self._client.key_value_delete(f'{_ROOT}/where/{self._questions - 1}/')
        return found

    def barrier(self, name: str, timeout: float = _DAY_MS / 1000) -> None:
        """Waits until all processes are here."""
        self._barriers += 1
        key = f'{_ROOT}/{name}/{self._barriers}'
        self._client.wait_at_barrier(key, round(timeout * 1000))

    def end(self, message: str, code: int) -> NoReturn:
        """Ends all processes with this exit code and, on process 0, one line."""
        self._tell(message, code)
        self._thread.join(60)
        # The thread ends the process, unless the store is gone.
        self._exit(message, code)

    def end_if_one_died(self) -> None:
        """After an error that another process's death may have caused: ends all if it did.

        The line then tells which one died. Returns once all have had the time to give signs of
        life.
        """
        self._patience = min(self._patience, 4)
        self._thread.join(10 * self._sign_seconds)

    def close(self, timeout: float = _DAY_MS / 1000) -> None:
        """Waits until all processes are here, and stops the thread; ends all if they are not."""
        try:
            self.barrier('close', timeout)
        except Exception as error:  # whatever the client raises
            self.end_if_one_died()
            self.end(f'process {self.index} stopped alone ({error}). {GO_ON}', 1)
        self._closed.set()
        self._thread.join()

    def _list(self, folder: str) -> list[tuple[str, str]]:
        return self._client.key_value_dir_get(folder)

    def _tell(self, message: str, code: int) -> None:
        """Leaves a message for all watching threads; the first one counts."""
        text = json.dumps({'message': message, 'code': code})
        # It fails where another one's is there already, or nobody is left to be told.
        with contextlib.suppress(Exception):
            self._client.key_value_set(f'{_ROOT}/end/first', text)

    def _watch(self) -> None:
        beat = 0
        while not self._closed.wait(self._sign_seconds):
            beat += 1
            sign = f'{beat} {socket.gethostname()}'
            try:
                self._client.key_value_set(
                    f'{_ROOT}/alive/{self.index}', sign, allow_overwrite=True
                )
                told = self._list(f'{_ROOT}/end/')
                signs = self._list(f'{_ROOT}/alive/')
            except Exception as error:  # whatever the client raises
                self._unanswered += 1
                if self._unanswered > self._patience:
                    cause = ' '.join(f'{error}'.split())[:200]
                    self._exit(f'process 0 has ended or cannot be reached ({cause}). {GO_ON}', 1)
                continue
            self._unanswered = 0
            if told:
                self._exit(**json.loads(told[0][1]))
            elif dead := self._dead(dict(signs)):
                self._tell(dead, 1)

    def _dead(self, signs: dict[str, str]) -> str | None:
        """Looks at the signs of life, and returns which process shows none any more."""
        for number, sign in enumerate(self._signs):
            text = signs.get(f'{_ROOT}/alive/{number}', '')
            sign.looks = sign.looks + 1 if text == sign.text else 0
            sign.text = text
            if sign.looks > self._patience:
                host = text.partition(' ')[2] or 'an unknown host'
                return (
                    f'process {number} of {self.count}, on {host}, has ended or hangs: no sign of '
                    f'life for {sign.looks * self._sign_seconds:.0f} s. {GO_ON}'
                )
        return None

    def _exit(self, message: str, code: int) -> NoReturn:
        if self.index == 0 or self._unanswered:
            print(f'error: {" ".join(message.split())}', file=sys.stderr)
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        if self.index == 0:
            # The store is here: the others are to read what is told.
            time.sleep(2 * self._sign_seconds)
        os._exit(code)
