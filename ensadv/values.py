"""What values a setting may have, and what to say of others: plain Python."""

import difflib
from collections.abc import Iterable
from typing import Any

from ensadv.errors import ConfigError

MAX_INTEGER = 2**31 - 1  # devices count in 32 bits
MAX_NUMBER = float.fromhex('0x1.fffffep+127')  # and compute in float32
# JAX's name of what makes random numbers of a key. No field: a seed means the same in every run.
PRNG = 'threefry2x32'


def nearest(found: str, allowed: Iterable[str]) -> str:
    """Returns " (did you mean 'x'?)" for the nearest of `allowed`, or '' if none is near."""
    close = difflib.get_close_matches(str(found), list(allowed), n=1)
    return f" (did you mean '{close[0]}'?)" if close else ''


def shown(value: Any) -> str:
    """Returns a value as messages have it."""
    try:
        text = str(value)
    except ValueError:  # of an integer with more than 4,300 digits
        text = 'a number of thousands of digits'
    return text if len(text) <= 100 else f'{text[:100]}...'


def is_integer(value: Any, low: int, high: int = MAX_INTEGER) -> bool:
    """Returns whether a value is a whole number, and no bool, with low <= value <= high."""
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def check_choice(field: str, found: Any, allowed: tuple[str, ...]) -> None:
    """Raises ConfigError unless a field's value is one of those allowed."""
    if found not in allowed:
        hint = nearest(shown(found).lower(), allowed)
        raise ConfigError(f"{field}: unknown '{shown(found)}'{hint}; allowed: {', '.join(allowed)}")


def check_integer(field: str, found: Any, low: int, high: int = MAX_INTEGER) -> None:
    """Raises ConfigError unless a field's value is a whole number, low <= value <= high."""
    if not is_integer(found, low, high):
        most = _limit(found, high, MAX_INTEGER)
        raise ConfigError(f'{field}: expected a whole number >= {low}{most}, found {shown(found)}')


def check_number(
    field: str,
    found: Any,
    low: float,
    high: float = MAX_NUMBER,
    *,
    above: bool = False,
    below: bool = False,
) -> None:
    """Raises ConfigError unless low <= value <= high.

    With `above` it is low < value, and with `below` value < high.
    """
    fits = isinstance(found, (int, float)) and not isinstance(found, bool) and low <= found <= high
    if not fits or (above and found == low) or (below and found == high):
        least = f'{">" if above else ">="} {low:g}'
        most = _limit(found, high, MAX_NUMBER, '<' if below else '<=')
        pixels = high == 1 and field.endswith(('epsilon', 'step_size', 'sigma'))
        where = '; pixels are in [0, 1]: 8/255, not 8' if pixels else ''
        raise ConfigError(f'{field}: expected a number {least}{most}, found {shown(found)}{where}')


def _limit(found: Any, high: float, usual: float, sign: str = '<=') -> str:
    """Returns ' and <= 1'; '' for a limit that all fields have, which only its excess concerns."""
    exceeded = isinstance(found, (int, float)) and found > high
    return f' and {sign} {high:.10g}' if high != usual or exceeded else ''
