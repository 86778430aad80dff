"""The house: every room has a floor, imports go down only and through the door of a room, its `__init__`."""

import ast
import importlib
import inspect
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / 'timm_robust'
FLOORS = {
    'threat_model': 0,
    'pixels': 0,
    'precision': 0,
    'distributed': 0,
    'files': 0,
    'provenance': 0,
    'command_line': 0,
    'activations': 0,
    'data': 1,
    'attacks': 1,
    'weights': 1,
    'results': 1,
    'plots': 1,
    'models': 2,
    'training': 3,
    'evaluation': 3,
    'release': 4,
    'evaluate': 4,
    'train': 4,
    'study': 4,
    'demo': 4,
    'report': 4,
    'app': 5,
    'staging': 5,
    'publish': 5,
    'robustbench': 5,
    'cli': 6,
    '__init__': 6,
}
FOLDERS = sorted(room for room in FLOORS if (PACKAGE / room).is_dir())
DOORS = {room: importlib.import_module(f'timm_robust.{room}') for room in FOLDERS}


def room(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix('.py')


def imports(path):
    """What a file imports of this package, at module level or inside functions: (room, what lies behind its door)."""
    depth = len(path.relative_to(PACKAGE).parts)
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.ImportFrom) and node.level == depth:  # the package itself; less is the own room
            names = [f'{node.module}.{alias.name}' if node.module else alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module.split('.')[0] == 'timm_robust':
            inside = node.module.partition('.')[2] or '__init__'
            names = [f'{inside}.{alias.name}' for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name.partition('.')[2] or '__init__' for alias in node.names]
            names = [
                name for name, alias in zip(names, node.names, strict=True) if alias.name.startswith('timm_robust')
            ]
        for name in names:
            there, _, behind = name.partition('.')
            yield there, behind


def test_every_room_has_a_floor():
    assert {room(path) for path in PACKAGE.rglob('*.py')} == set(FLOORS)


def test_imports_go_down_only():
    wrong = []
    for path in PACKAGE.rglob('*.py'):
        here = room(path)
        for there, _ in imports(path):
            if there == '__init__' and here == 'evaluate':
                continue  # a command registers the models as its user would
            if there != here and FLOORS[there] >= FLOORS[here]:
                wrong.append(f'{path.relative_to(PACKAGE)} (floor {FLOORS[here]}) imports {there} ({FLOORS[there]})')
    assert not wrong


def test_other_rooms_are_entered_by_their_door():
    wrong = []
    for path in PACKAGE.rglob('*.py'):
        for there, name in imports(path):
            if room(path) in (there, '__init__') or there not in FOLDERS:
                continue
            if name and name not in DOORS[there].__all__:
                wrong.append(f'{path.relative_to(PACKAGE)} imports {there}.{name}, which is not at the door')
    assert not wrong


@pytest.mark.parametrize('name', FOLDERS)
def test_a_door_is_no_wider_than_a_screen(name):
    door = DOORS[name]
    assert 0 < len(door.__all__) <= 20
    for item in door.__all__:
        assert inspect.ismodule(getattr(door, item)) or not (PACKAGE / name / f'{item}.py').exists(), (
            f'{item} hides a module'
        )


def test_library_reads_no_argv_and_names_no_device():
    for path in PACKAGE.rglob('*.py'):
        text = path.read_text()
        assert '.cuda()' not in text, path
        if 'sys.argv' in text:
            assert '__main__' in text or 'def main' in text, path
