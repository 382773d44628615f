"""configurator.py: what a command line and a config file do to a script's settings."""

import ast
import contextlib
import importlib
import inspect
import io
import itertools
import os
import random
import re
import subprocess
import sys

import pytest
from conftest import ROOT

from configurator import configure
from model import GPTConfig
from support import errors
from support.settings import find_config

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
    return configure(script_globals, GPTConfig if script == 'train.py' else None, args=list(args))


def misspellings(name):
    """The names one edit away: a letter less, more, other, or two exchanged."""
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
    ('--batch_size=32', 32), ('--batch_size=-1', -1), ('--batch_size=1_000', 1000),
    ('--batch_size=0x10', 16), ('--batch_size=1e3', 1000), ('--learning_rate=1e-3', 1e-3),
    ('--learning_rate=1', 1.0), ('--bias=true', True), ('--bias=FALSE', False), ('--bias', True),
    ('--out_dir=out-here', 'out-here'), ('--out_dir="quoted"', 'quoted'), ('--out_dir=a~b', 'a~b'),
    ('--out_dir=~/runs/a', os.path.expanduser('~/runs/a')), ('--data_dir=', ''), ('--start=~', '~'),
    ('--start=1+1=', '1+1='), ('--start=--bias=True', '--bias=True'), ('--start=--help', '--help'),
    ('--start= two words ', ' two words '), ('--start=\n', '\n'), ('--start=2024', '2024'),
    ('--start=1e3', '1e3'), ('--start=007', '007'), ('--start=true', 'true'), ('--start=', ''),
    ('--start=[1, 2]', '[1, 2]'), ('--start={[]}', '{[]}'), ('--start=–5', '–5'), ('--start=\0', '\0'),
    ('--start=' + '(' * 1000, '(' * 1000), ('--start=' + '9' * 5000, '9' * 5000),
    ('--top_k=None', None), ('--top_k=5', 5), ('--compile=auto', 'auto'), ('--compile', True),
], ids=lambda value: str(value)[:30])
def test_value_arrives(argument, value):
    result = configured(argument)[argument[2:].partition('=')[0]]
    assert (type(result), result) == (type(value), value)


@pytest.mark.parametrize('text, key, value', [
    ('learning_rate = 1', 'learning_rate', 1.0), ('top_k = None', 'top_k', None),
    ('start = 7', 'start', '7'), ('compile = False', 'compile', False),
    ('batch_size: int = 3', 'batch_size', 3), ('start = "é"', 'start', 'é'),
    ('out_dir = "~/a"', 'out_dir', os.path.expanduser('~/a')),
    ('\ufeffbatch_size = 3', 'batch_size', 3),  # Windows' editors begin a file with this mark
    ('"""Text."""\n_size = 2\nbatch_size = _size * batch_size', 'batch_size', 24),
    ('learning_rate = batch_size', 'learning_rate', 12.0),
    ('out_dir = "out-" + os.path.join("a", "b")', 'out_dir', os.path.join('out-a', 'b')),
    ('def size():\n    return int(math.sqrt(np.float64(16)))\nbatch_size = size()', 'batch_size', 4),
    ('class Plan:\n    size = 3\nfrom math import pi\nbatch_size = Plan.size + int(pi)', 'batch_size', 6),
    ('bias = bool(time.time() > 0 and not torch.zeros(1).any())', 'bias', True),
])
def test_value_arrives_from_a_config_which_may_define_and_import_and_sees_what_nanogpt_s_does(
        text, key, value, tmp_path):
    result = configured(config_file(tmp_path, text))[key]
    assert (type(result), result) == (type(value), value)


