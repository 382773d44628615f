"""configurator.py: what a command line and a config file do to a script's settings."""

import ast
import contextlib
import importlib
import inspect
import io
import os
import re
import subprocess
import sys

import pytest
from conftest import ROOT

from configurator import configure
from model import GPTConfig
from support.settings import find_config
from support.training.optim import OptimizerOptions

SETTINGS = {
    'out_dir': 'out', 'start': '\n', 'batch_size': 12, 'learning_rate': 6e-4, 'bias': False,
    'top_k': 200, 'compile': 'auto', 'data_dir': '',
    '__annotations__': {'top_k': int | None, 'compile': bool | str},
    '_private': 1, 'CONSTANT': 5, 'helper': print,
}
MACHINE = {'device', 'dtype', 'compile', 'backend'}  # what this machine does best
DEFAULTS = {  # as CONTRACT.md has them
    'train.py': """
        out_dir='out' eval_interval=2000 log_interval=1 eval_iters=200 eval_only=False
        always_save_checkpoint=True init_from='scratch' wandb_log=False wandb_project='owt'
        wandb_run_name='gpt2' dataset='openwebtext' gradient_accumulation_steps=40 batch_size=12
        block_size=1024 n_layer=12 n_head=12 n_embd=768 dropout=0.0 bias=False learning_rate=6e-4
        max_iters=600000 weight_decay=0.1 beta1=0.9 beta2=0.95 grad_clip=1.0 decay_lr=True
        warmup_iters=2000 lr_decay_iters=600000 min_lr=6e-5""",
    'sample.py': r"""
        init_from='resume' out_dir='out' start='\n' num_samples=10 max_new_tokens=500
        temperature=0.8 top_k=200 seed=1337""",
    'bench.py': 'batch_size=12 block_size=1024 bias=False real_data=True seed=1337 profile=False',
}


def configured(*args, **more):
    """The settings after `args`, nothing printed."""
    script = SETTINGS | more
    with contextlib.redirect_stdout(io.StringIO()):
        return configure(script, args=list(args))


def config_file(folder, text, name='config_file.py'):
    path = folder / name
    path.write_text(inspect.cleandoc(text) if '\n    ' in text else text, encoding='utf-8')
    return str(path)


def settings_of(script):
    """What a script's source states above its call of configure, and the lines that state it."""
    source = (ROOT / script).read_text(encoding='utf-8')
    above = re.split(r'^\S.*configure\(globals\(\)', source, maxsplit=1, flags=re.M)[0]
    script_globals = {'__file__': str(ROOT / script)}
    exec(compile(above, script, 'exec'), script_globals)
    lines = {line.partition(' ')[0].rstrip(':'): line for line in above.splitlines()
             if re.match(r'[a-z_0-9]+(: \S.*)? = ', line)}
    return script_globals, lines


def configure_script(script, *args):
    """The settings of one of our scripts after `args`."""
    script_globals, _ = settings_of(script)
    classes = (GPTConfig, [OptimizerOptions]) if script == 'train.py' else (None, ())
    return configure(script_globals, classes[0], args=list(args), more=classes[1])


def misspellings(name):
    """For scripts/soak.py: the names one edit away, a letter less, more, other, or two exchanged."""
    letters = 'abcdefghijklmnopqrstuvwxyz_'
    parts = [(name[:i], name[i:]) for i in range(len(name) + 1)]
    return {a + b[1:] for a, b in parts if b} | {a + c + b for a, b in parts for c in letters} \
        | {a + c + b[1:] for a, b in parts if b for c in letters} \
        | {a + b[1] + b[0] + b[2:] for a, b in parts if len(b) > 1}


def run_small_script(folder, *args, body='print(ascii(start))', **env):
    """A script with settings, run as a user runs it; its output in the order of a terminal."""
    path = folder / 'small_script.py'
    path.write_text(f'import sys\nsys.path.insert(0, {str(ROOT)!r})\n'
                    'from configurator import configure\n'
                    f'start = "x"\nbatch_size = 12\nconfigure(globals())\n{body}\n',
                    encoding='utf-8')
    return subprocess.run([sys.executable, path, *args], cwd=folder, env=os.environ | env,
                          timeout=60, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                          encoding='utf-8', stdin=subprocess.DEVNULL)


