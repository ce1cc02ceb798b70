"""The spellings of config values that the command line accepts."""

import re

from absl import flags
from ml_collections import config_flags
from ml_collections.config_flags.tuple_parser import TupleParser


class _WholeParser(flags.IntegerParser):
    """Also takes 1e5 and 128.0, which are whole numbers."""

    def convert(self, argument: int | float | str) -> int:
        try:
            return super().convert(argument)
        except (TypeError, ValueError):
            number = _float(argument)
        # A float cannot hold every whole number from 2**53 on.
        if number is None or not number.is_integer() or abs(number) >= 2**53:
            raise ValueError(f'expected a whole number{_without_commas(argument, whole=True)}')
        return int(number)


class _FractionParser(flags.FloatParser):
    """Also takes fractions such as 8/255."""

    def convert(self, argument: int | float | str) -> float:
        if not isinstance(argument, str):
            return super().convert(argument)
        numerator, slash, denominator = argument.partition('/')
        parts = [_float(part) for part in (numerator, denominator if slash else '1')]
        if None in parts:
            meant = _without_commas(argument, whole=False)
            raise ValueError(f'expected a number, as 0.1 or 8/255{meant}')
        if not parts[1]:
            raise ValueError('division by zero')
        return parts[0] / parts[1]


class _SwitchParser(flags.BooleanParser):
    """Also takes yes, no, on and off."""

    def parse(self, argument: str | int) -> bool:
        if isinstance(argument, str) and argument.lower() in ('yes', 'on', 'no', 'off'):
            return argument.lower() in ('yes', 'on')
        try:
            return super().parse(argument)
        except (TypeError, ValueError):
            raise ValueError('expected True or False') from None


class _ListParser(TupleParser):
    """Also takes clean,pgd20_m(loss=margin) and a/b,c.npz without quotes, and 1e3 as a number."""

    def parse(self, argument: str | tuple) -> tuple:
        if not isinstance(argument, str):
            return super().parse(argument)
        text = argument.strip()
        if text[:1] + text[-1:] in ('()', '[]'):
            text = text[1:-1].strip()
        if not text:
            return ()
        # Between parentheses a comma is the entry's own.
        names = re.split(r'\s*,\s*(?![^()]*\))', text.removesuffix(',').strip())
        is_path = r'[^()\'"]*(/|\.np[yz]$)[^()\'"]*'
        if all(re.fullmatch(rf'[^\W\d]\w*(\([^()\'"]*\))?|{is_path}', name) for name in names):
            return tuple(names)
        try:
            values = super().parse(argument)
        except ValueError:
            raise ValueError('expected names or numbers, with commas between them') from None
        whole = lambda value: isinstance(value, float) and value.is_integer()
        return tuple(int(value) if whole(value) else value for value in values)


def _float(text: str | float) -> float | None:
    try:
        return float(text)
    except (TypeError, ValueError, OverflowError):
        return None


def _without_commas(text: str | float, whole: bool) -> str:
    """Returns advice on a number that has commas; '' for anything else."""
    text = str(text)
    if re.fullmatch(r'\d{1,3}(,\d{3})+', text):
        return f'; without commas, as {text.replace(",", "")}'
    if not whole and re.fullmatch(r'\d+,\d+', text):
        return f'; with a point, as {text.replace(",", ".")}'
    return ''


def register() -> None:
    """Registers the parsers for all config fields of their types."""
    for kind, parser in (
        (int, _WholeParser()),
        (float, _FractionParser()),
        (bool, _SwitchParser()),
        (tuple, _ListParser()),
    ):
        config_flags.register_flag_parser_for_type(kind, parser)
