"""The rooms of the package: what each offers, and that importing one costs nothing."""

import ast
import subprocess
import sys

import pytest
from conftest import ROOT

PACKAGE = ROOT / 'ensadv'
ROOMS = sorted(path.parent.name for path in PACKAGE.glob('*/__init__.py'))


def offered(room: str) -> set[str]:
    """Returns a room's __all__; its __init__ holds that and one docstring, and nothing else."""
    docstring, names = ast.parse((PACKAGE / room / '__init__.py').read_text()).body
    assert isinstance(ast.literal_eval(docstring.value), str)
    assert names.targets[0].id == '__all__'
    return set(ast.literal_eval(names.value))


def imports(path):
    """Yields (room, module) of each import from a room of the package."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or '').startswith('ensadv.'):
            _, room, *module = node.module.split('.')
            for name in module[:1] or [alias.name for alias in node.names]:
                yield room, name


@pytest.mark.parametrize('room', ROOMS)
def test_a_room_offers_modules_that_it_has(room):
    assert offered(room) <= {path.stem for path in (PACKAGE / room).glob('*.py')}


def test_other_rooms_use_only_what_a_room_offers():
    for path in (*PACKAGE.rglob('*.py'), ROOT / 'main.py', *(ROOT / 'configs').glob('*.py')):
        for room, module in imports(path):
            if room in ROOMS and path.parent.name != room:
                assert module in offered(room), f'{path.name} imports ensadv.{room}.{module}'


def test_importing_a_room_imports_nothing_heavy():
    rooms = ', '.join(f'ensadv.{room}' for room in ROOMS)
    heavy = "{'jax', 'flax', 'matplotlib', 'scipy', 'tensorflow', 'orbax'}"
    program = f'import sys, {rooms}; print(sorted({heavy} & set(sys.modules)))'
    result = subprocess.run(
        [sys.executable, '-c', program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == '[]'