def test_last_argument_wins_and_overrides_are_printed_once(tmp_path, capsys, monkeypatch):
    config = config_file(tmp_path, 'batch_size = 2  # a reason\n')
    for args, size in (((config, '--batch_size=1'), 1), (('--batch_size=1', config), 2),
                       (('--batch_size=1', '--batch_size=3'), 3)):
        assert configured(*args)['batch_size'] == size
    configure(dict(SETTINGS), args=[config, '--learning_rate=1'])
    assert capsys.readouterr().out == (
        f'Overriding config with {config}:\nbatch_size = 2  # a reason\n\n'
        'Overriding: learning_rate = 1.0\n')
    monkeypatch.setenv('RANK', '1')  # only the first process prints
    assert configure(dict(SETTINGS), args=['--batch_size=7'])['batch_size'] == 7
    assert capsys.readouterr().out == ''


@pytest.mark.parametrize('annotations', [{'__annotations__': {'compile': bool | str}},
                                         {'__annotate__': lambda form: {'compile': bool | str}}])
def test_annotations_say_the_types_in_old_and_new_pythons(annotations):
    for text, value in (('False', False), ('auto', 'auto')):
        found = configure({'compile': 'auto'} | annotations, args=[f'--compile={text}'])
        assert found == {'compile': value}


WHOLE, HYPHEN = 'batch_size must be a whole number, not ', 'is no hyphen'
SPACES = ', without spaces around "="'


