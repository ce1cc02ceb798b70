"""Processes that run one command together: what they tell each other, and that they end together.

They speak through the key-value store of JAX's coordination service, which process 0 serves.
`jax.experimental.multihost_utils` speaks by computing on all devices, which a thread cannot do
beside training, and nobody can once a process has died. JAX's own heartbeat ends the survivors with
a stack trace of C++, and knows nothing of errors.
"""

import contextlib
import json
import os
import socket
import sys
import threading
import time
from typing import Any, NoReturn

GO_ON = 'What is written is kept: the same command, on all hosts, goes on from there'
_ROOT = 'ensadv'
_DAY = 24 * 3600.0


class Peers:
    """This process's place among those that run the same command in lockstep.

    `gather` is for the main thread: all processes call it in the same order, for the same. A thread
    gives signs of life, looks for those of the others, and ends this process when one of them has
    died or has told that it failed.
    """

    def __init__(
        self,
        client: Any = None,
        index: int = 0,
        count: int = 1,
        *,
        sign_seconds: float = 2.0,
        patience: int = 20,
    ):
        """Starts the thread, if this process is not alone.

        Args:
          client: JAX's DistributedRuntimeClient.
          index: this process's, from 0.
          count: how many there are.
          sign_seconds: between two signs of life, and between two looks at the others'.
          patience: looks at the same sign after which a process counts as dead. Looks, and not
            seconds: a machine that was paused finds all others' signs old at once.
        """
        self.index = index
        self.count = count
        self._client = client
        self._sign_seconds = sign_seconds
        self._patience = patience
        self._gathered = 0
        # Of each process the newest sign of life, and how many looks have found it the same.
        self._signs = [('', 0)] * count
        self._unanswered = 0  # looks in a row that the store did not answer
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name='peers', daemon=True)
        if count > 1:
            self._thread.start()

    def gather(self, what: str, value: Any = None, timeout: float = _DAY) -> list[Any]:
        """Waits until all processes are here, and returns the values of all, on each of them.

        Args:
          what: a name; all have the same.
          value: what JSON can hold. Among several processes tuples come back as lists.
          timeout: seconds after which it fails.
        """
        if self.count == 1:
            return [value]
        self._gathered += 1
        folder = f'{_ROOT}/{self._gathered}/{what}/'
        self._client.key_value_set(f'{folder}{self.index}', json.dumps(value))
        self._client.wait_at_barrier(folder, round(timeout * 1000))
        values = dict(self._client.key_value_dir_get(folder))
        if self.index == 0:
            # By now all have read what was gathered before this.
            self._client.key_value_delete(f'{_ROOT}/{self._gathered - 1}/')
        return [json.loads(values[f'{folder}{index}']) for index in range(self.count)]

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

    def close(self, timeout: float = _DAY) -> None:
        """Waits until all processes are here, and stops the thread; ends all if they are not."""
        try:
            self.gather('close', timeout=timeout)
        except Exception as error:  # whatever the client raises
            self.end_if_one_died()
            self.end(f'process {self.index} stopped alone ({error}). {GO_ON}', 1)
        self._closed.set()
        self._thread.join()

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
                told = self._client.key_value_dir_get(f'{_ROOT}/end/')
                signs = dict(self._client.key_value_dir_get(f'{_ROOT}/alive/'))
            except Exception as error:  # whatever the client raises
                self._unanswered += 1
                if self._unanswered > self._patience:
                    cause = ' '.join(f'{error}'.split())[:200]
                    self._exit(f'process 0 has ended or cannot be reached ({cause}). {GO_ON}', 1)
                continue
            self._unanswered = 0
            if told:
                self._exit(**json.loads(told[0][1]))
            for number in range(self.count):
                self._look_at(number, signs.get(f'{_ROOT}/alive/{number}', ''))

    def _look_at(self, number: int, sign: str) -> None:
        """Looks at a process's newest sign of life; tells all if it shows none any more."""
        before, looks = self._signs[number]
        looks = looks + 1 if sign == before else 0
        self._signs[number] = sign, looks
        if looks > self._patience:
            host = sign.partition(' ')[2] or 'an unknown host'
            self._tell(
                f'process {number} of {self.count}, on {host}, has ended or hangs: no sign of life '
                f'for {looks * self._sign_seconds:.0f} s. {GO_ON}',
                1,
            )

    def _exit(self, message: str, code: int) -> NoReturn:
        if self.index == 0 or self._unanswered:
            print(f'error: {" ".join(message.split())}', file=sys.stderr)
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        if self.index == 0:
            # The store is here: the others are to read what is told.
            time.sleep(2 * self._sign_seconds)
        os._exit(code)
