"""configurator.py: what a command line and a config file do to a script's settings."""

import ast
import contextlib
import importlib
import io
import os
import random
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from soak import misspellings

from configurator import configure
from support.machine import console
from support.settings import find_config
from support.text.tokenizer import GPT2Tokenizer

SETTINGS = {
    'out_dir': 'out', 'start': '\n', 'batch_size': 12, 'learning_rate': 6e-4, 'bias': False, 'top_k': 200,
    'compile': 'auto', '__annotations__': {'top_k': int | None, 'compile': bool | str},
    '_private': 1, 'CONSTANT': 5, 'helper': print,
}
SCRIPTS = ('train.py', 'sample.py', 'bench.py')
MACHINE = {'device', 'dtype', 'compile', 'backend'}  # what this machine does best

# CONTRACT.md, "Settings and defaults"
DEFAULTS = {
    'train.py': {
        'out_dir': 'out', 'eval_interval': 2000, 'log_interval': 1, 'eval_iters': 200, 'eval_only': False,
        'always_save_checkpoint': True, 'init_from': 'scratch', 'wandb_log': False, 'wandb_project': 'owt',
        'wandb_run_name': 'gpt2', 'dataset': 'openwebtext', 'gradient_accumulation_steps': 40,
        'batch_size': 12, 'block_size': 1024, 'n_layer': 12, 'n_head': 12, 'n_embd': 768, 'dropout': 0.0,
        'bias': False, 'learning_rate': 6e-4, 'max_iters': 600000, 'weight_decay': 0.1, 'beta1': 0.9,
        'beta2': 0.95, 'grad_clip': 1.0, 'decay_lr': True, 'warmup_iters': 2000, 'lr_decay_iters': 600000,
        'min_lr': 6e-5},
    'sample.py': {
        'init_from': 'resume', 'out_dir': 'out', 'start': '\n', 'num_samples': 10, 'max_new_tokens': 500,
        'temperature': 0.8, 'top_k': 200, 'seed': 1337},
    'bench.py': {
        'batch_size': 12, 'block_size': 1024, 'bias': False, 'real_data': True, 'seed': 1337,
        'profile': False},
}


def configured(*args, **more):
    """The settings after `args`, nothing printed."""
    script = SETTINGS | more
    with contextlib.redirect_stdout(io.StringIO()):
        configure(script, args=list(args))
    return script


def config_file(folder, text, name='config_file.py'):
    path = folder / name
    path.write_text(text, encoding='utf-8')
    return str(path)


def settings_of(script):
    """What a script's source states above its call of configure, and the lines that state it."""
    source = (ROOT / script).read_text(encoding='utf-8')
    script_globals = {'__file__': str(ROOT / script), '__doc__': ast.get_docstring(ast.parse(source))}
    lines = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign | ast.Expr) and ast.unparse(node).endswith('configure(globals())'):
            break
        if isinstance(node, ast.Assign | ast.AnnAssign):
            exec(compile(ast.Module([node], []), script, 'exec'), script_globals)
            lines[ast.unparse(node.target if isinstance(node, ast.AnnAssign) else node.targets[0])] = \
                source.splitlines()[node.lineno - 1]
    return script_globals, lines


def run_small_script(folder, *args, body='print(ascii(start))', **env):
    """A script with settings, run as a user runs it."""
    path = folder / 'small_script.py'
    path.write_text(f'import sys\nsys.path.insert(0, {str(ROOT)!r})\nfrom configurator import configure\n'
                    f'start = "x"\nbatch_size = 12\nconfigure(globals())\n{body}\n', encoding='utf-8')
    return subprocess.run([sys.executable, path, *args], cwd=folder, env=os.environ | env, timeout=60,
                          capture_output=True, text=True, encoding='utf-8', stdin=subprocess.DEVNULL)


# ---------------------------------------------------------------------------- the command line

def test_last_argument_wins(tmp_path):
    config = config_file(tmp_path, 'batch_size = 2')
    assert configured('--batch_size=1', config)['batch_size'] == 2
    assert configured(config, '--batch_size=1')['batch_size'] == 1
    assert configured('--batch_size=1', '--batch_size=3')['batch_size'] == 3


