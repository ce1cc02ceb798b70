"""Python files that the user names: configs, and models."""

import functools
import hashlib
import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

from ensadv import values
from ensadv.errors import UserError, in_a_line, line_of, place


class _UncachedLoader(importlib.machinery.SourceFileLoader):
    """Reads a file itself, never Python's cache of it.

    Python compares size and second, so a change from 0.1 to 0.2 can go unnoticed.
    """

    def get_code(self, fullname: str) -> CodeType:
        return self.source_to_code(self.get_data(self.path), self.path)


def execute(file: str, name: str) -> ModuleType:
    """Returns a file as a module of this name; raises whatever it raises."""
    loader = _UncachedLoader(name, file)
    module = importlib.util.module_from_spec(
        importlib.util.spec_from_file_location(name, file, loader=loader)
    )
    sys.modules[name] = module  # dataclasses look for their module there
    loader.exec_module(module)
    return module


def read(file: str) -> str:
    """Returns the text of a Python file.

    Raises:
      UserError: if it cannot be read.
    """
    path = Path(file).expanduser()
    try:
        if not path.is_file():  # a pipe might never end
            raise UserError(f'{file}: found no such file')
        return path.read_text('utf-8')
    except (OSError, ValueError) as error:
        raise UserError(f'{file}: cannot be read ({error})') from error


@functools.cache
def of_text(text: str, file: str) -> ModuleType:
    """Returns a text as a module, always the same one.

    It imports nothing from beside the file, which may be gone: what it needs is in it or installed.

    Args:
      text: of the file.
      file: where it is from, which tracebacks name.

    Raises:
      UserError: if it cannot be executed.
    """
    name = f'ensadv_text_{hashlib.sha256(f"{file}:{text}".encode()).hexdigest():.16}'
    module = ModuleType(name)
    module.__file__ = file
    sys.modules[name] = module  # dataclasses look for their module there
    try:
        exec(compile(text, file, 'exec'), vars(module))
    except (Exception, SystemExit) as error:
        where = f'{file}:{place(error, file) or getattr(error, "lineno", None) or 1}'
        raise UserError(f'{where}: {in_a_line(error)}') from error
    return module


def function(path: str) -> tuple[Callable[..., Any], str, str, str]:
    """Reads FILE.py:FUNCTION of --model, and runs the file as `python FILE.py` would.

    Returns:
      The function, its name, the file's absolute path and SHA-256.

    Raises:
      UserError: for anything that goes wrong.
    """
    text, _, name = path.rpartition(':')
    if not name.isidentifier() or not text.endswith('.py'):
        raise UserError(f'--model={path}: expected FILE.py:FUNCTION, as in my_model.py:predict')
    file = Path(text).expanduser().absolute()
    if not file.is_file():
        raise UserError(f'--model={path}: found no such file')
    sys.path.insert(0, str(file.parent))  # for what it imports from beside it
    try:
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        module = execute(str(file), 'model_file')
    except (Exception, SystemExit) as error:
        where = line_of(error, str(file))
        raise UserError(f'--model={path}: {where}{in_a_line(error)}') from error
    found = getattr(module, name, None)
    if not callable(found):
        there = [n for n, each in vars(module).items() if callable(each) and not n.startswith('_')]
        hint = values.nearest(name, there) or f'; it has {", ".join(there) or "none"}'
        raise UserError(f'--model={path}: found no function {name} in the file{hint}')
    return found, name, str(file), digest
