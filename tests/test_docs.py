"""README.md and docs/: notebooks and quick starts run; links, files, commands and settings exist."""

import ast
import dataclasses
import functools
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import runner
from conftest import ROOT, TINY_ARGS

from model import GPTConfig

SHAKESPEARE = Path(os.environ.get('SHAKESPEARE', ROOT / 'data/shakespeare_char/input.txt'))
NOTEBOOKS = [ROOT / 'docs/build_gpt.ipynb', ROOT / 'docs/sizing.ipynb']
QUICK_STARTS = [ROOT / f'docs/quickstart.{language}.md' for language in ('ko', 'pt', 'zh')]
PAGES = [ROOT / 'README.md', *sorted((ROOT / 'docs').glob('*.md'))]
LITTLE = {'train.py': [*TINY_ARGS, '--max_iters=4', '--eval_interval=2'],
          'sample.py': ['--num_samples=2', '--max_new_tokens=5', '--device=cpu']}


@pytest.fixture
def copy(tmp_path, monkeypatch):
    """A copy of the repository without data, and the working directory."""
    for path in [*ROOT.glob('*.py'), *ROOT.glob('data/*/prepare.py'), ROOT / 'README.md',
                 *(ROOT / folder for folder in ('config', 'docs', 'scripts', 'support'))]:
        target = tmp_path / 'repository' / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        (shutil.copytree if path.is_dir() else shutil.copy)(path, target)
    monkeypatch.chdir(tmp_path / 'repository')
    for name in ('path', 'excepthook', 'argv'):
        value = getattr(sys, name)
        monkeypatch.setattr(sys, name, [*value] if name == 'path' else value)
    return tmp_path / 'repository'


def cells(notebook, kind):
    return [cell for cell in json.loads(notebook.read_text(encoding='utf-8'))['cells']
            if cell['cell_type'] == kind]


def execute(notebook, n_cells=None):
    """Run the (first) code cells and the solutions folded between them, in order; gives their globals."""
    space = {'__name__': '__main__'}
    for cell in json.loads(notebook.read_text(encoding='utf-8'))['cells'][:n_cells]:
        source = ''.join(cell['source'])
        solutions = re.findall(r'^```python\n(.*?)^```', source, re.M | re.S)
        for code in [source] if cell['cell_type'] == 'code' else solutions:
            exec(compile(code, f'{notebook.name}, {cell["id"]}', 'exec'), space)
    return space


def use_shakespeare(folder, how):
    """Give the repository in `folder` Shakespeare's plays, prepared from somebody's copy or as input.txt."""
    if not SHAKESPEARE.exists():
        pytest.skip(f'{SHAKESPEARE} is not there')
    if how == 'prepared':
        runner.execute(folder / 'data/shakespeare_char/prepare.py', [f'--input={SHAKESPEARE}'])
    else:
        shutil.copy(SHAKESPEARE, folder / 'data/shakespeare_char/input.txt')


@pytest.mark.parametrize('text', ['standard library', 'prepared'])
def test_build_gpt_runs_on_either_text_and_ends_in_model_py(text, copy, monkeypatch):
    if text != 'standard library':
        use_shakespeare(copy, text)
    monkeypatch.setenv('MAX_ITERS', '2')
    pyplot = pytest.importorskip('matplotlib.pyplot')
    pyplot.switch_backend('agg')
    pictures = []
    monkeypatch.setattr(pyplot, 'show', lambda: (pictures.extend(pyplot.get_fignums()), pyplot.close('all')))
    with pyplot.rc_context():
        space = execute(copy / 'docs/build_gpt.ipynb')
    assert len(pictures) == 9
    results, solved = space['results'], {'sixteen heads', 'MLP without GELU', 'with dropout', 'without Muon'}
    assert {'bigram', 'GPT', 'GPT after 2019', 'the last model'} | solved <= set(results)
    assert all(loss < 10 for _, loss in results.values())
    assert (space['theirs'] - space['ours']).abs().max() < 1e-4
    assert space['gpt'].get_num_params(non_embedding=False) == space['results']['GPT'][0]
    if text != 'standard library':
        assert space['vocab_size'] == 65 and space['chars'] == space['shakespeare_chars']
        assert space['encode']('hi there') == [46, 47, 1, 58, 46, 43, 56, 43]