@pytest.mark.parametrize('argument, value', [
    ('--batch_size=32', 32), ('--batch_size=1e3', 1000), ('--learning_rate=1e-3', 1e-3),
    ('--learning_rate=1', 1.0), ('--bias=true', True), ('--bias', True), ('--out_dir="quoted"', 'quoted'),
    ('--out_dir=~/runs/a', os.path.expanduser('~/runs/a')), ('--data_dir=', ''), ('--start=1+1=', '1+1='),
    ('--start= two words ', ' two words '), ('--start=“–\xa0＝”', '“–\xa0＝”'), ('--start=2024', '2024'),
    ('--start=true', 'true'),
    ('--start={[]}', '{[]}'), ('--top_k=None', None), ('--compile=auto', 'auto'), ('--compile', True),
], ids=lambda value: str(value)[:30])
def test_value_arrives(argument, value):
    result = configured(argument)[argument[2:].partition('=')[0]]
    assert (type(result), result) == (type(value), value)


@pytest.mark.parametrize('text, key, value', [
    ('learning_rate = 1', 'learning_rate', 1.0), ('batch_size: int = 3', 'batch_size', 3),
    ('start = 7', 'start', '7'), ('\ufeffbatch_size = 3', 'batch_size', 3),  # as Windows' editors begin
    ('"""Text."""\n_size = 2\nbatch_size = _size * batch_size', 'batch_size', 24),
    ('def size():\n    return int(math.sqrt(np.float64(16)))\nbatch_size = size()', 'batch_size', 4),
    ('from math import pi\nbatch_size = int(pi)', 'batch_size', 3),
    ('bias = bool(time.time() > 0 and not torch.zeros(1).any())', 'bias', True),
])
def test_value_arrives_from_a_config_which_may_define_and_import(text, key, value, tmp_path):
    result = configured(config_file(tmp_path, text))[key]
    assert (type(result), result) == (type(value), value)


def test_last_argument_wins_and_overrides_are_printed_once(tmp_path, capsys):
    config = config_file(tmp_path, 'batch_size = 2  # a reason\n')
    for args, size in (((config, '--batch_size=1'), 1), (('--batch_size=1', config), 2),
                       (('--batch_size=1', '--batch_size=3'), 3)):
        assert configured(*args)['batch_size'] == size
    configure(dict(SETTINGS), args=[config, '--learning_rate=1'])
    assert capsys.readouterr().out == (
        f'Overriding config with {config}:\nbatch_size = 2  # a reason\n\n'
        'Overriding: learning_rate = 1.0\n')


WHOLE = 'batch_size must be a whole number, not '