@pytest.mark.parametrize('args, message', [
    # types
    (['--batch_size=1.5'], f'{WHOLE}1.5'), (['--batch_size=big'], f"{WHOLE}'big'"),
    (['--batch_size=True'], f'{WHOLE}True'), (['--batch_size='], f"{WHOLE}''"),
    (['--batch_size=None'], f'{WHOLE}None'), (['--batch_size={[]}'], WHOLE),
    (['--learning_rate=fast'], "learning_rate must be a number, not 'fast'"),
    (['--learning_rate=True'], 'learning_rate must be a number, not True'),
    (['--learning_rate=' + '9' * 400], 'learning_rate must be a number, not 999'),
    (['--bias=1'], 'bias must be True or False, not 1'),
    (['--bias=yes'], "bias must be True or False, not 'yes'"),
    (['--out_dir=None'], 'out_dir must be a string, not None'),
    (['--top_k=many'], "top_k must be a whole number or None, not 'many'"),
    (['--compile=None'], 'compile must be True or False or a string, not None'),
    (['CONFIG batch_size = "2"'], f"{WHOLE}'2'"),
    # names
    (['--bach_size=3'], 'Unknown config key: bach_size (did you mean batch_size?)'),
    (['--zzz=3'], 'Unknown config key: zzz (--help lists them all)'),
    *(([f'--{name}=3'], f'Unknown config key: {name}') for name in ('CONSTANT', '_private', 'helper')),
    *(([f'CONFIG batch_size = 4\n{line}'], f'Unknown config key: {key}') for line, key in [
        ('bach_size = 3', 'bach_size (did you mean batch_size?)'), ('anything = 1.5', 'anything'),
        ('for i in range(3): batch_size = i', 'i'), ('print = 3', 'print'), ('CONSTANT = 5', 'CONSTANT'),
        ('N = 3', 'N (--help lists them all) (in config_file.py; a name of the config\'s own begins with ')]),
    (['--config', 'a.py'], 'Unknown config key: config (name the config file by itself: '),
    # slips
    (['--batch_size'], '--batch_size needs a value: --batch_size=...'),
    (['--start', 'two words'], "--start needs a value: --start='two words'"),
    (['--out_dir', '--bias'], '--out_dir needs a value: --out_dir=...'),
    (['--batch_size', '=', '3'], f'write --batch_size=3{SPACES}'),
    (['--batch_size', '=3'], f'write --batch_size=3{SPACES}'),
    (['--batch_size=', '3'], f'write --batch_size=3{SPACES}'),
    (['--start', '=', 'two words'], f"write --start='two words'{SPACES}"),
    (['–-batch_size=3'], f'–-batch_size=3 begins with a dash that {HYPHEN}: write --batch_size=3'),
    (['--batch_size=–3'], f"{WHOLE}'–3': its dash {HYPHEN}, write -3"),
    (['--out_dir='], 'out_dir is empty; its default is out'),
    (['CONFIG out_dir = ""'], 'out_dir is empty; its default is out'),
    # no config
    (['config/eval_gtp2.py'], 'no config config/eval_gtp2.py (did you mean config/eval_gpt2.py or '),
    (['zzz'], 'no config zzz; settings are written --key=value'), (['x' * 300], 'no config xxx'),
    (['-batch_size=3'], 'no config -batch_size=3; settings are written --batch_size=3'),
    (['--bias', 'False'], 'no config False; settings are written --bias=False'),
    (['--start=', 'x'], 'no config x; settings are written --start=x'),
    (['--bias', 'config/no_such.py'], 'no config config/no_such.py'),
    (['out-run/ckpt.pt'], 'no config out-run/ckpt.pt; out-run is a folder: --out_dir=out-run'),
    (['my_text'], 'no config my_text; my_text is a folder: --data_dir=my_text'),
    (['CONFIG batch_size = size'], "config_file.py, line 1: name 'size' is not defined"),
], ids=lambda value: str(value)[:40])
def test_mistake_is_one_line_that_says_what_to_write(args, message, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for path in ('out-run/ckpt.pt', 'my_text/train.bin'):
        (tmp_path / path).parent.mkdir()
        (tmp_path / path).write_bytes(b'0')
    if args[0].startswith('CONFIG '):
        config_file(tmp_path, args[0].removeprefix('CONFIG '))
        args = ['config_file.py']
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        configured(*args)
    found = str(error.value)
    assert found.startswith(message) and '\n' not in found and len(found) < 450
    hinted = found.partition('did you mean ')[2]
    assert f'{args[-1]} ' not in hinted and f'{args[-1]}?' not in hinted


NAMES = [*SETTINGS, 'bach_size', 'N', '_own', 'print', 'é', '1']
VALUES = ['1', '"x"', 'None', 'True', '2.5', '[1]', 'out_dir', '1 +', '(', 'len', 'undefined', '10 ** 400',
          r'"\0"', 'lambda: 1', '{[]}', "b'x'", '...', '9' * 400, '\ud800']


@pytest.mark.parametrize('form', ['--{}={}', '{} = {}', '{}\n{}'])
def test_any_argument_or_config_is_refused_in_a_line_or_leaves_the_right_types(form, tmp_path):
    for name, value in itertools.product(NAMES, VALUES):
        script, arg = dict(SETTINGS), form.format(name, value)
        if form[0] != '-':
            arg = str(tmp_path / 'config.py')
            (tmp_path / 'config.py').write_bytes(form.format(name, value).encode('utf-8', 'surrogatepass'))
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                configure(script, args=[arg])
        except (errors.UserError, errors.MissingFile) as error:
            assert '\n' not in errors.in_one_line(error)
            continue
        except (TypeError, AttributeError):  # the config's own
            continue
        assert not [k for k in ('out_dir', 'batch_size', 'learning_rate', 'bias')
                    if type(script[k]) is not type(SETTINGS[k])]
        assert type(script['top_k']) in (int, type(None)) and type(script['compile']) in (bool, str)


def test_config_is_found_with_and_without_its_folder_and_ending_from_anywhere(monkeypatch,
                                                                              tmp_path):
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


def test_help_wins_over_mistakes_and_shows_the_values_of_the_other_arguments(run_script, tmp_path):
    config = config_file(tmp_path, 'num_samples = 3\ntemperature = 0.5')
    out = run_script('sample.py', config, 'no_such_config', '--help', '--no_such_key=1',
                     '--top_k=7').stdout
    assert 'num_samples=3 ' in out and 'temperature=0.5' in out and '  top_k=7 ' in out
    assert "start='\\n'" in out and 'FILE:path' in out and 'Overriding' not in out


def test_misspelt_setting_of_train_is_refused_with_the_right_name(tmp_path):
    names, (script, _) = configure_script('train.py'), settings_of('train.py')
    suggested = tried = 0
    for name, value in names.items():
        wrong = sorted(word for word in misspellings(name) - set(names)
                       if word.isidentifier() and word[0] != '_')
        for i, word in enumerate(random.Random(0).sample(wrong, 6)):
            arg = config_file(tmp_path, f'{word} = {value!r}') if i % 2 else f'--{word}={value}'
            with pytest.raises(ValueError, match=f'^Unknown config key: {word} ') as error, \
                    contextlib.redirect_stdout(io.StringIO()):
                configure(dict(script), GPTConfig, args=[arg])
            tried += 1
            suggested += re.search(f'(did you mean| or) {name}\\b', str(error.value)) is not None
    assert tried == 6 * len(names) > 300 and suggested > 0.97 * tried


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
    max: int = 3
    _own: int = 3
    layers: list = field(default_factory=list)
    unset: int = field(init=False, default=1)
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
    assert found == {'n_embd': 64, 'batch_size': 4, 'dropout': 1.0, 'window': 512,
                     'gate': 'sigmoid'}
    assert script['window'] == 512
    assert found.given == {'window', 'n_embd', 'batch_size', 'gate', 'dropout'}


@pytest.mark.parametrize('argument, message', [
    ('--window=all', "window must be a whole number or None, not 'all'"),
    *((f'--{name}', f'Unknown config key: {name.partition("=")[0]} ({hint}') for name, hint in [
        ('gat=sigmoid', 'did you mean gate?)'), ('pos_emb=rope', 'this model.py has no such option)'),
        ('use_rope=True', 'this model.py has no such option)'), ('vocab_size=65', 'taken from the data)'),
        ('torch=True', 'the script uses this name itself: set the default in '),
        ('max=4', 'the script uses this name itself: '), ('skip_spikes=3', 'removed)'),
        ('finetune_from=out', "removed: init_from takes the run's folder"), ('ema_decay=0.9', 'removed: ')]),
])
def test_model_s_settings_are_checked_and_missing_ones_are_explained(argument, message, with_model):
    with pytest.raises(ValueError) as error:
        with_model(argument)
    assert str(error.value).startswith(message)


def test_help_lists_the_model_s_settings_with_the_comments_of_its_file(with_model, tmp_path,
                                                                       capsys):
    script = config_file(tmp_path,
                         '"""A script."""\nn_embd = 64  # of the script\nbatch_size = 12', 's.py')
    with pytest.raises(SystemExit):
        with_model('--help', '--gate=sigmoid', __file__=script)
    own, theirs = capsys.readouterr().out.split('\n\nSettings of the model (their_model.py):\n')
    assert own.startswith('A script.\n\nSettings (--key=value):\n  n_embd=64')
    assert 'of the script' in own
    assert [' '.join(line.split()) for line in theirs.splitlines()] == [
        'dropout=0 of the model', 'window=None keys that a query sees',
        "gate='sigmoid' none, sigmoid"]


@pytest.mark.parametrize('text, given', [
    ('batch_size = 12', {'batch_size'}), ('batch_size: int = 12', {'batch_size'}),
    ('for batch_size in (1, 2): pass', {'batch_size'}),
    ('print([batch_size for batch_size in "ab"])', set()),
    ('def set_it():\n  global bias\n  bias = True\nset_it()', {'bias'}),
    ('if False:\n  bias = True', set()), ('def f():\n  bias = True', set()),
    ('from math import pi as _pi\nout_dir = str(_pi)', {'out_dir'}),
])
def test_given_are_the_settings_that_a_config_assigns_be_it_their_default(text, given, tmp_path):
    assert configured(config_file(tmp_path, text)).given == given


def test_config_is_utf8_whatever_the_locale_and_other_arguments_do_no_harm(tmp_path):
    config = config_file(tmp_path, 'start = "é日"  # café')
    done = run_small_script(tmp_path, config, PYTHONUTF8='0', LC_ALL='C', PYTHONCOERCECLOCALE='0')
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, ascii('é日')), done.stdout
    if os.name != 'nt':
        done = run_small_script(tmp_path, b'--start=\xff')
        assert (done.returncode, done.stdout.splitlines()[-1]) == (0, ascii('\udcff')), done.stdout
