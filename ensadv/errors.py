"""What can go wrong, as the program tells it: one line and an exit code."""


class UserError(Exception):
    """A mistake of the user's: its message is one line, and the program ends with exit code 2."""

    exit_code = 2


class ConfigError(UserError):
    """A config field, named in the message, whose value is not allowed."""


class TrainingError(Exception):
    """A run that cannot go on: the message says where it stopped; exit code 1."""

    exit_code = 1


class StorageError(Exception):
    """What cannot be written: full disk, no permission, lost storage; exit code 1."""

    exit_code = 1


class DataError(UserError):
    """A data set that is missing, unreadable or not what it should be; the message is one line."""