@pytest.mark.parametrize('args, message', [
    (['--batch_size=1.5'], f'{WHOLE}1.5'), (['--batch_size=big'], f"{WHOLE}'big'"),
    (['--learning_rate=True'], 'learning_rate must be a number, not True'),
    (['--bias=1'], 'bias must be True or False, not 1'),
    (['--out_dir=None'], 'out_dir must be a string, not None'),
    (['--top_k=many'], "top_k must be a whole number or None, not 'many'"),
    (['CONFIG batch_size = "2"'], f"{WHOLE}'2'"),
    (['--bach_size=3'], 'Unknown config key: bach_size (did you mean batch_size?)'),
    (['--CONSTANT=3'], 'Unknown config key: CONSTANT'),
    *(([f'CONFIG batch_size = 4\n{line}'], f'Unknown config key: {key}') for line, key in [
        ('bach_size = 3', 'bach_size (did you mean '), ('for i in range(3): batch_size = i', 'i')]),
    (['--batch_size'], '--batch_size needs a value: --batch_size=...'),
    (['--batch_size', '=', '3'], 'write --batch_size=3, without spaces around "="'),
    *(([arg], f'{arg} has characters that only look like those of the keyboard: write --batch_size=3')
      for arg in ('–-batch_size=3', '-–batch_size=3', '—batch_size=3', '‐‐batch_size=3', '--batch_size＝3',
                  '--batch_size\xa0=3', '\u200b--batch_size=3', '“--batch_size=3')),
    *(([f'--batch_size={value}'], f'{WHOLE}{value!r}: write {meant}') for value, meant in (
        ('“3”', '3'), ('3\xa0', '3'), ('３', '3'), ('−3', '-3'), ('3\u200b', '3'))),
    (['--out_dir=~nobody_at_all/a'], 'out_dir=~nobody_at_all/a begins with ~, but there is no such user'),
    (['--out_dir='], 'out_dir is empty; its default is out'),
    (['config/eval_gtp2.py'], 'no config config/eval_gtp2.py (did you mean config/eval_gpt2.py or '),
    (['CONFIG import os\nout_dir = os.environ["NO_SUCH"]'], "config_file.py, line 2: KeyError: 'NO_SUCH'"),
    (['CONFIG batch_size = 1 // 0'], 'config_file.py, line 1: ZeroDivisionError: integer division'),
    (['CONFIG batch_size = size'], "config_file.py, line 1: name 'size' is not defined"),
], ids=lambda value: str(value)[:40])
def test_mistake_is_one_line_that_says_what_to_write(args, message, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    if args[0].startswith('CONFIG '):
        config_file(tmp_path, args[0].removeprefix('CONFIG '))
        args = ['config_file.py']
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        configured(*args)
    found = str(error.value)
    assert found.startswith(message) and '\n' not in found


def test_config_is_found_with_and_without_its_folder_and_ending_from_anywhere(monkeypatch, tmp_path):
    for folder in (ROOT, tmp_path):
        monkeypatch.chdir(folder)
        for name in ('train_gpt2', 'train_gpt2.py', 'config/train_gpt2', 'config/train_gpt2.py'):
            assert find_config(name).resolve() == ROOT / 'config/train_gpt2.py'
    (tmp_path / 'config').mkdir()
    config_file(tmp_path / 'config', 'batch_size = 99', 'mine.py')
    assert configured('mine')['batch_size'] == configured('config/mine.py')['batch_size'] == 99


@pytest.mark.parametrize('script', DEFAULTS)
def test_defaults_are_the_contract_s_and_help_lists_them_with_their_comments(script, capsys):
    found, lines = settings_of(script)
    for key, _, text in (part.partition('=') for part in DEFAULTS[script].split()):
        value = ast.literal_eval(text)
        assert (key, type(found[key]), found[key]) == (key, type(value), value)
    assert set(found) >= (MACHINE if script == 'train.py' else MACHINE - {'backend'})
    with pytest.raises(SystemExit) as exit_:
        configure_script(script, '--help')
    out = capsys.readouterr().out
    docstring = ast.get_docstring(ast.parse((ROOT / script).read_text(encoding='utf-8')))
    assert exit_.value.code == 0 and docstring in out
    for name, source in lines.items():
        line = next(line for line in out.splitlines() if line.startswith(f'  {name}='))
        assert line.startswith(f'  {name}={found[name]!r}')
        assert line.endswith(source.partition('  # ')[2])


MODEL = '''
from dataclasses import dataclass, field

@dataclass
class GPTConfig:
    vocab_size: int = 50304  # of the data
    n_embd: int = 768
    dropout: float = 0  # of the model
    window: int | None = None  # keys that a query sees
    gate: str = 'none'  # none, sigmoid
    torch: bool = False
    layers: list = field(default_factory=list)
'''


@pytest.fixture
def with_model(tmp_path, monkeypatch):
    """Runs configure with a model.py of somebody's own: the script's globals, the settings."""
    (tmp_path / 'their_model.py').write_text(MODEL)
    monkeypatch.syspath_prepend(tmp_path)
    config_class = importlib.import_module('their_model').GPTConfig

    def run(*args, **script):
        script = {'n_embd': 64, 'torch': ast, 'batch_size': 12} | script
        return script, configure(script, config_class, args=list(args))
    yield run
    del sys.modules['their_model']


def test_fields_of_the_model_are_settings_but_for_those_that_the_script_binds(with_model, tmp_path):
    script, found = with_model()
    assert found == {'n_embd': 64, 'batch_size': 12, 'dropout': 0, 'window': None, 'gate': 'none'}
    assert script['gate'] == 'none' and script['torch'] is ast and found.given == set()
    path = config_file(tmp_path, 'window = 8 * n_embd\nn_embd = 64  # the default\nbatch_size = 4')
    script, found = with_model(path, '--gate=sigmoid', '--dropout=1')
    assert found == {'n_embd': 64, 'batch_size': 4, 'dropout': 1.0, 'window': 512, 'gate': 'sigmoid'}
    assert script['window'] == 512 and found.given == {'window', 'n_embd', 'batch_size', 'gate', 'dropout'}


@pytest.mark.parametrize('text, given', [
    ('batch_size = 12', {'batch_size'}), ('print([batch_size for batch_size in "ab"])', set()),
    ('if False:\n  bias = True', set()),
    ('from math import pi as _pi\nout_dir = str(_pi)', {'out_dir'}),
])
def test_given_are_the_settings_that_a_config_assigns_be_it_their_default(text, given, tmp_path):
    assert configured(config_file(tmp_path, text)).given == given


def test_config_is_utf8_whatever_the_locale(tmp_path):
    config = config_file(tmp_path, 'start = "é日"  # café')
    done = run_small_script(tmp_path, config, PYTHONUTF8='0', LC_ALL='C', PYTHONCOERCECLOCALE='0')
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, ascii('é日')), done.stdout
