"""README.md and docs/: notebooks run; links, files, commands and settings exist."""

import ast
import dataclasses
import functools
import json
import re
import shlex
import shutil
import sys

import pytest
from conftest import ROOT

from model import GPTConfig
from support.training.optim import OptimizerOptions

PAGES = [ROOT / 'README.md', *sorted((ROOT / 'docs').glob('*.md'))]


@pytest.fixture
def copy(tmp_path, monkeypatch):
    """A copy of the repository without data, and the working directory."""
    for path in [*ROOT.glob('*.py'), *ROOT.glob('data/*/prepare.py'), ROOT / 'README.md',
                 *(ROOT / folder for folder in ('config', 'docs', 'scripts', 'support'))]:
        target = tmp_path / 'repository' / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        (shutil.copytree if path.is_dir() else shutil.copy)(path, target)
    monkeypatch.chdir(tmp_path / 'repository')
    monkeypatch.setattr(sys, 'path', [*sys.path])
    return tmp_path / 'repository'


def execute(notebook):
    """Run the code cells and the solutions folded between them, in order; gives their globals."""
    space = {'__name__': '__main__'}
    for cell in json.loads(notebook.read_text(encoding='utf-8'))['cells']:
        source = ''.join(cell['source'])
        solutions = re.findall(r'^```python\n(.*?)^```', source, re.M | re.S)
        for code in [source] if cell['cell_type'] == 'code' else solutions:
            exec(compile(code, f'{notebook.name}, {cell["id"]}', 'exec'), space)
    return space


def test_build_gpt_runs_and_ends_in_model_py(copy, monkeypatch):
    monkeypatch.setenv('MAX_ITERS', '2')
    pyplot = pytest.importorskip('matplotlib.pyplot')
    pyplot.switch_backend('agg')
    monkeypatch.setattr(pyplot, 'show', lambda: pyplot.close('all'))
    with pyplot.rc_context():
        space = execute(copy / 'docs/build_gpt.ipynb')
    assert all(loss < 10 for _, loss in space['results'].values())
    assert (space['theirs'] - space['ours']).abs().max() < 1e-4
    assert space['gpt'].get_num_params(non_embedding=False) == space['results']['GPT'][0]


def test_sizing_s_formulas_hold_for_the_real_model(copy, monkeypatch):
    monkeypatch.setenv('MAX_ITERS', '2')
    execute(copy / 'docs/sizing.ipynb')  # it asserts them itself


def spans(page):
    """The page's inline code, each on one line."""
    text = re.sub(r'^```.*?^```', '', page.read_text(encoding='utf-8'), flags=re.M | re.S)
    return [' '.join(span.split()) for span in re.findall(r'`([^`]+)`', text)]


@functools.cache
def settings(script):
    """The names that a script binds before it calls configure, as its source states them, and GPTConfig's
    fields if it passes that."""
    names = settings('train.py') if script == 'scripts/plan.py' else set()  # which executes its settings
    for node in ast.parse((ROOT / script).read_text(encoding='utf-8')).body:
        calls = [n for n in ast.walk(node) if getattr(getattr(n, 'func', None), 'id', '') == 'configure']
        if calls:
            call = ast.unparse(calls[0])
            kinds = [kind for kind in (GPTConfig, OptimizerOptions) if kind.__name__ in call]
            return names | {f.name for kind in kinds for f in dataclasses.fields(kind)}
        for target in getattr(node, 'targets', [getattr(node, 'target', None)]):
            names |= {name.id for name in ast.walk(target) if isinstance(name, ast.Name)} if target else set()
    raise AssertionError(f'{script} calls no configure')


def all_commands(page):
    """[(script, its arguments)] of the page's sh blocks and inline code."""
    blocks = re.findall(r'^```sh\n(.*?)^```', page.read_text(encoding='utf-8'), re.M | re.S)
    found = []
    for line in [*''.join(blocks).splitlines(), *spans(page)]:
        if line.startswith(('python ', 'torchrun ', 'sbatch ')):
            words = shlex.split(line.replace('scripts/slurm.sh', 'train.py'), comments=True)
            scripts = [i for i, word in enumerate(words) if word.endswith('.py')]
            if scripts and '-m' not in words:
                found.append((words[scripts[0]], words[scripts[0] + 1:]))
    return found


def test_links_lead_somewhere():
    for page in PAGES:
        for link in re.findall(r'\]\((?!http)([^)]+)\)', page.read_text(encoding='utf-8')):
            target = page.parent / link.partition('#')[0]
            assert target.exists(), f'{page.name}: {link}'


@pytest.mark.parametrize('page', PAGES, ids=lambda path: path.name)
def test_files_scripts_configs_and_settings_that_a_page_names_exist(page):
    scripts = ['train.py', 'sample.py', 'eval.py', 'export.py', 'bench.py', 'plot.py', 'scripts/plan.py',
               *(path.relative_to(ROOT).as_posix() for path in ROOT.glob('data/*/prepare.py'))]
    known = set().union(*map(settings, scripts)) | {'help', 'nnodes', 'nproc_per_node', 'rdzv_endpoint'}
    placeholders = {'key', '이름', 'nome', '名称'}
    for span in spans(page):
        if re.fullmatch(r'(?!out)[\w-]+/[\w./-]+\.(py|sh|md|ipynb)', span):
            assert (ROOT / span).exists() or (ROOT / 'support' / span).exists(), span
        for flag in re.findall(r'(?:^| )--([\w-]+)', span) if span.startswith('--') else []:
            assert flag in known | placeholders, f'--{flag}'
    for script, args in all_commands(page):
        assert (ROOT / script).exists(), script
        for arg in args:
            key = arg.partition('=')[0].removeprefix('--')
            if arg.startswith('--'):
                assert key == 'help' or key in settings(script), f'{script} {arg}'
            elif arg.startswith('config/') or script == 'train.py' and re.fullmatch(r'\w+', arg):
                assert (ROOT / arg).exists() or (ROOT / f'config/{arg}.py').exists(), f'{script} {arg}'