@pytest.mark.parametrize('how', ['prepared', 'input.txt'])
def test_build_gpt_reads_the_same_plays_prepared_or_downloaded(how, copy):
    use_shakespeare(copy, how)
    text = execute(copy / 'docs/build_gpt.ipynb', n_cells=4)['text']
    assert text == SHAKESPEARE.read_text(encoding='utf-8')


def test_sizing_s_formulas_hold_for_the_real_model(copy, monkeypatch):
    monkeypatch.setenv('MAX_ITERS', '2')
    space = execute(copy / 'docs/sizing.ipynb')  # it asserts them itself
    assert space['count'](12, 768, 1024, 50257, bias=True)['MLP'] == 12 * 8 * 768**2


@pytest.mark.parametrize('notebook', NOTEBOOKS, ids=lambda path: path.stem)
def test_stored_outputs_are_of_a_whole_run_and_name_no_machine(notebook):
    code = cells(notebook, 'code')
    outputs = [o for cell in code for o in cell['outputs']]
    assert [cell['execution_count'] for cell in code] == [*range(1, len(code) + 1)] and len(outputs) > 10
    assert not [o for o in outputs if o['output_type'] == 'error' or o.get('name') == 'stderr']
    assert not re.search(r'/(tmp|home|root|Users|work|usr)\b', json.dumps(outputs))


def commands(page):
    """The commands of a page's sh blocks, but for installing, which needs the network."""
    blocks = re.findall(r'^```sh\n(.*?)^```', page.read_text(encoding='utf-8'), re.M | re.S)
    lines = [shlex.split(line, comments=True) for block in blocks for line in block.splitlines()]
    return [line for line in lines
            if line and line[0] not in ('source', 'pip') and line[1:3] != ['-m', 'venv']]


@pytest.mark.parametrize('page', QUICK_STARTS, ids=lambda path: path.name)
def test_every_command_of_a_quick_start_runs(page, copy, monkeypatch, capsys):
    """The text in the page's language is the page."""
    found = commands(page)
    assert found[0] == ['python', 'data/text/prepare.py', 'my_text.txt', '--name=my_text', '--tokenizer=bpe']
    shutil.copy(page, 'my_text.txt')
    assert len(found) >= 6 and all(line[0] == 'python' for line in found)
    for _, script, *args in found:
        monkeypatch.setattr(sys, 'argv', [script, *args, *LITTLE.get(script, [])])
        capsys.readouterr()
        try:
            runpy.run_path(str(copy / script), run_name='__main__')
        except SystemExit as stop:  # --help
            assert not stop.code and '--help' in args
        assert capsys.readouterr().out
    for path in ('out-stdlib-char/ckpt.pt', 'out-my-text/ckpt.pt', 'data/my_text/tokenizer.json'):
        assert os.path.isfile(path)


def spans(page):
    """The page's inline code, each on one line."""
    text = re.sub(r'^```.*?^```', '', page.read_text(encoding='utf-8'), flags=re.M | re.S)
    return [' '.join(span.split()) for span in re.findall(r'`([^`]+)`', text)]


def anchors(page):
    """The names that GitHub gives to a page's headings."""
    headings = re.findall(r'^#+ (.*)', page.read_text(encoding='utf-8'), re.M)
    return {re.sub(r'[^\w -]', '', heading.lower()).replace(' ', '-') for heading in headings}


