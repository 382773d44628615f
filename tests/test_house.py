"""The house: what stands at the root, which way imports go, and the sizes that keep it readable."""

import ast
import re
import runpy
import subprocess
import sys

import pytest
from conftest import ROOT

SCRIPTS = {'model.py', 'train.py', 'sample.py', 'bench.py', 'eval.py', 'export.py', 'plot.py',
           'configurator.py'}
FLOORS = ('machine', 'text', 'network', 'hub', 'run')  # a wing imports from itself and from those before it
LAUNCHED = sorted(path.relative_to(ROOT) for pattern in ('*.py', 'data/*/prepare.py', 'scripts/*.py')
                  for path in ROOT.glob(pattern) if path.name not in ('model.py', 'configurator.py'))
OLD_MODULES = {'json', 'os', 'pathlib', 're', 'statistics', 'subprocess', 'sys', 'sysconfig'}  # in Python 3.6
ROOMS = sorted(p.relative_to(ROOT) for p in (ROOT / 'support').rglob('*.py') if p.name != '__init__.py')


def imports_of(path):
    """Our modules that a file imports, as paths."""
    found = set()
    for node in ast.walk(ast.parse((ROOT / path).read_text(encoding='utf-8'))):
        if isinstance(node, ast.Import):
            names = [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module, *(f'{node.module}.{a.name}' for a in node.names)]
        else:
            continue
        candidates = [ROOT / (name.replace('.', '/') + '.py') for name in names]
        found |= {c.relative_to(ROOT) for c in candidates if c.is_file()}
    return found


def test_root_has_the_scripts_and_no_other_python_file():
    assert {p.name for p in ROOT.glob('*.py')} == SCRIPTS


def test_model_imports_nothing_of_ours():
    assert imports_of('model.py') == set()


@pytest.mark.parametrize('room', ROOMS, ids=str)
def test_imports_go_down_only(room):
    floor = FLOORS.index(room.parts[1])
    for other in imports_of(room):
        if other.parts[0] == 'support':
            assert FLOORS.index(other.parts[1]) <= floor, f'{room} imports {other}'
        else:
            assert str(other) == 'model.py', f'{room} imports {other}'


def test_imports_have_no_circles():
    graph, left = {room: imports_of(room) for room in ROOMS}, set(ROOMS)
    while ready := {room for room in left if not graph[room] & left}:
        left -= ready
    assert not left


@pytest.mark.parametrize('path, most', [('model.py', 500), ('train.py', 430),
                                        *((str(room), 330) for room in ROOMS)])
def test_files_stay_short(path, most):
    assert len((ROOT / path).read_text(encoding='utf-8').splitlines()) <= most


@pytest.mark.parametrize('script', LAUNCHED, ids=str)
def test_script_says_in_one_line_what_its_python_lacks(script):
    source = (ROOT / script).read_text(encoding='utf-8')
    for path in (script, 'configurator.py', 'support/__init__.py'):  # they must parse before they can say it
        ast.parse((ROOT / path).read_text(encoding='utf-8'), feature_version=(3, 6))
    imports = re.findall(r'^(?:import|from) (\w+)', source, re.M)
    assert set(imports[:imports.index('configurator')]) <= OLD_MODULES
    if script.name == 'attention_study.py':
        return  # it needs no packages itself, and starts train.py
    bare = subprocess.run([sys.executable, '-S', script], cwd=ROOT, capture_output=True, text=True)
    assert bare.returncode and re.match(r'ModuleNotFoundError: No module named .*; (activate the environment|'
                                        'install it as README.md shows): ', bare.stderr), bare.stderr
    assert 'Traceback' not in bare.stderr and bare.stdout == ''


@pytest.mark.parametrize('version', ['3.6.15', '3.10.13'])
def test_old_python_is_told_in_one_line_how_to_go_on(version, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, 'version_info', tuple(map(int, version.split('.'))))
    monkeypatch.setattr(sys, 'version', f'{version} (default)')
    (tmp_path / 'support').mkdir()
    copy = tmp_path / 'support/__init__.py'
    copy.write_text((ROOT / 'support/__init__.py').read_text(encoding='utf-8'), encoding='utf-8')
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=rf'^Python {version} is too old, 3.11 or newer .*requirements.txt$'):
        runpy.run_path(str(copy))
    (tmp_path / '.venv').mkdir()
    with pytest.raises(SystemExit, match='activate the environment: .*.venv.*activate$') as told:
        runpy.run_path(str(copy))
    assert '\n' not in str(told.value)


def test_gpt2_is_complete_before_the_ruler():
    text = (ROOT / 'model.py').read_text(encoding='utf-8')
    gpt2, _, beyond = text.partition('# ' + '=' * 76 + ' Beyond GPT-2')
    assert beyond and len(gpt2.splitlines()) <= 280
    assert all(f'class {name}' in gpt2 for name in (
        'GPTConfig', 'LayerNorm', 'CausalSelfAttention', 'MLP', 'Block', 'KVCache', 'GPT'))


def test_settings_of_train_are_seventy_at_most_and_no_name_is_used_for_anything_else():
    tree = ast.parse((ROOT / 'train.py').read_text(encoding='utf-8'))
    nodes = [*ast.walk(tree)]
    bound = [node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)]
    imported = [a.asname or a.name for node in nodes if isinstance(node, (ast.Import, ast.ImportFrom))
                for a in node.names]
    top = [t.id for node in tree.body for t in getattr(node, 'targets', [getattr(node, 'target', None)])
           if isinstance(t, ast.Name)]
    settings = top[:top.index('config')]
    assert 50 < len(settings) <= 70
    assert all(bound.count(name) == 1 and name not in imported for name in settings)