@pytest.mark.parametrize('argument, value', [
    ('--batch_size=32', 32),
    ('--batch_size=-1', -1),
    ('--batch_size=1_000', 1000),
    ('--batch_size=0x10', 16),
    ('--batch_size=1e3', 1000),
    ('--learning_rate=1e-3', 1e-3),
    ('--learning_rate=1', 1.0),
    ('--bias=True', True),
    ('--bias=true', True),
    ('--bias=FALSE', False),
    ('--bias', True),
    ('--out_dir=out-here', 'out-here'),
    ('--out_dir="quoted"', 'quoted'),
    ('--start=', ''),
    ('--start=1+1=', '1+1='),
    ('--start=--bias=True', '--bias=True'),
    ('--start=--help', '--help'),
    ('--start= two words ', ' two words '),
    ('--start=\n', '\n'),
    ('--start=2024', '2024'),
    ('--start=1e3', '1e3'),
    ('--start=007', '007'),
    ('--start=true', 'true'),
    ('--start=[1, 2]', '[1, 2]'),
    ('--start=日本語', '日本語'),
    ('--top_k=None', None),
    ('--top_k=5', 5),
    ('--compile=auto', 'auto'),
    ('--compile=False', False),
    ('--compile', True),
])
def test_value_arrives(argument, value):
    result = configured(argument)[argument[2:].partition('=')[0]]
    assert (type(result), result) == (type(value), value)


@pytest.mark.parametrize('argument, allowed', [
    ('--batch_size=1.5', 'a whole number'),
    ('--batch_size=big', 'a whole number'),
    ('--batch_size=True', 'a whole number'),
    ('--batch_size=', 'a whole number'),
    ('--batch_size=None', 'a whole number'),
    ('--learning_rate=fast', 'a number'),
    ('--learning_rate=True', 'a number'),
    ('--learning_rate=None', 'a number'),
    ('--bias=1', 'True or False'),
    ('--bias=yes', 'True or False'),
    ('--bias=None', 'True or False'),
    ('--out_dir=None', 'a string'),
    ('--top_k=many', 'a whole number or None'),
    ('--compile=None', 'True or False or a string'),
])
def test_wrong_type_is_refused_in_one_line_that_names_the_right_one(argument, allowed):
    with pytest.raises(ValueError) as error:
        configured(argument)
    assert f' must be {allowed}, not ' in str(error.value) and '\n' not in str(error.value)


@pytest.mark.parametrize('argument', ['--batch_size', '--learning_rate', '--out_dir', '--top_k'])
def test_bare_name_is_for_booleans(argument):
    with pytest.raises(ValueError, match=f'{argument}=...'):
        configured(argument)


@pytest.mark.parametrize('annotations', [{'__annotations__': {'compile': bool | str}},
                                         {'__annotate__': lambda form: {'compile': bool | str}}])
def test_annotations_tell_the_types_in_old_and_new_pythons(annotations):
    for text, value in (('False', False), ('auto', 'auto')):
        assert configure({'compile': 'auto'} | annotations, args=[f'--compile={text}']) == {'compile': value}


def test_unknown_key_is_refused_with_the_nearest_names():
    with pytest.raises(ValueError, match=r'^Unknown config key: bach_size \(did you mean batch_size\?\)$'):
        configured('--bach_size=3')
    with pytest.raises(ValueError, match=r'^Unknown config key: zzz \(--help'):
        configured('--zzz=3')


@pytest.mark.parametrize('name', ['CONSTANT', '_private', 'helper', '__annotations__'])
def test_constants_private_names_and_functions_are_no_settings(name, tmp_path):
    with pytest.raises(ValueError, match=f'Unknown config key: {name}'):
        configured(f'--{name}=3')
    assert set(configure(dict(SETTINGS), args=[])) == set(SETTINGS) - {
        '__annotations__', '_private', 'CONSTANT', 'helper'}


def test_configure_returns_the_settings_as_they_are_after_it(capsys):
    script = dict(SETTINGS)
    returned = configure(script, args=['--batch_size=7', '--top_k=None'])
    assert returned['batch_size'] == 7 and returned['top_k'] is None
    assert returned == {k: script[k] for k in returned}


