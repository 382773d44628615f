"""docs/: the notebooks run, and the quick starts' commands do."""

import json
import os
import re
import runpy
import shlex
import shutil
import sys

import pytest
from conftest import ROOT, TINY_ARGS

SHAKESPEARE = ROOT.parent / 'shared/data/tinyshakespeare/input.txt'
NOTEBOOKS = [ROOT / 'docs/build_gpt.ipynb', ROOT / 'docs/sizing.ipynb']
QUICK_STARTS = [ROOT / f'docs/quickstart.{language}.md' for language in ('ko', 'pt', 'zh')]
LITTLE = {'train.py': [*TINY_ARGS, '--max_iters=4', '--eval_interval=2'],
          'sample.py': ['--num_samples=2', '--max_new_tokens=5', '--device=cpu']}


@pytest.fixture
def copy(tmp_path, monkeypatch):
    """A copy of the repository without data, and the working directory."""
    for path in [*ROOT.glob('*.py'), ROOT / 'README.md', ROOT / 'docs', ROOT / 'config',
                 *ROOT.glob('data/*.py'), *ROOT.glob('data/*/prepare.py')]:
        target = tmp_path / 'repository' / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        (shutil.copytree if path.is_dir() else shutil.copy)(path, target)
    monkeypatch.chdir(tmp_path / 'repository')
    monkeypatch.setattr(sys, 'path', list(sys.path))
    monkeypatch.setattr(sys, 'excepthook', sys.excepthook)
    return tmp_path / 'repository'


# ---------------------------------------------------------------------------- notebooks

def cells(notebook, kind):
    return [cell for cell in json.loads(notebook.read_text(encoding='utf-8'))['cells']
            if cell['cell_type'] == kind]


def execute(notebook):
    """Run the code cells one after the other; gives their globals."""
    space = {'__name__': '__main__'}
    for i, cell in enumerate(cells(notebook, 'code')):
        exec(compile(''.join(cell['source']), f'{notebook.name}, code cell {i}', 'exec'), space)
    return space


@pytest.mark.parametrize('text', ['standard library', 'Shakespeare'])
def test_build_gpt_runs_on_either_text_and_ends_in_model_py(text, copy, monkeypatch):
    if text == 'Shakespeare':
        if not SHAKESPEARE.exists():
            pytest.skip(f'{SHAKESPEARE} is not there')
        shutil.copy(SHAKESPEARE, copy / 'data/shakespeare_char/input.txt')
    monkeypatch.setenv('MAX_ITERS', '2')
    space = execute(copy / 'docs/build_gpt.ipynb')
    assert len(space['results']) == 9 and all(loss < 10 for _, loss in space['results'].values())
    assert (space['theirs'] - space['ours']).abs().max() < 1e-4
    assert space['gpt'].get_num_params(non_embedding=False) == space['results']['GPT'][0]
    if text == 'Shakespeare':
        assert space['vocab_size'] == 65 and space['chars'] == space['shakespeare_chars']
        assert space['encode']('hi there') == [46, 47, 1, 58, 46, 43, 56, 43]


def test_greeting_of_build_gpt_is_the_known_eight_numbers():
    stored = [''.join(o.get('data', {}).get('text/plain', '')) for cell in cells(NOTEBOOKS[0], 'code')
              for o in cell['outputs'] if 'shakespeare_chars' in ''.join(cell['source'])]
    assert stored == ['[46, 47, 1, 58, 46, 43, 56, 43]']


def test_sizing_s_formulas_hold_for_the_real_model(copy, monkeypatch):
    monkeypatch.setenv('BUDGET', '1e7')
    space = execute(copy / 'docs/sizing.ipynb')  # it asserts them itself
    assert space['count'](12, 768, 1024, 50257, bias=True)['MLP'] == 12 * 8 * 768**2


@pytest.mark.parametrize('notebook', NOTEBOOKS, ids=lambda path: path.stem)
def test_stored_outputs_are_of_a_whole_run_and_name_no_machine(notebook):
    outputs = [o for cell in cells(notebook, 'code') for o in cell['outputs']]
    assert [cell['execution_count'] for cell in cells(notebook, 'code')] == [
        i + 1 for i in range(len(cells(notebook, 'code')))]
    assert len(outputs) > 10 and {o['output_type'] for o in outputs} <= {'stream', 'execute_result'}
    assert not [o for o in outputs if o.get('name') == 'stderr']
    assert not re.search(r'/(tmp|home|root|Users|work|usr)\b', json.dumps(outputs))
    assert not any(cell['metadata'] for kind in ('code', 'markdown') for cell in cells(notebook, kind))
    assert notebook.stat().st_size < 300_000


# ---------------------------------------------------------------------------- quick starts

def commands(page):
    """The commands of a page's sh blocks, but for installing, which needs the network."""
    blocks = re.findall(r'^```sh\n(.*?)^```', page.read_text(encoding='utf-8'), re.M | re.S)
    lines = [shlex.split(line, comments=True) for block in blocks for line in block.splitlines()]
    return [line for line in lines
            if line and line[0] not in ('source', 'pip') and line[1:3] != ['-m', 'venv']]


@pytest.mark.parametrize('page', QUICK_STARTS, ids=lambda path: path.name)
def test_every_command_of_a_quick_start_runs(page, copy, monkeypatch, capsys):
    found = commands(page)
    assert len(found) >= 6 and all(line[0] == 'python' for line in found)
    for _, script, *args in found:
        monkeypatch.setattr(sys, 'argv', [script, *args, *LITTLE.get(script, [])])
        capsys.readouterr()
        try:
            runpy.run_path(str(copy / script), run_name='__main__')
        except SystemExit as stop:  # --help
            assert not stop.code and '--help' in args
        assert capsys.readouterr().out
    assert os.path.isfile('out-stdlib-char/ckpt.pt') and os.path.isfile('out-my-text/ckpt.pt')


def test_quick_starts_have_the_same_commands_but_for_the_page_they_read():
    pages = [[[word.replace(page.name, 'PAGE') for word in line] for line in commands(page)]
             for page in QUICK_STARTS]
    assert pages[0] == pages[1] == pages[2]


def test_readme_links_to_everything_in_docs_and_all_links_lead_somewhere():
    readme = (ROOT / 'README.md').read_text(encoding='utf-8')
    for page in [*NOTEBOOKS, *QUICK_STARTS]:
        assert f'(docs/{page.name})' in readme
    for page in [ROOT / 'README.md', *QUICK_STARTS]:
        for link in re.findall(r'\]\((?!http)([^)#]+)\)', page.read_text(encoding='utf-8')):
            assert (page.parent / link).exists(), f'{page.name}: {link}'
