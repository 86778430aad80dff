"""Imports go down only: a module may import those on lower floors; scripts stand on the roof."""

import ast
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / 'timm_robust'
FLOORS = {
    'pssilu': 0,
    'allocator': 0,
    'threat_model': 0,
    'results': 0,
    'releases': 0.5,
    'download': 0.6,
    'model_config': 0,
    'hub': 5.5,
    'robustbench_zoo': 2,
    'robustbench_report': 2.5,
    'robustbench_package': 2.5,
    'robustbench': 5.5,
    'plots': 1,
    'activations': 0.5,  # stands on pssilu alone
    'models': 1,
    'averaging': 0,
    'clock': 0,
    'distributed': 0,
    'watchdog': 0,
    'files': 0,
    'command_line': 0,
    'precision': 0,
    'folding': 0.5,
    'packing': 0,
    'pixels': 0,
    'logs': 1,
    'attacks': 1,
    'gradients': 1.5,
    'data': 1,
    'schedule': 0,
    'papers': 0,
    'recipe': 1.25,
    'recipe_flags': 1.5,
    'resuming': 1.5,
    'checkpoint': 1,
    'losses': 2,
    'honesty': 3.25,
    'cards': 2,
    'staging': 5,
    'model_files': 1.5,
    'awp': 2,
    'step': 3,
    'autoattack_state': 1,
    'autoattack_runner': 2,
    'autoattack': 3,
    'search': 3.5,
    'shape': 3.5,
    'run': 4,
    'validation': 4.25,
    'warmup': 4.27,
    'plan': 4.3,
    'engine': 4.5,
    'robustness': 3.75,
    'evaluate': 4,
    '__init__': 6,
}


def room(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix('.py')


def imports(path):
    """Rooms of this package that a file imports, at module level or inside functions."""
    depth = len(path.relative_to(PACKAGE).parts)
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            if node.level == depth:  # from . (or .. in a subpackage): the package itself
                yield from [node.module.split('.')[0]] if node.module else [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and (node.module or '').split('.')[0] == 'timm_robust':
            parts = node.module.split('.')
            yield from [parts[1]] if len(parts) > 1 else ['__init__']
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split('.')[0] == 'timm_robust':
                    yield [*alias.name.split('.'), '__init__'][1]


def test_every_room_has_a_floor():
    rooms = {room(path) for path in PACKAGE.rglob('*.py')}
    assert rooms == set(FLOORS)


def test_imports_go_down_only():
    wrong = []
    for path in PACKAGE.rglob('*.py'):
        here = room(path)
        for there in imports(path):
            if there == '__init__' and here in ('evaluate',):
                continue  # a command registers the models as its user would
            if there != here and there in FLOORS and FLOORS[there] >= FLOORS[here]:
                wrong.append(f'{here} (floor {FLOORS[here]}) imports {there} (floor {FLOORS[there]})')
    assert not wrong


def test_library_reads_no_argv_and_names_no_device():
    for path in PACKAGE.rglob('*.py'):
        text = path.read_text()
        assert '.cuda()' not in text, path
        if 'sys.argv' in text:
            assert '__main__' in text or 'def main' in text, path
