"""Errors that the program reports as one line, with an exit code."""

import traceback


def place(error: BaseException, file: str) -> int | None:
    """Returns the number of the innermost line of a file that led to an error; None if none did."""
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if frame.filename == file]
    return lines[-1] if lines else None


def line_of(error: BaseException, file: str) -> str:
    """Returns 'line 12: ', see `place`; '' if no line led to the error."""
    found = place(error, file)
    return f'line {found}: ' if found else ''


def in_a_line(error: BaseException) -> str:
    """Returns an error's type and message."""
    return ' '.join(f'{type(error).__name__}: {error}'.split())


class UserError(Exception):
    """A mistake of the user's; its message is one line."""

    exit_code = 2


class ConfigError(UserError):
    """A config field whose value is not allowed; the message names the field."""


class DataError(UserError):
    """A data set that is missing, unreadable or not what it should be."""


class TrainingError(Exception):
    """A run that cannot go on; the message says where it stopped."""

    exit_code = 1


class StorageError(Exception):
    """Storage that cannot be written: full disk, no permission, lost connection."""

    exit_code = 1
