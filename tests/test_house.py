"""The house: what stands at the root, which way imports go, and that what one reads is what runs."""

import ast
import re

import pytest
import support
from conftest import ROOT

SCRIPTS = {'model.py', 'train.py', 'sample.py', 'bench.py', 'eval.py', 'export.py', 'plot.py',
           'configurator.py'}
LAUNCHED = sorted(path.relative_to(ROOT) for pattern in ('*.py', 'data/*/prepare.py', 'scripts/*.py')
                  for path in ROOT.glob(pattern) if path.name not in ('model.py', 'configurator.py'))
ROOMS = sorted(p.relative_to(ROOT) for p in (ROOT / 'support').rglob('*.py') if p.name != '__init__.py')
FLOORS = re.findall(r'^    (\w+)/ ', support.__doc__, re.M)  # from the highest to the lowest


def tree(path):
    return ast.parse((ROOT / path).read_text(encoding='utf-8'))


def imports_of(path):
    """Our modules that a file imports, as paths."""
    found = set()
    for node in ast.walk(tree(path)):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            names = [node.module, *(f'{node.module}.{a.name}' for a in node.names)]
        candidates = [ROOT / (name.replace('.', '/') + '.py') for name in names]
        found |= {c.relative_to(ROOT) for c in candidates if c.is_file()}
    return found


def test_root_has_the_scripts_and_model_imports_nothing_of_ours():
    assert {p.name for p in ROOT.glob('*.py')} == SCRIPTS
    assert imports_of('model.py') == set()


@pytest.mark.parametrize('room', [room for room in ROOMS if len(room.parts) == 3], ids=str)
def test_imports_go_down_only(room):
    wings = {other.parts[1] for other in imports_of(room) if len(other.parts) == 3}
    assert wings <= set(FLOORS[FLOORS.index(room.parts[1]):])
    assert {other.name for other in imports_of(room) if len(other.parts) == 1} <= {'model.py'}


def test_imports_have_no_circles():
    graph, left = {room: imports_of(room) for room in ROOMS}, set(ROOMS)
    while ready := {room for room in left if not graph[room] & left}:
        left -= ready
    assert not left


@pytest.mark.parametrize('path', [*LAUNCHED, *ROOMS], ids=str)
def test_nothing_is_put_in_the_place_of_a_model_s_methods(path):
    """And no error is swallowed but those of wandb."""
    for node in ast.walk(tree(path)):
        targets = getattr(node, 'targets', [getattr(node, 'target', None)])
        names = [t.attr for t in targets if isinstance(t, ast.Attribute)]
        assert not {'forward', 'loss', 'attend', '__class__'} & set(names), ast.unparse(node)
        if isinstance(node, ast.ExceptHandler) and path.name != 'log.py':
            assert ast.unparse(node.type) not in ('Exception', 'BaseException') or ends_in_raise(node)


def ends_in_raise(handler):
    return isinstance(handler.body[-1], ast.Raise)