@functools.cache
def settings(script):
    """The names that a script binds before it calls configure, as its source states them, and GPTConfig's
    fields if it passes that."""
    names = settings('train.py') if script == 'scripts/plan.py' else set()  # which executes its settings
    for node in ast.parse((ROOT / script).read_text(encoding='utf-8')).body:
        calls = [n for n in ast.walk(node) if getattr(getattr(n, 'func', None), 'id', '') == 'configure']
        if calls:
            has_model = 'GPTConfig' in ast.unparse(calls[0])
            return names | {f.name for f in dataclasses.fields(GPTConfig) if has_model}
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


@pytest.mark.skipif(sys.platform != 'linux' or not shutil.which('make'), reason='needs make on Linux')
@pytest.mark.parametrize('gpu', ['', 'yes'])
def test_makefile_takes_pytorch_s_cpu_build_where_there_is_no_gpu(gpu, tmp_path):
    for name in ('Makefile', 'requirements.txt'):
        shutil.copy(ROOT / name, tmp_path)
    plan = subprocess.run(['make', '-n', 'demo', f'GPU={gpu}'], cwd=tmp_path, capture_output=True, text=True,
                          check=True).stdout
    installs = re.findall(r'-m pip install (.*)', plan)
    assert installs[-1] == '-r requirements.txt'
    assert ['whl/cpu torch==' in line for line in installs[:-1]] == ([] if gpu else [True])
    advice = [shlex.split(line) for line in re.findall(r"echo '    python (.*)'", plan)]
    assert [script for script, *_ in advice] == ['sample.py', 'data/text/prepare.py', 'train.py']
    for script, *args in advice:
        assert {a.partition('=')[0].removeprefix('--') for a in args if a[0] == '-'} <= settings(script)


def test_links_lead_somewhere():
    for page in PAGES:
        for link in re.findall(r'\]\((?!http)([^)]+)\)', page.read_text(encoding='utf-8')):
            path, _, anchor = link.partition('#')
            target = page.parent / path if path else page
            assert target.exists(), f'{page.name}: {link}'
            assert not anchor or anchor in anchors(target), f'{page.name}: {link}'


def test_readme_links_to_everything_in_docs_and_maps_each_script_and_each_folder():
    readme = (ROOT / 'README.md').read_text(encoding='utf-8')
    assert [page.name for page in [*PAGES[1:], *NOTEBOOKS] if f'(docs/{page.name})' not in readme] == []
    files = readme.split('## The files')[1]
    assert set(re.findall(r'`(\w+\.py)`', files)) >= {path.name for path in ROOT.glob('*.py')}
    folders = {path.parent.relative_to(ROOT).as_posix() for path in ROOT.glob('support/*/*.py')}
    assert set(re.findall(r'`(support/\w+)/`', files)) == folders


@pytest.mark.parametrize('page', PAGES, ids=lambda path: path.name)
def test_files_tests_scripts_configs_and_settings_that_a_page_names_exist(page):
    tests = ''.join(path.read_text(encoding='utf-8') for path in ROOT.glob('tests/*.py'))
    scripts = ['train.py', 'sample.py', 'eval.py', 'export.py', 'bench.py', 'plot.py', 'scripts/plan.py',
               *(path.relative_to(ROOT).as_posix() for path in ROOT.glob('data/*/prepare.py'))]
    known = set().union(*map(settings, scripts)) | {'help', 'nnodes', 'nproc_per_node', 'rdzv_endpoint'}
    placeholders = {'key', '이름', 'nome', '名称'}
    for span in spans(page):
        if re.fullmatch(r'test_\w+', span):
            assert f'def {span}(' in tests, span
        elif re.fullmatch(r'(?!out)[\w-]+/[\w./-]+\.(py|sh|md|ipynb)', span):
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
    if page.name == 'options.md':
        rows = re.findall(r'^\| (`.*?) \|', page.read_text(encoding='utf-8'), re.M)
        assert rows and set(re.findall(r'`(\w+)`', ''.join(rows))) <= settings('train.py')