@settings(deadline=None, max_examples=300)
@given(st.text())
@example('{[]}')
@example('{{}}')
@example('\0')
@example('(' * 1000)
@example('-' * 20000)
@example('9' * 5000)
@example("'" + 'x' * 100)
def test_any_text_reaches_a_string_setting_as_it_is_or_as_the_string_it_quotes(text):
    try:
        literal = ast.literal_eval(text)
    except (SyntaxError, ValueError, TypeError, MemoryError, RecursionError):
        literal = text
    assume(literal is not None)
    assert configured(f'--start={text}')['start'] == (literal if isinstance(literal, str) else text)


values = st.text(max_size=20) | st.integers().map(str) | st.floats().map(str) | st.sampled_from([
    '', 'None', 'true', 'False', '1j', '[]', '()', '{}', '{[]}', "b'x'", '...', 'x' * 300, '9' * 400])
arguments = values | st.builds('--{}={}'.format, st.sampled_from(sorted(SETTINGS)) | values, values)


@settings(deadline=None, max_examples=300)
@given(st.lists(arguments.filter(lambda a: a not in ('-h', '--help')), max_size=3))
def test_random_arguments_are_taken_or_refused_and_never_leave_a_wrong_type(args):
    script = dict(SETTINGS)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(ValueError, FileNotFoundError):
        configure(script, args=args)
    for key in ('out_dir', 'batch_size', 'learning_rate', 'bias'):
        assert type(script[key]) is type(SETTINGS[key])
    assert type(script['top_k']) in (int, type(None)) and type(script['compile']) in (bool, str)


@pytest.mark.parametrize('argument', ['--learning_rate=' + '9' * 400, '--batch_size={[]}', 'x' * 300])
def test_impossible_argument_is_refused(argument):
    with pytest.raises((ValueError, FileNotFoundError)):
        configured(argument)


def test_overrides_are_printed(tmp_path, capsys):
    path = config_file(tmp_path, 'batch_size = 2  # a reason\n')
    configure(dict(SETTINGS), args=[path, '--learning_rate=1'])
    out = capsys.readouterr().out
    assert f'Overriding config with {path}:\nbatch_size = 2  # a reason\n' in out
    assert out.endswith('Overriding: learning_rate = 1.0\n')


def test_only_the_first_process_prints(monkeypatch, capsys):
    monkeypatch.setenv('RANK', '1')
    script = dict(SETTINGS)
    configure(script, args=['--batch_size=7'])
    assert script['batch_size'] == 7 and capsys.readouterr().out == ''


# ---------------------------------------------------------------------------- config files

def test_config_may_import_define_and_compute(tmp_path):
    config = config_file(tmp_path, '''
"""A docstring."""
import math
import os.path
from functools import reduce as fold
from math import pi
_tokens = 2 ** 9

def rate(n):
    return 1 / n

class Plan:
    size = 3

batch_size = int(math.sqrt(_tokens * 2)) // 4 + Plan.size + fold(max, [0, 1]) + int(pi)
learning_rate = rate(8)
out_dir = os.path.join('a', 'b')
''')
    result = configured(config)
    assert (result['batch_size'], result['learning_rate']) == (15, 0.125)
    assert result['out_dir'] == os.path.join('a', 'b')


def test_config_reads_the_settings_as_they_stand(tmp_path):
    config = config_file(tmp_path, 'batch_size = 2 * batch_size\nlearning_rate = batch_size')
    result = configured('--batch_size=50', config)
    assert result['batch_size'] == 100
    assert (type(result['learning_rate']), result['learning_rate']) == (float, 100.0)


@pytest.mark.parametrize('text, key', [
    ('bach_size = 3', 'bach_size'), ('N = 3', 'N'), ('for i in range(3): batch_size = i', 'i'),
    ('anything = 1.5', 'anything'), ('rates = [1, 2]', 'rates'), ('print = 3', 'print'),
])
def test_unknown_key_in_a_config_is_refused_with_the_config_s_name(text, key, tmp_path):
    config = config_file(tmp_path, f'batch_size = 4\n{text}')
    with pytest.raises(ValueError, match=f'^Unknown config key: {key} .*config_file.py') as error:
        configured(config)
    assert '\n' not in str(error.value)


def test_unknown_key_in_a_config_gets_the_nearest_names(tmp_path):
    with pytest.raises(ValueError, match='did you mean batch_size'):
        configured(config_file(tmp_path, 'bach_size = 3'))


@pytest.mark.parametrize('text, allowed', [
    ('batch_size = 1.5', 'a whole number'), ('batch_size = "2"', 'a whole number'),
    ('bias = 1', 'True or False'),
    ('learning_rate = None', 'a number'), ('out_dir = None', 'a string'),
    ('top_k = "all"', 'a whole number or None'), ('batch_size = True', 'a whole number'),
])
def test_wrong_type_in_a_config_is_refused(text, allowed, tmp_path):
    with pytest.raises(ValueError, match=f' must be {allowed}, not '):
        configured(config_file(tmp_path, text))


@pytest.mark.parametrize('text, key, value', [
    ('learning_rate = 1', 'learning_rate', 1.0), ('top_k = None', 'top_k', None), ('start = 7', 'start', '7'),
    ('compile = False', 'compile', False), ('compile = "auto"', 'compile', 'auto'),
    ('batch_size: int = 3', 'batch_size', 3), ('start = "é"', 'start', 'é'),
    ('\ufeffbatch_size = 3', 'batch_size', 3),  # with the mark that Windows' editors begin a file with
])
def test_value_arrives_from_a_config(text, key, value, tmp_path):
    result = configured(config_file(tmp_path, text))[key]
    assert (type(result), result) == (type(value), value)


def test_config_is_found_by_its_bare_name_from_anywhere(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    script, _ = settings_of('train.py')
    with contextlib.redirect_stdout(io.StringIO()):
        configure(script, args=['eval_gpt2'])
    assert (script['init_from'], script['eval_only']) == ('gpt2', True)
    (tmp_path / 'config').mkdir()
    config_file(tmp_path / 'config', 'batch_size = 99', 'mine.py')
    assert configured('mine')['batch_size'] == 99
    assert configured('config/mine.py')['batch_size'] == 99


@pytest.mark.parametrize('name', ['train_gpt2', 'train_gpt2.py', 'config/train_gpt2', 'config/train_gpt2.py'])
def test_config_is_found_with_and_without_its_folder_and_ending(name, monkeypatch, tmp_path):
    for folder in (ROOT, tmp_path):
        monkeypatch.chdir(folder)
        assert find_config(name).resolve() == ROOT / 'config/train_gpt2.py'


@pytest.mark.parametrize('args, told', [
    (['config/eval_gtp2.py'], ' (did you mean config/eval_gpt2.py or '),
    (['confg/eval_gpt2.py'], ' (did you mean config/eval_gpt2.py or '),
    (['zzz'], '; settings are written --key=value'),
    (['-n', '3'], '; settings are written --key=value'),
    (['batch_size=3'], '; settings are written --batch_size=3'),
    (['-batch_size=3'], '; settings are written --batch_size=3'),
    (['--bias', 'False'], '; settings are written --bias=False'),
    (['--bias', 'config/no_such.py'], 'no config config/no_such.py'),
    (['out-run'], '; out-run is a folder: --out_dir=out-run'),
    (['out-run/ckpt.pt'], '; out-run is a folder: --out_dir=out-run'),
    (['my_text'], '; my_text is a folder'),
])
def test_argument_that_is_no_config_is_told_as_it_is_written(args, told, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for path in ('out-run/ckpt.pt', 'my_text/train.bin'):
        (tmp_path / path).parent.mkdir()
        (tmp_path / path).write_bytes(b'0')
    with pytest.raises(FileNotFoundError) as error:
        configured(*args)
    message = str(error.value)
    assert message.startswith('no config ') and told in message and len(message) < 200
    suggested = message.partition('did you mean ')[2]
    assert f'{args[-1]} ' not in suggested and f'{args[-1]}?' not in suggested
    if args == ['my_text']:
        with pytest.raises(FileNotFoundError, match='--data_dir=my_text$'):
            configured(*args, data_dir='')


@pytest.mark.parametrize('args, written', [
    (['--out_dir', 'out-run'], '--out_dir=out-run'), (['--start', 'two words'], "--start='two words'"),
    (['--out_dir', '--bias'], '--out_dir=...'), (['--out_dir'], '--out_dir=...'),
])
def test_setting_without_its_value_is_told_how_it_is_written(args, written):
    with pytest.raises(ValueError, match=f'needs a value: {written}$'):
        configured(*args)


@pytest.mark.parametrize('path', sorted((ROOT / 'config').glob('*.py')), ids=lambda p: p.stem)
def test_train_takes_every_config_of_the_repository(path):
    script, _ = settings_of('train.py')
    with contextlib.redirect_stdout(io.StringIO()):
        configure(script, args=[str(path)])


# ---------------------------------------------------------------------------- the scripts' settings

@pytest.mark.parametrize('script', SCRIPTS)
def test_defaults_are_the_contract_s(script):
    found, _ = settings_of(script)
    for key, value in DEFAULTS[script].items():
        assert (key, type(found[key]), found[key]) == (key, type(value), value)
    assert set(found) >= (MACHINE if script == 'train.py' else MACHINE - {'backend'})


@pytest.mark.parametrize('script', SCRIPTS)
def test_help_lists_every_setting_with_its_default_and_comment(script, capsys):
    script_globals, source_lines = settings_of(script)
    with pytest.raises(SystemExit) as exit_:
        configure(script_globals, args=['--help'])
    out = capsys.readouterr().out
    assert exit_.value.code == 0 and script_globals['__doc__'] in out
    assert len(source_lines) >= len(DEFAULTS[script])
    for name, source_line in source_lines.items():
        line = next(line for line in out.splitlines() if line.startswith(f'  {name}='))
        assert line.startswith(f'  {name}={script_globals[name]!r}')
        assert line.endswith(source_line.partition('  # ')[2])


def test_help_wins_over_everything_else_on_the_line(run_script):
    out = run_script('sample.py', 'no_such_config', '--help', '--no_such_key=1').stdout
    assert "start='\\n'" in out and 'the prompt, or FILE:path' in out


@pytest.mark.parametrize('place', ['command line', 'config'])
def test_misspelt_setting_of_train_is_refused_with_the_right_name(place, tmp_path):
    script, _ = settings_of('train.py')
    names, suggested, tried = configure(dict(script), args=[]), 0, 0
    for name, value in names.items():
        wrong = sorted(w for w in misspellings(name) - set(names) if w.isidentifier() and w[0] != '_')
        for word in random.Random(0).sample(wrong, 15):
            arg = f'--{word}={value}'
            if place == 'config':
                arg = config_file(tmp_path, f'{word} = {value!r}')
            with pytest.raises(ValueError, match=f'^Unknown config key: {word} ') as error, \
                    contextlib.redirect_stdout(io.StringIO()):
                configure(dict(script), args=[arg])
            tried += 1
            suggested += f'did you mean {name}' in str(error.value) or f' or {name}' in str(error.value)
    assert tried == 15 * len(names) > 500 and suggested > 0.98 * tried


def test_misspellings_are_the_names_one_edit_away():
    found = misspellings('ab')
    assert {'a', 'b', 'ba', 'cb', 'ac', 'abc', 'cab', 'acb', 'a_b', '_ab'} <= found and len(found) > 100
    assert not {'', 'abcd', 'cd'} & found


statements = st.builds('{} = {}'.format,
                       st.sampled_from([*SETTINGS, 'bach_size', 'N', '_own', 'print', 'é', '1']),
                       st.sampled_from(['1', '"x"', 'None', 'True', '2.5', '[1]', 'out_dir', '1 +', '(',
                                        'len', '1 / 0', 'undefined', '10 ** 400', r'"\0"', 'lambda: 1']))


@settings(deadline=None, max_examples=200)
@given(st.lists(statements | st.text(max_size=30), max_size=4))
def test_random_config_is_taken_or_refused_and_never_leaves_a_wrong_type(tmp_path_factory, lines):
    text = '\n'.join(lines)
    path = tmp_path_factory.getbasetemp() / 'random_config.py'
    path.write_bytes(text.encode('utf-8', 'surrogatepass'))
    script = dict(SETTINGS)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            configure(script, args=[str(path)])
    except (ValueError, FileNotFoundError) as error:
        assert '\n' not in str(error) or isinstance(error, UnicodeDecodeError)
        return
    except Exception as error:  # the config's own
        assert isinstance(error, SyntaxError | NameError | ZeroDivisionError | TypeError | AttributeError)
        return
    for key in ('out_dir', 'batch_size', 'learning_rate', 'bias'):
        assert type(script[key]) is type(SETTINGS[key])


# ---------------------------------------------------------------------------- the model's settings

MODEL = """
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
"""


@pytest.fixture
def with_model(tmp_path, monkeypatch):
    """Runs configure with a model.py of somebody's own: the script's globals, the settings."""
    config_file(tmp_path, MODEL, 'their_model.py')
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


@pytest.mark.parametrize('argument, message', [
    ('--window=all', "window must be a whole number or None, not 'all'"),
    ('--gat=sigmoid', 'Unknown config key: gat (did you mean gate?)'),
    ('--pos_emb=rope', 'Unknown config key: pos_emb (this model.py has no such option)'),
    ('--use_rope=True', 'Unknown config key: use_rope (this model.py has no such option)'),
    ('--torch=True', 'Unknown config key: torch (a field of the model whose name the script uses itself: '),
    ('--max=4', 'Unknown config key: max (a field of the model whose name the script uses itself: '),
    ('--vocab_size=65', 'Unknown config key: vocab_size (taken from the data)'),
    ('--finetune_from=out', "Unknown config key: finetune_from (removed: init_from takes the run's folder"),
    ('--ema_decay=0.9', 'Unknown config key: ema_decay (removed: '),
    ('--plan_gpus=8xH100', 'Unknown config key: plan_gpus (removed: see docs/SCALING.md)'),
    ('--cpu_offload=True', 'Unknown config key: cpu_offload (removed: '),
    ('--allow_changed_data', 'Unknown config key: allow_changed_data (removed: '),
    ('--skip_spikes=3', 'Unknown config key: skip_spikes (removed)'),
])
def test_model_s_settings_are_checked_and_missing_ones_are_explained(argument, message, with_model):
    with pytest.raises(ValueError) as error:
        with_model(argument)
    assert str(error.value).startswith(message)


def test_help_lists_the_model_s_settings_with_the_comments_of_its_file(with_model, tmp_path, capsys):
    script = config_file(tmp_path, '"""A script."""\nn_embd = 64  # of the script\nbatch_size = 12', 's.py')
    with pytest.raises(SystemExit):
        with_model('--help', __file__=script)
    own, theirs = capsys.readouterr().out.split('\n\nSettings of the model (their_model.py):\n')
    assert own.startswith('A script.\n\nSettings (--key=value):\n  n_embd=64') and 'of the script' in own
    assert [line.split('  # ')[0].split() for line in theirs.splitlines()] == [
        ['dropout=0', 'of', 'the', 'model'], ['window=None', 'keys', 'that', 'a', 'query', 'sees'],
        ["gate='none'", 'none,', 'sigmoid']]


def test_settings_can_be_saved_in_a_checkpoint_that_any_program_reads(tmp_path):
    found = configure(dict(SETTINGS), args=['--batch_size=3'])
    torch.save({'config': found}, tmp_path / 'ckpt.pt')
    read = torch.load(tmp_path / 'ckpt.pt', weights_only=True)['config']
    assert read == found and type(read).__module__ != type(found).__module__


@pytest.mark.parametrize('text, given', [
    ('batch_size = 12', {'batch_size'}), ('batch_size: int = 12', {'batch_size'}),
    ('for batch_size in (1, 2): pass', {'batch_size'}), ('print([batch_size for batch_size in "ab"])', set()),
    ('def set_it():\n    global bias\n    bias = True\nset_it()', {'bias'}),
    ('if False:\n    bias = True', set()), ('def f():\n    bias = True', set()),
    ('from math import pi as _pi\nout_dir = str(_pi)', {'out_dir'}),
])
def test_given_are_the_settings_that_a_config_assigns_be_it_their_default(text, given, tmp_path):
    with contextlib.redirect_stdout(io.StringIO()):
        assert configure(dict(SETTINGS), args=[config_file(tmp_path, text)]).given == given


# ---------------------------------------------------------------------------- what a user sees

@pytest.mark.parametrize('argument, line', [
    ('--bach_size=3', 'ValueError: Unknown config key: bach_size (did you mean batch_size?)'),
    ('--batch_size=x', "ValueError: batch_size must be a whole number, not 'x'"),
    ('--batch_size', 'ValueError: --batch_size needs a value: --batch_size=...'),
    ('wrong.py', 'ValueError: Unknown config key: N '),
    ('missing.py', 'FileNotFoundError: no config missing.py'),
])
def test_mistake_is_one_line_and_an_exit_status(argument, line, tmp_path):
    config_file(tmp_path, 'N = 3', 'wrong.py')
    done = run_small_script(tmp_path, argument)
    assert done.returncode != 0
    assert done.stderr.startswith(line) and done.stderr.count('\n') == 1


@pytest.mark.skipif(os.name == 'nt', reason='symbolic links need rights on Windows')
def test_mistake_is_one_line_where_the_repository_is_reached_through_a_link(tmp_path):
    (tmp_path / 'link').symlink_to(ROOT)
    done = subprocess.run([sys.executable, tmp_path / 'link' / 'data' / 'text' / 'prepare.py'],
                          capture_output=True, text=True, timeout=60)
    assert done.returncode != 0 and done.stderr.startswith('ValueError: name at least one')


@pytest.mark.parametrize('body, kind', [
    ('import numpy; from support.text import tokens\n'
     'tokens.read_windows(numpy.zeros(9), numpy.zeros((2, 3, 4)), 1)', 'ValueError'),
    ('from support.text import tokens\ntokens.check_split(None, "x", 1, 1)', 'TypeError'),
])
def test_error_that_nobody_foresaw_keeps_its_traceback(body, kind, tmp_path):
    done = run_small_script(tmp_path, body=body)
    assert done.returncode != 0
    assert done.stderr.startswith('Traceback') and f'\n{kind}: ' in done.stderr
    assert 'tokens.py' in done.stderr


def test_error_is_the_last_line_of_the_output(tmp_path):
    config_file(tmp_path, '# a long config\n' * 40 + 'batch_size = 3', 'long.py')
    script = tmp_path / 'script.py'
    script.write_text(f'import sys\nsys.path.insert(0, {str(ROOT)!r})\nfrom configurator import configure\n'
                      'batch_size = 1\nconfigure(globals())\nfrom support.machine.files import read_text\n'
                      'print("reading")\nread_text("nothing.txt")')
    done = subprocess.run([sys.executable, script, 'long.py'], cwd=tmp_path, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert done.stdout.count('# a long config') == 40
    assert done.stdout.endswith('\nreading\nFileNotFoundError: nothing.txt is missing\n')


@pytest.mark.parametrize('term, no_color, coloured', [('xterm', '', True), ('xterm', '1', False),
                                                      ('dumb', '', False), (None, '', False)])
def test_error_stands_out_on_a_terminal(term, no_color, coloured, monkeypatch, capsys):
    monkeypatch.setenv('TERM', term or 'xterm')
    monkeypatch.setenv('NO_COLOR', no_color)
    monkeypatch.setattr(console, 'line_is_live', True)
    monkeypatch.setattr(sys.stderr, 'isatty', lambda: term is not None, raising=False)
    try:
        find_config('zzz')
    except FileNotFoundError as error:
        console.show_error(FileNotFoundError, error, error.__traceback__)
    line = 'FileNotFoundError: no config zzz; settings are written --key=value'
    assert capsys.readouterr() == ('\n', f'\x1b[1;31m{line}\x1b[0m\n' if coloured else f'{line}\n')


def test_package_that_a_function_misses_is_one_line(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, 'tiktoken', None)
    try:
        GPT2Tokenizer().encode('a')
    except ModuleNotFoundError as error:
        console.show_error(ModuleNotFoundError, error, error.__traceback__)
    told = capsys.readouterr().err
    assert 'tiktoken' in told and sys.executable in told and told.count('\n') == 1


def test_config_is_utf8_whatever_the_locale(tmp_path):
    config = config_file(tmp_path, 'start = "é日"  # café')
    done = run_small_script(tmp_path, config, PYTHONUTF8='0', LC_ALL='C', PYTHONCOERCECLOCALE='0')
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == ascii('é日')


@pytest.mark.skipif(os.name == 'nt', reason='arguments are Unicode on Windows')
def test_argument_that_is_not_utf8_does_no_harm(tmp_path):
    done = run_small_script(tmp_path, b'--start=\xff')
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == ascii('\udcff')
